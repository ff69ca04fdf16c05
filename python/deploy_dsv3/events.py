"""Turns ansible-runner's raw events into typed records, and a stream of records into the outcome of a run.

A stage is the part before the colon of a play's name (``"ray: form the cluster"``). What a failure *means* is
worked out here: its message, the first host and task it happened on (with ``any_errors_fatal`` Ansible stops
the other hosts as well: those are echoes), the likely cause, the remedy, and the exit code.
"""

from __future__ import annotations

import json
import re
import time as clock
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from datetime import datetime
from typing import TYPE_CHECKING, Any

from deploy_dsv3 import runbook
from deploy_dsv3.causes import diagnose
from deploy_dsv3.findings import Finding

if TYPE_CHECKING:
    from deploy_dsv3.signatures import Match

#: Stages of a deployment in their order; `verify` runs after the playbook, in Python.
STAGES = runbook.STAGES

# That a group of the convention is not used by this inventory, and what Ansible does to every new host.
_NOISE = (
    "Could not match supplied host pattern",
    "No inventory was parsed",
    "provided hosts list is empty",
    "Module remote_tmp ",
)
#: Key of a result that carries findings of ours (preflight's action plugin).
FINDINGS_KEY = "dsv3_findings"
#: Code of the finding of a lock that another run holds (playbooks/action_plugins/dsv3_lock.py).
LOCKED = "locked"
#: Key of ``ansible.builtin.set_stats`` under which a playbook hands results to the report.
REPORT_KEY = "dsv3_report"


@dataclass(frozen=True, kw_only=True)
class Record:
    """Base of all records; `time` is seconds since the epoch, `stage` the play's stage."""

    time: float
    stage: str = ""


@dataclass(frozen=True, kw_only=True)
class StageStarted(Record):
    """A play began; several plays may belong to one stage."""

    title: str


@dataclass(frozen=True, kw_only=True)
class TaskStarted(Record):
    """A task or handler began, on all hosts of its play (on one, with the ``free`` strategy)."""

    task: str
    role: str = ""
    handler: bool = False


@dataclass(frozen=True, kw_only=True)
class HostRecord(Record):
    """Base of what happens to one task on one host."""

    host: str
    task: str


@dataclass(frozen=True, kw_only=True)
class HostStarted(HostRecord):
    """A host began a task."""


@dataclass(frozen=True, kw_only=True)
class HostOk(HostRecord):
    """A task succeeded and changed nothing."""

    findings: tuple[Finding, ...] = ()


@dataclass(frozen=True, kw_only=True)
class HostChanged(HostOk):
    """A task succeeded and changed something (would change it, in check mode)."""


@dataclass(frozen=True, kw_only=True)
class HostSkipped(HostRecord):
    """A task did not apply."""


@dataclass(frozen=True, kw_only=True)
class HostRetried(HostRecord):
    """A task with ``until`` is tried again; `detail` is what it waits for, as far as the result tells."""

    attempt: int
    attempts: int
    detail: str = ""


@dataclass(frozen=True, kw_only=True)
class Failure:
    """Why a host failed.

    Attributes:
        host, stage, task, role: where.
        code: stable name of the cause, e.g. ``sudo-password-wrong``; ``task-failed`` if it is none of the
            known ones.
        message: what was found, the module's own words.
        cause: the likely cause, in a sentence; empty if unknown.
        remedy: what to do; empty if unknown.
        page: file and anchor of the runbook that says more.
        unreachable: whether the host could not be reached or logged into.
        findings: all findings of ours in the result.
    """

    host: str
    stage: str
    task: str
    role: str = ""
    code: str = "task-failed"
    message: str
    cause: str = ""
    remedy: str = ""
    page: str = ""
    unreachable: bool = False
    findings: tuple[Finding, ...] = ()

    def as_dict(self) -> dict[str, Any]:
        """The failure for ``--json``."""
        return asdict(self)


@dataclass(frozen=True, kw_only=True)
class HostFailed(HostRecord):
    """A task failed; `ignored` if the playbook goes on regardless."""

    failure: Failure
    ignored: bool = False


@dataclass(frozen=True, kw_only=True)
class HostUnreachable(HostRecord):
    """A host could not be reached."""

    failure: Failure


@dataclass(frozen=True, kw_only=True)
class Warned(Record):
    """A warning of Ansible's."""

    message: str


