"""A plan for people: what happens on which host and why, then what is served and how."""

from __future__ import annotations

import shlex
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any, TextIO

from deploy_dsv3 import capacity
from deploy_dsv3.comparison import Action
from deploy_dsv3.plan import Downtime, HostPlan, Plan, ReplicaPlan
from deploy_dsv3.progress import duration

#: Variables that decide how the nodes speak to each other.
_NETWORK = ("NCCL_", "GLOO_")
_MARKS = {
    "created": ("+", "green"),
    "changed": ("~", "yellow"),
    "restarted": ("*", "yellow"),
    "rebooted": ("!", "red"),
    "downloaded": ("<", "cyan"),
    "removed": ("-", "red"),
    "checked": ("?", "dim"),
}


def render(plan: Plan, stream: TextIO, *, brief: bool = False) -> None:
    """Write a plan.

    Args:
        plan: what to tell.
        stream: where; colours are used if it is a terminal.
        brief: only what is to be done, without what is served and how.
    """
    from rich.console import Console

    console = Console(file=stream, highlight=False, soft_wrap=True)
    for replica in plan.replicas:
        _render_replica(console, replica, brief=brief)
    for host, why in plan.unreachable.items():
        console.print(f"[bold red]not reached[/] {host}: ", end="")
        console.print(why, markup=False)
    for warning in plan.warnings:
        console.print(f"warning: {warning}", style="yellow", markup=False)
    for finding in plan.findings:
        style = "bold red" if finding.severity == "error" else "yellow"
        console.print(f"{finding.severity}: {finding.message}", style=style, markup=False)
        if finding.remedy:
            console.print(f"    remedy: {finding.remedy}", markup=False)
    console.print(summary(plan), style="bold", markup=False)


def summary(plan: Plan) -> str:
    """The plan in a sentence, as it is kept in the history of runs."""
    if plan.unreachable:
        return f"plan: {len(plan.unreachable)} hosts could not be looked at"
    if plan.errors:
        return f"plan: preflight would refuse, {_count(len(plan.errors), 'error')}"
    if plan.nothing_to_do:
        return "plan: nothing to do"
    parts = list(_counts(plan.actions))
    if plan.drift:
        parts.append(f"{len(plan.drift)} changed by hand")
    stops = [replica.name for replica in plan.replicas if replica.downtime.kind == "restart"]
    if stops:
        parts.append(f"{', '.join(stops)} away meanwhile")
    return f"plan: {', '.join(parts)}"


def _counts(actions: Sequence[Action]) -> Iterator[str]:
    for kind in _MARKS:
        found = [action for action in actions if action.kind == kind]
        if found:
            size = sum(action.bytes or 0 for action in found)
            yield f"{len(found)} {kind}" + (f" ({gigabytes(size)})" if size else "")


def gigabytes(size: int) -> str:
    """A download's size in decimal units, as registries and networks count."""
    return f"{size / 1e9:.1f} GB" if size >= 1e9 else f"{size / 1e6:.1f} MB"


def _count(number: int, word: str) -> str:
    return f"{number} {word}" if number == 1 else f"{number} {word}s"


def _render_replica(console: Any, replica: ReplicaPlan, *, brief: bool) -> None:
    from rich.text import Text

    console.print(Text.assemble((replica.name, "bold"), f": {_away(replica.downtime)}"))
    if replica.lock:
        held = f"{replica.lock.get('who')} on {replica.lock.get('host')}: {replica.lock.get('verb')}"
        console.print(f"  a run is under way: {held}", style="yellow", markup=False)
    elif replica.last_run and replica.last_run.get("exit_code"):
        run = replica.last_run
        when = time.strftime("%Y-%m-%d %H:%M", time.localtime(run.get("started", 0)))
        console.print(
            f"  the last run ({run.get('verb')}, {when}, {run.get('who')}) did not finish: differences may be its own",
            style="yellow",
            markup=False,
        )
    for host in replica.hosts:
        _render_host(console, host)
    if not brief:
        _render_service(console, replica)
    console.print()


def _away(downtime: Downtime) -> str:
    known = f" (about {duration(downtime.seconds)}, as at its last start)" if downtime.seconds else ""
    return {
        "none": "clients notice nothing",
        "start": f"nothing is served yet; the engine starts{known}",
        "restart": f"clients wait while the engine restarts{known}",
    }[downtime.kind]


def _render_host(console: Any, host: HostPlan) -> None:
    from rich.text import Text

    where = f"{host.role}, {host.address} over {host.interface}"
    console.print(Text.assemble("  ", (host.host, "bold"), f" ({where})"))
    if not (host.actions or host.drift):
        console.print("    nothing to do", style="green")
    actions = _together(host.actions)
    width = min(44, max((len(action.subject) for action in actions), default=0))
    for action in actions:
        mark, style = _MARKS[action.kind]
        size = f", {gigabytes(action.bytes)}" if action.bytes else ""
        what = (f"{action.kind:<10}", style)
        console.print(Text.assemble(f"    {mark} ", what, f" {action.subject:<{width}}  {action.why}{size}"))
    told = " ".join(action.why for action in host.actions)
    for one in host.drift:
        if str(one) not in told:
            console.print(Text.assemble("    ! ", ("by hand   ", "magenta"), f" {one}; no role changes it back"))


def _together(actions: Sequence[Action]) -> list[Action]:
    """The actions, with roles that are walked for the same reason on one line."""
    kept = [action for action in actions if action.kind != "checked"]
    walked = [action for action in actions if action.kind == "checked"]
    for why in dict.fromkeys(action.why for action in walked):
        same = [action for action in walked if action.why == why]
        roles = ", ".join(action.role for action in same)
        kept.append(replace(same[0], subject=f"roles {roles}" if len(same) > 1 else same[0].subject))
    return kept


def _render_service(console: Any, replica: ReplicaPlan) -> None:
    if replica.command:
        console.print(f"  serves at {replica.endpoint} with", markup=False)
        console.print(f"    {shlex.join(replica.command)}", markup=False)
    for host in replica.hosts:
        shown = [f"{name}={value}" for name, value in host.environment.items() if name.startswith(_NETWORK)]
        direct = f", GPUDirect {host.gpudirect}" if host.gpudirect not in ("", "none") else ""
        console.print(f"  network of {host.host} ({host.link_layer}{direct}): {' '.join(shown)}", markup=False)
    if replica.capacity:
        console.print("  capacity (estimate)")
        for label, value in capacity.rows(replica.capacity):
            console.print(f"    {label:<22} {value}", markup=False)
    else:
        console.print(f"  capacity: {replica.capacity_unknown}", markup=False)
