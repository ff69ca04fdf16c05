"""A Docker daemon, spoken to through its own command line."""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from subprocess import CompletedProcess
from typing import Any

from . import shell
from .errors import LabError

_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"


@dataclass(frozen=True, kw_only=True)
class DockerCli:
    """The daemon at one address (``unix://…``)."""

    host: str

    def run(
        self, *arguments: str, stdin: bytes | None = None, check: bool = True, timeout_s: float | None = None
    ) -> CompletedProcess[str]:
        """``docker ARGUMENTS``.

        Raises:
            LabError: it failed, or ran longer than `timeout_s`.
        """
        # The classic builder and CLI speak to every daemon since 20.10 without plugins.
        environment = {"DOCKER_HOST": self.host, "DOCKER_CLI_HINTS": "false"}
        return shell.run(["docker", *arguments], stdin=stdin, environment=environment, check=check, timeout_s=timeout_s)

    def info(self) -> dict[str, Any] | None:
        """``docker info``, or None if no daemon answers."""
        if shell.which("docker") is None:
            return None
        try:
            done = self.run("info", "--format", "{{json .}}", check=False, timeout_s=20)
            answer: dict[str, Any] = json.loads(done.stdout or "{}")
        except (LabError, json.JSONDecodeError):
            return None
        return answer if answer.get("ServerVersion") and not answer.get("ServerErrors") else None

    def inspect(self, kind: str, name: str) -> dict[str, Any] | None:
        """``docker inspect`` of one object, or None if it does not exist."""
        done = self.run("inspect", "--type", kind, name, check=False)
        if done.returncode != 0:
            return None
        objects: list[dict[str, Any]] = json.loads(done.stdout)
        return objects[0]

    def container_names(self, labels: Mapping[str, str]) -> list[str]:
        """Containers, running or not, that carry all of these labels."""
        filters = [f"--filter=label={name}={value}" for name, value in labels.items()]
        return self.run("ps", "--all", "--format", "{{.Names}}", *filters).stdout.split()

    def volume_names(self, labels: Mapping[str, str]) -> list[str]:
        """Volumes that carry all of these labels."""
        filters = [f"--filter=label={name}={value}" for name, value in labels.items()]
        return self.run("volume", "ls", "--quiet", *filters).stdout.split()

    def inside(
        self, container: str, argv: Sequence[str], *, stdin: bytes | None = None, check: bool = True
    ) -> CompletedProcess[str]:
        """Run a command as root in the namespaces of a running container.

        Not ``docker exec``: beside cgroup v1 controllers that fails once the systemd inside has made the
        container's cgroup an inner node ("device or resource busy").
        """
        found = self.inspect("container", container)
        pid = found["State"]["Pid"] if found else 0
        if not pid:
            raise LabError(f"the container {container} does not run", remedy="Start the host, or `lab up` again.")
        enter = ["nsenter", f"--target={pid}", "--mount", "--uts", "--ipc", "--net", "--pid"]
        clean = ["env", "--ignore-environment", f"PATH={_PATH}", "HOME=/root", "LANG=C.UTF-8"]
        return shell.run(shell.as_root([*enter, *clean, *argv]), stdin=stdin, check=check)

    def copy_in(self, container: str, files: Mapping[str, File]) -> None:
        """Put files into a container, running or not.

        Args:
            files: absolute path to content.
        """
        self.run("cp", "-", f"{container}:/", stdin=archive(files))

    def extend(self, base: str, tag: str, script: str, files: Mapping[str, File], changes: Sequence[str] = ()) -> None:
        """Make image `tag` from `base`: lay down files, run a script as root, keep the result."""
        name = f"dsv3-build-{tag.replace('/', '-').replace(':', '-')}"
        self.run("rm", "--force", name, check=False)
        self.run("create", f"--name={name}", "--network=host", "--interactive", base, "/bin/sh", "-eu")
        try:
            self.copy_in(name, files)
            self.run("start", "--attach", "--interactive", name, stdin=script.encode())
            self.run("commit", *(f"--change={change}" for change in changes), name, tag)
        finally:
            self.run("rm", "--force", name, check=False)


@dataclass(frozen=True, kw_only=True)
class File:
    """Content of a file to lay down, with its rights; owned by root unless told otherwise."""

    content: bytes
    mode: int = 0o644
    uid: int = 0
    gid: int = 0


def archive(files: Mapping[str, File]) -> bytes:
    """A tar of these files, ready for ``docker cp -``."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        for path, file in sorted(files.items()):
            entry = tarfile.TarInfo(path.lstrip("/"))
            entry.size, entry.mode, entry.uid, entry.gid = len(file.content), file.mode, file.uid, file.gid
            tar.addfile(entry, io.BytesIO(file.content))
    return buffer.getvalue()


def tree(root: Path) -> dict[str, File]:
    """Files below a folder as they belong below ``/``; a file that can be executed stays so."""
    return {
        f"/{path.relative_to(root)}": File(
            content=path.read_bytes(), mode=0o755 if path.read_bytes().startswith(b"#!") else 0o644
        )
        for path in sorted(root.rglob("*"))
        if path.is_file() and "__pycache__" not in path.parts
    }
