"""The process that measures: `python -m deploy_dsv3.benchmark.worker FOLDER KEY_FILE`.

Started by `supervision` in a session of its own (or in a container on the head), it needs no terminal and no
connection: it works through the job in FOLDER, leaves results there and says in `progress.json` where it is.
The API key is read from KEY_FILE (`/dev/stdin` on the control machine); a regular file is removed at once.
"""

from __future__ import annotations

import asyncio
import json
import os
import platform
import resource
import signal
import stat
import sys
import time
import traceback
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TextIO

import deploy_dsv3
from deploy_dsv3.benchmark.client import Client, Endpoint, Outcome, RowRun, check_open_files
from deploy_dsv3.benchmark.estimate import estimate_rest
from deploy_dsv3.benchmark.figures import csv_row, row_figures
from deploy_dsv3.benchmark.plan import Plan, Row
from deploy_dsv3.benchmark.runs import RunFolder, now
from deploy_dsv3.benchmark.texts import load_sharegpt, load_tokenizer
from deploy_dsv3.benchmark.workload import Request, Tokenizer, Workload, make_workload
from deploy_dsv3.errors import DeployError, InternalError, Interrupted, UnreachableError, UsageError

_REPORT_EVERY_S = 1.0
# Upstream rests this long between the warm-up and the row.
_REST_AFTER_WARM_UP_S = 1.5


@dataclass(frozen=True, kw_only=True)
class Job:
    """How a worker is to go about a plan; nothing in it changes which requests a row sends."""

    rows: tuple[str, ...]
    """Names of the rows to measure now, in this order."""
    later: tuple[str, ...] = ()
    """Names of rows that another job measures after this one; only the estimate of the end looks at them."""
    base_url: str
    ca_file: str = ""
    """Absolute, or in the run's folder."""
    model: str = ""
    tokenizer: str = ""
    """Folder or file of the model's tokenizer; empty: synthetic text of counted words."""
    tokenizer_required: bool = False
    """Whether to stop where it cannot be read, rather than count words."""
    max_failed: float = 0.01
    """Share of failed requests above which a row does not count."""
    where: str = "control"
    """`control`, or `head`: said in the results."""
    environment: dict[str, Any]
    """What is being measured: release, digest, driver, GPUs, layout, NCCL transport."""


def job_from_json(data: dict[str, Any]) -> Job:
    """The job that `asdict` turned into JSON."""
    return Job(**{**data, "rows": tuple(data["rows"]), "later": tuple(data["later"])})


