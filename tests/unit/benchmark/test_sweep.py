"""Batch sizes, releases and supervision: what is decided before and around a row."""

from __future__ import annotations

import json
import signal
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
from counterpart import Server

from deploy_dsv3.benchmark import supervision, sweep
from deploy_dsv3.benchmark.display import duration, sentence
from deploy_dsv3.benchmark.estimate import estimate_rest
from deploy_dsv3.benchmark.plan import Plan
from deploy_dsv3.benchmark.profiles import Wishes, find_profile
from deploy_dsv3.benchmark.runs import RunFolder
from deploy_dsv3.benchmark.sweep import Request, Service
from deploy_dsv3.benchmark.target import Target
from deploy_dsv3.errors import HostError, InternalError, Interrupted, UnreachableError, UsageError, VerificationError

Serve = Callable[..., Server]


def request(folder: Path, **changes: Any) -> Request:
    asked = {"profile": "published", "rows": "4-5", "wishes": Wishes(num_prompts=2), "output": folder, "json": True}
    return Request(**{**asked, **changes})


def service(server: Server, **changes: Any) -> Service:
    server.behaviour.step_s = 0.0
    return Service(target=Target(base_url=server.url, max_batch_size=1024, batch_size_from="a test", **changes))


def test_a_batch_size_that_does_not_fit_stops_before_anything_is_sent(serve: Serve, tmp_path: Path) -> None:
    server = serve()
    with pytest.raises(UsageError, match="runs with max batch size 1024") as refused:
        sweep.run(request(tmp_path / "run"), service(server))
    assert "api_n2_in2048_out16384_dsv3 needs 128" in refused.value.message
    for choice in ("Nothing was measured", "--change-release", "--rows 4 measures those that fit", "--any-batch-size"):
        assert choice in refused.value.remedy
    assert server.seen.completions == 0
    assert not (tmp_path / "run").exists()


