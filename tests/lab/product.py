"""The product as its users run it: ``deploy-dsv3 …`` as a process of its own, in a folder that is not the checkout."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

#: Longest time for one command [seconds]; a deploy on a loaded machine of 2 cores takes a few minutes.
TIMEOUT_S = 900
_TAIL = 6000


@dataclass(kw_only=True)
class Times:
    """What took how long, for the summary at the end of the session."""

    rows: list[tuple[str, float]] = field(default_factory=list)

    def note(self, what: str, seconds: float) -> None:
        """Write one down."""
        self.rows.append((what, seconds))


@dataclass(frozen=True, kw_only=True)
class Run:
    """A command that has ended."""

    argv: Sequence[str]
    exit_code: int
    out: str
    err: str
    seconds: float

    @property
    def document(self) -> dict[str, Any]:
        """What ``--json`` printed: one document, and nothing else on standard output."""
        found: dict[str, Any] = json.loads(self.out)
        return found

    @property
    def told(self) -> str:
        """Everything it said."""
        return self.out + self.err


@dataclass(frozen=True, kw_only=True)
class Product:
    """The installed command.

    Attributes:
        program: the executable.
        folder: where it is run; what it remembers goes below it as well.
        times: where durations are noted.
    """

    program: Path
    folder: Path
    times: Times

    @property
    def state(self) -> Path:
        """Where it keeps the logs of its runs."""
        return self.folder / "state" / "deploy-dsv3"

    @property
    def environment(self) -> dict[str, str]:
        """Its environment: the tester's, with a state folder of its own."""
        return {**os.environ, "XDG_STATE_HOME": str(self.folder / "state")}

    def argv(self, *arguments: str | Path) -> list[str]:
        """The command line."""
        return [str(self.program), *map(str, arguments)]

    @contextmanager
    def started(self, *arguments: str | Path, log: Path) -> Iterator[subprocess.Popen[bytes]]:
        """Start it, with what it says in a file, and let it go on by itself; killed in the end if it still does."""
        with log.open("wb") as out:
            process = subprocess.Popen(
                self.argv(*arguments),
                cwd=self.folder,
                env=self.environment,
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=subprocess.STDOUT,
            )
        try:
            yield process
        finally:
            process.kill()
            process.wait()

    def __call__(self, *arguments: str | Path, expect: int = 0, what: str = "") -> Run:
        """Run it to its end.

        Args:
            expect: the exit status it must have.
            what: its line in the summary of durations; none if empty.
        """
        argv = self.argv(*arguments)
        started = time.monotonic()
        done = subprocess.run(
            argv,
            cwd=self.folder,
            env=self.environment,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=TIMEOUT_S,
            check=False,
        )
        run = Run(
            argv=argv,
            exit_code=done.returncode,
            out=done.stdout,
            err=done.stderr,
            seconds=time.monotonic() - started,
        )
        if what:
            self.times.note(what, run.seconds)
        if run.exit_code != expect:
            pytest.fail(
                f"{' '.join(argv)}: exit status {run.exit_code}, expected {expect}\n"
                f"--- standard output\n{run.out[-_TAIL:]}\n--- standard error\n{run.err[-_TAIL:]}",
                pytrace=False,
            )
        return run


def installed() -> Path:
    """The command of the environment that runs the tests."""
    return Path(sys.executable).parent / "deploy-dsv3"
