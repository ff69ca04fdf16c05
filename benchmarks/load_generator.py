"""Shows that the load generator is not what a benchmark measures.

    taskset -c 0 python benchmarks/load_generator.py

A server that answers at once (counterpart.py, on the other core) faces the generator (on one core) with 1024
streams open. Prints what was sustained and what the generator needed for it, and how far that is from the
published table: its highest output is 1743.56 tokens/s and its highest rate 3.4 requests/s. Ends with exit
status 1 where less than ten times that was reached, or more than 1 GB was needed.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import resource
import subprocess
import sys
import time
from pathlib import Path

from deploy_dsv3.benchmark.client import Client, Endpoint, RowRun, check_open_files
from deploy_dsv3.benchmark.figures import row_figures
from deploy_dsv3.benchmark.plan import Plan, Row
from deploy_dsv3.benchmark.workload import make_workload

_PUBLISHED_TOKENS_PER_S = 1743.56
_PUBLISHED_REQUESTS_PER_S = 3.4
_TIMES = 10
_MOST_MEMORY_MIB = 1000


async def _run(url: str, row: Row) -> tuple[RowRun, float]:
    plan = Plan(profile="custom", rows=(row,))
    workload = make_workload(plan, row, None, None)
    async with Client(Endpoint(base_url=url)) as client:
        model = await client.find_model()
        await client.warm_up(model, workload.requests[0])
        before = time.process_time()
        run = await client.run(model, workload, concurrency=row.concurrency)
        return run, time.process_time() - before


def main() -> int:
    """Measure and judge; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--prompts", type=int, default=10000)
    parser.add_argument("--input-len", type=int, default=2048)
    parser.add_argument("--output-len", type=int, default=256)
    parser.add_argument("--streams", type=int, default=1024, help="requests in flight, and the server's batch")
    arguments = parser.parse_args()
    row = Row(
        num_prompts=arguments.prompts,
        input_len=arguments.input_len,
        output_len=arguments.output_len,
        concurrency=arguments.streams,
    )
    check_open_files(arguments.streams)
    cores = sorted(os.sched_getaffinity(0))
    others = sorted(set(range(os.cpu_count() or 1)) - set(cores[:1])) or cores
    server = subprocess.Popen(
        [sys.executable, str(Path(__file__).with_name("counterpart.py")), "--max-batch", str(arguments.streams)],
        stdout=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: os.sched_setaffinity(0, others),
    )
    os.sched_setaffinity(0, cores[:1])
    try:
        assert server.stdout is not None
        url = server.stdout.readline().strip()
        run, cpu_s = asyncio.run(_run(url, row))
    finally:
        server.terminate()
        server.wait()
    figures = row_figures(run)
    memory_mib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    tokens = figures.output_throughput / _PUBLISHED_TOKENS_PER_S
    requests = figures.request_throughput / _PUBLISHED_REQUESTS_PER_S
    events = sum(run.timeline.events)
    print(f"{figures.completed} requests, {figures.failed} failed, {figures.duration:.1f} s")
    print(f"streams open at most     {max(run.timeline.open):>10,}")
    print(f"output                   {figures.output_throughput:>10,.0f} tokens/s   {tokens:.1f} × published")
    print(f"requests                 {figures.request_throughput:>10,.1f} /s         {requests:.1f} × published")
    print(
        f"generator's CPU          {cpu_s / figures.duration:>10.0%} of one core, {1e6 * cpu_s / events:.1f} µs a token"
    )
    print(f"generator's peak memory  {memory_mib:>10,.0f} MiB")
    enough = min(tokens, requests) >= _TIMES and memory_mib < _MOST_MEMORY_MIB and not figures.failed
    print("enough" if enough else f"NOT enough: wanted {_TIMES} × in under {_MOST_MEMORY_MIB} MiB")
    return 0 if enough else 1


if __name__ == "__main__":
    sys.exit(main())