class Sweep:
    """Works through a job's rows."""

    def __init__(self, folder: RunFolder, plan: Plan, job: Job, api_key: str) -> None:
        self._folder = folder
        self._plan = plan
        self._job = job
        self._endpoint = Endpoint(
            base_url=job.base_url,
            api_key=api_key,
            ca_file=str(folder.path / job.ca_file) if job.ca_file else "",
            model=job.model,
        )
        self._progress: dict[str, Any] = {"pid": os.getpid(), "rows": list(job.rows), "started": now()}

    async def run(self) -> None:
        """Measure the job's rows that have no result yet.

        Raises:
            DeployError: why it stopped; what was measured until then is in the folder.
        """
        rows = {row.name: row for row in self._plan.rows}
        todo = [rows[name] for name in self._job.rows if not self._folder.result(rows[name])]
        afterwards = [rows[name] for name in self._job.later]
        self.say("starting")
        tokenizer = self._tokenizer()
        pairs = load_sharegpt(Path(self._plan.dataset_path)) if self._plan.dataset_path else None
        async with Client(self._endpoint) as client:
            model = await client.find_model()
            for place, row in enumerate(todo):
                self._folder.clear_leftovers(row)
                self.say("preparing", row=row.name)
                try:
                    workload = make_workload(self._plan, row, tokenizer, pairs)
                except ValueError as error:
                    raise UsageError(
                        f"{row.name}: {error}", remedy="Ask for fewer, or give another dataset."
                    ) from error
                await self._measure(client, model, row, workload, todo[place + 1 :] + afterwards, tokenizer)
        self.say("done")

    def _tokenizer(self) -> Tokenizer | None:
        if not self._job.tokenizer:
            return None
        try:
            return load_tokenizer(Path(self._job.tokenizer))
        except UsageError:
            if self._job.tokenizer_required:
                raise
            return None  # the results then say that the words were counted

    async def _measure(
        self,
        client: Client,
        model: str,
        row: Row,
        workload: Workload,
        later: list[Row],
        tokenizer: Tokenizer | None,
    ) -> None:
        plan, folder = self._plan, self._folder
        check_open_files(min(row.num_prompts, row.concurrency or row.num_prompts))
        await self._warm_up(client, model, row, workload.requests[0])
        run = RowRun()
        started, cpu_before = now(), time.process_time()
        with folder.requests_file(row).open("w", encoding="utf-8") as lines:
            reporter = asyncio.create_task(self._report(row, workload, run, later))
            try:
                await client.run(
                    model,
                    workload,
                    concurrency=row.concurrency,
                    finished=lambda outcome: _write_line(lines, outcome),
                    run=run,
                )
            finally:
                reporter.cancel()
        record: dict[str, Any] = {
            "schema": 1,
            "row": asdict(row),
            "plan": asdict(plan),
            "text": workload.text,
            "tokenizer": self._job.tokenizer if tokenizer else "",
            "model": model,
            "base_url": self._job.base_url,
            "where": self._job.where,
            "started": started,
            "ended": now(),
            "errors": [{"error": error, "count": count} for error, count in run.failures.most_common()],
            "timeline": asdict(run.timeline),
            "client": _client_facts(time.process_time() - cpu_before, run.duration),
            "environment": self._job.environment,
        }
        if run.gone:
            done = sum(1 for outcome in run.outcomes if not outcome.error)
            record["why"] = f"the endpoint was lost after {done} of {row.num_prompts} requests: {run.gone}"
            kept = folder.put_aside(row, record)
            raise UnreachableError(
                f"{row.name}: {record['why']}",
                remedy=f"Kept in {kept}. Bring the service back and run the same command: "
                "the sweep goes on at this row.",
            )
        figures = row_figures(run)
        record["figures"] = figures.as_json()
        if figures.failed > self._job.max_failed * row.num_prompts:
            worst = record["errors"][0]
            record["why"] = (
                f"{figures.failed} of {row.num_prompts} requests failed, "
                f"most often ({worst['count']} times): {worst['error']}"
            )
            kept = folder.put_aside(row, record)
            await self._check_still_there(client, row, record["why"], kept)
            self._progress.setdefault("rejected", []).append({"row": row.name, "why": record["why"]})
        else:
            folder.keep(row, record, csv_row(plan, row, workload.text, figures))

    async def _warm_up(self, client: Client, model: str, row: Row, request: Request) -> None:
        """One request alone; the longest rows' takes many minutes, so it says how far it is."""
        run = RowRun()

        async def report() -> None:
            while True:
                tokens = sum(run.timeline.events)
                self.say("warming up", row=row.name, tokens=tokens, tokens_total=request.output_len)
                await asyncio.sleep(_REPORT_EVERY_S)

        reporter = asyncio.create_task(report())
        try:
            await client.warm_up(model, request, run=run)
        finally:
            reporter.cancel()
        await asyncio.sleep(_REST_AFTER_WARM_UP_S)

    async def _check_still_there(self, client: Client, row: Row, why: str, kept: Path) -> None:
        """After a row that failed: stop here if the rows after it could only fail too."""
        try:
            await client.find_model()
        except DeployError as error:
            raise type(error)(
                f"{row.name}: the endpoint was lost: {why}",
                remedy=f"Kept in {kept}. {error.remedy} Then run the same command: the sweep goes on at this row.",
            ) from error

    async def _report(self, row: Row, workload: Workload, run: RowRun, later: list[Row]) -> None:
        begun = time.monotonic()
        total = workload.total_output
        while True:
            elapsed = time.monotonic() - begun
            events = sum(run.timeline.events)
            rate = events / elapsed if elapsed else 0.0
            row_left, sweep_left = estimate_rest(self._plan, row, later, events=events, total=total, rate=rate)
            self.say(
                "running",
                row=row.name,
                finished=len(run.outcomes),
                failed=sum(run.failures.values()),
                requests=row.num_prompts,
                in_flight=run.timeline.in_flight,
                tokens=events,
                tokens_total=total,
                elapsed_s=round(elapsed, 1),
                output_throughput=round(rate, 2),
                row_left_s=row_left,
                sweep_left_s=sweep_left,
            )
            await asyncio.sleep(_REPORT_EVERY_S)

    def say(self, state: str, **fields: Any) -> None:
        """Write `progress.json`."""
        kept: dict[str, Any] = {
            key: self._progress[key] for key in ("pid", "rows", "started", "rejected") if key in self._progress
        }
        self._progress = {**kept, "state": state, "updated": time.time(), **fields}
        self._folder.write_state("progress.json", self._progress)

    def say_failed(self, error: DeployError) -> None:
        """Write down why the worker stops."""
        told = {"message": error.message, "remedy": error.remedy, "exit_code": error.exit_code}
        with suppress(DeployError):  # a full disk may be the very reason
            self.say("failed", error=told)