def test_the_batch_size_that_runs_is_measured_only_when_asked_for_and_marked(serve: Serve, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    result = sweep.run(request(folder, rows="5", any_batch_size=True), service(serve()))
    assert result.exit_code == 0
    told = (folder / "report.md").read_text()
    assert "measured with max batch size 1024; the row calls for 128" in told


@dataclass(frozen=True, kw_only=True)
class Redeployable(Service):
    """A service whose release changes at once, and says so; the inventory's own has batch size 1024."""

    changes: list[int | None] = field(default_factory=list)

    def is_inventorys_own(self) -> bool:
        return self.target.max_batch_size == 1024

    def redeployed(self, batch_size: int | None) -> Service:
        self.changes.append(batch_size)
        return replace(self, target=replace(self.target, max_batch_size=batch_size or 1024))

    def left_at(self, batch_size: int) -> Redeployable:
        """What a sweep finds after one that was killed before it put the release back."""
        return replace(self, target=replace(self.target, max_batch_size=batch_size))


def test_the_release_is_changed_for_the_rows_that_need_it_and_put_back(serve: Serve, tmp_path: Path) -> None:
    plain = service(serve())
    changing = Redeployable(target=plain.target)
    folder = tmp_path / "run"
    assert sweep.run(request(folder, change_release=True), changing).exit_code == 0
    assert changing.changes == [128, None]
    sizes = [result.record["environment"]["max_batch_size"] for result in RunFolder(folder).results()]
    assert sizes == [1024, 128]
    assert "the row calls for" not in (folder / "report.md").read_text()


def test_the_release_is_put_back_when_a_row_fails(serve: Serve, tmp_path: Path) -> None:
    server = serve(fail_every=2)  # every warm-up passes, every other request of a row fails
    changing = Redeployable(target=service(server).target)
    with pytest.raises(VerificationError, match="requests failed"):
        sweep.run(request(tmp_path / "run", rows="5", change_release=True), changing)
    assert changing.changes == [128, None]


def test_a_release_that_a_killed_sweep_left_changed_is_put_back_by_the_next(serve: Serve, tmp_path: Path) -> None:
    changing = Redeployable(target=service(serve()).target).left_at(128)
    asked = request(tmp_path / "run", rows="5", change_release=True)
    assert sweep.run(asked, changing).exit_code == 0
    assert changing.changes == [None], "row 5 fits what runs"
    assert sweep.run(asked, changing).exit_code == 0, "killed after the last row: nothing is left to measure"
    assert changing.changes == [None, None]


def test_a_sweep_whose_follower_was_killed_is_followed_and_goes_on(serve: Serve, tmp_path: Path) -> None:
    """The worker measures row 4 while nobody follows; the same command waits for it and does the rest."""
    server = serve()
    changing = Redeployable(target=service(server).target)
    folder = tmp_path / "run"
    begun = sweep.run(request(folder, rows="4", detach=True), changing)
    assert begun.document["detached"] is True
    assert sweep.run(request(folder, rows="4", detach=True), changing).exit_code == 0, "it runs already"
    assert sweep.run(request(folder, change_release=True), changing).exit_code == 0
    assert changing.changes == [128, None]
    assert [result.row.output_len for result in RunFolder(folder).results()] == [8192, 16384]
    assert server.seen.completions == 2 * (1 + 2), "each row once, with its warm-up"


def test_rows_under_another_release_count_for_the_end_of_the_sweep(serve: Serve, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    changing = Redeployable(target=service(serve(fail_every=2)).target)
    with pytest.raises(VerificationError):
        sweep.run(request(folder, change_release=True), changing)
    job = RunFolder(folder).state("job.json")
    assert (job["rows"], job["later"]) == (["api_n2_in2048_out8192_dsv3"], ["api_n2_in2048_out16384_dsv3"])


def test_a_sweep_that_nobody_follows_cannot_change_the_release(serve: Serve, tmp_path: Path) -> None:
    changing = Redeployable(target=service(serve()).target)
    with pytest.raises(UsageError, match="--detach cannot change the release"):
        sweep.run(request(tmp_path / "run", detach=True, change_release=True), changing)
    assert not (tmp_path / "run").exists()


def test_a_url_alone_has_no_release_to_change(serve: Serve, tmp_path: Path) -> None:
    server = serve()
    with pytest.raises(UsageError, match="changed through its inventory"):
        sweep.run(request(tmp_path / "run", change_release=True), service(server))
    assert server.seen.completions == 0


def test_a_held_row_says_why_in_its_result(serve: Serve, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    wishes = Wishes(num_prompts=3)
    asked = request(folder, rows="1", wishes=wishes)
    sweep.run(asked, service(serve(), max_connections=2))
    record = json.loads((folder / "api_n3_in2048_out1024_dsv3.json").read_text())
    assert record["row"]["concurrency"] == 1280
    assert "the endpoint takes 2 connections" in record["environment"]["in_flight"]["api_n3_in2048_out1024_dsv3"]
    # The operator's own wish is not second-guessed.
    own = request(tmp_path / "own", rows="1", wishes=Wishes(num_prompts=3, concurrency=0))
    sweep.run(own, service(serve(), max_connections=2))
    assert json.loads((tmp_path / "own" / "api_n3_in2048_out1024_dsv3.json").read_text())["row"]["concurrency"] == 0


@dataclass
class Scripted:
    """A worker that acts out a script: each look takes its next entry, an exception is raised."""

    script: list[Any]
    last: Mapping[str, Any] = field(default_factory=dict)
    look_every_s: float = 0.0
    stopped: bool = False
    collected: int = 0

    def start(self, api_key: str) -> None: ...

    def alive(self) -> bool:
        entry = self.script.pop(0)
        if isinstance(entry, Exception):
            raise entry
        return bool(entry)

    def progress(self) -> Mapping[str, Any]:
        return self.last

    def last_words(self) -> str:
        return "Killed"

    def stop(self) -> None:
        self.stopped = True

    def collect(self) -> None:
        self.collected += 1


def test_a_connection_that_is_lost_for_a_while_does_not_end_the_following() -> None:
    worker = Scripted([True, UnreachableError("gpu1: no route"), UnreachableError("gpu1: no route"), True, False])
    worker.last = {"state": "done"}
    shown: list[Mapping[str, Any]] = []
    assert supervision.follow(worker, shown.append) == {"state": "done"}
    assert [entry["state"] for entry in shown].count("not reached, trying again: gpu1: no route") == 2
    assert worker.collected == 1
    assert not worker.stopped


def test_a_connection_that_stays_lost_leaves_the_load_running(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(supervision, "_GIVE_UP_AFTER_S", -1.0)
    worker = Scripted([UnreachableError("gpu1: no route")])
    with pytest.raises(UnreachableError) as lost:
        supervision.follow(worker, lambda _: None)
    assert "the same command follows it again" in lost.value.remedy
    assert not worker.stopped


def test_a_signal_taken_while_looking_stops_the_worker() -> None:
    worker = Scripted([True, Interrupted(signal.SIGTERM), True])
    with pytest.raises(Interrupted) as stopped:
        supervision.follow(worker, lambda _: None)
    assert stopped.value.exit_code == 143
    assert worker.stopped
    assert worker.collected == 1


@pytest.mark.parametrize(
    ("code", "kind"),
    [
        (1, InternalError),
        (2, UsageError),
        (4, HostError),
        (5, VerificationError),
        (6, UnreachableError),
        (143, Interrupted),
    ],
)
def test_what_a_worker_wrote_down_becomes_its_error(code: int, kind: type[Exception]) -> None:
    last = {"state": "failed", "error": {"message": "m", "remedy": "r", "exit_code": code}}
    with pytest.raises(kind) as raised:
        supervision.follow(Scripted([False], last), lambda _: None)
    assert (raised.value.exit_code, raised.value.remedy) == (code, "r")  # type: ignore[attr-defined]


def test_a_worker_that_dies_without_a_word_is_told_with_its_last_ones() -> None:
    with pytest.raises(HostError, match="ended without a word: Killed"):
        supervision.follow(Scripted([True, False], {"state": "running"}), lambda _: None)


def test_the_end_is_estimated_from_published_speeds() -> None:
    plan = Plan(profile="published", rows=find_profile("published").rows)
    first, second, *_ = plan.rows
    # Half of the published speed, a quarter done: 3 840 000 tokens at 871.78/s are left.
    row_left, sweep_left = estimate_rest(plan, first, [second], events=1_280_000, total=5_120_000, rate=1743.56 / 2)
    assert row_left == pytest.approx(3_840_000 / 871.78, rel=1e-4)
    # The next row, 10 240 000 tokens, at half of its own published 1682.41/s.
    assert sweep_left == pytest.approx(3_840_000 / 871.78 + 10_240_000 / (1682.41 / 2), rel=1e-4)
    smoke = find_profile("smoke").rows
    assert estimate_rest(plan, smoke[0], [smoke[1]], events=10, total=20, rate=10)[1] == pytest.approx(1 + 409.6)
    assert estimate_rest(plan, first, [], events=0, total=5, rate=0) == (None, None)


def test_progress_is_one_sentence() -> None:
    assert sentence({"state": "preparing", "row": "r"}) == "r: preparing"
    warming = {"state": "warming up", "row": "r", "tokens": 300, "tokens_total": 16384}
    assert sentence(warming) == "r: warming up with one request, 300 of 16384 tokens"
    running = {"state": "running", "row": "r", "tokens": 50, "tokens_total": 200, "finished": 3, "requests": 9}
    running |= {"failed": 1, "in_flight": 6, "output_throughput": 812.4, "row_left_s": 30, "sweep_left_s": 4000}
    assert sentence(running) == (
        "r: 25 %, 3/9 requests, 1 FAILED, 6 in flight, 812 tok/s, row ends in 30 s, sweep in 1 h 7 min"
    )
    assert [duration(s) for s in (5, 600, 191_770)] == ["5 s", "10 min", "2 d 5 h"]
