"""Every failure points to a page that exists and speaks of it."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from deploy_dsv3 import runbook
from deploy_dsv3.causes import CAUSES
from deploy_dsv3.signatures import SIGNATURES

ROOT = Path(__file__).parents[2]


def anchors(page: str) -> set[str]:
    """The anchors of a page's headings, by GitHub's rule."""
    headings = re.findall(r"^#+ (.+)$", (ROOT / page).read_text(encoding="utf-8"), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


PAGES = {
    *(runbook.stage_page(stage) for stage in (*runbook.STAGES, "", "destroy")),
    *(cause.page for cause in CAUSES),
    *(signature.page for signature in SIGNATURES),
    runbook.FINDINGS,
    runbook.LOCK,
}


@pytest.mark.parametrize("page", sorted(PAGES))
def test_it_is_there(page: str) -> None:
    file, _, anchor = page.partition("#")
    assert (ROOT / file).is_file()
    assert not anchor or anchor in anchors(file)


def test_the_page_has_a_section_for_each_stage_and_cause_and_no_others() -> None:
    text = (ROOT / runbook.FAILED_RUNS).read_text(encoding="utf-8")
    stages = re.findall(r"^## (.+)$", text, flags=re.MULTILINE)
    assert stages == [*runbook.STAGES, "What keeps from a host"]
    assert re.findall(r"^### (.+)$", text, flags=re.MULTILINE) == [cause.code for cause in CAUSES]


@pytest.mark.parametrize("page", [runbook.FAILED_RUNS, runbook.LOG_LINES])
def test_links_within_the_runbooks_lead_somewhere(page: str) -> None:
    text = (ROOT / page).read_text(encoding="utf-8")
    for target in re.findall(r"\]\(([^)]+)\)", text):
        file, _, anchor = target.partition("#")
        found = (ROOT / page).parent / file if file else ROOT / page
        assert found.is_file(), target
        assert not anchor or anchor in anchors(str(found.resolve().relative_to(ROOT))), target
