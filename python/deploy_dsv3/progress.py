"""Live progress of a run: a table of hosts on a terminal, plain lines with the time otherwise.

Both show records as they come; neither decides anything. Progress goes to the stream it is given, so that
with ``--json`` standard output holds the document and nothing else.
"""

from __future__ import annotations

import sys
import time as clock
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from types import TracebackType
from typing import TYPE_CHECKING, Protocol, Self, TextIO

from deploy_dsv3.events import (
    Finished,
    HostChanged,
    HostFailed,
    HostOk,
    HostRecord,
    HostRetried,
    HostSkipped,
    HostStarted,
    HostUnreachable,
    Record,
    StageStarted,
    TaskStarted,
    Warned,
)

if TYPE_CHECKING:
    from rich.table import Table

#: How often a host that waits says so in plain lines [seconds].
WAIT_LINE_S = 30.0


class Progress(AbstractContextManager["Progress"], Protocol):
    """Shows the records of a run as they come."""

    def show(self, record: Record) -> None:
        """Take one record."""


def choose(hosts: Sequence[str], *, json: bool, stream: TextIO | None = None) -> Progress:
    """The progress that suits where the output goes.

    Args:
        hosts: hosts of the run, in the order to show them.
        json: whether standard output is kept for a JSON document.
        stream: where to write; by default standard error with `json`, else standard output.
    """
    target = stream or (sys.stderr if json else sys.stdout)
    if not json and target.isatty():
        return TerminalProgress(hosts, target)
    return PlainProgress(target)


class PlainProgress:
    """One line for each stage, and for each host that changes, fails or is tried again.

    Args:
        stream: where to write.
        now: seconds since the epoch, for tests.
    """

    def __init__(self, stream: TextIO, now: Callable[[], float] = clock.time) -> None:
        self._stream = stream
        self._now = now
        self._started = now()
        self._stage = ""
        self._since = self._started
        self._hosts: dict[str, dict[str, int]] = {}
        self._waits: dict[str, float] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._close_stage(self._now())

    def show(self, record: Record) -> None:
        """Write what the record says, if it is worth a line."""
        match record:
            case StageStarted():
                stage = record.stage or record.title
                if stage != self._stage:
                    self._close_stage(record.time)
                    self._stage, self._since, self._hosts = stage, record.time, {}
                self._line(record.time, f"{stage}: {record.title}")
            case HostChanged():
                self._count(record.host, "changed")
                self._line(record.time, f"{self._stage}: {record.host}: changed: {record.task}")
            case HostOk():
                self._count(record.host, "ok")
            case HostSkipped():
                self._count(record.host, "skipped")
            case HostRetried():
                # The first wait is news, the others are signs of life.
                if record.attempt == 1 or record.time - self._waits.get(record.host, 0.0) >= WAIT_LINE_S:
                    self._waits[record.host] = record.time
                    what = f"{record.task} ({record.attempt}/{record.attempts})"
                    detail = f": {record.detail}" if record.detail else ""
                    self._line(record.time, f"{self._stage}: {record.host}: waiting: {what}{detail}")
            case HostFailed(ignored=False) | HostUnreachable():
                word = "unreachable" if record.failure.unreachable else "FAILED"
                self._line(record.time, f"{self._stage}: {record.host}: {word}: {record.task}")
            case Warned():
                self._line(record.time, f"{self._stage}: warning: {record.message}")
            case Finished():
                self._close_stage(record.time)

    def _count(self, host: str, what: str) -> None:
        counts = self._hosts.setdefault(host, {})
        counts[what] = counts.get(what, 0) + 1

    def _close_stage(self, time: float) -> None:
        if self._stage:
            changed = sum(counts.get("changed", 0) for counts in self._hosts.values())
            took = duration(time - self._since)
            self._line(time, f"{self._stage}: done in {took}, {changed} changed on {len(self._hosts)} hosts")
            self._stage = ""

    def _line(self, time: float, text: str) -> None:
        self._stream.write(
            f"{clock.strftime('%H:%M:%S', clock.localtime(time))} +{time - self._started:6.1f}s {text}\n"
        )
        self._stream.flush()


