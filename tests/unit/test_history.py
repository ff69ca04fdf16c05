"""What is kept of a run, and how the runs of several heads are listed."""

from __future__ import annotations

import io

import pytest

from deploy_dsv3 import history, lock
from deploy_dsv3.events import Failure, HostFailed, HostStats, Outcome

MINE = lock.holder("20260102T030405Z-deploy-1a2b", "deploy")


def entry(exit_code: int, outcome: Outcome | None = None) -> dict[str, object]:
    return history.entry(
        MINE, started=1_767_323_045.67, seconds=61.23, exit_code=exit_code, plan="plan: 2 created", outcome=outcome
    )


def failed() -> Outcome:
    outcome = Outcome(hosts={"gpu-01": HostStats(ok=3, changed=2, failed=1)})
    failure = Failure(
        host="gpu-01",
        stage="ray",
        task="Wait",
        message="first cause\nand its echo",
        cause="a firewall",
        role="ray_cluster",
    )
    outcome.add(HostFailed(time=0, stage="ray", host="gpu-01", task="Wait", failure=failure))
    return outcome


@pytest.mark.parametrize(
    ("code", "result"), [(0, "done"), (4, "failed"), (7, "failed"), (130, "stopped"), (143, "stopped")]
)
def test_how_it_ended(code: int, result: str) -> None:
    kept = entry(code)
    assert (kept["result"], kept["exit_code"], kept["seconds"], kept["started"]) == (
        result,
        code,
        61.2,
        1_767_323_045.7,
    )


def test_a_failed_run_keeps_its_first_cause() -> None:
    kept = entry(4, failed())
    assert kept["failure"] == {
        "host": "gpu-01",
        "stage": "ray",
        "message": "first cause",
        "cause": "a firewall",
        "page": "",
    }
    assert kept["changed"] == {"gpu-01": 2}


def test_who_and_what() -> None:
    kept = entry(0)
    assert (kept["run"], kept["verb"], kept["who"], kept["plan"]) == (MINE.run, "deploy", MINE.who, "plan: 2 created")


def test_runs_of_several_heads_are_told_once_and_in_order() -> None:
    first = [{"run": "b", "started": 2}, {"run": "c", "started": 3}]
    second = [{"run": "a", "started": 1}, {"run": "b", "started": 2}]
    assert [run["run"] for run in history.merge([first, second])] == ["a", "b", "c"]


def shown(*runs: dict[str, object]) -> str:
    stream = io.StringIO()
    history.render(runs, stream)
    return stream.getvalue()


def test_the_list() -> None:
    text = shown(entry(0), entry(4, failed()))
    assert text.count(MINE.run) == 2 and "deploy" in MINE.run and "1m01s" in text
    assert "plan: 2 created" in text and "failed (4)" in text and "ray, gpu-01: first cause" in text


def test_an_empty_list_says_so() -> None:
    assert shown() == "no run is on record\n"


def test_lines_of_another_version_do_no_harm() -> None:
    assert "?" not in shown({"run": "x"}, {"started": "soon", "changed": [], "failure": "x", "seconds": None})
