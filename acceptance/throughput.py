#!/usr/bin/env python3
"""Compare the throughput of one server with that of others that are alike, under the same load, one after the other.

    throughput.py OUTPUT NAME=URL[,KEY] LIKE=URL[,KEY] LIKE=URL[,KEY] … [--rounds N] [--seconds S] [--until S]

The first is compared with the mean of the others. How far those are apart, two servers of one kind, is told beside
it: a difference no larger than that is none. What a server gives also depends on its start, so one call is one start
of all of them; a further call, after they were started again, adds its rounds to what is in OUTPUT.

The load is the benchmark's own: the same requests for all, as many as take one server about `--seconds`, which is
found out first. Who begins changes from round to round. throughput.json and .md in OUTPUT are written after every
round, so that a run cut short has what it measured. `--until` is the time to be done by [seconds from now]. A server
that is not asked is idle and takes nothing but memory.
"""

from __future__ import annotations

import argparse
import asyncio
import gc
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
# Lengths from half of that on: where all end at once, how the next ones arrive decides how many share a prefill.
RANGE_RATIO = 0.5
STREAMS = 64
LEAST_PROMPTS = 128


async def measure(endpoint: Endpoint, prompts: int, seed: int) -> dict[str, Any]:
    """Send a row to one server; its figures."""
    row = Row(num_prompts=prompts, input_len=INPUT_LEN, output_len=OUTPUT_LEN, concurrency=STREAMS)
    workload = make_workload(Plan(profile="custom", rows=(row,), seed=seed, range_ratio=RANGE_RATIO), row, None, None)
    async with Client(endpoint) as client:
        model = await client.find_model()
        gc.collect()  # what the last row left is not this one's to clear away
        busy = time.process_time()
        run = await client.run(model, workload, concurrency=row.concurrency)
        busy = time.process_time() - busy
    figures = row_figures(run)
    return {
        "completed": figures.completed,
        "failed": figures.failed,
        "duration_s": round(figures.duration, 2),
        "output_tokens_per_s": round(figures.output_throughput, 1),
        "counted_output_tokens": figures.counted_output_tokens,
        "ttft_ms": figures.ttft_ms and round(figures.ttft_ms.p50, 1),
        "tpot_ms": figures.tpot_ms and round(figures.tpot_ms.p50, 2),
        "client_busy": round(busy / figures.duration, 2),
    }


def summarise(rounds: Sequence[Mapping[str, Any]], names: Sequence[str], prompts: int) -> dict[str, Any]:
    """The ratios of each round, of each start, and of all.

    `ratios` has the first server to the mean of the others, and each further one of those to the first of them. Rounds
    of one start share what that start made of the servers: `starts` are their means, and how far those are apart is
    what `standard_errors` are made of.
    """
    first, *others = names
    against = {first: others, **dict.fromkeys(others[1:], others[:1])}
    rates = [{name: each[name]["output_tokens_per_s"] for name in names} for each in rounds]
    ratios = {
        label(name, bases): [rate[name] / statistics.mean(rate[base] for base in bases) for rate in rates]
        for name, bases in against.items()
    }
    numbers = list(dict.fromkeys(each["start"] for each in rounds))
    starts = {
        title: [
            statistics.mean(ratio for ratio, each in zip(row, rounds, strict=True) if each["start"] == number)
            for number in numbers
        ]
        for title, row in ratios.items()
    }
    return {
        "prompts": prompts,
        "input_len": INPUT_LEN,
        "output_len": OUTPUT_LEN,
        "range_ratio": RANGE_RATIO,
        "streams": STREAMS,
        "names": list(names),
        "rounds": list(rounds),
        "client_busy": max(each[name]["client_busy"] for each in rounds for name in names),
        "median_output_tokens_per_s": {
            name: round(statistics.median(rate[name] for rate in rates), 1) for name in names
        },
        "ratios": {title: [round(ratio, 4) for ratio in row] for title, row in ratios.items()},
        "starts": {title: [round(ratio, 4) for ratio in row] for title, row in starts.items()},
        "means": {title: round(statistics.mean(row), 4) for title, row in starts.items()},
        "standard_errors": {
            title: round(statistics.stdev(row) / len(row) ** 0.5, 4) if len(row) > 1 else None
            for title, row in starts.items()
        },
    }


