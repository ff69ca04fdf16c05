"""Runs one playbook with ansible-runner; the only module that imports it.

ansible-runner writes everything it is given (variables, passwords, environment, command line) below its
private data directory. That directory is a fresh one, mode 0700, on a memory file system where there is one,
and it is removed when the run ends; what is kept is a log of our own, with the values of secrets struck out.
"""

from __future__ import annotations

import json
import os
import secrets
import shlex
import shutil
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any, TextIO

from deploy_dsv3 import content
from deploy_dsv3.errors import InternalError, Interrupted
from deploy_dsv3.events import Outcome, Record, Translator

#: More forks than this gain nothing: the controller is CPU-bound at 8 to 25 ms a task on a host.
MAX_FORKS = 50

_TEMPORARY_PREFIX = "deploy-dsv3-"
_STRUCK_OUT = "********"
#: Shorter values would strike out parts of ordinary words.
_SHORTEST_SECRET = 4


@dataclass(frozen=True, kw_only=True)
class Passwords:
    """Passwords typed by the operator or read from files; never shown.

    Attributes:
        become: for sudo.
        become_file: file with the password for sudo.
        vault: for vaulted values.
        vault_files: as `inventory.VaultOptions.password_files`.
    """

    become: str = field(default="", repr=False)
    become_file: str = ""
    vault: str = field(default="", repr=False)
    vault_files: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Job:
    """One playbook run.

    Attributes:
        playbook: file to run.
        inventories: inventory files or directories.
        hosts: number of hosts, for the number of forks.
        extra_vars: variables of ours; they win over everything.
        user_extra_vars: values of ``-e`` as the operator gave them.
        limit, tags, skip_tags: as Ansible's options; empty for none.
        check, diff: as Ansible's options.
        verbosity: number of ``-v``.
        passwords: for sudo and vaults.
    """

    playbook: Path
    inventories: tuple[Path, ...]
    hosts: int = 1
    extra_vars: Mapping[str, Any] = field(default_factory=dict, repr=False)
    user_extra_vars: tuple[str, ...] = field(default=(), repr=False)
    limit: str = ""
    tags: str = ""
    skip_tags: str = ""
    check: bool = False
    diff: bool = False
    verbosity: int = 0
    passwords: Passwords = field(default_factory=Passwords)


def run(job: Job, *, log: RunLog, on_record: Callable[[Record], None]) -> Outcome:
    """Run a playbook to its end.

    Args:
        job: what to run.
        log: where raw events and Ansible's output are kept.
        on_record: called with each record, in order, in this thread.

    Returns:
        The outcome, also when hosts failed.

    Raises:
        Interrupted: the operator stopped the run (SIGINT or SIGTERM); the task that was running was finished
            first.
        InternalError: Ansible could not run the playbook at all.
    """
    import ansible_runner

    outcome = Outcome()
    translator = Translator()
    broken: list[Exception] = []

    def handle(event: dict[str, Any]) -> bool:
        try:
            log.write(event)
            for record in translator.translate(event):
                outcome.add(record)
                on_record(record)
        except Exception as error:  # Ansible must not go on unwatched: end it, then tell
            broken.append(error)
            stop.now = True
        return True  # ansible-runner keeps an event only if its handler says so

    with private_directory() as private, _stop_on_signal(private / "stop") as stop:
        result = ansible_runner.run(
            private_data_dir=str(private),
            # Relative paths in an inventory mean what they mean to ansible-playbook.
            project_dir=str(Path.cwd()),
            playbook=str(job.playbook),
            inventory=[str(path.absolute()) for path in job.inventories],
            limit=job.limit or None,
            tags=job.tags or None,
            skip_tags=job.skip_tags or None,
            verbosity=job.verbosity or None,
            forks=max(1, min(job.hosts, MAX_FORKS)),
            cmdline=shlex.join(_arguments(job, private)) or None,
            envvars=_environment(private),
            suppress_env_files=True,
            quiet=True,
            settings={"pexpect_timeout": 1, "suppress_output_file": True},
            event_handler=handle,
            cancel_callback=lambda: stop.now,
        )
    if broken:
        raise broken[0]
    if stop.signal_number:
        raise Interrupted(stop.signal_number, message="stopped after the task that was running")
    if not outcome.finished and not outcome.failures:
        raise InternalError(
            f"Ansible could not run {job.playbook.name} (exit status {result.rc}): {log.last_error()}",
            remedy=f"The full output is in {log.directory}.",
        )
    return outcome