def _write_line(lines: TextIO, outcome: Outcome) -> None:
    record: dict[str, Any] = {
        "index": outcome.index,
        "prompt_len": outcome.prompt_len,
        "output_len": outcome.asked_len,
        "started": round(outcome.started, 6),
        "ttft": outcome.ttft and round(outcome.ttft, 6),
        "latency": round(outcome.latency, 6),
        "counted": [outcome.counted_prompt_tokens, outcome.counted_output_tokens],
    }
    if outcome.error:
        record["error"] = outcome.error
    lines.write(json.dumps(record) + "\n")
    lines.flush()


def _client_facts(cpu_s: float, duration: float) -> dict[str, Any]:
    return {
        "version": deploy_dsv3.__version__,
        "host": platform.node(),
        "python": platform.python_version(),
        "cpu_s": round(cpu_s, 2),
        "busy": round(cpu_s / duration, 3) if duration else 0.0,
        "peak_memory_mib": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024, 1),
    }


def read_key(file: Path) -> str:
    """The API key in a file; a regular file is removed once read, as it was written for this reader alone."""
    key = file.read_text(encoding="utf-8").strip()
    if stat.S_ISREG(file.stat().st_mode):
        file.unlink()
    return key


async def _run_until_told(sweep: Sweep) -> None:
    task = asyncio.current_task()
    told: list[int] = []

    def stop(number: int) -> None:
        told.append(number)
        if task:
            task.cancel()

    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stop, number)
    try:
        await sweep.run()
    except asyncio.CancelledError:
        raise Interrupted(told[0] if told else signal.SIGTERM) from None


def main(arguments: list[str]) -> int:
    """Measure what the job in FOLDER says; returns the exit code, which `progress.json` explains."""
    path, key_file = arguments
    folder = RunFolder(Path(path))
    sweep = None
    try:
        api_key = read_key(Path(key_file))
        with folder.lock():
            sweep = Sweep(folder, folder.plan(), job_from_json(folder.state("job.json")), api_key)
            try:
                asyncio.run(_run_until_told(sweep))
            except OSError as error:
                raise UsageError(
                    f"cannot write the results into {path}: {error.strerror or error}",
                    remedy="Free space there and run the same command: the sweep goes on at this row.",
                ) from error
    except DeployError as error:
        if sweep is not None:
            sweep.say_failed(error)
        print(f"{error.message}\n{error.remedy}", file=sys.stderr)
        return error.exit_code
    except Exception as error:
        traceback.print_exc()
        if sweep is not None:
            summary = f"a defect of deploy-dsv3: {type(error).__name__}: {error}"
            sweep.say_failed(InternalError(summary, remedy="Please report it, with worker.log."))
        return InternalError.exit_code
    return 0


if __name__ == "__main__":
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    sys.exit(main(sys.argv[1:]))
