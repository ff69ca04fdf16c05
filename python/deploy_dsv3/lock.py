"""One run at a time: the lock of a deployment on its heads, taken by a play and kept alive from here.

The playbook takes it (`playbooks/lock.yml`) once preflight has shown that the hosts can be reached, and before
anything is changed; plain `ansible-playbook` takes it as well. Here is who a holder is, how it is told that one
has died, and the thread that gives signs of life while a run lasts. A lock is taken over without asking only

- when its holder was a process of this very system (same boot, same process namespace) that is gone, or
- when it has given no sign of life for as long as it promised to (`EXPIRES_S`).

Everything else is `deploy-dsv3 unlock`, a person's decision.
"""

from __future__ import annotations

import getpass
import os
import socket
import threading
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from deploy_dsv3 import observation
from deploy_dsv3.events import LOCKED, HostChanged, HostOk, Record
from deploy_dsv3.findings import Finding

#: Time between two signs of life [seconds].
HEARTBEAT_S = 30.0
#: After this long without one a lock is stale [seconds]: several signs may get lost, or a laptop sleep shortly.
EXPIRES_S = 300.0
#: The same for a run of plain ansible-playbook, which gives no signs [seconds].
EXPIRES_ALONE_S = 4 * 3600.0

#: The task that takes the lock, see playbooks/lock.yml.
TASK = "Take the deployment's lock"

_PROC = Path("/proc")


@dataclass(frozen=True, kw_only=True)
class Holder:
    """The run that holds a lock.

    Attributes:
        run: the run's id.
        verb: what it does.
        who: the user.
        host: the machine that it runs on.
        boot: boot ID of that machine.
        namespace: process namespace, as pids are told apart by.
        pid: process ID of the run.
        started: start time of that process [clock ticks since boot]: pids are used again.
        expires_s: longest time between two signs of life [seconds].
    """

    run: str
    verb: str
    who: str
    host: str
    boot: str
    namespace: str
    pid: int
    started: int
    expires_s: float

    def as_dict(self) -> dict[str, Any]:
        """The holder as it is kept in the lock."""
        return asdict(self)


def holder(run: str, verb: str, *, pid: int | None = None, expires_s: float = EXPIRES_S) -> Holder:
    """A holder for a process of this machine, by default this one."""
    pid = os.getpid() if pid is None else pid
    return Holder(
        run=run,
        verb=verb,
        who=os.environ.get("SUDO_USER") or _user(),
        host=socket.gethostname(),
        boot=_boot(),
        namespace=_namespace(),
        pid=pid,
        started=_started(pid),
        expires_s=expires_s,
    )


def is_dead(known: Mapping[str, Any]) -> bool:
    """Whether the holder of a lock is certainly gone: a process of this very system that no longer runs."""
    pid, started = known.get("pid"), known.get("started")
    if not (isinstance(pid, int) and isinstance(started, int) and started):
        return False
    if not known.get("boot") or (known.get("boot"), known.get("namespace")) != (_boot(), _namespace()):
        return False
    return _started(pid) != started


def refusal(host: str, known: Mapping[str, Any]) -> Finding:
    """What to tell somebody who meets a lock.

    Args:
        host: the head that has it.
        known: its holder, with ``silent_s`` as the head tells it.
    """
    who = f"{known.get('who') or 'somebody'} on {known.get('host') or 'an unknown machine'}"
    doing = f"{known.get('verb') or 'run'} {known.get('run') or ''}".strip()
    silent, expires = float(known.get("silent_s") or 0), float(known.get("expires_s") or 0)
    return Finding(
        code=LOCKED,
        host=host,
        severity="error",
        message=f"{host}: the deployment is locked by {who} ({doing}, process {known.get('pid') or 'unknown'}, "
        f"last sign of life {silent:.0f} s ago)",
        cause="another run changes this deployment now, or one was killed on another machine",
        remedy=f"Wait for it. A run that is gone loses the lock {max(0.0, expires - silent):.0f} s from now; "
        "if you know that it is gone: deploy-dsv3 unlock.",
    )


class Keeper:
    """Keeps the lock of a run alive while it lasts, and gives it back with the run's line of history.

    Args:
        mine: the run.
        connections: each head's variables for connecting.
        locks: whether the run takes the lock; one that only looks leaves its line of history all the same.
    """

    def __init__(self, mine: Holder, connections: Mapping[str, Mapping[str, Any]], *, locks: bool = True) -> None:
        self._mine = mine
        self._connections = connections
        self._locks = locks
        self._held: list[str] = []
        self._changed = False
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._beat, name="lock", daemon=True)
        #: The run's line of history.
        self.entry: dict[str, Any] = {}
        #: Whether the history goes with the deployment.
        self.forget = False
        #: What went wrong with the lock, for the operator.
        self.problems: list[str] = []

    def watch(self, record: Record) -> None:
        """Notice where the run has taken the lock, and whether it has changed anything."""
        if isinstance(record, HostOk) and record.task == TASK and record.host not in self._held:
            self._held.append(record.host)
        self._changed = self._changed or isinstance(record, HostChanged)

    def __enter__(self) -> Keeper:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()
        request = {"do": "release", "entry": self.entry, "keep": self._changed, "forget": self.forget}
        if self._held:
            self._note(self._ask(request), "the lock could not be given back; it is stale in a few minutes")
        elif not self._locks and self.entry:
            self._held = list(self._connections)
            self._ask(request)

    def _beat(self) -> None:
        while not self._over.wait(HEARTBEAT_S):
            if self._held:
                self._note(self._ask({"do": "refresh"}), "the lock was lost during the run")

    def _ask(self, request: Mapping[str, Any]) -> dict[str, observation.Observation]:
        heads = {host: self._connections[host] for host in self._held if host in self._connections}
        return ask(heads, {**request, "holder": self._mine.as_dict()})

    def _note(self, answers: Mapping[str, observation.Observation], problem: str) -> None:
        for host, answer in answers.items():
            text = f"{host}: {problem}" + (f" ({answer.error})" if answer.error else "")
            if not answer.seen.get("done") and text not in self.problems:
                self.problems.append(text)


def ask(connections: Mapping[str, Mapping[str, Any]], request: Mapping[str, Any]) -> dict[str, observation.Observation]:
    """Have the module `dsv3_lock` do something on each of these heads; its answer is what was seen."""
    command = observation.carried(observation.module("dsv3_lock"), "apply", request)
    return observation.ask(connections, dict.fromkeys(connections, command))


def _user() -> str:
    with suppress(OSError, KeyError):
        return getpass.getuser()
    return str(os.getuid())


def _boot() -> str:
    with suppress(OSError):
        return (_PROC / "sys/kernel/random/boot_id").read_text().strip()
    return ""


def _namespace() -> str:
    with suppress(OSError):
        return str((_PROC / "self/ns/pid").readlink())
    return ""


def _started(pid: int) -> int:
    """Start time of a process [clock ticks since boot] (proc(5), field 22 of stat); 0 where it does not run."""
    with suppress(OSError, ValueError, IndexError):
        # The name, in parentheses, may hold blanks; the third field follows it.
        fields = (_PROC / str(pid) / "stat").read_text().rpartition(")")[2].split()
        return 0 if fields[0] in "ZX" else int(fields[19])
    return 0
