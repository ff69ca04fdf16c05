"""Two runs side by side, and a run against its floor.

How sure a ratio is: with one seed both runs were asked the same requests in the same order, so each tenth of
a row's tokens is the same work in both. The spread of the ratio over the tenths (without the first and last,
which are ramp and tail) gives its 95 % interval, Student's t with 7 degrees of freedom. It tells noise within
a run; runs of other days differ by more, so no interval is narrower than one percent either way.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from itertools import accumulate
from typing import Any, Literal

import numpy as np

from deploy_dsv3.benchmark.runs import RowResult, RunFolder

Verdict = Literal["faster", "slower", "within noise", "not comparable", "missing"]

_TENTHS = 10
_STUDENT_T_95_7 = 2.365
_LEAST_NOISE = 0.01
_UNKNOWN_NOISE = 1.05
# Fewer bins of time than this say nothing about tenths.
_FEWEST_BINS = 20


@dataclass(frozen=True, kw_only=True)
class RowComparison:
    """One row of two runs."""

    name: str
    before: float | None
    """Output throughput [tokens/s]; None: not measured."""
    after: float | None
    verdict: Verdict
    why: str = ""
    ratio: float | None = None
    low: float | None = None
    """Lower end of the ratio's 95 % interval; None: the rows were too short to tell."""
    high: float | None = None
    latency_ratios: dict[str, float] | None = None
    """Median after / median before, for `ttft_ms`, `tpot_ms`, `itl_ms` and `e2e_ms`."""

    def as_json(self) -> dict[str, Any]:
        """Plain data."""
        return asdict(self)


def compare_runs(before: RunFolder, after: RunFolder) -> list[RowComparison]:
    """Every row that either run planned, in the order of the first.

    Raises:
        UsageError: one of the folders holds no run.
    """
    first, second = ({row.name: row for row in run.plan().rows} for run in (before, after))
    return [
        _compare(
            name,
            before.result(first[name]) if name in first else None,
            after.result(second[name]) if name in second else None,
        )
        for name in {**first, **second}
    ]


def share_of(result: RowResult, reference: RowResult | None) -> float | None:
    """Output throughput as a share of an earlier run's, or of the published; None where there is none."""
    if reference is not None:
        known = reference.figures.output_throughput
    elif result.row.published:
        known = result.row.published.output_throughput
    else:
        return None
    return result.figures.output_throughput / known if known else None


def _compare(name: str, before: RowResult | None, after: RowResult | None) -> RowComparison:
    known = RowComparison(
        name=name,
        before=before.figures.output_throughput if before else None,
        after=after.figures.output_throughput if after else None,
        verdict="missing",
    )
    if before is None or after is None:
        which = "both runs" if before is after else "the first run" if before is None else "the second run"
        return replace(known, why=f"not measured in {which}")
    if differences := _differences(before, after):
        return replace(known, verdict="not comparable", why="; ".join(differences))
    ratio = after.figures.output_throughput / before.figures.output_throughput
    noise = _noise(before.record["timeline"], after.record["timeline"])
    least, most = ratio / (noise or _UNKNOWN_NOISE), ratio * (noise or _UNKNOWN_NOISE)
    return replace(
        known,
        ratio=ratio,
        low=least if noise else None,
        high=most if noise else None,
        verdict="faster" if least > 1 else "slower" if most < 1 else "within noise",
        why="" if noise else "too short to tell noise from change: 5 % either way is taken as noise",
        latency_ratios=_latency_ratios(before, after),
    )


def _differences(before: RowResult, after: RowResult) -> list[str]:
    found = []
    for key in ("seed", "lengths", "range_ratio", "dataset", "request_rate"):
        a, b = before.record["plan"][key], after.record["plan"][key]
        if a != b:
            found.append(f"{key} {a} and {b}")
    if before.row.concurrency != after.row.concurrency:
        found.append(f"in flight at most {before.row.concurrency} and {after.row.concurrency}")
    if before.record["text"] != after.record["text"]:
        found.append(f"text {before.record['text']} and {after.record['text']}")
    return found


def _latency_ratios(before: RowResult, after: RowResult) -> dict[str, float]:
    ratios = {}
    for name in ("ttft_ms", "tpot_ms", "itl_ms", "e2e_ms"):
        a, b = getattr(before.figures, name), getattr(after.figures, name)
        if a and b and a.p50:
            ratios[name] = b.p50 / a.p50
    return ratios


def _noise(before: dict[str, Any], after: dict[str, Any]) -> float | None:
    """The factor by which the ratio is uncertain either way; None where the rows are too short."""
    tenths = [_tenths(timeline) for timeline in (before, after)]
    if any(not tenth for tenth in tenths):
        return None
    logs = [math.log(a / b) for a, b in zip(*tenths, strict=True)][1:-1]
    error = float(np.std(logs, ddof=1)) / math.sqrt(len(logs))
    return max(math.exp(_STUDENT_T_95_7 * error), 1 + _LEAST_NOISE)


def _tenths(timeline: dict[str, Any]) -> Sequence[float]:
    """How long each tenth of a row's tokens took [s]; empty where it was too short."""
    events: list[int] = timeline["events"]
    if len(events) < _FEWEST_BINS or not sum(events):
        return ()
    reached = np.array([0, *accumulate(events)], dtype=float) / sum(events)
    times = np.arange(len(events) + 1) * timeline["bin_s"]
    # Bins without tokens make plateaus; interpolation wants the curve without them.
    rising = np.concatenate(([True], np.diff(reached) > 0))
    marks = np.interp(np.linspace(0, 1, _TENTHS + 1), reached[rising], times[rising])
    durations = np.diff(marks)
    return tuple(durations.tolist()) if (durations > 0).all() else ()
