"""What can go wrong, as classes: each class is one exit code, each error carries its remedy.

Nothing below `deploy_dsv3.cli.main` exits the process: code raises one of these, `main` turns it into an exit
status and a message. Exit codes are part of the command's contract with scripts:

=====  ==========================================================================
 code  meaning
=====  ==========================================================================
    0  done, and verified where the verb verifies
    1  a defect of deploy-dsv3 itself
    2  usage, inventory or settings wrong; no host was touched
    3  preflight says no; nothing was changed on any host
    4  a host failed while being changed; running again continues
    5  everything ran, and verification failed
    6  a host could not be reached
    7  another run holds the deployment's lock
   10  ``plan`` only: there is something to do
  130  stopped by Ctrl-C (143: by SIGTERM); running again continues
=====  ==========================================================================
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, ClassVar


class DeployError(Exception):
    """Base of every failure that is told to the operator.

    Args:
        message: what was found, in a sentence; names the host, file or key.
        remedy: what to do about it, in a sentence; may be empty only if the message says it.
    """

    exit_code: ClassVar[int] = 1

    def __init__(self, message: str, *, remedy: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.remedy = remedy

    def as_dict(self) -> dict[str, Any]:
        """The error for ``--json``: ``{"message", "remedy"}``, more in subclasses."""
        return {"message": self.message, "remedy": self.remedy}


class InternalError(DeployError):
    """A defect of ours, or a part of Ansible that answered in an unknown way."""

    exit_code = 1


class UsageError(DeployError):
    """The command line is wrong."""

    exit_code = 2


@dataclass(frozen=True, kw_only=True)
class ConfigError:
    """One thing wrong with the inventory or the settings.

    Attributes:
        message: what is wrong, in a sentence without a trailing remedy.
        remedy: what to write instead.
        file: the file as the operator named it, if one is to blame.
        line: line in `file`, from 1.
        key: the setting, section or group.
        host: the host (or group) whose value it is; empty if it concerns all.
        found: the value found; never a secret's.
        expected: what would have been right.
    """

    message: str
    remedy: str = ""
    file: str = ""
    line: int | None = None
    key: str = ""
    host: str = ""
    found: str = ""
    expected: str = ""

    @property
    def where(self) -> str:
        """``file:line``, ``file`` or an empty string."""
        return f"{self.file}:{self.line}" if self.file and self.line else self.file

    def as_dict(self) -> dict[str, Any]:
        """The error for ``--json``; empty fields are left out."""
        fields = {
            "message": self.message,
            "file": self.file,
            "line": self.line,
            "key": self.key,
            "host": self.host,
            "found": self.found,
            "expected": self.expected,
            "remedy": self.remedy,
        }
        return {name: value for name, value in fields.items() if value not in ("", None)}

    def __str__(self) -> str:
        subject = self.where
        if self.host:
            subject = f"{subject} [{self.host}]" if subject else self.host
        lines = [f"{subject}: {self.message}" if subject else self.message]
        if self.found:
            lines.append(f"    found: {self.found}")
        if self.expected:
            lines.append(f"    expected: {self.expected}")
        if self.remedy:
            lines.append(f"    remedy: {self.remedy}")
        return "\n".join(lines)


class ConfigErrors(DeployError):
    """Every mistake of an inventory and its settings, told at once. No host was touched.

    Args:
        errors: at least one; identical ones are folded into one.
    """

    exit_code = 2

    def __init__(self, errors: Iterable[ConfigError]) -> None:
        self.errors = tuple(dict.fromkeys(errors))
        if not self.errors:
            raise ValueError("ConfigErrors needs at least one error")
        count = len(self.errors)
        head = "1 mistake" if count == 1 else f"{count} mistakes"
        super().__init__(f"{head} in inventory or settings; no host was touched")

    def __iter__(self) -> Iterator[ConfigError]:
        return iter(self.errors)

    def __str__(self) -> str:
        return "\n".join([*map(str, self.errors), self.message])

    def as_dict(self) -> dict[str, Any]:
        """``{"message", "remedy", "errors": [ConfigError.as_dict(), ...]}``."""
        return {**super().as_dict(), "errors": [error.as_dict() for error in self.errors]}


def config_error(message: str, **fields: Any) -> ConfigErrors:
    """A `ConfigErrors` of one, for mistakes that leave nothing else to look at."""
    return ConfigErrors([ConfigError(message=message, **fields)])


class PreflightError(DeployError):
    """Preflight refused; nothing was changed on any host."""

    exit_code = 3


class HostError(DeployError):
    """A host failed while it was being changed; running again continues."""

    exit_code = 4


class VerificationError(DeployError):
    """Everything ran, and verification failed."""

    exit_code = 5


class UnreachableError(DeployError):
    """A host could not be reached, or its login or sudo was refused."""

    exit_code = 6


class LockedError(DeployError):
    """Another run holds the deployment's lock."""

    exit_code = 7


class Interrupted(DeployError):
    """The operator stopped the run; running again continues.

    Args:
        signal_number: 2 (SIGINT) or 15 (SIGTERM).
    """

    def __init__(self, signal_number: int, *, message: str = "stopped", remedy: str = "") -> None:
        super().__init__(message, remedy=remedy or "Run the same command again: it continues where this one stopped.")
        self.signal_number = signal_number

    @property
    def exit_code(self) -> int:  # type: ignore[override]
        """128 + signal, as shells have it."""
        return 128 + self.signal_number


#: Exit code of `plan` when there is something to do; a result, not an error.
EXIT_PLAN_CHANGES = 10

#: Exit code of a run whose first failure is of this kind.
BY_EXIT_CODE: dict[int, type[DeployError]] = {
    3: PreflightError,
    4: HostError,
    5: VerificationError,
    6: UnreachableError,
    7: LockedError,
}