@dataclass(frozen=True, kw_only=True)
class HostStats:
    """Counts of tasks on one host, as in Ansible's recap."""

    ok: int = 0
    changed: int = 0
    failed: int = 0
    unreachable: int = 0
    skipped: int = 0
    rescued: int = 0
    ignored: int = 0


@dataclass(frozen=True, kw_only=True)
class Finished(Record):
    """The playbook ended; `report` is what it handed over with ``set_stats``."""

    hosts: Mapping[str, HostStats]
    report: Mapping[str, Any] = field(default_factory=dict)


class Translator:
    """Turns raw events, in their order, into records."""

    def __init__(self) -> None:
        self._stage = ""

    def translate(self, event: Mapping[str, Any]) -> Iterator[Record]:
        """Yield the records of one raw event of ansible-runner; none for those that say nothing."""
        data = event.get("event_data") or {}
        time = _time(event)
        kind = event.get("event")
        if kind == "playbook_on_play_start":
            name = str(data.get("name", ""))
            stage, found, title = name.partition(":")
            self._stage = stage.strip().lower() if found else ""
            yield StageStarted(time=time, stage=self._stage, title=(title if found else name).strip())
        elif kind == "playbook_on_task_start":
            yield TaskStarted(
                time=time,
                stage=self._stage,
                task=_task(data),
                role=str(data.get("role") or ""),
                handler=bool(data.get("is_conditional")),
            )
        elif kind == "playbook_on_stats":
            yield _finished(time, data)
        elif kind in ("warning", "system_warning"):
            message = _warning(str(event.get("stdout", "")))
            if message:
                yield Warned(time=time, stage=self._stage, message=message)
        elif data.get("host"):
            yield from self._host_event(kind, time, data)

    def _host_event(self, kind: Any, time: float, data: Mapping[str, Any]) -> Iterator[Record]:
        common: dict[str, Any] = {
            "time": time,
            "stage": self._stage,
            "host": str(data["host"]),
            "task": _task(data),
        }
        result = data.get("res") or {}
        if kind == "runner_on_start":
            yield HostStarted(**common)
        elif kind == "runner_on_ok":
            record = HostChanged if result.get("changed") else HostOk
            yield record(**common, findings=_findings(result, common["host"]))
        elif kind == "runner_on_skipped":
            yield HostSkipped(**common)
        elif kind == "runner_retry":
            yield HostRetried(
                **common,
                attempt=int(result.get("attempts", 0)),
                attempts=int(result.get("retries", 0)),
                detail=wait_detail(result),
            )
        elif kind in ("runner_on_failed", "runner_on_async_failed"):
            yield HostFailed(
                **common,
                failure=self._failure(data, result, unreachable=False),
                ignored=bool(data.get("ignore_errors")),
            )
        elif kind == "runner_on_unreachable":
            yield HostUnreachable(**common, failure=self._failure(data, result, unreachable=True))

    def _failure(self, data: Mapping[str, Any], result: Mapping[str, Any], *, unreachable: bool) -> Failure:
        host = str(data["host"])
        findings = _findings(result, host)
        whole = failure_message(result)
        message, cause, remedy = told(whole)
        failure = Failure(
            host=host,
            stage=self._stage,
            task=_task(data),
            role=str(data.get("role") or ""),
            code="unreachable" if unreachable else "task-failed",
            message=message,
            cause=cause,
            remedy=remedy,
            page=runbook.stage_page(self._stage),
            unreachable=unreachable,
            findings=findings,
        )
        said = f"{whole}\n{result.get('module_stderr', '')}\n{result.get('module_stdout', '')}"
        known = diagnose(said, connected=not unreachable)
        if known:
            return replace(
                failure,
                code=known.code,
                cause=known.cause,
                remedy=known.remedy.replace("HOST", host),
                page=known.page,
                unreachable=unreachable or known.unreachable,
            )
        own = [finding for finding in findings if finding.severity == "error"]
        if own:
            page = runbook.LOCK if own[0].code == LOCKED else runbook.FINDINGS
            return replace(failure, code=own[0].code, cause=own[0].cause, remedy=own[0].remedy, page=page)
        return recognised(failure)


