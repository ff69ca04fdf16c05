"""The report: what it says of a run, and that it needs nothing but itself."""

from __future__ import annotations

import re
from array import array
from dataclasses import asdict, replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from deploy_dsv3.benchmark import page, plots
from deploy_dsv3.benchmark.client import Outcome, RowRun, Timeline
from deploy_dsv3.benchmark.figures import csv_row, row_figures
from deploy_dsv3.benchmark.plan import Plan, Row
from deploy_dsv3.benchmark.profiles import Wishes, find_profile, make_plan
from deploy_dsv3.benchmark.runs import RunFolder

PLAN = make_plan(find_profile("published"), Wishes())
ENVIRONMENT: dict[str, Any] = {
    "image": {"name": "openmmlab/lmdeploy:v0.18.0-cu12.8", "digest": "sha256:" + "ab" * 32},
    "versions": {"lmdeploy": "0.18.0", "ray": "2.60.0"},
    "serve_argv": ["lmdeploy", "serve", "api_server", "/data/models/DeepSeek-V3", "--tp", "16"],
    "layout": "TP16 on 2 nodes",
    "gpus": {"name": "NVIDIA H800", "per_node": {"gpu1": 8, "gpu2": 8}},
    "driver": "580.95.05",
    "nccl_transport": "RDMA over mlx5_0:1,mlx5_1:1",
    "max_batch_size": 1024,
    "in_flight": {},
}


def keep(folder: RunFolder, row: Row, *, output_throughput: float, plan: Plan = PLAN, **changes: Any) -> None:
    """Store a row that gave so many tokens a second, with one failed request among a thousand good ones."""
    good = [
        Outcome(n, 1026, 512, started=0.0, ttft=0.2 + n / 500, latency=8 + n / 100, counted_output_tokens=512)
        for n in range(1000)
    ]
    duration = 1000 * 512 / output_throughput
    events = [round(512_000 / 300 * (1.3 if n < 200 else 0.4)) for n in range(300)]
    run = RowRun(
        duration=duration,
        outcomes=[*good, *changes.pop("failed", [])],
        itls=array("f", [0.02, 0.03, 0.05] * 100),
        timeline=Timeline(bin_s=duration / 300, events=events),
    )
    record = {
        "row": asdict(row),
        "plan": asdict(plan),
        "text": "sharegpt",
        "model": "deepseek-ai/DeepSeek-V3",
        "where": "control",
        "started": "2026-11-24T06:00:00Z",
        "ended": "2026-11-24T07:00:00Z",
        "errors": [{"error": error, "count": count} for error, count in run.failures.most_common()],
        "timeline": asdict(run.timeline),
        "client": {"busy": 0.1},
        "environment": ENVIRONMENT,
        **changes,
    }
    figures = row_figures(run)
    folder.keep(row, {**record, "figures": figures.as_json()}, csv_row(plan, row, "sharegpt", figures))


def begin(path: Path, plan: Plan = PLAN) -> RunFolder:
    folder = RunFolder(path)
    folder.create(plan, {"base_url": "https://192.0.2.10:8000", "replica": "dsv3"})
    return folder


@pytest.fixture
def sweep(tmp_path: Path) -> RunFolder:
    """All six rows, at 99, 98, … 94 % of the published output throughput."""
    folder = begin(tmp_path / "run")
    for place, row in enumerate(PLAN.rows):
        assert row.published is not None
        keep(folder, row, output_throughput=row.published.output_throughput * (0.99 - place / 100))
    return folder


