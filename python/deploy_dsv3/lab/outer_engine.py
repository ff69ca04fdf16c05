"""The Docker engine that holds the lab's containers: one that is there, or a private one that the lab starts.

A running engine is used when it can carry hosts (same kernel, root, a storage that nests). Otherwise the
lab starts a dockerd of its own, with its own data, sockets and log, beside anything else; only that one
is ever stopped.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

from . import machine, prerequisites, shell
from .docker_cli import DockerCli
from .errors import LabError
from .paths import CACHE_VARIABLE, LabPaths

Choice = Literal["auto", "running", "private"]

_START_TIMEOUT_S = 60.0
_STOP_TIMEOUT_S = 40.0
_FORWARDING = Path("/proc/sys/net/ipv4/ip_forward")


class OuterEngine(Protocol):
    """A Docker engine for the lab's containers."""

    @property
    def docker(self) -> DockerCli:
        """How to speak to it."""

    def describe(self) -> str:
        """A few words for the operator."""

    def ensure(self) -> None:
        """Have it running."""

    def stop(self) -> None:
        """Stop it, if the lab started it."""


@dataclass(frozen=True, kw_only=True)
class RunningEngine:
    """An engine that somebody else runs."""

    host: str

    @property
    def docker(self) -> DockerCli:
        return DockerCli(host=self.host)

    def describe(self) -> str:
        return f"the running Docker engine at {self.host}"

    def ensure(self) -> None:
        if self.docker.info() is None:
            raise LabError(
                f"the Docker engine at {self.host} that carries the lab does not answer any more",
                remedy="Start it again: the lab's containers are in it.",
            )

    def stop(self) -> None:
        """Not ours to stop."""


@dataclass(frozen=True, kw_only=True)
class PrivateEngine:
    """A dockerd that the lab starts and stops."""

    paths: LabPaths

    @property
    def socket(self) -> Path:
        return self.paths.runtime / "docker.sock"

    @property
    def log(self) -> Path:
        return self.paths.state / "dockerd.log"

    @property
    def docker(self) -> DockerCli:
        return DockerCli(host=f"unix://{self.socket}")

    def describe(self) -> str:
        return "a private Docker engine"

    def command(self) -> list[str]:
        """How it is started."""
        return [
            shell.which("dockerd") or "dockerd",
            f"--data-root={self.paths.cache / 'docker'}",
            f"--exec-root={self.paths.runtime / 'exec'}",
            f"--pidfile={self.paths.runtime / 'docker.pid'}",
            f"--host=unix://{self.socket}",
            f"--group={os.getgid()}",
            "--bridge=none",  # docker0 may be another engine's; labs bring networks of their own
            "--storage-driver=overlay2",
        ]

    def pid(self) -> int | None:
        """The process, if it runs and is really this engine."""
        pidfile = self.paths.runtime / "docker.pid"
        try:
            pid = int(pidfile.read_text())
            command = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
        except (OSError, ValueError):
            return None
        return pid if f"--pidfile={pidfile}".encode() in command else None

    def ensure(self) -> None:
        if self.pid() and self.docker.info():
            return
        prerequisites.have("dockerd", "docker", "iptables")
        for folder in (self.paths.state, self.paths.cache / "docker"):
            folder.mkdir(parents=True, exist_ok=True)
        shell.run(shell.as_root(["mkdir", "--parents", str(self.paths.runtime)]))
        self._forget_dead()
        self._remember_forwarding()
        with self.log.open("ab") as log:
            process = subprocess.Popen(
                shell.as_root(self.command()),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,  # Ctrl-C in the terminal is not meant for it
            )
        deadline = time.monotonic() + _START_TIMEOUT_S
        while self.docker.info() is None:
            if process.poll() is not None or time.monotonic() > deadline:
                tail = "\n".join(self.log.read_text(errors="replace").splitlines()[-8:])
                raise LabError(
                    f"the private Docker engine did not start:\n{tail}",
                    remedy=f"Its log is {self.log}. It needs iptables, and its data ({self.paths.cache}) on a file "
                    f"system that carries overlayfs, such as ext4 or xfs: {CACHE_VARIABLE} names another folder.",
                )
            time.sleep(0.2)

    def stop(self) -> None:
        self._end_process()
        self._restore_forwarding()
        mounts = [Path(line.split()[1]) for line in Path("/proc/self/mounts").read_text().splitlines()]
        for mount in reversed(mounts):  # what a dockerd leaves behind, above all one that was killed
            if mount.is_relative_to(self.paths.runtime) or mount.is_relative_to(self.paths.cache / "docker"):
                shell.run(shell.as_root(["umount", "--lazy", str(mount)]))
        shell.run(shell.as_root(["rm", "--recursive", "--force", str(self.paths.runtime)]))

    def _end_process(self) -> None:
        pid = self.pid()
        if pid is None:
            return
        shell.run(shell.as_root(["kill", f"-{signal.SIGTERM.value}", str(pid)]))
        deadline = time.monotonic() + _STOP_TIMEOUT_S
        while self.pid() is not None:
            if time.monotonic() > deadline:
                raise LabError(
                    f"the private Docker engine (process {pid}) does not end",
                    remedy=f"Look at {self.log}; then end the process yourself and run `lab down` again.",
                )
            time.sleep(0.1)

    def _forget_dead(self) -> None:
        # A dockerd that was killed leaves PID files; where PID 1 does not reap, their processes still "exist".
        stale = [self.paths.runtime / "docker.pid"]
        containerd = self.paths.runtime / "exec" / "containerd"
        if not _runs(str(containerd / "containerd.toml")):
            stale.append(containerd / "containerd.pid")
        shell.run(shell.as_root(["rm", "--force", *map(str, stale)]))

    # dockerd switches the machine's forwarding on, and does not switch it off again.

    def _remember_forwarding(self) -> None:
        record = self.paths.state / "forwarding.json"
        if record.exists():
            return
        rules = shell.run(shell.as_root([shell.which("iptables") or "iptables", "-S", "FORWARD"])).stdout
        found = {"enabled": _FORWARDING.read_text().strip(), "policy": rules.split()[2]}
        record.write_text(json.dumps(found) + "\n")

    def _restore_forwarding(self) -> None:
        record = self.paths.state / "forwarding.json"
        found = json.loads(record.read_text()) if record.exists() else {}
        if found.get("enabled") == "0":  # nobody else forwarded before, so nobody relies on it now
            shell.run(shell.as_root(["sysctl", "-q", "-w", "net.ipv4.ip_forward=0"]))
            shell.run(shell.as_root([shell.which("iptables") or "iptables", "-P", "FORWARD", found["policy"]]))
        record.unlink(missing_ok=True)


