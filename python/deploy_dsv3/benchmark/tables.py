"""Results and comparisons as tables in a terminal."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TextIO

from rich.console import Console
from rich.table import Table
from rich.text import Text

from deploy_dsv3.benchmark.comparison import RowComparison
from deploy_dsv3.benchmark.runs import RowResult

_STYLES = {"faster": "green", "slower": "red", "not comparable": "yellow", "missing": "yellow"}
# A pipe has no width; a table there takes what it needs.
_PIPE_WIDTH = 200


def results_table(results: Sequence[RowResult], shares: Mapping[str, float | None], stream: TextIO) -> None:
    """One line a row: throughput, its share of the reference, latencies, failures."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("row", no_wrap=True)
    for title in ("input tok/s", "output tok/s", "req/s", "share", "TTFT p50", "TPOT p50", "failed"):
        table.add_column(title, justify="right", no_wrap=True)
    for result in results:
        figures, share = result.figures, shares.get(result.row.name)
        table.add_row(
            result.row.name,
            f"{figures.input_throughput:,.2f}",
            f"{figures.output_throughput:,.2f}",
            f"{figures.request_throughput:.3g}",
            "" if share is None else f"{share:.1%}",
            _milliseconds(figures.ttft_ms.p50 if figures.ttft_ms else None),
            _milliseconds(figures.tpot_ms.p50 if figures.tpot_ms else None),
            Text(str(figures.failed), style="red" if figures.failed else ""),
        )
    _print(table, stream)


def comparison_table(rows: Sequence[RowComparison], stream: TextIO) -> None:
    """One line a row: both throughputs, their ratio with its interval, and the verdict."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("row", no_wrap=True)
    for title in ("before tok/s", "after tok/s", "ratio", "95 % interval", "TTFT", "TPOT"):
        table.add_column(title, justify="right", no_wrap=True)
    table.add_column("verdict")
    for row in rows:
        latency = row.latency_ratios or {}
        verdict = f"{row.verdict} ({row.why})" if row.why else row.verdict
        table.add_row(
            row.name,
            "–" if row.before is None else f"{row.before:,.2f}",
            "–" if row.after is None else f"{row.after:,.2f}",
            "–" if row.ratio is None else f"{row.ratio:.3f}",
            "–" if row.low is None or row.high is None else f"{row.low:.3f} to {row.high:.3f}",
            _ratio(latency.get("ttft_ms")),
            _ratio(latency.get("tpot_ms")),
            Text(verdict, style=_STYLES.get(row.verdict, "")),
        )
    _print(table, stream)


def _print(table: Table, stream: TextIO) -> None:
    width = None if stream.isatty() else _PIPE_WIDTH
    Console(file=stream, highlight=False, width=width).print(table)


def _milliseconds(value: float | None) -> str:
    return "–" if value is None else f"{value:,.1f} ms"


def _ratio(value: float | None) -> str:
    return "–" if value is None else f"× {value:.2f}"
