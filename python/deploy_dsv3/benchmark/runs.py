"""The folder of a run: what was planned, what each row gave, and what is going on now.

```
run.json                      the plan, written once
job.json                      how the worker was last started (no secret)
progress.json, worker.log     what the worker does now
ROW.csv                       upstream's columns, named as the guide names it
ROW.json                      everything known of the row; its presence means that the row is measured
ROW.requests.jsonl            one line a request
attempts/ROW.N.*              rows that were cut off, or failed too much to count; kept, never counted
report.html, report.md        made from the above, any number of times
```

No result is ever overwritten: files are made whole under another name and then linked to their own, which
fails where one exists.
"""

from __future__ import annotations

import csv
import fcntl
import io
import json
import os
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from deploy_dsv3.benchmark.figures import CSV_COLUMNS, Figures, figures_from_json
from deploy_dsv3.benchmark.plan import Plan, Row, plan_as_json, plan_from_json
from deploy_dsv3.errors import LockedError, UsageError

SCHEMA = 1


@dataclass(frozen=True, kw_only=True)
class RowResult:
    """A measured row."""

    row: Row
    figures: Figures
    record: Mapping[str, Any]
    """The row's JSON, whole."""


class RunFolder:
    """One run's folder. Nothing is read or written before a method is called."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def check(self, plan: Plan) -> None:
        """Make sure that the folder is free for a plan: absent, empty, or with a run of that very plan.

        Raises:
            UsageError: it holds something else.
        """
        if (self.path / "run.json").exists():
            found = self.plan()
            if found != plan:
                raise UsageError(
                    f"{self.path} holds another run: {_differences(found, plan)}",
                    remedy="Name another folder (--output), or the same options as that run to continue it.",
                )
        elif any(self.path.glob("*.csv")):
            raise UsageError(
                f"{self.path} holds CSV files of something else", remedy="Name a new folder: --output DIR."
            )

    def create(self, plan: Plan, about: Mapping[str, Any]) -> None:
        """Begin a run, or join one that has the same plan.

        Raises:
            UsageError: the folder cannot be written, or holds something else.
        """
        with self._writing():
            self.path.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=self.path):
                pass
        self.check(plan)
        if not (self.path / "run.json").exists():
            record = {"schema": SCHEMA, "created": now(), "fingerprint": plan.fingerprint(), **about}
            self._write_new("run.json", json.dumps({**record, "plan": plan_as_json(plan)}, indent=1))

    def read(self) -> dict[str, Any]:
        """`run.json`.

        Raises:
            UsageError: the folder holds no run, or a broken one.
        """
        file = self.path / "run.json"
        remedy = "Name the folder that `deploy-dsv3 benchmark` printed."
        try:
            data = json.loads(file.read_text(encoding="utf-8"))
        except OSError as error:
            raise UsageError(
                f"no benchmark run in {self.path} ({file.name}: {error.strerror})", remedy=remedy
            ) from error
        except ValueError as error:
            raise UsageError(f"{file} is not JSON: {error}", remedy=remedy) from error
        if not isinstance(data, dict) or data.get("schema") != SCHEMA:
            raise UsageError(f"{file} is not a run this version reads (schema {SCHEMA})", remedy=remedy)
        return data

    def plan(self) -> Plan:
        """The run's plan."""
        try:
            return plan_from_json(self.read()["plan"])
        except (KeyError, ValueError) as error:
            raise UsageError(f"{self.path / 'run.json'}: {error}", remedy="Begin a new run.") from error

    def result(self, row: Row) -> RowResult | None:
        """What a row gave; None while it is not measured."""
        file = self.path / f"{row.name}.json"
        if not file.exists():
            return None
        try:
            record = json.loads(file.read_text(encoding="utf-8"))
            return RowResult(row=row, figures=figures_from_json(record["figures"]), record=record)
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise UsageError(
                f"{file} cannot be read as a row's result: {error}",
                remedy="Move it away and run the benchmark again: that row is measured anew.",
            ) from error

    def results(self) -> list[RowResult]:
        """The measured rows, in the plan's order."""
        return [result for row in self.plan().rows if (result := self.result(row))]

    def attempts(self, row: Row) -> list[dict[str, Any]]:
        """Records of a row's attempts that do not count, oldest first."""
        files = sorted((self.path / "attempts").glob(f"{row.name}.*.json"), key=_attempt_number)
        return [json.loads(file.read_text(encoding="utf-8")) for file in files]

    def requests_file(self, row: Row) -> Path:
        """Where a row's requests are written while it runs."""
        return self.path / f"{row.name}.requests.partial.jsonl"

    def clear_leftovers(self, row: Row) -> None:
        """Put aside what a killed attempt at a row left."""
        leftovers = [self.requests_file(row), *self.path.glob(f"{row.name}.csv"), self._requests_done(row)]
        for file in leftovers:
            if file.exists():
                with self._writing():
                    file.replace(self._attempt(row, file.name.removeprefix(f"{row.name}.")))

    def keep(self, row: Row, record: Mapping[str, Any], line: Mapping[str, Any]) -> None:
        """Store a measured row: requests, CSV, and last the JSON that makes it count."""
        with self._writing():
            if self.requests_file(row).exists():
                self.requests_file(row).replace(self._requests_done(row))
        self._write_new(f"{row.name}.csv", _csv(line))
        self._write_new(f"{row.name}.json", json.dumps(record, indent=1))

    def put_aside(self, row: Row, record: Mapping[str, Any]) -> Path:
        """Store an attempt that does not count; returns its JSON."""
        with self._writing():
            requests = self.requests_file(row)
            target = self._attempt(row, "json")
            if requests.exists():
                requests.replace(target.with_suffix(".requests.jsonl"))
            target.write_text(json.dumps(record, indent=1), encoding="utf-8")
        return target

    def write_state(self, name: str, data: Mapping[str, Any]) -> None:
        """Replace a state file (`progress.json`, `job.json`) in one step."""
        with self._writing():
            part = self.path / f".{name}.{os.getpid()}"
            part.write_text(json.dumps(data, indent=1), encoding="utf-8")
            part.replace(self.path / name)

    def write_report(self, name: str, text: str) -> Path:
        """Write a page made from the results; the one kind of file that is made anew each time."""
        with self._writing():
            part = self.path / f".{name}.{os.getpid()}"
            part.write_text(text, encoding="utf-8")
            part.replace(self.path / name)
        return self.path / name

    def state(self, name: str) -> dict[str, Any]:
        """A state file; empty while there is none."""
        try:
            data = json.loads((self.path / name).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return {}
        return data if isinstance(data, dict) else {}

    @contextmanager
    def lock(self) -> Iterator[None]:
        """Hold the folder: one worker measures into it.

        Raises:
            LockedError: another holds it.
        """
        with self._writing():
            file = (self.path / "run.lock").open("a+")
        with file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                raise LockedError(
                    f"another benchmark measures into {self.path}",
                    remedy="Run the same command to follow it, or name another folder (--output).",
                ) from error
            yield

    def is_locked(self) -> bool:
        """Whether a worker of this machine holds the folder."""
        try:
            with (self.path / "run.lock").open("a+") as file:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
        except OSError:
            return False
        return False

    def _requests_done(self, row: Row) -> Path:
        return self.path / f"{row.name}.requests.jsonl"

    def _attempt(self, row: Row, suffix: str) -> Path:
        folder = self.path / "attempts"
        folder.mkdir(exist_ok=True)
        taken = [_attempt_number(file) for file in folder.glob(f"{row.name}.*")]
        return folder / f"{row.name}.{max(taken, default=0) + 1}.{suffix}"

    def _write_new(self, name: str, text: str) -> None:
        with (
            self._writing(),
            tempfile.NamedTemporaryFile("w", dir=self.path, encoding="utf-8", newline="") as part,
        ):
            part.write(text)
            part.flush()
            os.fsync(part.fileno())
            Path(part.name).chmod(0o644)
            (self.path / name).hardlink_to(part.name)

    @contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            yield
        except FileExistsError as error:
            raise UsageError(
                f"{error.filename2 or error.filename} exists already, and results are never overwritten",
                remedy="Name another folder: --output DIR.",
            ) from error
        except OSError as error:
            raise UsageError(
                f"cannot write the results into {self.path}: {error.strerror or error}",
                remedy="Name a folder that you may write, with space left: --output DIR.",
            ) from error


def unfinished_run(parent: Path, plan: Plan) -> RunFolder | None:
    """The newest run below `parent` that has this plan and rows still to measure."""
    found = []
    for file in parent.glob("*/run.json"):
        folder = RunFolder(file.parent)
        try:
            if folder.read().get("fingerprint") == plan.fingerprint() and folder.plan() == plan:
                found.append((folder.read()["created"], folder))
        except UsageError:
            continue  # a folder that is not ours, or of another version: not one to continue
    for _, folder in sorted(found, key=lambda pair: str(pair[0]), reverse=True):
        if folder.is_locked() or len(folder.results()) < len(plan.rows):
            return folder
    return None


def now() -> str:
    """This moment, ISO 8601 in UTC, to the second."""
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())


def _attempt_number(file: Path) -> int:
    parts = [part for part in file.name.split(".") if part.isdigit()]
    return int(parts[0]) if parts else 0


def _csv(line: Mapping[str, Any]) -> str:
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, fieldnames=CSV_COLUMNS)
    writer.writeheader()
    writer.writerow(line)
    return text.getvalue()


def _differences(found: Plan, wanted: Plan) -> str:
    a, b = plan_as_json(found), plan_as_json(wanted)
    parts: Sequence[str] = [
        f"{key} {a[key]!r} there, {b[key]!r} asked for" for key in a if key != "rows" and a[key] != b[key]
    ]
    if found.rows != wanted.rows:
        parts = [*parts, f"rows {', '.join(row.name for row in found.rows)} there"]
    return "; ".join(parts)
