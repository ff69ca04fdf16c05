"""Starts a worker, follows it, and stops it: the worker goes on when whoever follows is gone."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from types import FrameType
from typing import Any, NoReturn, Protocol

from deploy_dsv3.benchmark.runs import RunFolder
from deploy_dsv3.errors import (
    BY_EXIT_CODE,
    DeployError,
    HostError,
    InternalError,
    Interrupted,
    UnreachableError,
    UsageError,
)

_LOOK_EVERY_S = 0.2
_STOP_WITHIN_S = 20.0
# A connection that is lost for so long will not come back by itself.
_GIVE_UP_AFTER_S = 900.0


class Worker(Protocol):
    """A worker somewhere."""

    #: Seconds between two looks at it.
    look_every_s: float

    def start(self, api_key: str) -> None:
        """Start it; its plan and job are in the folder."""
        ...

    def alive(self) -> bool:
        """Whether it still works."""
        ...

    def progress(self) -> Mapping[str, Any]:
        """What it last said; empty before it said anything."""
        ...

    def last_words(self) -> str:
        """The end of what it printed, for when it died without a reason."""
        ...

    def stop(self) -> None:
        """Ask it to stop, and wait until it has."""
        ...

    def collect(self) -> None:
        """Bring its results into the folder on this machine."""
        ...


class LocalWorker:
    """A worker on this machine, in a session of its own: closing the terminal does not end it."""

    look_every_s = _LOOK_EVERY_S

    def __init__(self, folder: RunFolder) -> None:
        self._folder = folder
        self._process: subprocess.Popen[bytes] | None = None

    def start(self, api_key: str) -> None:
        """Start it; the key goes through a pipe."""
        command = [sys.executable, "-m", "deploy_dsv3.benchmark.worker", str(self._folder.path), "/dev/stdin"]
        # What an earlier worker said must not be taken for this one's.
        self._folder.write_state("progress.json", {"state": "starting"})
        with (self._folder.path / "worker.log").open("ab") as log:
            process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=log, stderr=log, start_new_session=True)
        self._process = process
        if process.stdin is not None:
            with suppress(BrokenPipeError):  # it died at once: `last_words` tells why
                process.stdin.write(api_key.encode())
                process.stdin.close()

    def alive(self) -> bool:
        """Whether the process that was started, or another that holds the folder, works."""
        if self._process is not None and self._process.poll() is None:
            return True
        return self._folder.is_locked()

    def progress(self) -> Mapping[str, Any]:
        """Its `progress.json`."""
        return self._folder.state("progress.json")

    def last_words(self) -> str:
        """The end of `worker.log`."""
        try:
            text = (self._folder.path / "worker.log").read_text(encoding="utf-8", errors="replace")
        except OSError:
            return ""
        return " ".join(line.strip() for line in text.splitlines()[-6:] if line.strip())

    def stop(self) -> None:
        """SIGTERM; it stops its requests and says so."""
        pid = self._process.pid if self._process is not None else self.progress().get("pid")
        if not (isinstance(pid, int) and self.alive()):
            return
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGTERM)
        deadline = time.monotonic() + _STOP_WITHIN_S
        while self.alive() and time.monotonic() < deadline:
            time.sleep(_LOOK_EVERY_S / 4)

    def collect(self) -> None:
        """Nothing to bring: it worked in the folder itself."""


def follow(worker: Worker, show: Callable[[Mapping[str, Any]], None]) -> Mapping[str, Any]:
    """Show a worker's progress until it ends.

    SIGINT and SIGTERM stop the worker too. A terminal that goes away (SIGHUP) ends only the following.

    Returns:
        Its last progress, of state `done`.

    Raises:
        Interrupted: the operator stopped it.
        DeployError: why it stopped.
    """
    with _asked_to_stop() as asked:
        lost_since: float | None = None
        while True:
            try:
                if not worker.alive():
                    break
                if asked:
                    worker.stop()
                    worker.collect()
                    raise _stopped(asked[0])
                lost_since = None
                show(worker.progress())
            except Interrupted as told:
                # Looking at a worker elsewhere takes signals for itself, and tells of them so.
                if asked:
                    raise
                asked.append(told.signal_number)
                continue
            except UnreachableError as lost:
                lost_since = lost_since or time.monotonic()
                if time.monotonic() - lost_since > _GIVE_UP_AFTER_S:
                    lost.remedy = f"{lost.remedy} The load goes on there: the same command follows it again."
                    raise
                show({"state": f"not reached, trying again: {lost.message}"})
            time.sleep(worker.look_every_s)
    worker.collect()
    last = worker.progress()
    show(last)
    if last.get("state") == "done":
        return last
    if error := last.get("error"):
        raise_told(error)
    raise HostError(
        f"the benchmark's worker ended without a word: {worker.last_words() or 'killed, or out of memory'}",
        remedy="Run the same command again: rows that are measured are kept.",
    )


def _stopped(signal_number: int) -> Interrupted:
    return Interrupted(
        signal_number,
        message="the benchmark was stopped; the row that ran begins anew next time",
        remedy="Run the same command again: rows that are measured are kept.",
    )


def raise_told(told: Mapping[str, Any]) -> NoReturn:
    """Raise the error that a worker wrote down."""
    code = told.get("exit_code", 1)
    if code > 128:
        raise Interrupted(code - 128, message=told["message"], remedy=told["remedy"])
    kind: type[DeployError] = UsageError if code == 2 else BY_EXIT_CODE.get(code, InternalError)
    raise kind(told["message"], remedy=told["remedy"])


@contextmanager
def _asked_to_stop() -> Iterator[list[int]]:
    asked: list[int] = []

    def note(number: int, _frame: FrameType | None) -> None:
        asked.append(number)

    previous = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield asked
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
