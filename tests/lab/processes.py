"""Processes of this machine; those of the lab's hosts and of their containers are among them."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path


def command_lines() -> dict[int, str]:
    """Process to its command line, as everybody on the machine can read it."""
    found = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with suppress(OSError):
                words = (entry / "cmdline").read_bytes().decode(errors="replace").split("\0")
                found[int(entry.name)] = " ".join(words).strip()
    return found


def below(pid: int) -> dict[int, str]:
    """Processes that a process started, directly or not, with their command lines."""
    parents: dict[int, int] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with suppress(OSError):
                # The name, in brackets, may hold anything; the parent is the second field after it.
                parents[int(entry.name)] = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
    lines = command_lines()
    return {one: lines.get(one, "") for one in parents if one != pid and pid in _ancestry(one, parents)}


def _ancestry(pid: int, parents: dict[int, int]) -> Iterator[int]:
    while pid in parents:
        yield pid
        pid = parents[pid]


def left_of(pids: dict[int, str], *, within_s: float) -> dict[int, str]:
    """Those that still run, with the same command line, after a while."""
    deadline = time.monotonic() + within_s
    while True:
        now = command_lines()
        left = {pid: line for pid, line in pids.items() if line and now.get(pid) == line}
        if not left or time.monotonic() > deadline:
            return left
        time.sleep(0.5)


@contextmanager
def watched(words: dict[str, str]) -> Iterator[set[str]]:
    """Collect, while it lasts, which of these words stood in the command line of any process.

    Args:
        words: what a word is to the word.

    Yields:
        ``what: command line`` of each that was seen.
    """
    seen: set[str] = set()
    done = threading.Event()

    def look() -> None:
        while not done.wait(0.5):
            for line in command_lines().values():
                seen.update(f"{what}: {line}" for what, word in words.items() if word in line)

    thread = threading.Thread(target=look, daemon=True)
    thread.start()
    try:
        yield seen
    finally:
        done.set()
        thread.join()
