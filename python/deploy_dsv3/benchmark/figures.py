"""The figures of a row, by upstream's formulas (`calculate_metrics` of its `profile_restful_api.py`).

Throughput is a sum over the requests that succeeded, divided by the wall time of the whole row. Input
counts the nominal prompt length and output the length asked for (with `ignore_eos` the same as what comes
back; the server's own counts are kept beside them). TPOT is (latency - TTFT) / (output tokens - 1), for
requests of more than one token. Two cases where upstream would write a number that nobody observed are left
out instead: a request that streamed no text has no TTFT and no TPOT (upstream: 0), and a row in which all
failed has no latencies (upstream: NaN).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from deploy_dsv3.benchmark.client import RowRun
from deploy_dsv3.benchmark.plan import Plan, Row

#: Upstream's CSV columns, in upstream's order.
CSV_COLUMNS = (
    "backend",
    "dataset_name",
    "sharegpt_output_len",
    "random_input_len",
    "random_output_len",
    "random_range_ratio",
    "request_rate",
    "completed",
    "total_input_tokens",
    "total_output_tokens",
    "duration",
    "request_throughput",
    "input_throughput",
    "output_throughput",
    "mean_e2e_latency_ms",
    "mean_ttft_ms",
    "mean_tpot_ms",
    "mean_itl_ms",
)


@dataclass(frozen=True, kw_only=True)
class Spread:
    """How one latency was spread over a row [ms]."""

    mean: float
    std: float
    p50: float
    p90: float
    p99: float
    count: int
    """Values behind it."""


@dataclass(frozen=True, kw_only=True)
class Figures:
    """What a row gave."""

    completed: int
    failed: int
    duration: float
    """[s]"""
    total_input_tokens: int
    total_output_tokens: int
    counted_input_tokens: int | None
    """The server's own count, where it gave one for every completed request."""
    counted_output_tokens: int | None
    request_throughput: float
    """[requests/s]"""
    input_throughput: float
    """[tokens/s]"""
    output_throughput: float
    """[tokens/s]"""
    ttft_ms: Spread | None
    tpot_ms: Spread | None
    itl_ms: Spread | None
    e2e_ms: Spread | None

    def as_json(self) -> dict[str, Any]:
        """Plain data; `figures_from_json` turns it back."""
        return asdict(self)


def figures_from_json(data: dict[str, Any]) -> Figures:
    """The figures that `Figures.as_json` wrote."""
    spreads = {name: Spread(**data[name]) if data[name] else None for name in data if name.endswith("_ms")}
    return Figures(**{**data, **spreads})


def row_figures(run: RowRun) -> Figures:
    """The figures of a row that ran; `run.itls` is reordered."""
    done = [outcome for outcome in run.outcomes if not outcome.error]
    total_input = sum(outcome.prompt_len for outcome in done)
    total_output = sum(outcome.asked_len for outcome in done)
    timed = [outcome for outcome in done if outcome.ttft is not None]
    tpots = [
        (outcome.latency - (outcome.ttft or 0.0)) / (outcome.asked_len - 1)
        for outcome in timed
        if outcome.asked_len > 1
    ]
    # A view on the array, not a copy: a row of the guide has up to forty million of these.
    itls = np.frombuffer(run.itls, dtype=np.float32) if run.itls else np.empty(0, np.float32)
    return Figures(
        completed=len(done),
        failed=len(run.outcomes) - len(done),
        duration=run.duration,
        total_input_tokens=total_input,
        total_output_tokens=total_output,
        counted_input_tokens=_sum_or_none([outcome.counted_prompt_tokens for outcome in done]),
        counted_output_tokens=_sum_or_none([outcome.counted_output_tokens for outcome in done]),
        request_throughput=len(done) / run.duration,
        input_throughput=total_input / run.duration,
        output_throughput=total_output / run.duration,
        ttft_ms=_spread(np.array([outcome.ttft for outcome in timed], dtype=np.float64)),
        tpot_ms=_spread(np.array(tpots, dtype=np.float64)),
        itl_ms=_spread(itls),
        e2e_ms=_spread(np.array([outcome.latency for outcome in done], dtype=np.float64)),
    )


def csv_row(plan: Plan, row: Row, text: str, figures: Figures) -> dict[str, Any]:
    """One line of upstream's CSV.

    `dataset_name` says `random-synthetic` where the text did not come from ShareGPT: such a row must not be
    taken for one of upstream's.
    """
    is_random = plan.dataset == "random"
    return {
        "backend": "lmdeploy",
        "dataset_name": "random-synthetic" if text.startswith("synthetic") else plan.dataset,
        "sharegpt_output_len": "" if is_random else row.output_len or "",
        "random_input_len": row.input_len if is_random else "",
        "random_output_len": row.output_len if is_random else "",
        "random_range_ratio": plan.range_ratio,
        "request_rate": plan.request_rate or "inf",
        "completed": figures.completed,
        "total_input_tokens": figures.total_input_tokens,
        "total_output_tokens": figures.total_output_tokens,
        "duration": figures.duration,
        "request_throughput": figures.request_throughput,
        "input_throughput": figures.input_throughput,
        "output_throughput": figures.output_throughput,
        "mean_e2e_latency_ms": _mean(figures.e2e_ms),
        "mean_ttft_ms": _mean(figures.ttft_ms),
        "mean_tpot_ms": _mean(figures.tpot_ms),
        "mean_itl_ms": _mean(figures.itl_ms),
    }


def _mean(spread: Spread | None) -> float | str:
    return spread.mean if spread else ""


def _sum_or_none(counts: Sequence[int | None]) -> int | None:
    known = [count for count in counts if count is not None]
    return sum(known) if known and len(known) == len(counts) else None


def _spread(seconds: NDArray[Any]) -> Spread | None:
    if not seconds.size:
        return None
    # float64 sums over the float32 array; percentiles last, as they sort the array where it lies.
    mean = float(seconds.mean(dtype=np.float64)) * 1000
    std = _std(seconds, mean / 1000) * 1000
    p50, p90, p99 = (float(value) * 1000 for value in np.percentile(seconds, (50, 90, 99), overwrite_input=True))
    return Spread(mean=mean, std=std, p50=p50, p90=p90, p99=p99, count=int(seconds.size))


def _std(seconds: NDArray[Any], mean: float, part: int = 1_000_000) -> float:
    """`np.std`, without its float64 copy of the whole array."""
    squares = sum(
        float(np.square(seconds[start : start + part].astype(np.float64) - mean).sum())
        for start in range(0, seconds.size, part)
    )
    return float(np.sqrt(squares / seconds.size))
