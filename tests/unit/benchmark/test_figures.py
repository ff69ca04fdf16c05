"""Upstream's formulas, with numbers worked out by hand."""

from __future__ import annotations

from array import array

import numpy as np
import pytest

from deploy_dsv3.benchmark.client import Outcome, RowRun
from deploy_dsv3.benchmark.figures import CSV_COLUMNS, csv_row, figures_from_json, row_figures
from deploy_dsv3.benchmark.plan import Plan, Row

ROW = Row(num_prompts=4, input_len=100, output_len=20)
PLAN = Plan(profile="custom", rows=(ROW,))


def worked_run() -> RowRun:
    """Ten seconds; three requests that succeeded and one that failed.

    | request | prompt | output | TTFT | latency | ITL            |
    | 0       | 10     | 3      | 1 s  | 5 s     | 1.5, 2.5       |
    | 1       | 20     | 1      | 2 s  | 2 s     |                |
    | 2       | 30     | 5      | 3 s  | 9 s     | 1, 1, 2, 2     |
    | 3       | 40     | 9      | failed                          |
    """
    return RowRun(
        duration=10.0,
        outcomes=[
            Outcome(0, 10, 3, ttft=1.0, latency=5.0, counted_prompt_tokens=11, counted_output_tokens=3),
            Outcome(1, 20, 1, ttft=2.0, latency=2.0, counted_prompt_tokens=21, counted_output_tokens=1),
            Outcome(3, 40, 9, ttft=0.5, latency=1.0, error="HTTP 500"),
            Outcome(2, 30, 5, ttft=3.0, latency=9.0, counted_prompt_tokens=31, counted_output_tokens=5),
        ],
        itls=array("f", [1.5, 2.5, 1, 1, 2, 2]),
    )


def test_throughput_is_over_what_succeeded_and_the_whole_time() -> None:
    figures = row_figures(worked_run())
    assert (figures.completed, figures.failed, figures.duration) == (3, 1, 10.0)
    assert (figures.total_input_tokens, figures.total_output_tokens) == (60, 9)
    assert figures.request_throughput == pytest.approx(0.3)
    assert figures.input_throughput == pytest.approx(6.0)
    assert figures.output_throughput == pytest.approx(0.9)


def test_latencies_are_upstreams() -> None:
    figures = row_figures(worked_run())
    assert figures.ttft_ms and figures.tpot_ms and figures.itl_ms and figures.e2e_ms
    assert figures.ttft_ms.mean == pytest.approx(2000)
    assert figures.ttft_ms.p50 == pytest.approx(2000)
    # numpy's percentile interpolates: 2 + 0.98 * (3 - 2).
    assert figures.ttft_ms.p99 == pytest.approx(2980)
    assert figures.ttft_ms.std == pytest.approx(1000 * (2 / 3) ** 0.5)
    # (5 - 1) / 2 = 2 and (9 - 3) / 4 = 1.5; the request of one token has none.
    assert figures.tpot_ms.mean == pytest.approx(1750)
    assert figures.tpot_ms.count == 2
    assert figures.itl_ms.mean == pytest.approx(10_000 / 6)
    assert figures.itl_ms.p50 == pytest.approx(1750)
    assert figures.itl_ms.count == 6
    assert figures.e2e_ms.mean == pytest.approx(16_000 / 3)
    assert figures.e2e_ms.p90 == pytest.approx(1000 * (5 + 0.8 * 4))


def test_the_servers_own_counts_stand_beside() -> None:
    figures = row_figures(worked_run())
    assert (figures.counted_input_tokens, figures.counted_output_tokens) == (63, 9)
    run = worked_run()
    run.outcomes[0].counted_output_tokens = None
    assert row_figures(run).counted_output_tokens is None


def test_a_request_without_text_has_no_ttft_and_none_is_made_up() -> None:
    run = RowRun(duration=2.0, outcomes=[Outcome(0, 4, 4, latency=1.0), Outcome(1, 4, 4, ttft=0.5, latency=2.0)])
    figures = row_figures(run)
    assert figures.ttft_ms and figures.tpot_ms and figures.e2e_ms
    assert (figures.ttft_ms.mean, figures.ttft_ms.count) == (500, 1)
    assert figures.tpot_ms.mean == pytest.approx(500)
    assert figures.e2e_ms.mean == 1500
    assert figures.itl_ms is None


def test_nothing_succeeded_gives_no_latency() -> None:
    figures = row_figures(RowRun(duration=2.0, outcomes=[Outcome(0, 4, 4, error="HTTP 500")]))
    assert (figures.completed, figures.failed, figures.output_throughput) == (0, 1, 0)
    assert figures.ttft_ms is figures.e2e_ms is figures.itl_ms is None
    assert csv_row(PLAN, ROW, "sharegpt", figures)["mean_ttft_ms"] == ""


def test_millions_of_latencies_agree_with_numpy() -> None:
    values = np.random.RandomState(0).exponential(0.03, 2_300_000).astype(np.float32)
    run = RowRun(duration=1.0, outcomes=[Outcome(0, 1, 1, latency=1.0)], itls=array("f", values.tobytes()))
    spread = row_figures(run).itl_ms
    assert spread is not None
    wide = values.astype(np.float64) * 1000
    assert spread.mean == pytest.approx(wide.mean())
    assert spread.std == pytest.approx(wide.std())
    assert [spread.p50, spread.p90, spread.p99] == pytest.approx(np.percentile(wide, (50, 90, 99)).tolist())


def test_csv_has_upstreams_columns_in_upstreams_order() -> None:
    assert ",".join(CSV_COLUMNS) == (
        "backend,dataset_name,sharegpt_output_len,random_input_len,random_output_len,random_range_ratio,"
        "request_rate,completed,total_input_tokens,total_output_tokens,duration,request_throughput,"
        "input_throughput,output_throughput,mean_e2e_latency_ms,mean_ttft_ms,mean_tpot_ms,mean_itl_ms"
    )
    line = csv_row(PLAN, ROW, "sharegpt", row_figures(worked_run()))
    assert tuple(line) == CSV_COLUMNS
    assert line["backend"] == "lmdeploy"
    assert (line["dataset_name"], line["request_rate"], line["sharegpt_output_len"]) == ("random", "inf", "")
    assert (line["random_input_len"], line["random_output_len"], line["random_range_ratio"]) == (100, 20, 0.0)
    assert line["mean_tpot_ms"] == pytest.approx(1750)


@pytest.mark.parametrize("text", ["synthetic", "synthetic-words"])
def test_csv_marks_text_that_is_not_sharegpts(text: str) -> None:
    assert csv_row(PLAN, ROW, text, row_figures(worked_run()))["dataset_name"] == "random-synthetic"


def test_csv_of_sharegpt_lengths_names_no_random_lengths() -> None:
    row = Row(num_prompts=4, input_len=0, output_len=32)
    plan = Plan(profile="custom", rows=(row,), dataset="sharegpt", dataset_path="x", request_rate=2.5)
    line = csv_row(plan, row, "sharegpt", row_figures(worked_run()))
    assert (line["dataset_name"], line["sharegpt_output_len"], line["random_input_len"]) == ("sharegpt", 32, "")
    assert line["request_rate"] == 2.5


def test_figures_survive_their_file() -> None:
    figures = row_figures(worked_run())
    assert figures_from_json(figures.as_json()) == figures