def label(name: str, bases: Sequence[str]) -> str:
    """`deployed / by hand` of "deployed" and "by hand 1", "by hand 2"."""
    return f"{name} / {bases[0] if len(bases) == 1 else bases[0].rstrip(' 0123456789')}"


def markdown(summary: Mapping[str, Any]) -> str:
    """The table for people."""
    medians, ratios = summary["median_output_tokens_per_s"], summary["ratios"]
    lines = [
        f"Throughput, {summary['prompts']} requests of up to {summary['input_len']} tokens in and"
        f" {summary['output_len']} out, {summary['streams']} in flight (output tokens/s); the load generator used at"
        f" most {summary['client_busy']:.0%} of a core:",
        "",
        f"| start | round | first | {' | '.join([*medians, *ratios])} |",
        f"| --- | --- | --- |{' ---: |' * (len(medians) + len(ratios))}",
    ]
    for number, each in enumerate(summary["rounds"]):
        cells = [f"{each[name]['output_tokens_per_s']:,}" for name in medians]
        cells += [f"{row[number]:.3f}" for row in ratios.values()]
        lines.append(f"| {each['start']} | {number + 1} | {each['first']} | {' | '.join(cells)} |")
    cells = [f"{median:,}" for median in medians.values()]
    for title, mean in summary["means"].items():
        error = summary["standard_errors"][title]
        cells.append(f"**{mean:.3f}**" + ("" if error is None else f" ± {error:.3f}"))
    lines.append(f"| | | median, mean of the starts | {' | '.join(cells)} |")
    return "\n".join([*lines, ""])


async def compare(options: argparse.Namespace) -> int:
    began = time.monotonic()
    servers: dict[str, Endpoint] = dict(options.servers)
    names = list(servers)
    file = options.output / "throughput.json"
    known = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {"rounds": []}
    rounds: list[dict[str, Any]] = known["rounds"]
    if rounds and known["names"] != names:
        print(f"{file} is of {', '.join(known['names'])}: name those, or another folder", file=sys.stderr)
        return 2
    start = rounds[-1]["start"] + 1 if rounds else 1
    # Not counted: all get warm, and the row's length is found out.
    for endpoint in servers.values():
        await measure(endpoint, LEAST_PROMPTS, seed=0)
    tries = {name: await measure(endpoint, LEAST_PROMPTS, seed=1) for name, endpoint in servers.items()}
    fastest = max(one["completed"] / one["duration_s"] for one in tries.values())
    prompts = known.get("prompts") or max(LEAST_PROMPTS, round(fastest * options.seconds / STREAMS) * STREAMS)
    print(f"start {start}: tried {tries}; {prompts} requests a measurement", flush=True)
    failed, longest = sum(one["failed"] for one in tries.values()), 0.0
    for number in range(options.rounds):
        now = time.monotonic()
        if number and now - began + longest > options.until:
            print(f"no time for round {number + 1}")
            break
        turn = (number + start - 1) % len(names)
        order = names[turn:] + names[:turn]
        each: dict[str, Any] = {"start": start, "first": order[0]}
        for name in order:
            each[name] = await measure(servers[name], prompts, seed=len(rounds) + 2)
            failed += each[name]["failed"]
            print(f"start {start} round {number + 1} {name}: {each[name]}", flush=True)
        rounds.append(each)
        longest = max(longest, time.monotonic() - now)
        summary = summarise(rounds, names, prompts)
        options.output.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(summary, indent=1) + "\n", encoding="utf-8")
        (options.output / "throughput.md").write_text(markdown(summary), encoding="utf-8")
    print(markdown(summary))
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
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--seconds", type=float, default=8.0)
    parser.add_argument("--until", type=float, default=600.0)
    options = parser.parse_args(arguments)
    if len(dict(options.servers)) < max(2, len(options.servers)):
        parser.error("name two servers or more, each differently")
    check_open_files(STREAMS)
    return asyncio.run(compare(options))


if __name__ == "__main__":
    sys.exit(main())