class RunLog:
    """The directory that keeps the log of one run, readable by its owner only.

    It has ``events.jsonl`` (every event), ``ansible.log`` (Ansible's own output) and, once the run has ended,
    ``report.txt`` (what was told at the end, the first cause of a failure first).

    Args:
        verb: what is run, part of the directory's name.
        hidden: values to strike out.
    """

    def __init__(self, verb: str, hidden: Iterable[str] = ()) -> None:
        self.id = new_id(verb)
        self.directory = state_directory() / "runs" / self.id
        self._hidden = sorted({text for text in hidden if len(text) >= _SHORTEST_SECRET}, key=len, reverse=True)
        self._errors: list[str] = []
        self._files: tuple[TextIO, TextIO] | None = None

    def __enter__(self) -> RunLog:
        self.directory.mkdir(parents=True, mode=0o700)
        self._files = (
            _open_private(self.directory / "events.jsonl"),
            _open_private(self.directory / "ansible.log"),
        )
        return self

    def __exit__(self, *_: object) -> None:
        for file in self._files or ():
            file.close()
        self._files = None

    def write(self, event: Mapping[str, Any]) -> None:
        """Append one raw event and the output that belongs to it."""
        if self._files is None or event.get("event") == "EOF":
            return
        events, output = self._files
        stdout = str(event.get("stdout", ""))
        if event.get("event") in ("error", "verbose") and ("ERROR" in stdout or "rror:" in stdout):
            self._errors.append(self.strike_out(stdout))
        kept = {key: value for key, value in event.items() if key not in ("stdout", "start_line", "end_line")}
        print(self.strike_out(json.dumps(kept, default=str)), file=events, flush=True)
        if stdout:
            print(self.strike_out(stdout), file=output, flush=True)

    def conclude(self, report: str) -> None:
        """Keep what was told at the end of the run."""
        write_private(self.directory / "report.txt", self.strike_out(report))

    def strike_out(self, text: str) -> str:
        """The text without the values of secrets."""
        for value in self._hidden:
            text = text.replace(value, _STRUCK_OUT)
            escaped = json.dumps(value)[1:-1]
            if escaped != value:
                text = text.replace(escaped, _STRUCK_OUT)
        return text

    def last_error(self) -> str:
        """The first lines that Ansible itself called an error; empty if there were none."""
        return " ".join(" ".join(self._errors[:3]).split())


def new_id(name: str) -> str:
    """A name for a run: when, what, and a few letters that make it unique."""
    return f"{time.strftime('%Y%m%dT%H%M%SZ', time.gmtime())}-{name}-{secrets.token_hex(2)}"


def state_directory() -> Path:
    """Where this machine keeps what deploy-dsv3 remembers (XDG base directories: ``XDG_STATE_HOME``)."""
    base = os.environ.get("XDG_STATE_HOME", "")
    return (Path(base) if Path(base).is_absolute() else Path.home() / ".local" / "state") / "deploy-dsv3"


def _arguments(job: Job, private: Path) -> list[str]:
    """Options that ansible-runner has no parameter for; secrets only as names of files."""
    arguments = []
    if job.check:
        arguments.append("--check")
    if job.diff:
        arguments.append("--diff")
    for index, option in enumerate(job.user_extra_vars):
        text = option.strip()
        if text.startswith("@"):
            arguments += ["-e", f"@{Path(text[1:]).expanduser().absolute()}"]
        else:
            arguments += ["-e", f"@{_extra_vars_file(private / f'extra-{index}.yml', text)}"]
    if job.extra_vars:
        path = private / "extra-ours.json"
        write_private(path, json.dumps(job.extra_vars))
        arguments += ["-e", f"@{path}"]
    passwords = job.passwords
    if passwords.vault:
        path = private / "vault-password"
        write_private(path, passwords.vault)
        arguments += ["--vault-password-file", str(path)]
    for item in passwords.vault_files:
        label, found, name = item.rpartition("@")
        absolute = Path(name).expanduser().absolute()
        arguments += ["--vault-id", f"{label}@{absolute}"] if found else ["--vault-password-file", str(absolute)]
    if passwords.become:
        path = private / "become-password"
        write_private(path, passwords.become)
        arguments += ["--become-password-file", str(path)]
    elif passwords.become_file:
        arguments += ["--become-password-file", str(Path(passwords.become_file).expanduser().absolute())]
    return arguments


def _extra_vars_file(path: Path, text: str) -> Path:
    """A file that means the same to ``-e @FILE`` as the text means to ``-e``."""
    if text.startswith(("{", "[")):
        write_private(path, text)
    else:
        from ansible.parsing.splitter import parse_kv

        write_private(path, json.dumps({str(key): str(value) for key, value in parse_kv(text).items()}))
    return path


