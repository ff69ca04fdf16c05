"""Commands that the lab needs on the machine, installed from its own package mirror when missing."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

from . import shell
from .errors import LabError

#: Command to the package of Debian and Ubuntu that brings it.
_PACKAGES = {
    "dockerd": "docker.io",
    "docker": "docker.io",
    "iptables": "iptables",
    "ip": "iproute2",
    "debootstrap": "debootstrap",
    "ssh-keygen": "openssh-client",
}
_POLICY = Path("/usr/sbin/policy-rc.d")


def have(*commands: str) -> None:
    """Have these commands installed; starts no service.

    Raises:
        LabError: one is missing and cannot be installed.
    """
    missing = sorted({_PACKAGES[command] for command in commands if shell.which(command) is None})
    if not missing:
        return
    if shell.which("apt-get") is None:
        raise LabError(f"{', '.join(missing)} is not installed", remedy="Install it with this machine's packages.")
    environment = ["env", "DEBIAN_FRONTEND=noninteractive"]
    apt = [*environment, "apt-get", "--quiet", "--yes", "--no-install-recommends"]
    with _no_service_starts():
        shell.run(shell.as_root([*apt, "update"]))
        shell.run(shell.as_root([*apt, "install", *missing]))


@contextlib.contextmanager
def _no_service_starts() -> Iterator[None]:
    # Debian's way to say that a package's service is not started on installation: the lab starts its own.
    if _POLICY.exists():
        yield
        return
    shell.run(shell.as_root(["install", "--mode=0755", "/dev/stdin", str(_POLICY)]), stdin=b"#!/bin/sh\nexit 101\n")
    try:
        yield
    finally:
        shell.run(shell.as_root(["rm", "--force", str(_POLICY)]))
