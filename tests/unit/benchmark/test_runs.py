"""The folder of a run: nothing is overwritten, nothing is lost, and it knows what is missing."""

from __future__ import annotations

import csv
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from test_figures import worked_run

from deploy_dsv3.benchmark.figures import CSV_COLUMNS, csv_row, row_figures
from deploy_dsv3.benchmark.plan import Plan, Row
from deploy_dsv3.benchmark.runs import RunFolder, unfinished_run
from deploy_dsv3.errors import LockedError, UsageError

ROWS = (Row(num_prompts=4, input_len=16, output_len=8), Row(num_prompts=4, input_len=16, output_len=32))
PLAN = Plan(profile="custom", rows=ROWS)


def make_run(path: Path, plan: Plan = PLAN) -> RunFolder:
    folder = RunFolder(path)
    folder.create(plan, {"base_url": "http://127.0.0.1:1"})
    return folder


def keep(folder: RunFolder, row: Row, **more: Any) -> None:
    figures = row_figures(worked_run())
    folder.requests_file(row).write_text('{"index": 0}\n')
    folder.keep(row, {"figures": figures.as_json(), **more}, csv_row(PLAN, row, "sharegpt", figures))


def test_a_row_is_stored_under_the_guides_name(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run")
    keep(folder, ROWS[0])
    assert sorted(path.name for path in folder.path.glob("api_n*")) == [
        "api_n4_in16_out8_dsv3.csv",
        "api_n4_in16_out8_dsv3.json",
        "api_n4_in16_out8_dsv3.requests.jsonl",
    ]
    with (folder.path / "api_n4_in16_out8_dsv3.csv").open(newline="") as file:
        reader = csv.DictReader(file)
        (line,) = reader
    assert tuple(reader.fieldnames or ()) == CSV_COLUMNS
    assert float(line["output_throughput"]) == pytest.approx(0.9)
    result = folder.result(ROWS[0])
    assert result is not None
    assert result.figures == row_figures(worked_run())
    assert [result.row for result in folder.results()] == [ROWS[0]]


def test_results_are_never_overwritten(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run")
    keep(folder, ROWS[0])
    before = {path: path.read_bytes() for path in folder.path.glob("*")}
    with pytest.raises(UsageError, match="exists already, and results are never overwritten"):
        keep(folder, ROWS[0], other=True)
    for path, content in before.items():
        if path.suffix in (".csv", ".json"):
            assert path.read_bytes() == content


def test_what_a_killed_attempt_left_is_put_aside(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run")
    for content in ("first\n", "second\n"):
        folder.requests_file(ROWS[0]).write_text(content)
        folder.clear_leftovers(ROWS[0])
    # Killed between the CSV and the JSON that makes it count.
    (folder.path / f"{ROWS[0].name}.csv").write_text("half a result")
    folder.clear_leftovers(ROWS[0])
    kept = {path.name: path.read_text() for path in (folder.path / "attempts").iterdir()}
    assert sorted(kept.values()) == ["first\n", "half a result", "second\n"]
    keep(folder, ROWS[0])
    assert folder.result(ROWS[0]) is not None


def test_attempts_are_kept_and_numbered(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run")
    for number in range(11):
        folder.requests_file(ROWS[1]).write_text("{}\n")
        folder.put_aside(ROWS[1], {"why": f"reason {number}"})
    assert [attempt["why"] for attempt in folder.attempts(ROWS[1])] == [f"reason {n}" for n in range(11)]
    assert len(list((folder.path / "attempts").glob("*.requests.jsonl"))) == 11
    assert folder.result(ROWS[1]) is None
    assert folder.attempts(ROWS[0]) == []


def test_the_same_plan_continues_and_another_is_refused(tmp_path: Path) -> None:
    make_run(tmp_path / "run")
    make_run(tmp_path / "run")
    with pytest.raises(UsageError, match="holds another run: seed 1 there, 2 asked for"):
        make_run(tmp_path / "run", replace(PLAN, seed=2))
    with pytest.raises(UsageError, match="rows api_n4_in16_out8_dsv3, api_n4_in16_out32_dsv3 there"):
        make_run(tmp_path / "run", replace(PLAN, rows=ROWS[:1]))


def test_a_folder_with_csvs_of_something_else_is_refused(tmp_path: Path) -> None:
    (tmp_path / "api_n10000_in2048_out1024_dsv3.csv").write_text("upstream's\n")
    with pytest.raises(UsageError, match="holds CSV files of something else"):
        make_run(tmp_path)


def test_a_folder_that_cannot_be_written_is_refused_before_anything_else(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="cannot write the results into /sys/kernel/benchmark") as refused:
        make_run(Path("/sys/kernel/benchmark"))
    assert "--output" in refused.value.remedy
    file = tmp_path / "file"
    file.write_text("")
    with pytest.raises(UsageError, match="cannot write the results"):
        make_run(file / "run")


def test_folders_that_hold_no_run_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no benchmark run in"):
        RunFolder(tmp_path).plan()
    (tmp_path / "run.json").write_text("{")
    with pytest.raises(UsageError, match="is not JSON"):
        RunFolder(tmp_path).plan()
    (tmp_path / "run.json").write_text('{"schema": 77}')
    with pytest.raises(UsageError, match="is not a run this version reads"):
        RunFolder(tmp_path).plan()
    (tmp_path / "run.json").write_text('{"schema": 1, "plan": {"schema": 1}}')
    with pytest.raises(UsageError, match="not a benchmark plan"):
        RunFolder(tmp_path).plan()


def test_a_row_that_cannot_be_read_is_told_not_measured_over(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run")
    (folder.path / f"{ROWS[0].name}.json").write_text('{"figures": {}}')
    with pytest.raises(UsageError, match="cannot be read as a row's result"):
        folder.result(ROWS[0])


def test_one_worker_at_a_time(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run")
    assert not folder.is_locked()
    with folder.lock():
        assert folder.is_locked()
        with pytest.raises(LockedError, match="another benchmark measures into"), folder.lock():
            pass
    assert not folder.is_locked()


def test_the_newest_unfinished_run_of_the_plan_is_found(tmp_path: Path) -> None:
    assert unfinished_run(tmp_path, PLAN) is None
    for name, day in (("old", "2026-01-01"), ("new", "2026-01-02"), ("done", "2026-01-03")):
        folder = make_run(tmp_path / name)
        record = json.loads((folder.path / "run.json").read_text())
        (folder.path / "run.json").write_text(json.dumps({**record, "created": f"{day}T00:00:00Z"}))
    make_run(tmp_path / "other", replace(PLAN, seed=9))
    (tmp_path / "foreign").mkdir()
    (tmp_path / "foreign" / "run.json").write_text("{")
    done = RunFolder(tmp_path / "done")
    for row in ROWS:
        keep(done, row)
    found = unfinished_run(tmp_path, PLAN)
    assert found is not None
    assert found.path.name == "new"