def _environment(private: Path) -> dict[str, str]:
    """Ansible's configuration for a run; what the operator set wins where it is a matter of preference."""
    preferences = {
        "ANSIBLE_TIMEOUT": "15",
        "ANSIBLE_SSH_RETRIES": "3",
        # ansible-runner switches host key checking off unless it is set.
        "ANSIBLE_HOST_KEY_CHECKING": "True",
        "ANSIBLE_PYTHON_INTERPRETER": "auto_silent",
        "ANSIBLE_PIPELINING": "1",
    }
    if not _ssh_arguments_are_configured():
        preferences["ANSIBLE_SSH_ARGS"] = (
            "-C -o ControlMaster=auto -o ControlPersist=300s"
            # A host that hangs is given up after a minute.
            " -o ServerAliveInterval=10 -o ServerAliveCountMax=6"
        )
    settings = {
        # The scripts beside this interpreter, also when the environment is not activated.
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', os.defpath)}",
        # What ssh and sudo complain of is recognised in English; Ansible itself insists on UTF-8.
        "LC_ALL": "C.UTF-8",
        "ANSIBLE_ROLES_PATH": str(content.roles()),
        "ANSIBLE_NOCOLOR": "1",
        "ANSIBLE_RETRY_FILES_ENABLED": "0",
        "ANSIBLE_DEPRECATION_WARNINGS": "0",
        "ANSIBLE_LOCALHOST_WARNING": "0",
        "ANSIBLE_HOST_PATTERN_MISMATCH": "ignore",
        "ANSIBLE_DISPLAY_SKIPPED_HOSTS": "1",
        "ANSIBLE_CALLBACK_PLUGINS": str(Path(__file__).parent / "callbacks"),
        "ANSIBLE_CALLBACKS_ENABLED": "dsv3_stop",
        "DEPLOY_DSV3_STOP_FILE": str(private / "stop"),
    }
    return {**{name: os.environ.get(name, value) for name, value in preferences.items()}, **settings}


def _ssh_arguments_are_configured() -> bool:
    """Whether the operator has ssh_args of their own (a jump host, say), which ours must not replace."""
    import configparser

    from ansible import constants

    if "ANSIBLE_SSH_ARGS" in os.environ:
        return True
    path = constants.CONFIG_FILE
    if not path:
        return False
    parser = configparser.ConfigParser(interpolation=None, strict=False)
    try:
        parser.read(path)
    except (configparser.Error, UnicodeDecodeError):
        return False
    return parser.has_option("ssh_connection", "ssh_args")


@dataclass
class _Stop:
    signal_number: int = 0
    now: bool = False


@contextmanager
def _stop_on_signal(flag: Path) -> Iterator[_Stop]:
    """Turn the first SIGINT or SIGTERM into a wish to stop, and the second into stopping at once.

    The wish is a file that our callback plugin looks for before each task.
    """
    stop = _Stop()

    def handle(number: int, _frame: FrameType | None) -> None:
        if stop.signal_number:
            stop.now = True
            return
        stop.signal_number = number
        flag.touch()
        sys.stderr.write("\nStopping after the task that is running; once more to stop at once.\n")

    if threading.current_thread() is not threading.main_thread():
        yield stop
        return
    previous = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stop
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


@contextmanager
def private_directory() -> Iterator[Path]:
    """A directory of mode 0700 that is removed in the end, as are now those of runs that were killed."""
    runtime = os.environ.get("XDG_RUNTIME_DIR", "")
    base = Path(runtime) if runtime and os.access(runtime, os.W_OK) else Path(tempfile.gettempdir())
    _remove_leftovers(base)
    path = Path(tempfile.mkdtemp(prefix=f"{_TEMPORARY_PREFIX}{os.getpid()}-", dir=base))
    try:
        yield path
    finally:
        shutil.rmtree(path, ignore_errors=True)


def _remove_leftovers(base: Path) -> None:
    for path in base.glob(f"{_TEMPORARY_PREFIX}*-*"):
        pid = path.name.removeprefix(_TEMPORARY_PREFIX).split("-")[0]
        with suppress(OSError):
            if pid.isdigit() and path.stat().st_uid == os.getuid() and not Path(f"/proc/{pid}").exists():
                shutil.rmtree(path, ignore_errors=True)


def write_private(path: Path, text: str) -> None:
    """Write a file that only its owner can read."""
    with _open_private(path) as file:
        file.write(text)


def _open_private(path: Path) -> TextIO:
    return os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600), "a", encoding="utf-8")
