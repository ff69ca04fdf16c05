#!/usr/bin/env python3
"""Compare the throughput of servers of one model under the same load, one after the other, several rounds.

    throughput.py OUTPUT NAME=URL[,KEY] NAME=URL[,KEY] … [--rounds N] [--seconds S] [--until S]

The last is what the others are compared with. One more of its kind among them shows how far two servers of one kind
are apart: less than that says nothing. The load is the benchmark's own: the same requests for all, as many as take
one server about `--seconds`, which is found out first. Who begins changes from round to round. throughput.json and
.md in OUTPUT are written after every round, so that a run cut short has what it measured. `--until` is the time to be
done by [seconds from now]. A server that is not asked is idle and takes nothing but memory.
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


def summarise(rounds: Sequence[Mapping[str, Any]], names: Sequence[str], prompts: int) -> dict[str, Any]:
    """Medians, and the ratio of each server to the last named: of the medians, and of each round."""
    *others, last = names
    rates = {name: [each[name]["output_tokens_per_s"] for each in rounds] for name in names}
    medians = {name: round(statistics.median(rates[name]), 1) for name in names}
    return {
        "prompts": prompts,
        "input_len": INPUT_LEN,
        "output_len": OUTPUT_LEN,
        "streams": STREAMS,
        "rounds": list(rounds),
        "median_output_tokens_per_s": medians,
        "compared_with": last,
        "ratio_of_medians": {name: round(medians[name] / medians[last], 4) for name in others},
        "ratios": {
            name: [round(one / base, 4) for one, base in zip(rates[name], rates[last], strict=True)] for name in others
        },
    }


def markdown(summary: Mapping[str, Any]) -> str:
    """The table for people."""
    medians, last = summary["median_output_tokens_per_s"], summary["compared_with"]
    heads = [*medians, *(f"{name} / {last}" for name in summary["ratios"])]
    lines = [
        f"Throughput, {summary['prompts']} requests of {summary['input_len']} tokens in and {summary['output_len']} out"
        f", {summary['streams']} in flight (output tokens/s):",
        "",
        f"| round | first | {' | '.join(heads)} |",
        f"| --- | --- |{' ---: |' * len(heads)}",
    ]
    for number, each in enumerate(summary["rounds"]):
        cells = [f"{each[name]['output_tokens_per_s']:,}" for name in medians]
        cells += [f"{ratios[number]:.3f}" for ratios in summary["ratios"].values()]
        lines.append(f"| {number + 1} | {each['first']} | {' | '.join(cells)} |")
    cells = [f"{median:,}" for median in medians.values()]
    cells += [f"**{ratio:.3f}**" for ratio in summary["ratio_of_medians"].values()]
    return "\n".join([*lines, f"| median | | {' | '.join(cells)} |", ""])


async def compare(options: argparse.Namespace) -> int:
    began = time.monotonic()
    servers: dict[str, Endpoint] = dict(options.servers)
    # Not counted: all get warm, and the row's length is found out.
    tries = {name: await measure(endpoint, LEAST_PROMPTS, seed=1) for name, endpoint in servers.items()}
    fastest = max(one["completed"] / one["duration_s"] for one in tries.values())
    prompts = max(LEAST_PROMPTS, round(fastest * options.seconds / STREAMS) * STREAMS)
    print(f"tried {tries}; {prompts} requests a measurement", flush=True)
    names, order = list(servers), list(servers)
    rounds: list[dict[str, Any]] = []
    longest = 0.0
    for number in range(options.rounds):
        now = time.monotonic()
        if rounds and now - began + longest > options.until:
            print(f"no time for round {number + 1}")
            break
        each: dict[str, Any] = {"first": order[0]}
        for name in order:
            each[name] = await measure(servers[name], prompts, seed=number + 2)
            print(f"round {number + 1} {name}: {each[name]}", flush=True)
        order = order[1:] + order[:1]
        rounds.append(each)
        longest = max(longest, time.monotonic() - now)
        summary = summarise(rounds, names, prompts)
        options.output.mkdir(parents=True, exist_ok=True)
        (options.output / "throughput.json").write_text(json.dumps(summary, indent=1) + "\n", encoding="utf-8")
        (options.output / "throughput.md").write_text(markdown(summary), encoding="utf-8")
    print(markdown(summary))
    failed = sum(each[name]["failed"] for each in rounds for name in names)
    if failed:
        print(f"{failed} requests failed", file=sys.stderr)
    return 1 if failed else 0


def read_server(text: str) -> tuple[str, Endpoint]:
    """Take `NAME=URL[,KEY]` apart."""
    name, _, where = text.partition("=")
    url, _, key = where.partition(",")
    if not (name and url):
        raise argparse.ArgumentTypeError(f"{text!r} is not NAME=URL[,KEY]")
    return name, Endpoint(base_url=url, api_key=key)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", type=Path)
    parser.add_argument("servers", nargs="+", type=read_server, metavar="NAME=URL[,KEY]")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=8.0)
    parser.add_argument("--until", type=float, default=600.0)
    options = parser.parse_args(arguments)
    if len(dict(options.servers)) < max(2, len(options.servers)):
        parser.error("name two servers or more, each differently")
    check_open_files(STREAMS)
    return asyncio.run(compare(options))


if __name__ == "__main__":
    sys.exit(main())
