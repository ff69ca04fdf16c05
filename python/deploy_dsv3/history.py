"""The runs that changed a deployment: a line of each, kept on its heads by the lock (`deploy_dsv3.lock`)."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping
from typing import Any, TextIO

from deploy_dsv3 import __version__
from deploy_dsv3.events import Outcome
from deploy_dsv3.lock import Holder
from deploy_dsv3.progress import duration

SCHEMA = 1
_SHOWN = 100


def entry(
    mine: Holder, *, started: float, seconds: float, exit_code: int, plan: str, outcome: Outcome | None
) -> dict[str, Any]:
    """The line of a run.

    Args:
        mine: the run.
        started: when it began [seconds since the epoch].
        seconds: how long it took.
        exit_code: how it ended; above 128 it was stopped by a signal.
        plan: what was planned, in a sentence; "" where no plan was made.
        outcome: what the playbook came to; None if it was stopped.
    """
    first = outcome.first if outcome else None
    hosts = outcome.hosts if outcome else {}
    return {
        "schema": SCHEMA,
        "run": mine.run,
        "verb": mine.verb,
        "who": mine.who,
        "host": mine.host,
        "version": __version__,
        "started": round(started, 1),
        "seconds": round(seconds, 1),
        "result": "done" if exit_code == 0 else "stopped" if exit_code > 128 else "failed",
        "exit_code": exit_code,
        "plan": plan,
        "changed": {host: stats.changed for host, stats in hosts.items()},
        "failure": {
            "host": first.host,
            "stage": first.stage,
            "message": _first_line(first.message),
            "cause": first.cause,
            "page": first.page,
        }
        if first
        else None,
    }


def merge(heads: Iterable[Iterable[Mapping[str, Any]]]) -> list[dict[str, Any]]:
    """The runs of several heads, oldest first; a run that changed several replicas is on each of their heads."""
    runs = {str(run.get("run")): dict(run) for head in heads for run in head if isinstance(run, Mapping)}
    return sorted(runs.values(), key=lambda run: _number(run.get("started")))


def render(runs: Iterable[Mapping[str, Any]], stream: TextIO) -> None:
    """Write the runs for people, one line each."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = Console(file=stream, highlight=False, soft_wrap=True, width=None if stream.isatty() else 240)
    table = Table(box=None, pad_edge=False, header_style="dim")
    for column in ("when", "run", "who", "took", "result", "changed", "what"):
        table.add_column(column, no_wrap=column != "what")
    for run in runs:
        result = str(run.get("result", ""))
        good = result == "done"
        table.add_row(
            time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(_number(run.get("started")))),
            # The id has the verb in it.
            str(run.get("run", "")),
            f"{run.get('who', '')}@{run.get('host', '')}",
            duration(_number(run.get("seconds"))),
            Text(result if good else f"{result} ({run.get('exit_code')})", style="green" if good else "red"),
            str(sum(_changes(run).values())),
            Text(_what(run)),
        )
    if table.row_count:
        console.print(table)
    else:
        console.print("no run is on record")


def _what(run: Mapping[str, Any]) -> str:
    failure = run.get("failure")
    if isinstance(failure, Mapping):
        text = f"{failure.get('stage')}, {failure.get('host')}: {failure.get('message')}"
        return text if len(text) <= _SHOWN else f"{text[: _SHOWN - 1]}…"
    return str(run.get("plan", ""))


def _changes(run: Mapping[str, Any]) -> Mapping[str, int]:
    changed = run.get("changed")
    return changed if isinstance(changed, Mapping) else {}


def _number(value: Any) -> float:
    return float(value) if isinstance(value, int | float) else 0.0


def _first_line(text: str) -> str:
    return text.strip().splitlines()[0] if text.strip() else ""
