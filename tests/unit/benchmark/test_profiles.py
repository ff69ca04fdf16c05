"""Profiles as data, and what an operator's wishes make of them."""

from __future__ import annotations

from pathlib import Path

import pytest

from deploy_dsv3.benchmark.plan import plan_as_json, plan_from_json
from deploy_dsv3.benchmark.profiles import Wishes, find_profile, make_plan, profiles, select_rows
from deploy_dsv3.errors import UsageError

# The guide's table: max batch size, prompts, input, output, input tok/s, output tok/s, requests/s.
GUIDE = [
    (1024, 10000, 2048, 1024, 3489.50, 1743.56, 3.4),
    (1024, 10000, 2048, 2048, 1665.07, 1682.41, 1.62),
    (1024, 10000, 2048, 4096, 725.01, 1455.12, 0.71),
    (1024, 10000, 2048, 8192, 253.17, 1009.80, 0.25),
    (128, 2000, 2048, 16384, 76.78, 600.07, 0.07),
    (128, 2000, 2048, 32768, 17.75, 281.89, 0.02),
]


def test_published_profile_is_the_guides_table() -> None:
    plan = make_plan(find_profile("published"), Wishes())
    rows = [
        (
            row.max_batch_size,
            row.num_prompts,
            row.input_len,
            row.output_len,
            row.published.input_throughput,
            row.published.output_throughput,
            row.published.request_throughput,
        )
        for row in plan.rows
        if row.published
    ]
    assert rows == GUIDE
    assert (plan.range_ratio, plan.seed, plan.dataset, plan.request_rate) == (0.0, 1, "random", 0.0)
    assert all(row.concurrency == 0 for row in plan.rows)


def test_csv_names_are_the_guides() -> None:
    assert [row.name for row in find_profile("published").rows][::5] == [
        "api_n10000_in2048_out1024_dsv3",
        "api_n2000_in2048_out32768_dsv3",
    ]


def test_smoke_asks_for_minutes_not_hours() -> None:
    tokens = sum(row.num_prompts * row.output_len / 2 for row in find_profile("smoke").rows)
    # The slowest row of the guide, with its 128 streams, made 282 tokens/s.
    assert tokens / 282 < 120


def test_unknown_profile_suggests_a_known_one() -> None:
    with pytest.raises(UsageError, match="unknown profile 'publshed'") as refused:
        find_profile("publshed")
    assert refused.value.remedy == "Did you mean published? Profiles: published, smoke, custom."
    assert set(profiles()) == {"published", "smoke", "custom"}


@pytest.mark.parametrize(
    ("chosen", "outputs"),
    [
        ("", [1024, 2048, 4096, 8192, 16384, 32768]),
        ("1-2,6", [1024, 2048, 32768]),
        ("out8192", [8192]),
        ("api_n2000_in2048_out16384_dsv3, 1", [1024, 16384]),
    ],
)
def test_rows_are_chosen_by_number_or_name(chosen: str, outputs: list[int]) -> None:
    plan = make_plan(find_profile("published"), Wishes())
    assert [row.output_len for row in select_rows(plan, chosen)] == outputs


@pytest.mark.parametrize("chosen", ["0", "7", "2-9", "out17", "first", "1-", "-"])
def test_rows_that_are_not_there_are_refused_with_the_list(chosen: str) -> None:
    plan = make_plan(find_profile("published"), Wishes())
    with pytest.raises(UsageError, match="is no row of published") as refused:
        select_rows(plan, chosen)
    assert "6 api_n2000_in2048_out32768_dsv3" in refused.value.remedy


@pytest.mark.parametrize(
    ("profile", "wishes", "told"),
    [
        ("published", Wishes(output_len=64), "have the published lengths"),
        ("smoke", Wishes(num_prompts=8, input_len=64, output_len=8), "become the same"),
        ("custom", Wishes(num_prompts=0), "--num-prompts 0: must be at least 1"),
        ("custom", Wishes(range_ratio=1.5), "between 0 and 1"),
        ("custom", Wishes(concurrency=-1), "must not be negative"),
        ("published", Wishes(dataset="sharegpt", dataset_path=Path("x")), "not of ShareGPT's own"),
        ("custom", Wishes(dataset="sharegpt"), "needs the file"),
        ("custom", Wishes(dataset="sharegpt", dataset_path=Path("x"), input_len=8), "no meaning"),
    ],
)
def test_wishes_that_contradict_are_refused(profile: str, wishes: Wishes, told: str) -> None:
    with pytest.raises(UsageError, match=told):
        make_plan(find_profile(profile), wishes)


def test_fewer_prompts_keep_the_published_number_in_mind() -> None:
    row = make_plan(find_profile("published"), Wishes(num_prompts=50)).rows[0]
    assert (row.num_prompts, row.published_prompts) == (50, 10000)
    assert row.name == "api_n50_in2048_out1024_dsv3"


def test_sharegpt_row_has_its_own_name() -> None:
    wishes = Wishes(dataset="sharegpt", dataset_path=Path("x"), num_prompts=7)
    assert make_plan(find_profile("custom"), wishes).rows[0].name == "api_n7_sharegpt_dsv3"


def test_a_plan_survives_its_file() -> None:
    plan = make_plan(find_profile("published"), Wishes(seed=3, dataset_path=Path("data.json")))
    assert plan_from_json(plan_as_json(plan)) == plan
    other = make_plan(find_profile("published"), Wishes(seed=4, dataset_path=Path("data.json")))
    assert plan.fingerprint() != other.fingerprint()
    with pytest.raises(ValueError, match="schema"):
        plan_from_json({**plan_as_json(plan), "schema": 99})
    with pytest.raises(ValueError, match="not a benchmark plan"):
        plan_from_json({**plan_as_json(plan), "surprise": 1})
