"""Run commands of the machine, with failures that say what failed."""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path

from .errors import LabError

_TAIL_LINES = 15


def run(
    argv: Sequence[str],
    *,
    stdin: bytes | None = None,
    environment: Mapping[str, str] | None = None,
    check: bool = True,
    timeout_s: float | None = None,
    log: Path | None = None,
) -> subprocess.CompletedProcess[str]:
    """Run a command to its end and give back its output as text.

    Args:
        stdin: bytes for its standard input; none means an empty one.
        environment: variables on top of this process's own.
        check: raise when it fails.
        timeout_s: kill it after this many seconds.
        log: append its output to this file instead of giving it back.

    Raises:
        LabError: it failed, ran out of time, or is not installed.
    """
    name = shlex.join(argv[:6]) + (" …" if len(argv) > 6 else "")
    target = log.open("ab") if log else subprocess.PIPE
    try:
        done = subprocess.run(
            argv,
            input=stdin or b"",
            env={**os.environ, **(environment or {})},
            stdout=target,
            stderr=target,
            timeout=timeout_s,
            check=False,
        )
    except FileNotFoundError as error:
        raise LabError(f"the command {argv[0]} is not installed", remedy=f"Install {argv[0]} and run again.") from error
    except subprocess.TimeoutExpired as error:
        raise LabError(
            f"`{name}` did not end within {timeout_s:.0f} s", remedy="Look at the load of this machine."
        ) from error
    finally:
        if not isinstance(target, int):
            target.close()
    output = (done.stdout or b"").decode(errors="replace")
    errors = log.read_text(errors="replace") if log else done.stderr.decode(errors="replace")
    if check and done.returncode != 0:
        tail = "\n".join((errors or output).strip().splitlines()[-_TAIL_LINES:])
        raise LabError(
            f"`{name}` failed with exit code {done.returncode}:\n{tail}",
            remedy=f"The whole output is in {log}." if log else "",
        )
    return subprocess.CompletedProcess(list(argv), done.returncode, output, errors)


def as_root(argv: Sequence[str]) -> list[str]:
    """The same command for root: through sudo where this process is not root."""
    return list(argv) if os.geteuid() == 0 else ["sudo", "-n", *argv]


def which(name: str) -> str | None:
    """Path of a command, also one that only root has on its PATH."""
    return shutil.which(name, path=f"{os.environ.get('PATH', os.defpath)}:/usr/sbin:/sbin")
