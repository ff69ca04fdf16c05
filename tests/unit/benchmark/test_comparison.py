"""Two runs side by side: what is change, what is noise, and what cannot be compared."""

from __future__ import annotations

from dataclasses import asdict, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from test_figures import worked_run

from deploy_dsv3.benchmark.comparison import RowComparison, compare_runs, share_of
from deploy_dsv3.benchmark.figures import csv_row, row_figures
from deploy_dsv3.benchmark.plan import Plan, Published, Row
from deploy_dsv3.benchmark.runs import RunFolder

ROW = Row(
    num_prompts=4,
    input_len=16,
    output_len=8,
    published=Published(input_throughput=2, output_throughput=1.8, request_throughput=1),
)
PLAN = Plan(profile="custom", rows=(ROW,))


def measured(
    path: Path, *, seconds: float = 100, noise: float = 0.0, seed: int = 0, plan: Plan = PLAN, text: str = "sharegpt"
) -> RunFolder:
    """A run whose row took `seconds` for 10 000 tokens, at a rate that falls by half and jitters by `noise`."""
    folder = RunFolder(path)
    folder.create(plan, {"base_url": "http://127.0.0.1:1"})
    bins = 200
    rate = np.linspace(2, 1, bins) * np.random.RandomState(seed).normal(1, noise or 1e-9, bins).clip(0.1)
    events = np.floor(10_000 * rate / rate.sum()).astype(int).tolist()
    run = replace(worked_run(), duration=seconds)
    figures = row_figures(run)
    record: dict[str, Any] = {
        "figures": figures.as_json(),
        "plan": asdict(plan),
        "text": text,
        "timeline": {"bin_s": seconds / bins, "events": events},
    }
    folder.keep(plan.rows[0], record, csv_row(plan, plan.rows[0], text, figures))
    return folder


def only(before: RunFolder, after: RunFolder) -> RowComparison:
    (row,) = compare_runs(before, after)
    return row


def test_a_run_beside_itself_is_no_change(tmp_path: Path) -> None:
    row = only(measured(tmp_path / "a"), measured(tmp_path / "b"))
    assert (row.ratio, row.verdict) == (pytest.approx(1.0), "within noise")
    # Runs of other days differ by at least this much.
    assert (row.low, row.high) == (pytest.approx(1 / 1.01), pytest.approx(1.01))
    assert row.latency_ratios == {"ttft_ms": 1.0, "tpot_ms": 1.0, "itl_ms": 1.0, "e2e_ms": 1.0}


@pytest.mark.parametrize(("seconds", "verdict"), [(80, "faster"), (125, "slower"), (100.5, "within noise")])
def test_a_real_change_is_told_from_noise(tmp_path: Path, seconds: float, verdict: str) -> None:
    before = measured(tmp_path / "a", noise=0.05, seed=1)
    after = measured(tmp_path / "b", seconds=seconds, noise=0.05, seed=2)
    row = only(before, after)
    assert row.verdict == verdict
    assert row.ratio == pytest.approx(100 / seconds)
    assert row.low is not None
    assert row.high is not None
    assert row.low < 100 / seconds < row.high


def test_the_same_change_in_a_noisy_run_is_not_one(tmp_path: Path) -> None:
    before = measured(tmp_path / "a", noise=0.9, seed=1)
    row = only(before, measured(tmp_path / "b", seconds=95, noise=0.9, seed=2))
    assert row.verdict == "within noise"
    assert row.low is not None
    assert row.low < 0.95


def test_the_interval_holds_what_it_promises(tmp_path: Path) -> None:
    """Pairs of equal speed with 20 % jitter: the 95 % interval holds 1 in nearly all of 100."""
    runs = [measured(tmp_path / str(seed), noise=0.2, seed=seed) for seed in range(101)]
    holds = 0
    for before, after in pairwise(runs):
        row = only(before, after)
        assert row.low is not None
        assert row.high is not None
        holds += row.low < 1 < row.high
    assert holds >= 93


def test_runs_of_other_requests_do_not_compare(tmp_path: Path) -> None:
    first = measured(tmp_path / "a")
    other_seed = measured(tmp_path / "b", plan=replace(PLAN, seed=2))
    assert (only(first, other_seed).verdict, only(first, other_seed).why) == ("not comparable", "seed 1 and 2")
    other_text = only(first, measured(tmp_path / "c", text="synthetic"))
    assert (other_text.verdict, other_text.why) == ("not comparable", "text sharegpt and synthetic")
    held = replace(PLAN, rows=(replace(ROW, concurrency=2),))
    assert "in flight at most 0 and 2" in only(first, measured(tmp_path / "d", plan=held)).why


def test_rows_that_one_run_lacks_are_named(tmp_path: Path) -> None:
    empty = RunFolder(tmp_path / "empty")
    empty.create(replace(PLAN, rows=(ROW, replace(ROW, output_len=64))), {})
    rows = compare_runs(measured(tmp_path / "a"), empty)
    assert [(row.name, row.verdict, row.why) for row in rows] == [
        ("api_n4_in16_out8_dsv3", "missing", "not measured in the second run"),
        ("api_n4_in16_out64_dsv3", "missing", "not measured in both runs"),
    ]


def test_a_share_is_of_the_published_or_of_the_earlier_run(tmp_path: Path) -> None:
    slow = measured(tmp_path / "a", seconds=10).results()[0]
    fast = measured(tmp_path / "b", seconds=5).results()[0]
    assert slow.figures.output_throughput == pytest.approx(0.9)
    assert share_of(slow, None) == pytest.approx(0.5)
    assert share_of(slow, fast) == pytest.approx(0.5)
    assert share_of(replace(slow, row=replace(ROW, published=None)), None) is None
