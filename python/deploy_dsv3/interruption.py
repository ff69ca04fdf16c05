"""SIGTERM as an exception, as Python makes one of SIGINT: whoever stops a run by it runs every cleanup on the way.

While a playbook runs, `deploy_dsv3.runner` has handlers of its own, which let the running task end first.
"""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from types import FrameType


class Terminated(KeyboardInterrupt):
    """SIGTERM came. No `Exception`, so that nothing takes it for a failure of its own."""


@dataclass
class Stop:
    """What stopped the process: a signal's number, 0 while none has."""

    signal_number: int = 0


@contextmanager
def terminable() -> Iterator[Stop]:
    """Raise `Terminated` where SIGTERM comes, and note which signal it was; for the main thread."""
    stop = Stop()
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return

    def handle(number: int, _frame: FrameType | None) -> None:
        stop.signal_number = number
        raise Terminated

    previous = signal.signal(signal.SIGTERM, handle)
    try:
        yield stop
    finally:
        signal.signal(signal.SIGTERM, previous)


def number_of(error: KeyboardInterrupt) -> int:
    """The signal that an exception stands for."""
    return signal.SIGTERM if isinstance(error, Terminated) else signal.SIGINT


def end_children() -> None:
    """End every process that this one has started, with theirs; does nothing where /proc does not tell them."""
    for pid in _below(os.getpid()):
        with suppress(ProcessLookupError, PermissionError):
            os.kill(pid, signal.SIGTERM)


def _below(pid: int) -> list[int]:
    found: list[int] = []
    for path in Path(f"/proc/{pid}/task").glob("*/children"):
        with suppress(OSError):
            for child in map(int, path.read_text().split()):
                found += [child, *_below(child)]
    return found
