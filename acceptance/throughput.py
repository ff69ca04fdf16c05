#!/usr/bin/env python3
"""Compare the throughput of two servers of one model under the same load, one after the other, several rounds.

    throughput.py OUTPUT DEPLOYED_URL BY_HAND_URL [--key KEY] [--rounds N] [--seconds S] [--until S]

The load is the benchmark's own: the same requests for both, all in flight at once. How many that are is found out
first, so that one measurement takes about `--seconds`. Who begins alternates from round to round. throughput.json and
.md in OUTPUT are written after every round, so that a run cut short has what it measured. `--until` is the time to be
done by [seconds from now]. The server that is not asked is idle and takes nothing but memory.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import statistics
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from deploy_dsv3.benchmark.client import Client, Endpoint, check_open_files
from deploy_dsv3.benchmark.figures import row_figures
from deploy_dsv3.benchmark.plan import Plan, Row
from deploy_dsv3.benchmark.workload import make_workload

INPUT_LEN, OUTPUT_LEN = 128, 256
STREAMS = 64
LEAST_PROMPTS = 128


async def measure(endpoint: Endpoint, prompts: int, seed: int) -> dict[str, Any]:
    """Send a row to one server; its figures."""
    row = Row(num_prompts=prompts, input_len=INPUT_LEN, output_len=OUTPUT_LEN, concurrency=STREAMS)
    workload = make_workload(Plan(profile="custom", rows=(row,), seed=seed, range_ratio=1.0), row, None, None)
    async with Client(endpoint) as client:
        model = await client.find_model()
        await client.warm_up(model, workload.requests[0])
        figures = row_figures(await client.run(model, workload, concurrency=row.concurrency))
    return {
        "completed": figures.completed,
        "failed": figures.failed,
        "duration_s": round(figures.duration, 2),
        "output_tokens_per_s": round(figures.output_throughput, 1),
        "counted_output_tokens": figures.counted_output_tokens,
        "ttft_ms": figures.ttft_ms and round(figures.ttft_ms.p50, 1),
        "tpot_ms": figures.tpot_ms and round(figures.tpot_ms.p50, 2),
    }


def summarise(rounds: Sequence[Mapping[str, Any]], prompts: int) -> dict[str, Any]:
    """Medians, and the ratio of deployed to by hand: of the medians, and of each round."""
    medians = {
        who: round(statistics.median(each[who]["output_tokens_per_s"] for each in rounds), 1)
        for who in ("deployed", "by_hand")
    }
    ratios = [each["deployed"]["output_tokens_per_s"] / each["by_hand"]["output_tokens_per_s"] for each in rounds]
    return {
        "prompts": prompts,
        "input_len": INPUT_LEN,
        "output_len": OUTPUT_LEN,
        "streams": STREAMS,
        "rounds": list(rounds),
        "median_output_tokens_per_s": medians,
        "ratio_of_medians": round(medians["deployed"] / medians["by_hand"], 4),
        "ratios": [round(ratio, 4) for ratio in ratios],
    }


def markdown(summary: Mapping[str, Any]) -> str:
    """The table for people."""
    lines = [
        f"Throughput, {summary['prompts']} requests of {summary['input_len']} tokens in and {summary['output_len']} out"
        f", {summary['streams']} in flight (output tokens/s):",
        "",
        "| round | first | deployed | by hand | ratio |",
        "| --- | --- | ---: | ---: | ---: |",
    ]
    for number, (each, ratio) in enumerate(zip(summary["rounds"], summary["ratios"], strict=True), 1):
        deployed, by_hand = (each[who]["output_tokens_per_s"] for who in ("deployed", "by_hand"))
        lines.append(f"| {number} | {each['first'].replace('_', ' ')} | {deployed:,} | {by_hand:,} | {ratio:.3f} |")
    deployed, by_hand = (summary["median_output_tokens_per_s"][who] for who in ("deployed", "by_hand"))
    lines.append(f"| median | | {deployed:,} | {by_hand:,} | **{summary['ratio_of_medians']:.3f}** |")
    return "\n".join([*lines, ""])


async def compare(options: argparse.Namespace) -> int:
    began = time.monotonic()
    servers = {
        "deployed": Endpoint(base_url=options.deployed),
        "by_hand": Endpoint(base_url=options.by_hand, api_key=options.key),
    }
    # Not counted: both get warm, and the row's length is found out.
    tries = {who: await measure(endpoint, LEAST_PROMPTS, seed=1) for who, endpoint in servers.items()}
    fastest = max(one["completed"] / one["duration_s"] for one in tries.values())
    prompts = max(LEAST_PROMPTS, round(fastest * options.seconds / STREAMS) * STREAMS)
    print(f"tried {tries}; {prompts} requests a measurement", flush=True)
    rounds: list[dict[str, Any]] = []
    longest = 0.0
    for number in range(options.rounds):
        now = time.monotonic()
        if rounds and now - began + longest > options.until:
            print(f"no time for round {number + 1}")
            break
        order = ("deployed", "by_hand") if number % 2 == 0 else ("by_hand", "deployed")
        each: dict[str, Any] = {"first": order[0]}
        for who in order:
            each[who] = await measure(servers[who], prompts, seed=number + 2)
            print(f"round {number + 1} {who}: {each[who]}", flush=True)
        rounds.append(each)
        longest = max(longest, time.monotonic() - now)
        summary = summarise(rounds, prompts)
        options.output.mkdir(parents=True, exist_ok=True)
        (options.output / "throughput.json").write_text(json.dumps(summary, indent=1) + "\n", encoding="utf-8")
        (options.output / "throughput.md").write_text(markdown(summary), encoding="utf-8")
    print(markdown(summary))
    failed = sum(each[who]["failed"] for each in rounds for who in servers)
    if failed:
        print(f"{failed} requests failed", file=sys.stderr)
    return 1 if failed else 0


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", type=Path)
    parser.add_argument("deployed", metavar="DEPLOYED_URL")
    parser.add_argument("by_hand", metavar="BY_HAND_URL")
    parser.add_argument("--key", default="", help="API key of the one started by hand")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=8.0)
    parser.add_argument("--until", type=float, default=600.0)
    options = parser.parse_args(arguments)
    check_open_files(STREAMS)
    return asyncio.run(compare(options))


if __name__ == "__main__":
    sys.exit(main())
