"""Why a host cannot be reached, or fails before any module of ours runs: what ssh, sudo and Ansible say, and
mean.

What the engine's logs mean is in `deploy_dsv3.signatures`.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from deploy_dsv3 import runbook


@dataclass(frozen=True, kw_only=True)
class Cause:
    """A known reason for not getting at a host, or for failing there.

    Attributes:
        code: its stable name.
        pattern: what betrays it in the text of an error.
        cause, remedy: what to tell; ``HOST`` in the remedy stands for the host.
        unreachable: whether the host counts as not reached.
    """

    code: str
    pattern: re.Pattern[str]
    cause: str
    remedy: str
    unreachable: bool = False

    @property
    def page(self) -> str:
        """File and anchor of its section in the runbook."""
        return f"{runbook.FAILED_RUNS}#{self.code}"


def _known(code: str, pattern: str, cause: str, remedy: str, *, unreachable: bool = False) -> Cause:
    return Cause(
        code=code,
        pattern=re.compile(pattern, re.I | re.S),
        cause=cause,
        remedy=remedy,
        unreachable=unreachable,
    )


# The words are those of OpenSSH's client, sudo, and ansible-core's ssh and sudo plugins; the first match
# wins.
CAUSES: Sequence[Cause] = (
    _known(
        "ssh-host-key-changed",
        r"REMOTE HOST IDENTIFICATION HAS CHANGED",
        "the host presents another SSH key than the one known for it: it was reinstalled, its address went "
        "to another machine, or somebody is in between",
        "Ask whoever runs the host. If the change is right: ssh-keygen -R HOST, then add its new key.",
        unreachable=True,
    ),
    _known(
        "ssh-host-key-unknown",
        r"Host key verification failed|host key is known for|authenticity of host",
        "this machine has never seen the host's SSH key",
        "Log in once by hand (ssh HOST) and compare the key, or add it to ~/.ssh/known_hosts.",
        unreachable=True,
    ),
    _known(
        "dns",
        r"Could not resolve hostname",
        "the host's name has no address",
        "Correct the name, or set ansible_host to the address.",
        unreachable=True,
    ),
    _known(
        "ssh-authentication",
        r"Permission denied \(|Invalid/incorrect password|Too many authentication failures|no such identity",
        "the host refuses the login: wrong user, or the host does not have this key",
        "Check ansible_user and ansible_ssh_private_key_file; `ssh USER@HOST true` must ask nothing.",
        unreachable=True,
    ),
    _known(
        "ssh-refused",
        r"Connection refused",
        "the host answers, and no SSH server listens on that port",
        "Start sshd there, or set ansible_port.",
        unreachable=True,
    ),
    _known(
        "ssh-timeout",
        r"Connection timed out|Operation timed out|No route to host|Network is unreachable|banner exchange|"
        r"timed out waiting for",
        "nothing answers at the host's address: it is off, or the network or a firewall is in the way",
        "Check that the host is up, and that this machine can reach it (ping, ssh).",
        unreachable=True,
    ),
    _known(
        "ssh-dropped",
        r"Connection (closed|reset) by|Shared connection to \S+ closed|Broken pipe|closed by remote host",
        "the connection broke while it was in use",
        "Run again. If it happens again, look at the host's sshd and at the network.",
        unreachable=True,
    ),
    _known(
        "sudo-password-wrong",
        r"Incorrect (sudo|su) password|Sorry, try again|incorrect password attempt",
        "sudo refuses the password",
        "Give the right one: --ask-become-pass, --become-password-file, or a vaulted ansible_become_password.",
        unreachable=True,
    ),
    _known(
        "sudo-password-missing",
        r"Missing (sudo|su) password|a password is required|a terminal is required to read the password",
        "sudo asks for a password and none was given",
        "Give it: --ask-become-pass, --become-password-file, or a vaulted ansible_become_password.",
        unreachable=True,
    ),
    _known(
        "sudo-denied",
        r"is not in the sudoers file|is not allowed to (run|execute)|may not run sudo",
        "the user may not use sudo on the host",
        "Add the user to the host's sudoers, or set ansible_user to one that may.",
        unreachable=True,
    ),
    _known(
        "sudo-no-answer",
        r"waiting for privilege escalation prompt|Timeout \(\d+s\) waiting for privilege",
        "sudo does not answer: the host is overloaded, or its name resolution hangs",
        "Try `sudo -k true` on the host; set ansible_become_timeout if it is only slow.",
        unreachable=True,
    ),
    _known(
        "sudo-not-there",
        r"sudo: (command )?not found|sudo: No such file",
        "the host has no sudo",
        "Install sudo on the host, or log in as root (ansible_user=root).",
        unreachable=True,
    ),
    _known(
        "python-not-there",
        r"interpreter '?\S+'? was not found|python3?: (command )?not found|No python interpreters found",
        "the host has no Python 3, which Ansible needs there",
        "Install python3 on the host, or set ansible_python_interpreter.",
    ),
    _known(
        "disk-full",
        r"No space left on device|Disk quota exceeded",
        "a file system of the host is full",
        "Free space (df -h, docker system df) and run again.",
    ),
    _known(
        "package-lock",
        r"Could not get lock /var/lib/(dpkg|apt)|Unable to acquire the dpkg frontend lock",
        "another package manager runs on the host, often its unattended upgrades",
        "Wait until it is done, or stop it, and run again.",
    ),
)


def diagnose(text: str, *, connected: bool) -> Cause | None:
    """The known cause of an error text, None if it is none of the known ones.

    Args:
        text: message, stderr and stdout of a failed connection or module.
        connected: whether the host was reached. A module that failed for reasons of its own may quote words
            such as "connection refused" (by a registry, say): of what keeps from a host, only sudo's words
            count then.
    """
    return next(
        (
            known
            for known in CAUSES
            if (not connected or not known.unreachable or known.code.startswith("sudo-")) and known.pattern.search(text)
        ),
        None,
    )
