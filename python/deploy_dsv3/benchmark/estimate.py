"""When a sweep ends, from how it went so far."""

from __future__ import annotations

from collections.abc import Sequence

from deploy_dsv3.benchmark.plan import Plan, Row


def estimate_rest(
    plan: Plan, row: Row, later: Sequence[Row], *, events: int, total: int, rate: float
) -> tuple[float | None, float | None]:
    """Seconds left of this row and of the whole sweep; None before anything is known.

    A later row is taken to run at its published speed times what this row reaches of its own, or at this
    row's speed where one of them has none published.

    Args:
        plan: range ratio of the lengths.
        row: the row that runs.
        later: the rows after it.
        events: tokens seen so far.
        total: tokens the row asks for.
        rate: tokens seen a second.
    """
    if not events or rate <= 0:
        return None, None
    row_left = max(total - events, 0) / rate
    share = rate / row.published.output_throughput if row.published else None
    sweep_left = row_left
    for other in later:
        tokens = other.num_prompts * other.output_len * (1 + plan.range_ratio) / 2
        speed = other.published.output_throughput * share if other.published and share else rate
        sweep_left += tokens / speed
    return round(row_left, 1), round(sweep_left, 1)
