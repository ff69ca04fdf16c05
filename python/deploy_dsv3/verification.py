"""Verifies a deployment: the suites of ``tests/testinfra`` on every host, and what they found as one report.

The suites run in one pytest process, which looks at all hosts at once (`deploy_dsv3.observation`), so their
cost hardly grows with the number of hosts. Their records come back as JSON lines; nothing is scraped.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal, TextIO
from xml.etree import ElementTree

from deploy_dsv3 import content
from deploy_dsv3.errors import InternalError
from deploy_dsv3.topology import Deployment, Replica

SCHEMA = 1
#: Longest time for all suites together [seconds]: a fleet is looked at at once, a long prompt takes a while.
TIMEOUT_S = 900

Outcome = Literal["passed", "failed", "error", "skipped"]
_MARKS: Mapping[str, tuple[str, str]] = {
    "passed": ("✓", "green"),
    "failed": ("✗", "bold red"),
    "error": ("!", "bold red"),
    "skipped": ("–", "dim"),
}
#: More hosts than this are counted instead of shown side by side.
_COLUMNS = 8
#: The check that says whether a host could be looked at at all.
REACHED = "The host can be looked at"


@dataclass(frozen=True, kw_only=True)
class Check:
    """One check on one host: a sentence, what came of it, and why where it did not pass."""

    host: str
    suite: str
    check: str
    outcome: Outcome
    seconds: float
    message: str = ""
    details: Mapping[str, Any] = field(default_factory=dict)

    @property
    def good(self) -> bool:
        """Whether it does not stand against the deployment."""
        return self.outcome in ("passed", "skipped")


@dataclass(frozen=True, kw_only=True)
class VerificationReport:
    """Every check of every host."""

    checks: tuple[Check, ...]
    seconds: float

    @property
    def failures(self) -> tuple[Check, ...]:
        """The checks that stand against the deployment."""
        return tuple(check for check in self.checks if not check.good)

    @property
    def passed(self) -> bool:
        """Whether everything that was looked at is as it should be."""
        return not self.failures

    @property
    def unreachable(self) -> tuple[str, ...]:
        """Hosts that could not be looked at."""
        return tuple(check.host for check in self.failures if check.check == REACHED)

    @property
    def exit_code(self) -> int:
        """0 when everything passed, 6 when a host could not be reached, 5 otherwise."""
        return 0 if self.passed else 6 if self.unreachable else 5

    def as_dict(self) -> dict[str, Any]:
        """The report for ``--json``."""
        counts = {word: sum(check.outcome == word for check in self.checks) for word in _MARKS}
        return {
            "schema": SCHEMA,
            "passed": self.passed,
            "exit_code": self.exit_code,
            "seconds": round(self.seconds, 2),
            "counts": counts,
            "unreachable": list(self.unreachable),
            "checks": [asdict(check) for check in self.checks],
        }


@dataclass(frozen=True, kw_only=True)
class Expectations:
    """What the suites are told: the deployment, each host's settings and how to connect to it; its facts where they
    were read a moment ago.

    It holds secrets (keys, passwords): as a file it is readable by its owner only, and short-lived.
    """

    deployment: Deployment
    settings: Mapping[str, Mapping[str, Any]] = field(repr=False)
    connections: Mapping[str, Mapping[str, Any]] = field(repr=False)
    facts: Mapping[str, Mapping[str, Any]] = field(default_factory=dict, repr=False)

    def write(self, path: Path) -> None:
        """Write it to a new file of mode 0600."""
        document = {
            "schema": SCHEMA,
            "replicas": [
                {"name": replica.name, "head": replica.head, "workers": replica.workers}
                for replica in self.deployment.replicas
            ],
            "settings": self.settings,
            "connections": self.connections,
            "facts": self.facts,
        }
        path.touch(mode=0o600, exist_ok=False)
        path.write_text(json.dumps(document), encoding="utf-8")

    @staticmethod
    def read(path: Path) -> Expectations:
        """The expectations in a file that `write` made."""
        document = json.loads(path.read_text(encoding="utf-8"))
        replicas = (
            Replica(name=found["name"], head=found["head"], workers=tuple(found["workers"]))
            for found in document["replicas"]
        )
        return Expectations(
            deployment=Deployment(replicas=tuple(replicas)),
            settings=document["settings"],
            connections=document["connections"],
            facts=document["facts"],
        )


def verify(
    deployment: Deployment,
    settings: Mapping[str, Mapping[str, Any]],
    connections: Mapping[str, Mapping[str, Any]],
    *,
    facts: Mapping[str, Mapping[str, Any]] | None = None,
    junit: Path | None = None,
    suites: Path | None = None,
) -> VerificationReport:
    """Run the suites against every host of a deployment.

    Args:
        deployment: the replicas to verify; already narrowed by ``--limit``.
        settings: each host's settings by name, defaults included.
        connections: each host's variables for connecting, see `observation.connections`.
        facts: of hosts that were probed a moment ago and not changed since, what was read.
        junit: where to write the checks as JUnit XML, if anywhere.
        suites: the folder of the suites, where it is not the product's own.

    Raises:
        InternalError: the suites could not be run; that is never taken for a pass.
    """
    expectations = Expectations(
        deployment=deployment,
        settings={host: settings[host] for host in deployment.hosts},
        connections={host: connections[host] for host in deployment.hosts},
        facts={host: found for host, found in (facts or {}).items() if host in deployment.hosts},
    )
    started = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="deploy-dsv3-") as folder:
        checks = _run_suites(expectations, Path(folder), suites or content.testinfra())
    report = VerificationReport(checks=tuple(checks), seconds=time.monotonic() - started)
    if junit:
        write_junit(report, junit)
    return report


def _run_suites(expectations: Expectations, folder: Path, suites: Path) -> list[Check]:
    told, records = folder / "expectations.json", folder / "records.jsonl"
    expectations.write(told)
    argv = [sys.executable, "-m", "pytest", str(suites), f"--rootdir={suites}", "--config-file=/dev/null"]
    argv += [f"--expectations={told}", f"--records={records}", "--quiet", "--tb=line", "--color=no"]
    argv += ["-p", "no:cacheprovider", "-p", "no:logging"]
    # Plugins that happen to be installed have no part in this: they cost time and can change outcomes.
    environment = {**os.environ, "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
    environment.pop("PYTEST_ADDOPTS", None)
    try:
        done = _run_to_its_end(argv, environment)
    except subprocess.TimeoutExpired as error:
        raise InternalError(
            f"verification did not end within {TIMEOUT_S} s",
            remedy="Run `deploy-dsv3 status` to see which host does not answer.",
        ) from error
    lines = records.read_text(encoding="utf-8").splitlines() if records.exists() else []
    found = [json.loads(line) for line in lines]
    # 0 and 1 are pytest's words for "ran to the end"; its own last record says that it did.
    if done.returncode not in (0, 1) or not found or "finished" not in found[-1]:
        raise InternalError(
            f"the verification suites could not be run (pytest exit {done.returncode}): {_tail(done)}",
            remedy="This is a defect of deploy-dsv3 or of its installation; nothing was verified.",
        )
    checks = [Check(**record) for record in found[:-1]]
    if not checks or len(checks) != found[-1]["finished"]:
        raise InternalError(
            f"{len(checks)} of {found[-1]['finished']} checks of the verification suites were recorded",
            remedy="This is a defect of deploy-dsv3 or of its installation; nothing was verified.",
        )
    order = {host: index for index, host in enumerate(expectations.deployment.hosts)}
    return sorted(checks, key=lambda check: order.get(check.host, -1))


def _run_to_its_end(argv: Sequence[str], environment: Mapping[str, str]) -> subprocess.CompletedProcess[str]:
    """Run pytest; whatever ends the wait for it ends it as well, with its connections to the hosts."""
    # In a group of its own, so that all of it can be ended at once.
    with subprocess.Popen(
        argv, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, process_group=0
    ) as process:
        try:
            out, err = process.communicate(timeout=TIMEOUT_S)
        except BaseException:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            raise
    return subprocess.CompletedProcess(argv, process.returncode, out, err)


def _tail(done: subprocess.CompletedProcess[str]) -> str:
    lines = [line for line in (done.stdout + done.stderr).splitlines() if line.strip()]
    return " / ".join(lines[-5:])


def write_junit(report: VerificationReport, path: Path) -> None:
    """Write the checks as JUnit XML: a test suite for each host, a test case for each check."""
    root = ElementTree.Element("testsuites", name="deploy-dsv3 verify")
    for host in dict.fromkeys(check.host for check in report.checks):
        checks = [check for check in report.checks if check.host == host]
        suite = ElementTree.SubElement(
            root,
            "testsuite",
            name=host,
            tests=str(len(checks)),
            failures=str(sum(check.outcome == "failed" for check in checks)),
            errors=str(sum(check.outcome == "error" for check in checks)),
            skipped=str(sum(check.outcome == "skipped" for check in checks)),
            time=f"{sum(check.seconds for check in checks):.3f}",
        )
        for check in checks:
            case = ElementTree.SubElement(
                suite, "testcase", classname=check.suite, name=check.check, time=f"{check.seconds:.3f}"
            )
            if check.outcome != "passed":
                tag = {"failed": "failure"}.get(check.outcome, check.outcome)
                ElementTree.SubElement(case, tag, message=check.message).text = check.message
    ElementTree.indent(root)
    path.parent.mkdir(parents=True, exist_ok=True)
    ElementTree.ElementTree(root).write(path, encoding="utf-8", xml_declaration=True)


def render(report: VerificationReport, stream: TextIO) -> None:
    """Write the report for people: checks down, hosts across, and below it why something did not pass."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    # A file or a pipe has no width of its own.
    console = Console(file=stream, highlight=False, soft_wrap=True, width=None if stream.isatty() else 200)
    hosts = list(dict.fromkeys(check.host for check in report.checks))
    rows: dict[tuple[str, str], dict[str, Check]] = {}
    for check in report.checks:
        rows.setdefault((check.suite, check.check), {})[check.host] = check
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("check")
    for title in hosts if len(hosts) <= _COLUMNS else ("hosts",):
        table.add_column(title, no_wrap=True)
    suite = ""
    for (name, sentence), found in sorted(rows.items(), key=lambda row: _suite_order(row[0][0])):
        if name != suite:
            table.add_row(Text(name, style="bold"))
            suite = name
        if len(hosts) <= _COLUMNS:
            cells = [Text(*_MARKS[found[host].outcome]) if host in found else Text("") for host in hosts]
        else:
            bad = [check.host for check in found.values() if not check.good]
            tally = f"{len(found) - len(bad)}/{len(found)}"
            cells = [Text(f"{tally} {', '.join(bad)}".strip(), style="red" if bad else "green")]
        table.add_row(f"  {sentence}", *cells)
    console.print(table, soft_wrap=False)
    for check in report.failures:
        console.print(Text.assemble((f"\n{check.host}: {check.check}", "bold red")))
        console.print(Text("  " + check.message.replace("\n", "\n  ")))
    bad_count = len(report.failures)
    verdict = f"{bad_count} did not pass" if bad_count else "all passed"
    skipped = sum(check.outcome == "skipped" for check in report.checks)
    verdict += f", {skipped} did not apply" if skipped else ""
    style = "red" if bad_count else "green"
    summary = f"{len(report.checks)} checks on {len(hosts)} hosts in {report.seconds:.1f} s: {verdict}"
    console.print(Text(f"\n{summary}", style=style))


def _suite_order(name: str) -> int:
    order: Sequence[str] = ("host", "container", "ray", "network", "secrets", "endpoint", "service")
    return order.index(name) if name in order else len(order)
