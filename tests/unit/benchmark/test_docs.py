"""The page about benchmarks says what the command takes, and what the profiles are."""

from __future__ import annotations

from pathlib import Path

import pytest

from deploy_dsv3.benchmark.commands import benchmark
from deploy_dsv3.benchmark.profiles import profiles

PAGE = (Path(__file__).parents[3] / "docs" / "benchmark.md").read_text(encoding="utf-8")


def test_every_option_and_command_is_documented() -> None:
    options = [option.opts[0] for command in (benchmark, *benchmark.commands.values()) for option in command.params]
    missing = [option for option in options if option.startswith("--") and f"`{option}" not in PAGE]
    assert missing == []
    for name in benchmark.commands:
        assert f"benchmark {name} " in PAGE


def test_every_profile_is_documented() -> None:
    for name in profiles():
        assert f"| `{name}` |" in PAGE


@pytest.mark.parametrize("place", range(6))
def test_the_published_rows_are_as_documented(place: int) -> None:
    row = profiles()["published"].rows[place]
    published = row.published
    assert published is not None
    shape = f"| {row.max_batch_size} | {row.num_prompts} | {row.input_len} | {row.output_len} |"
    figures = f"{published.input_throughput:.2f} | {published.output_throughput:.2f} | {published.request_throughput} |"
    assert f"| {place + 1} {shape} {figures}" in PAGE
