"""Progress of the lab's steps: live on a terminal, plain lines elsewhere."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Iterator
from types import TracebackType

from rich.console import Console
from rich.live import Live
from rich.spinner import Spinner
from rich.table import Table


class Steps:
    """Steps that run one after the other or side by side, each with the time it took.

    Use as a context manager around the steps.
    """

    def __init__(self, console: Console) -> None:
        self._console = console
        self._running: dict[str, float] = {}
        self._lock = threading.Lock()
        self._live: Live | None = None

    def __enter__(self) -> Steps:
        if self._console.is_terminal:
            self._live = Live(self, console=self._console, refresh_per_second=8, transient=True)
            self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._live is not None:
            self._live.stop()

    def __rich__(self) -> Table:
        table = Table.grid(padding=(0, 1))
        with self._lock:
            for title, since in self._running.items():
                table.add_row(Spinner("dots"), title, f"[dim]{time.monotonic() - since:.0f} s[/dim]")
        return table

    @contextlib.contextmanager
    def step(self, title: str) -> Iterator[None]:
        """One step; told when it begins and, with its time, when it ended."""
        since = time.monotonic()
        with self._lock:
            self._running[title] = since
        if self._live is None:
            self._console.print(f"      … {title}", highlight=False, soft_wrap=True)
        try:
            yield
        except BaseException:
            self._tell("[red]fail[/red]", title, since)
            raise
        self._tell("[green]ok[/green]", title, since)

    def note(self, text: str) -> None:
        """A line between steps."""
        self._console.print(f"        {text}", highlight=False, soft_wrap=True)

    def _tell(self, mark: str, title: str, since: float) -> None:
        with self._lock:
            self._running.pop(title, None)
        self._console.print(f"{time.monotonic() - since:5.1f} s {mark} {title}", highlight=False, soft_wrap=True)