def wait_detail(result: Mapping[str, Any]) -> str:
    """What a task that is tried again waits for, in a few words; empty if its result does not say.

    Understands a module's ``progress``, and what the launcher prints: its status and Ray's nodes.
    """
    if isinstance(result.get("progress"), str):
        return str(result["progress"])
    try:
        seen = json.loads(str(result.get("stdout", "")))
    except ValueError:
        return ""
    if isinstance(seen, Mapping) and isinstance(seen.get("phase"), str):
        return ": ".join(filter(None, (seen["phase"], str(seen.get("message") or ""))))
    if isinstance(seen, list) and all(isinstance(node, Mapping) and "gpus" in node for node in seen):
        alive = [node for node in seen if node.get("alive")]
        return f"{len(alive)} nodes with {sum(int(node['gpus']) for node in alive)} GPUs so far"
    return ""


def told(message: str) -> tuple[str, str, str]:
    """Found, cause and remedy of a message of ours.

    Roles and plugins write "FOUND. Likely cause: CAUSE. Remedy: REMEDY" (or the remedy without its word), so
    that plain ansible-playbook tells all of it. A message of another shape is all found.
    """
    found, marker, rest = message.partition("Likely cause:")
    if not marker:
        found, _, remedy = message.partition("Remedy:")
        return found.strip(), "", remedy.strip()
    cause, marker, remedy = rest.partition("Remedy:")
    if not marker:
        cause, _, remedy = rest.partition(". ")
    return found.strip(), cause.strip().rstrip("."), remedy.strip()


def recognised(failure: Failure) -> Failure:
    """The failure with the cause that a line of the engine's log in its message is known for."""
    from deploy_dsv3 import signatures

    match = signatures.first_cause(failure.message.splitlines())
    return explained(failure, match) if match else failure


def explained(failure: Failure, match: Match) -> Failure:
    """The failure with the cause that a line of a log tells."""
    known = match.signature
    return replace(failure, code=known.id, cause=known.cause, remedy=known.remedy, page=known.page)


def failure_message(result: Mapping[str, Any]) -> str:
    """The most telling words of a module's failed result."""
    if "censored" in result:
        return "the task failed; its output is hidden because it handles secrets"
    parts: list[str] = []
    items = [item for item in result.get("results") or [] if isinstance(item, Mapping) and item.get("failed")]
    message = _text(result.get("msg"))
    if items and (not message or message.startswith("One or more items failed") or message == "All items completed"):
        for item in items:
            label = item.get("_ansible_item_label", item.get("item", ""))
            parts.append(f"{_text(label)}: {failure_message(item)}" if label else failure_message(item))
        return "\n".join(parts)
    if message:
        parts.append(message)
    # "MODULE FAILURE", "non-zero return code": the words that matter are elsewhere.
    if not message or re.match(r"(MODULE FAILURE|non-zero return code|Module result deserialization failed)", message):
        for key in ("stderr", "module_stderr", "stdout", "module_stdout"):
            text = _text(result.get(key))
            if text:
                parts.append(_tail(text))
                break
    return "\n".join(parts) or "the task failed and said nothing"