def _runs(argument: str) -> bool:
    """Whether a live process has this among its arguments."""
    for entry in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            if argument.encode() in entry.read_bytes().split(b"\0"):
                return True
    return False


def choose(paths: LabPaths, choice: Choice = "auto") -> OuterEngine:
    """The engine that carries the labs of `paths`; the same one as before while it has labs.

    Raises:
        LabError: `running` was asked for and no engine can do it.
    """
    remembered = recall(paths)
    if remembered is not None:
        return remembered
    host = os.environ.get("DOCKER_HOST") or "unix:///var/run/docker.sock"
    info = DockerCli(host=host).info() if choice != "private" else None
    refusal = refuse(host, info) if choice != "private" else "not asked for"
    if not refusal:
        return RunningEngine(host=host)
    if choice == "running":
        raise LabError(f"the Docker engine at {host} cannot carry the lab: {refusal}", remedy="Use --engine private.")
    return PrivateEngine(paths=paths)


def refuse(host: str, info: dict[str, Any] | None) -> str:
    """Why an engine cannot carry hosts with systemd and a Docker of their own; empty if it can.

    Args:
        info: answer of ``docker info``, None if there was none.
    """
    if info is None:
        return "no engine answers"
    if not host.startswith("unix://"):
        return "it is on another machine"
    if info.get("OSType") != "linux" or info.get("KernelVersion") != machine.kernel_release():
        return "it runs on another kernel than this command (a virtual machine)"
    if any("rootless" in option or "userns" in option for option in info.get("SecurityOptions") or []):
        return "it runs without root or with remapped users"
    backing = dict(info.get("DriverStatus") or []).get("Backing Filesystem", "")
    if backing in ("overlayfs", "aufs"):
        return f"its storage is on {backing}, which cannot carry a Docker inside"
    return ""


def remember(paths: LabPaths, engine: OuterEngine) -> None:
    """Record which engine carries the labs."""
    paths.state.mkdir(parents=True, exist_ok=True, mode=0o700)
    record = asdict(engine) if isinstance(engine, RunningEngine) else {"private": True}
    (paths.state / "engine.json").write_text(json.dumps(record) + "\n")


def recall(paths: LabPaths) -> OuterEngine | None:
    """The engine recorded for these labs, if any."""
    record = paths.state / "engine.json"
    if not record.is_file():
        return None
    fields = json.loads(record.read_text())
    return PrivateEngine(paths=paths) if fields.get("private") else RunningEngine(host=fields["host"])
