"""The report in a real browser, at desktop and telephone width."""

from __future__ import annotations

import html as html_module
import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
from test_page import PLAN, begin, keep

from deploy_dsv3.benchmark import page

pytestmark = pytest.mark.browser

_LOOK = """
const page = document.querySelector('iframe').contentDocument, view = page.defaultView;
const shown = element => view.getComputedStyle(element).display !== 'none';
const plots = [...page.querySelectorAll('svg.plot')].filter(shown);
const wider = [...page.querySelectorAll('body *')].filter(e => e.getBoundingClientRect().right > view.innerWidth + 0.5);
const texts = plots.flatMap(plot => [...plot.querySelectorAll('text')]);
return {
  width: view.innerWidth,
  scroll_width: page.documentElement.scrollWidth,
  wider: wider.map(e => e.tagName + '.' + (e.className.baseVal ?? e.className)),
  rows: page.querySelectorAll('#rows tbody tr').length,
  plots: plots.map(plot => [plot.classList[1], plot.getBoundingClientRect().height]),
  smallest_text: Math.min(...texts.map(t => parseFloat(view.getComputedStyle(t).fontSize)
    * t.ownerSVGElement.getBoundingClientRect().width / t.ownerSVGElement.viewBox.baseVal.width)),
  outside: texts.filter(t => { const box = t.getBBox(), area = t.ownerSVGElement.viewBox.baseVal;
    return box.x < -1 || box.x + box.width > area.width + 1 || box.y + box.height > area.height + 1; })
    .map(t => t.textContent),
  marks: page.querySelectorAll('svg.wide rect.measured').length,
  text: page.body.innerText,
  fetched: view.performance.getEntriesByType('resource').map(entry => entry.name),
};
"""


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = begin(tmp_path_factory.mktemp("page") / "run")
    for place, row in enumerate(PLAN.rows):
        assert row.published is not None
        keep(folder, row, output_throughput=row.published.output_throughput * (1.02 - place / 20))
    return page.render(folder)[0]


def look(report: str, width: int, folder: Path) -> dict[str, Any]:
    """What a browser makes of the page at a width, and what the page made it fetch."""
    browser = shutil.which("chromium") or shutil.which("chromium-browser")
    if browser is None:
        pytest.fail("no Chromium: `./dev test` installs it, or: apt-get install chromium")
    wrapper = folder / "wrapper.html"
    # A frame, because a headless window is never narrower than 500 px.
    wrapper.write_text(
        f'<iframe style="border:0;width:{width}px;height:4000px" srcdoc="{html_module.escape(report)}"></iframe>'
        f"<pre></pre><script>const look = () => {{{_LOOK}}};"
        "onload = () => { document.querySelector('pre').textContent = JSON.stringify(look()); };</script>",
        encoding="utf-8",
    )
    done = subprocess.run(
        [
            *(browser, "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"),
            *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
            *(f"--user-data-dir={folder / 'profile'}", f"--window-size={max(width, 500)},4000"),
            # The browser itself calls home, whatever page it shows.
            "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1",
            *("--virtual-time-budget=5000", "--dump-dom", wrapper.as_uri()),
        ],
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    found = re.search(r"<pre>(\{.*?\})</pre>", done.stdout, re.S)
    assert found, done.stdout[-2000:] + done.stderr[-2000:]
    seen: dict[str, Any] = json.loads(html_module.unescape(found[1]))
    return seen


@pytest.mark.parametrize("width", [390, 768, 900, 1440])
def test_the_page_fits_and_is_whole(report: str, width: int, tmp_path: Path) -> None:
    seen = look(report, width, tmp_path)
    assert seen["width"] == width
    assert seen["scroll_width"] <= width
    assert seen["wider"] == []
    assert seen["rows"] == 6
    assert seen["marks"] == 6
    assert [name for name, _ in seen["plots"]] == ["throughput", "course", "latency"]
    assert all(height > 150 for _, height in seen["plots"])
    assert seen["outside"] == []
    assert seen["smallest_text"] >= 10
    for told in ("1,778.4", "102 %", "77 %", "TP16 on 2 nodes"):
        assert told in seen["text"]
    assert seen["fetched"] == []


def test_the_look_would_see_what_it_looks_for(report: str, tmp_path: Path) -> None:
    """The same checks on a page that is too wide and fetches something: they must not be blind."""
    bad = report.replace("<main>", '<div style="width:2000px">x</div><img src="http://127.0.0.1:9/pixel.png"><main>', 1)
    seen = look(bad, 390, tmp_path)
    assert seen["scroll_width"] > 390
    assert seen["wider"]
    assert seen["fetched"] == ["http://127.0.0.1:9/pixel.png"]
