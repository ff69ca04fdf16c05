"""Progress of a sweep for whoever watches: a live line on a terminal, a plain line now and then otherwise."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, TextIO

_PLAIN_EVERY_S = 30.0

Show = Callable[[Mapping[str, Any]], None]


@contextmanager
def shown_on(stream: TextIO) -> Iterator[Show]:
    """A function that shows a worker's progress on the stream."""
    if not stream.isatty():
        yield _Plain(stream).show
        return
    from rich.console import Console
    from rich.live import Live
    from rich.text import Text

    with Live(console=Console(file=stream), refresh_per_second=4) as live:
        yield lambda progress: live.update(Text(sentence(progress)))


def sentence(progress: Mapping[str, Any]) -> str:
    """One line that says how far a sweep is."""
    state, row = progress.get("state", "starting"), progress.get("row", "")
    if state == "warming up":
        return f"{row}: warming up with one request, {progress['tokens']} of {progress['tokens_total']} tokens"
    if state != "running":
        return f"{row}: {state}" if row else str(state)
    share = 100 * progress["tokens"] / progress["tokens_total"] if progress["tokens_total"] else 0
    failed = f", {progress['failed']} FAILED" if progress["failed"] else ""
    left = ""
    if progress.get("row_left_s") is not None:
        left = f", row ends in {duration(progress['row_left_s'])}, sweep in {duration(progress['sweep_left_s'])}"
    return (
        f"{row}: {share:.0f} %, {progress['finished']}/{progress['requests']} requests{failed}, "
        f"{progress['in_flight']} in flight, {progress['output_throughput']:.0f} tok/s{left}"
    )


def duration(seconds: float) -> str:
    """`42 s`, `7 min`, `3 h 20 min` or `2 d 5 h`."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    if minutes < 60:
        return f"{minutes} min"
    hours, minutes = divmod(minutes, 60)
    if hours < 24:
        return f"{hours} h {minutes} min"
    days, hours = divmod(hours, 24)
    return f"{days} d {hours} h"


class _Plain:
    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._shown = ("", "")
        self._when = 0.0

    def show(self, progress: Mapping[str, Any]) -> None:
        what = (str(progress.get("state", "")), str(progress.get("row", "")))
        now = time.monotonic()
        if what == self._shown and now - self._when < _PLAIN_EVERY_S:
            return
        self._shown, self._when = what, now
        print(f"{time.strftime('%H:%M:%S')} {sentence(progress)}", file=self._stream, flush=True)
