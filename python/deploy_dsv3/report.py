"""The end of a run: what was done where, what to look out for, where the service is."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from deploy_dsv3.events import Failure, HostStats, Outcome
from deploy_dsv3.progress import duration
from deploy_dsv3.topology import Deployment

if TYPE_CHECKING:
    from deploy_dsv3.verification import VerificationReport

SCHEMA = 1


@dataclass(frozen=True, kw_only=True)
class Report:
    """Everything told at the end of a run.

    Attributes:
        verb: what was run.
        exit_code: how it ended.
        seconds: wall time.
        deployment: what it was run on.
        outcome: what the playbook came to; None if none was run.
        check: whether it was a dry run.
        verification: what verification found; None if it did not run.
        log: directory of the run's log.
    """

    verb: str
    exit_code: int
    seconds: float
    deployment: Deployment
    outcome: Outcome | None = None
    check: bool = False
    warnings: tuple[str, ...] = ()
    verification: VerificationReport | None = None
    log: Path | None = None

    def as_dict(self) -> dict[str, Any]:
        """The report for ``--json``."""
        outcome = self.outcome or Outcome()
        return {
            "schema": SCHEMA,
            "verb": self.verb,
            "exit_code": self.exit_code,
            "check": self.check,
            "seconds": round(self.seconds, 1),
            "replicas": [
                {
                    "name": replica.name,
                    "head": replica.head,
                    "workers": list(replica.workers),
                    **_mapping(outcome.report.get(replica.name)),
                }
                for replica in self.deployment.replicas
            ],
            "stages": [{"name": name, "seconds": round(seconds, 1)} for name, seconds in outcome.stages.items()],
            "hosts": {host: asdict(stats) for host, stats in outcome.hosts.items()},
            "failures": [failure.as_dict() for failure in outcome.failures],
            "findings": [finding.to_json() for finding in outcome.findings],
            "warnings": [*self.warnings, *outcome.warnings],
            "verification": self.verification.as_dict() if self.verification else None,
            "log": str(self.log) if self.log else None,
        }


def render(report: Report, stream: TextIO) -> None:
    """Write the report for people.

    Args:
        report: what to tell.
        stream: where; colours are used if it is a terminal.
    """
    from rich.console import Console

    console = Console(file=stream, highlight=False, soft_wrap=True)
    outcome = report.outcome or Outcome()
    console.print()
    _render_hosts(console, outcome.hosts)
    _render_warnings(console, report, outcome)
    if report.verification:
        from deploy_dsv3 import verification

        verification.render(report.verification, stream)
    # What verification found is in its table.
    told = [failure for failure in outcome.failures if failure.code != "verification"]
    for failure in told[:1]:
        _render_failure(console, failure)
    for failure in told[1:]:
        console.print(
            f"[red]also[/] {failure.host}, stage {failure.stage}: {_first_line(failure.message)}", markup=True
        )
    _render_service(console, report, outcome)
    word = "[green]done[/]" if report.exit_code == 0 else "[red]failed[/]"
    dry = " (check mode: nothing was changed)" if report.check else ""
    console.print(f"{report.verb}: {word} in {duration(report.seconds)}{dry}, exit status {report.exit_code}")
    if report.exit_code and report.log:
        console.print(f"log: {report.log}", markup=False)


def _render_hosts(console: Any, hosts: Mapping[str, HostStats]) -> None:
    from rich.table import Table

    if not hosts:
        return
    table = Table(box=None, pad_edge=False, header_style="dim")
    for column in ("host", "ok", "changed", "skipped", "failed", "unreachable"):
        table.add_column(column, justify="left" if column == "host" else "right")
    for host, stats in hosts.items():
        style = "red" if stats.failed or stats.unreachable else "yellow" if stats.changed else "green"
        counts = (stats.ok, stats.changed, stats.skipped, stats.failed, stats.unreachable)
        table.add_row(host, *map(str, counts), style=style)
    console.print(table)


def _render_warnings(console: Any, report: Report, outcome: Outcome) -> None:
    from rich.panel import Panel
    from rich.text import Text

    for warning in (*report.warnings, *outcome.warnings):
        console.print(f"warning: {warning}", style="yellow", markup=False)
    loud = [finding for finding in outcome.findings if finding.severity == "warning"]
    if loud:
        text = Text()
        for finding in loud:
            text.append(f"{finding.host}: {finding.message}\n", style="bold yellow")
            if finding.remedy:
                text.append(f"  {finding.remedy}\n")
        text.rstrip()
        console.print(Panel(text, title="WARNING", border_style="yellow", title_align="left"))


def _render_failure(console: Any, failure: Failure) -> None:
    where = f"{failure.role}: {failure.task}" if failure.role else failure.task
    console.print(f"[bold red]FAILED[/] stage {failure.stage}, host {failure.host}: ", end="")
    console.print(where, markup=False)
    errors = [finding for finding in failure.findings if finding.severity == "error"]
    if errors:
        for finding in errors:
            _render_lines(console, finding.message, finding.cause, finding.remedy, host=finding.host)
    else:
        _render_lines(console, failure.message, failure.cause, failure.remedy)
    if failure.page:
        console.print(f"    see:    {failure.page}", markup=False)


def _render_lines(console: Any, message: str, cause: str, remedy: str, *, host: str = "") -> None:
    lines = message.splitlines() or [""]
    console.print(f"    found:  {host + ': ' if host and host not in lines[0] else ''}{lines[0]}", markup=False)
    for line in lines[1:]:
        console.print(f"            {line}", markup=False)
    if cause:
        console.print(f"    cause:  {cause}", markup=False)
    if remedy:
        console.print(f"    remedy: {remedy}", markup=False, style="bold")


def _render_service(console: Any, report: Report, outcome: Outcome) -> None:
    for replica in report.deployment.replicas:
        served = _mapping(outcome.report.get(replica.name))
        if not served:
            continue
        console.print(f"[bold]{replica.name}[/] serves [bold]{served.get('model')}[/] at {served.get('endpoint')}")
        if completion := served.get("completion"):
            console.print(f"    a completion came back: {completion!r}", markup=False)


def _mapping(value: Any) -> dict[str, Any]:
    return dict(value) if isinstance(value, Mapping) else {}


def _first_line(text: str) -> str:
    return text.splitlines()[0] if text else ""