@dataclass(kw_only=True)
class _Row:
    state: str = "waiting"
    task: str = ""
    detail: str = ""
    since: float = 0.0
    changed: int = 0
    ok: int = 0


class TerminalProgress:
    """A table that is redrawn in place: finished stages above, one row for each host below.

    Args:
        hosts: hosts in the order to show them.
        stream: a terminal.
    """

    def __init__(self, hosts: Sequence[str], stream: TextIO) -> None:
        from rich.console import Console
        from rich.live import Live

        self._console = Console(file=stream)
        self._rows = {host: _Row() for host in hosts}
        self._stage = ""
        self._title = "starting"
        self._since = clock.time()
        self._live = Live(console=self._console, get_renderable=self._table, refresh_per_second=4, transient=True)

    def __enter__(self) -> Self:
        self._live.__enter__()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._close_stage(clock.time())
        self._live.__exit__(kind, error, trace)

    def show(self, record: Record) -> None:
        """Take one record into the table."""
        match record:
            case StageStarted():
                stage = record.stage or record.title
                if stage != self._stage:
                    self._close_stage(record.time)
                    self._stage, self._since = stage, record.time
                    for row in self._rows.values():
                        row.changed = row.ok = 0
                        if row.state not in ("failed", "unreachable"):
                            row.state, row.task, row.since = "waiting", "", record.time
                self._title = record.title
            case HostStarted():
                self._set(record, "running")
            case HostRetried():
                self._set(record, f"waiting {record.attempt}/{record.attempts}").detail = record.detail
            case HostChanged():
                self._set(record, "changed").changed += 1
            case HostOk():
                self._set(record, "ok").ok += 1
            case HostSkipped():
                self._set(record, "ok")
            case HostFailed(ignored=False):
                self._set(record, "unreachable" if record.failure.unreachable else "failed")
            case HostUnreachable():
                self._set(record, "unreachable")
            case Warned():
                self._console.print(f"warning: {record.message}", style="yellow", markup=False)
            case TaskStarted() | Finished():
                pass

    def _set(self, record: HostRecord, state: str) -> _Row:
        row = self._rows.setdefault(record.host, _Row())
        if row.task != record.task:
            row.since, row.detail = record.time, ""
        row.state, row.task = state, record.task
        return row

    def _close_stage(self, time: float) -> None:
        if not self._stage:
            return
        failed = [host for host, row in self._rows.items() if row.state in ("failed", "unreachable")]
        changed = sum(row.changed for row in self._rows.values())
        mark, style = ("✗", "red") if failed else ("✓", "green")
        detail = (
            f"failed on {', '.join(failed)}" if failed else f"{changed} changed" if changed else "nothing to change"
        )
        self._console.print(
            f"[{style}]{mark}[/] {self._stage:<12} {duration(time - self._since):>7}  [dim]{detail}[/]",
            highlight=False,
        )
        self._stage = self._title = ""

    def _table(self) -> Table:
        from rich.table import Table
        from rich.text import Text

        styles = {
            "failed": "red",
            "unreachable": "red",
            "changed": "yellow",
            "ok": "green",
            "running": "cyan",
        }
        now = clock.time()
        title = self._title
        if self._stage:
            title = f"{self._stage}: {title}  {duration(now - self._since)}"
        table = Table(title=title, title_justify="left", title_style="bold", box=None, pad_edge=False)
        for column, width in (("host", None), ("state", 14), ("time", 7), ("task", None)):
            table.add_column(column, width=width, no_wrap=True, header_style="dim")
        for host, row in self._rows.items():
            table.add_row(
                host,
                Text(row.state, style=styles.get(row.state, "dim")),
                duration(now - row.since) if row.since else "",
                f"{row.task}: {row.detail}" if row.detail else row.task,
            )
        return table


def duration(seconds: float) -> str:
    """Seconds for people: ``3.2s``, ``2m05s``, ``1h02m``."""
    seconds = max(0.0, seconds)
    if seconds < 59.95:
        return f"{seconds:.1f}s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}h{minutes:02d}m" if hours else f"{minutes}m{rest:02d}s"