@dataclass
class Outcome:
    """What a run came to, gathered from its records.

    Attributes:
        failures: failures that ended a host, in the order they happened.
        warnings: findings of severity ``warning`` and warnings of Ansible's, each once.
        stages: seconds spent in each stage, in order.
        hosts: the recap; empty if the playbook never ended.
        report: what the playbook handed over.
    """

    failures: list[Failure] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    findings: list[Finding] = field(default_factory=list)
    stages: dict[str, float] = field(default_factory=dict)
    hosts: dict[str, HostStats] = field(default_factory=dict)
    report: dict[str, Any] = field(default_factory=dict)
    finished: bool = False
    _open: tuple[str, float] | None = None
    _rescued: list[Failure] = field(default_factory=list)

    def add(self, record: Record) -> None:
        """Take one record into account."""
        match record:
            case StageStarted():
                self._switch(record.stage or record.title, record.time)
            case HostStarted():
                # Ansible runs nothing more on a failed host: what runs again was rescued.
                for failure in [f for f in self.failures if f.host == record.host]:
                    self.failures.remove(failure)
                    self._rescued.append(failure)
            case HostFailed(ignored=False) | HostUnreachable():
                self.failures.append(record.failure)
                self._note(record.failure.findings)
            case HostOk():
                self._note(record.findings)
            case Warned():
                if record.message not in self.warnings and not self._is_finding(record.message):
                    self.warnings.append(record.message)
            case Finished():
                self._switch("", record.time)
                self.finished = True
                self.hosts = dict(record.hosts)
                self.report = dict(record.report)
                self._settle()

    def close(self, time: float) -> None:
        """End the stage that is open."""
        self._switch("", time)

    @property
    def first(self) -> Failure | None:
        """The failure that the run is judged by."""
        return self.failures[0] if self.failures else None

    @property
    def exit_code(self) -> int:
        """0, or the code of the first failure: 6 unreachable, 7 locked, 3 preflight, 5 verify, 4 any other."""
        first = self.first
        if first is None:
            return 0
        if first.unreachable:
            return 6
        if first.code == LOCKED:
            return 7
        return {"preflight": 3, "verify": 5}.get(first.stage, 4)

    def _switch(self, stage: str, time: float) -> None:
        if self._open:
            name, since = self._open
            self.stages[name] = self.stages.get(name, 0.0) + max(0.0, time - since)
        self._open = (stage, time) if stage else None

    def _note(self, findings: Sequence[Finding]) -> None:
        self.findings.extend(finding for finding in findings if finding not in self.findings)
        self.warnings = [warning for warning in self.warnings if not self._is_finding(warning)]

    def _is_finding(self, warning: str) -> bool:
        """Whether a warning of Ansible's repeats a finding, which plain ansible-playbook shows no other way."""
        return any(" ".join(finding.message.split()) in warning for finding in self.findings)

    def _settle(self) -> None:
        """Keep the failures of hosts that the recap calls failed; those may have failed once rescued."""
        failed = {host for host, stats in self.hosts.items() if stats.failed or stats.unreachable}
        self.failures = [failure for failure in self.failures if failure.host in failed]
        for host in failed - {failure.host for failure in self.failures}:
            last = [failure for failure in self._rescued if failure.host == host][-1:]
            self.failures.extend(last)


def _time(event: Mapping[str, Any]) -> float:
    try:
        return datetime.fromisoformat(str(event["created"])).timestamp()
    except (KeyError, ValueError):
        return clock.time()


def _task(data: Mapping[str, Any]) -> str:
    name = str(data.get("task") or data.get("name") or "")
    role = str(data.get("role") or "")
    return name.removeprefix(f"{role} : ") if role else name


def _findings(result: Mapping[str, Any], host: str) -> tuple[Finding, ...]:
    raw = result.get(FINDINGS_KEY)
    if not isinstance(raw, list):
        return ()
    return tuple(
        Finding(
            code=str(item.get("code", "")),
            host=str(item.get("host") or host),
            severity="warning" if item.get("severity") == "warning" else "error",
            message=str(item.get("message", "")),
            cause=str(item.get("cause", "")),
            remedy=str(item.get("remedy", "")),
        )
        for item in raw
        if isinstance(item, Mapping)
    )


def _finished(time: float, data: Mapping[str, Any]) -> Finished:
    columns = {
        "ok": "ok",
        "changed": "changed",
        "failed": "failures",
        "unreachable": "dark",
        "skipped": "skipped",
        "rescued": "rescued",
        "ignored": "ignored",
    }

    def count(column: str, host: str) -> int:
        values = data.get(column)
        return int(values.get(host, 0)) if isinstance(values, Mapping) else 0

    processed = data.get("processed")
    hosts = processed if isinstance(processed, Mapping) else {}
    artifacts = data.get("artifact_data")
    report = artifacts.get(REPORT_KEY) if isinstance(artifacts, Mapping) else None
    return Finished(
        time=time,
        hosts={host: HostStats(**{name: count(column, host) for name, column in columns.items()}) for host in hosts},
        report=report if isinstance(report, Mapping) else {},
    )


def _warning(stdout: str) -> str:
    text = re.sub(r"\x1b\[[0-9;]*m", "", stdout).strip()
    text = " ".join(text.removeprefix("[WARNING]:").split())
    if text.startswith(_NOISE):
        return ""
    return text


def _text(value: Any) -> str:
    if isinstance(value, str):
        return value.strip()
    if isinstance(value, list):
        return "\n".join(_text(item) for item in value)
    return "" if value is None else str(value)


def _tail(text: str, lines: int = 20) -> str:
    return "\n".join(text.strip().splitlines()[-lines:])