class Page(HTMLParser):
    """What of a page matters here: table cells by table, and everything that a browser would fetch."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.rows: dict[str, list[list[str]]] = {}
        self.fetched: list[str] = []
        self.tags: list[str] = []
        self._table = ""
        self._in_cell = False
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        found = dict(attrs)
        self.fetched += [str(found[name]) for name in ("src", "href", "data", "xlink:href") if name in found]
        if tag == "table":
            self._table = str(found["id"])
            self.rows[self._table] = []
        if tag == "tr":
            self.rows[self._table].append([])
        if tag == "td":
            self._in_cell = True
            self.rows[self._table][-1].append("")

    def handle_endtag(self, tag: str) -> None:
        if tag == "td":
            self._in_cell = False

    def handle_data(self, data: str) -> None:
        if self._in_cell:
            self.rows[self._table][-1][-1] += data


def test_the_table_has_published_measured_and_ratio_for_each_cell(sweep: RunFolder) -> None:
    html, markdown = page.render(sweep)
    rows = [row for row in Page(html).rows["rows"] if row]
    assert len(rows) == 6
    assert rows[0][:4] == ["1024", "10,000", "2048", "1024"]
    # 1743.56 published, 99 % of it measured; 1026 of input for each 512 of output.
    assert rows[0][7:10] == ["1,743.6", "1,726.1", "99 %"]
    assert rows[0][4:7] == ["3,489.5", "3,459.0", "99 %"]
    assert rows[5][7:10] == ["281.9", "265.0", "94 %"]
    assert "| 1024 | 10000 | 2048 | 1024 | 3,489.5, **3,459.0**, 99 %" in markdown
    assert "6 of 6 rows measured; the lowest is out 32,768 with 94 % of the published output." in markdown
    assert "Geometric mean: 96 %" in markdown


def test_it_says_what_was_measured(sweep: RunFolder) -> None:
    for text in page.render(sweep):
        for told in (
            "TP16 on 2 nodes",
            "8 + 8 × NVIDIA H800",
            "580.95.05",
            "RDMA over mlx5_0:1,mlx5_1:1, as configured",
            "sha256:abab",
            "lmdeploy 0.18.0, ray 2.60.0",
            "ShareGPT, cut or repeated to length",
            "2026-11-24T06:00:00Z",
        ):
            assert told in text


def test_it_needs_nothing_but_itself(sweep: RunFolder) -> None:
    html, _ = page.render(sweep)
    parsed = Page(html)
    assert parsed.fetched == []
    assert not {"script", "link", "img", "iframe", "object", "embed"} & set(parsed.tags)
    assert not re.search(r"@import|url\(|@font-face", html)
    assert parsed.tags.count("svg") == 6  # three pictures, wide and narrow


def test_rows_that_are_missing_or_failed_are_told_not_left_out(tmp_path: Path) -> None:
    folder = begin(tmp_path / "run")
    first, second, *_ = PLAN.rows
    failed = [Outcome(5000 + n, 10, 10, error="HTTP 500 <b>boom</b>") for n in range(7)]
    keep(folder, first, output_throughput=1000, failed=failed)
    folder.put_aside(second, {"why": "5000 of 10000 requests failed, most often (5000 times): HTTP 503"})
    html, markdown = page.render(folder)
    assert "7 of 10000 requests FAILED and are in no figure: 7 × HTTP 500 <b>boom</b>" in markdown
    assert "HTTP 500 &lt;b&gt;boom" in html
    assert "<b>boom" not in html
    assert "out 2,048: NOT COUNTED: 5000 of 10000 requests failed" in markdown
    assert "out 4,096, out 8,192, out 16,384, out 32,768: not measured" in markdown
    assert [row[8] for row in Page(html).rows["rows"] if row][1:] == ["–"] * 5


def test_what_keeps_a_row_from_its_face_value_is_told(tmp_path: Path) -> None:
    plan = make_plan(find_profile("published"), Wishes(num_prompts=1000, concurrency=160))
    folder = begin(tmp_path / "run", plan)
    row = plan.rows[4]
    environment = {**ENVIRONMENT, "in_flight": {row.name: "the endpoint takes 512 connections"}}
    keep(
        folder,
        row,
        output_throughput=900,
        plan=plan,
        text="synthetic-words",
        client={"busy": 0.93},
        environment=environment,
    )
    result = folder.result(row)
    assert result is not None
    counted = {**result.record["figures"], "counted_output_tokens": 500_000}
    (folder.path / f"{row.name}.json").unlink()
    folder.write_state(f"{row.name}.json", {**result.record, "figures": counted})
    html, markdown = page.render(folder)
    for told in (
        "1000 prompts, published with 2000: ramp and tail weigh more, so this does not compare",
        "at most 160 requests in flight (the endpoint takes 512 connections); upstream sends all at once",
        "measured with max batch size 1024; the row calls for 128",
        "the server counted 500,000 output tokens where 512,000 were asked for",
        "the load generator kept its core 93 % busy",
        "SYNTHETIC (not ShareGPT)",
    ):
        assert told in markdown
        assert told in html
    # 150 % of the published: but not of the same thing, so it is neither praised nor averaged.
    assert "1 of 6 rows measured, none as it was published: see the notes." in markdown
    assert "Geometric mean" not in markdown
    assert 'class="ratio "' in html


def test_rows_that_were_measured_under_other_releases_are_told_apart(tmp_path: Path) -> None:
    """Continued after the image was renewed, with the release changed for the last row."""
    folder = begin(tmp_path / "run")
    renewed = {**ENVIRONMENT, "image": {"name": "openmmlab/lmdeploy:v0.19.0-cu12.8", "digest": "sha256:" + "cd" * 32}}
    changed = {**renewed, "serve_argv": ["lmdeploy", "--max-batch-size", "128"], "max_batch_size": 128}
    first, second, *_, last = PLAN.rows
    keep(folder, first, output_throughput=1000)
    keep(folder, second, output_throughput=1000, environment=renewed, where="head")
    keep(folder, last, output_throughput=1000, environment={**changed, "release_changed": True})
    html, markdown = page.render(folder)
    for told in (
        f"Image: out 1,024: openmmlab/lmdeploy:v0.18.0-cu12.8 sha256:{'ab' * 32}; out 2,048, out 32,768: openmmlab",
        "Serving command: out 1,024, out 2,048: lmdeploy serve api_server /data/models/DeepSeek-V3 --tp 16; "
        "out 32,768: lmdeploy --max-batch-size 128",
        "Load from: out 1,024, out 32,768: the control machine; out 2,048: the head",
        "Driver: 580.95.05",
        "out 32,768: the release was changed to max batch size 128 for it",
    ):
        assert told in markdown
    assert "out 2,048, out 32,768: openmmlab/lmdeploy:v0.19.0-cu12.8" in html


def test_a_run_without_published_figures_has_no_empty_columns(tmp_path: Path) -> None:
    plan = make_plan(find_profile("smoke"), Wishes())
    folder = begin(tmp_path / "run", plan)
    keep(folder, plan.rows[0], output_throughput=500, plan=plan)
    html, markdown = page.render(folder)
    assert "ublished" not in re.sub(r"<style>.*?</style>|<svg.*?</svg>", "", html, flags=re.S)
    assert "| any | 64 | 128 | 64 | **1,002.0** | **500.0** | **0.977** |" in markdown


def test_an_empty_run_has_a_page_too(tmp_path: Path) -> None:
    html, markdown = page.render(begin(tmp_path / "run"))
    assert "0 of 6 rows measured." in markdown
    assert html.count("nothing measured") == 8  # four latencies, wide and narrow


def test_bars_are_as_long_as_they_say() -> None:
    svg = plots.throughput([plots.Bar(label="a", measured=50, published=100)], plots.WIDE)
    widths = {kind: float(width) for kind, width in re.findall(r'rect class="(\w+)".*?width="([\d.]+)"', svg)}
    assert widths["measured"] == pytest.approx(widths["published"] / 2, abs=0.1)
    assert "50 %" in svg


@pytest.mark.parametrize(("low", "high"), [(21, 45), (0.4, 90_000), (100, 100), (16.6, 17.7), (1e-3, 2e-3)])
def test_an_axis_holds_its_values_between_round_numbers(low: float, high: float) -> None:
    row = plots.LatencyRow(label="x", p50=low, p90=(low + high) / 2, p99=high)
    for width in (plots.WIDE, plots.NARROW):
        svg = plots.latencies([("t", [row])], width)
        lines = [float(x) for x in re.findall(r'class="grid" x1="([\d.]+)"', svg)]
        dots = [float(x) for x in re.findall(r'cx="([\d.]+)"', svg)]
        assert 2 <= len(lines) <= 6
        assert lines == sorted(set(lines))
        assert lines[0] - 0.1 <= min(dots) <= max(dots) <= lines[-1] + 0.1


def test_a_long_row_is_drawn_with_few_points() -> None:
    course = plots.Course(label="x", rates=[1.0] * 100_000, bin_s=1.0, mean=1.0, published=None)
    svg = plots.courses([course], plots.NARROW)
    assert svg.count(" L") < 500
    assert "1 d 3 h" in svg
    assert "nothing measured" in plots.courses([replace(course, rates=[])], plots.WIDE)
