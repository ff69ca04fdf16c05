"""Looks at hosts: one SSH round trip each, all at the same time, and nothing is changed.

Hosts are reached as the inventory says, over testinfra's connections. Where those cannot do what Ansible can
(passwords, other connection plugins, other ways to become root), one `ansible` command looks at them all.
"""

from __future__ import annotations

import base64
import configparser
import ipaddress
import json
import os
import re
import shlex
import subprocess
import sys
import tempfile
import zlib
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from deploy_dsv3 import causes, content, observer, runner, signatures
from deploy_dsv3.interruption import end_children

if TYPE_CHECKING:
    from deploy_dsv3.inventory import Inventory
    from deploy_dsv3.runner import Passwords

#: Longest time on a host [seconds]; every command in there has a shorter one of its own.
TIMEOUT_S = 120
_MAX_PARALLEL = 32
# Never a question that nobody can answer, and never a wait for a host that has gone away.
_SSH_OPTIONS = "-o BatchMode=yes -o ServerAliveInterval=5 -o ServerAliveCountMax=6"
#: Variable that names the folder of `shared_connections` to the processes that are started meanwhile.
_SHARED = "DEPLOY_DSV3_CONNECTIONS"
# ssh adds a hash of 40 and a suffix of 17 characters, and the address of a socket takes 107 bytes.
_LONGEST_FOLDER = 45
# From this version on the process that holds a connection open lets go of its parent's standard error.
_SHARING_SSH = (8, 9)
# testinfra knows nothing of these, or hands a password to sshpass in an argument that every user can read.
_NEEDS_ANSIBLE: Mapping[str, tuple[str, ...]] = {
    "ansible_password": (),
    "ansible_ssh_pass": (),
    "ansible_ssh_password": (),
    "ansible_become_password": (),
    "ansible_become_pass": (),
    "ansible_become_password_file": (),
    "ansible_become_method": ("sudo", "ansible.builtin.sudo"),
    "ansible_become_user": ("root",),
    "ansible_become_exe": (),
    "ansible_become_flags": (),
    "ansible_ssh_executable": ("ssh",),
    "ansible_ssh_transfer_method": (),
}
# What Ansible itself adds to the variables of a host.
_NOT_CONNECTION = frozenset(
    f"ansible_{name}"
    for name in (
        *("check_mode", "config_file", "diff_mode", "facts", "forks", "inventory_sources", "limit"),
        *("local", "playbook_python", "run_tags", "skip_tags", "verbosity", "version"),
    )
)
_PLAIN_CONNECTIONS = ("", "ssh", "smart", "local")


@dataclass(frozen=True, kw_only=True)
class Observation:
    """What was seen of one host, or why nothing was.

    `seen` is the JSON of `deploy_dsv3.observer.observe`; empty where `error` says why.
    """

    host: str
    error: str = ""
    seen: Mapping[str, Any] = field(default_factory=dict, repr=False)

    @property
    def reached(self) -> bool:
        """Whether the host could be looked at."""
        return not self.error

    def document(self, name: str) -> Mapping[str, Any]:
        """One of the host's JSON files (``node``, ``serve``, ``release``, ``status``); {} if absent."""
        found = self.seen.get("documents", {}).get(name)
        return found if isinstance(found, dict) else {}

    @property
    def container(self) -> Mapping[str, Any]:
        """``docker inspect`` of the engine's container; {} if there is none."""
        return self.seen.get("container", {}).get("inspect") or {}


def connections(
    inventory: Inventory, hosts: Iterable[str], passwords: Passwords | None = None
) -> dict[str, dict[str, Any]]:
    """The ``ansible_*`` variables of each host, resolved, with the passwords that the operator typed.

    Variables that need facts of the host stay out: no connection can depend on them.
    """
    typed: dict[str, Any] = {}
    if passwords and passwords.become:
        typed["ansible_become_password"] = passwords.become
    elif passwords and passwords.become_file:
        text = Path(passwords.become_file).expanduser().read_text(encoding="utf-8")
        typed["ansible_become_password"] = text.rstrip("\n")
    found = {}
    for host in hosts:
        names = (name for name in inventory.names(host) if name.startswith("ansible_"))
        known = [inventory.variable(host, name) for name in names if name not in _NOT_CONNECTION]
        found[host] = {**typed, **{v.name: v.value for v in known if not v.pending and not v.error}}
    return found


def connect_address(host: str, connection: Mapping[str, Any]) -> str:
    """The address that Ansible connects to; "" where it is a name or this machine."""
    address = str(connection.get("ansible_host", host))
    try:
        ipaddress.ip_address(address)
    except ValueError:
        return ""
    return address


def look(
    connections: Mapping[str, Mapping[str, Any]],
    settings: Mapping[str, Mapping[str, Any]],
    *,
    deep: bool,
    facts: Mapping[str, Mapping[str, Any]] | None = None,
) -> dict[str, Observation]:
    """Look at every host of `connections`.

    Args:
        connections: as `connections` gives them.
        settings: each host's settings by name.
        deep: also what takes seconds on a host, see `deploy_dsv3.observer.observe`.
        facts: of hosts whose facts were read a moment ago, these; they are not read again.
    """
    known = facts or {}
    commands = {host: command(settings[host], deep=deep, facts=host not in known) for host in connections}
    return {
        host: replace(one, seen={**one.seen, "facts": known[host]}) if one.reached and host in known else one
        for host, one in ask(connections, commands).items()
    }


def ask(connections: Mapping[str, Mapping[str, Any]], commands: Mapping[str, str]) -> dict[str, Observation]:
    """Run a command on each host, all at the same time; what it prints last is the JSON that was seen.

    Args:
        connections: as `connections` gives them.
        commands: a shell command for each of these hosts, such as `carried` gives.
    """
    variables = {host: dict(found) for host, found in connections.items()}
    by_ansible = [host for host, found in variables.items() if _needs_ansible(found)]
    plain = [host for host in variables if host not in by_ansible]
    with tempfile.TemporaryDirectory(prefix="deploy-dsv3-") as folder:
        inventory = Path(folder) / "inventory.yml"
        _write_inventory(inventory, variables)
        with ThreadPoolExecutor(max_workers=_MAX_PARALLEL) as pool, _nothing_left(pool):
            # Started first: it takes the longest.
            others = pool.submit(_look_with_ansible, inventory, {host: commands[host] for host in by_ansible})
            runner = _testinfra_runner(inventory, variables)
            seen = dict(
                zip(
                    plain,
                    pool.map(lambda h: _look_with_testinfra(runner, h, commands[h]), plain),
                    strict=True,
                )
            )
            seen |= others.result()
    return {host: seen[host] for host in variables}


@contextmanager
def shared_connections() -> Iterator[None]:
    """Log in to each host once for as long as this lasts: whoever looks again goes through the same connection, also
    from a process that is started meanwhile. A login costs a host more than what it is asked.
    """
    with runner.private_directory() as folder:
        shared = len(str(folder)) <= _LONGEST_FOLDER and _SHARED not in os.environ and _ssh_version() >= _SHARING_SSH
        if not shared:
            yield
            return
        os.environ[_SHARED] = str(folder)
        try:
            yield
        finally:
            del os.environ[_SHARED]
            _hang_up(folder)


def _hang_up(folder: Path) -> None:
    """End the connections whose sockets are in a folder."""
    ending = [
        subprocess.Popen(
            # The name of a host is asked for and has no part in it.
            ["ssh", "-F", "none", "-O", "exit", "-o", f"ControlPath={socket}", "any"],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        for socket in folder.iterdir()
    ]
    for process in ending:
        process.wait()


@cache
def _ssh_version() -> tuple[int, int]:
    """Version of OpenSSH's client; (0, 0) where there is none, or another."""
    try:
        said = subprocess.run(["ssh", "-V"], capture_output=True, text=True, check=False, timeout=10).stderr
    except (OSError, subprocess.TimeoutExpired):
        return 0, 0
    found = re.match(r"OpenSSH_(\d+)\.(\d+)", said)
    return (int(found[1]), int(found[2])) if found else (0, 0)


@contextmanager
def _nothing_left(pool: ThreadPoolExecutor) -> Iterator[None]:
    """Whoever is stopped while hosts are asked does not wait for their answers."""
    try:
        yield
    except KeyboardInterrupt:
        pool.shutdown(wait=False, cancel_futures=True)
        end_children()
        raise


def command(settings: Mapping[str, Any], *, deep: bool, facts: bool = True) -> str:
    """The shell command that prints a host's observation as one line of JSON, as root; without `facts` those are
    left out.
    """
    request = {
        "container": settings["engine_container_name"],
        "cdi_spec_path": settings["nvidia_container_toolkit_cdi_spec_path"],
        "deep": deep,
        "facts": facts,
        "probe": module("dsv3_probe"),
        "phrases": signatures.searched_for(),
    }
    return carried(Path(observer.__file__).read_text(encoding="utf-8"), "observe", request)


def module(name: str) -> str:
    """The source of one of our Ansible modules that needs nothing but Python."""
    return (content.playbooks() / "library" / f"{name}.py").read_text(encoding="utf-8")


def carried(source: str, function: str, request: Mapping[str, Any]) -> str:
    """The shell command that calls a function of a Python source as root and prints its result as JSON.

    It carries the source in itself, so nothing has to be installed on the host. Base64 keeps it safe from
    every shell on the way, and from Ansible, which would take braces for a template. Not for secrets: every
    user of the host can see a command.
    """
    whole = json.dumps({"source": source, "function": function, "request": request})
    program = (
        "import base64,json,zlib;"
        f'r=json.loads(zlib.decompress(base64.b64decode("{_packed(whole)}")));'
        'n={"__name__":"carried"};exec(r["source"],n);print(json.dumps(n[r["function"]](r["request"])))'
    )
    return (
        'become=; [ "$(id -u)" = 0 ] || become="sudo -n"; '
        f"$become timeout -k 5 {TIMEOUT_S} python3 -IS -c {shlex.quote(program)}"
    )


@cache
def _packed(text: str) -> str:
    # Most hosts of a fleet are asked the same.
    return base64.b64encode(zlib.compress(text.encode(), 9)).decode()


def _look_with_testinfra(runner: Any, host: str, line: str) -> Observation:
    try:
        done = runner.get_host(host).run(line.replace("%", "%%"))
    except RuntimeError as error:  # its argument is the result of an ssh that could not connect
        return _not_reached(host, getattr(error.args[0], "stderr", str(error)), connected=False)
    return _observation(host, done.rc, done.stdout, done.stderr)


def _testinfra_runner(inventory: Path, variables: Mapping[str, Mapping[str, Any]]) -> Any:
    from testinfra.utils.ansible_runner import AnsibleRunner, get_ansible_config

    runner = AnsibleRunner(str(inventory))
    # It would start ansible-inventory to learn what is known here already.
    runner.inventory = {
        # The command itself uses `sudo -n` where needed; testinfra would for root as well.
        "_meta": {"hostvars": {host: {**found, "ansible_become": False} for host, found in variables.items()}},
        "all": {"hosts": list(variables), "children": []},
    }
    runner.ansible_config = _with_ssh_options(get_ansible_config())
    return runner


def _with_ssh_options(config: configparser.ConfigParser) -> configparser.ConfigParser:
    """The user's ansible.cfg as testinfra reads it, with the environment's and our own options."""
    if not config.has_section("ssh_connection"):
        config.add_section("ssh_connection")
    configured = config.get("ssh_connection", "ssh_args", fallback="", raw=True)
    ssh_args = os.environ.get("ANSIBLE_SSH_ARGS", configured)
    checking = config.get("defaults", "host_key_checking", fallback="true", raw=True)
    if os.environ.get("ANSIBLE_HOST_KEY_CHECKING", checking).lower() in ("false", "no", "0", "off"):
        ssh_args += " -o StrictHostKeyChecking=no"
    folder = os.environ.get(_SHARED, "")
    if folder and "controlpath" not in ssh_args.lower():
        # testinfra adds ControlMaster and ControlPersist.
        ssh_args += f" -o ControlPath={folder}/%C"
    config.set("ssh_connection", "ssh_args", f"{ssh_args} {_SSH_OPTIONS}".strip().replace("%", "%%"))
    return config


def _look_with_ansible(inventory: Path, commands: Mapping[str, str]) -> dict[str, Observation]:
    if not commands:
        return {}
    line = next(iter(commands.values()))
    if any(other != line for other in commands.values()):
        # Hosts with different settings, which is rare: one after the other.
        seen: dict[str, Observation] = {}
        for host, own in commands.items():
            seen |= _look_with_ansible(inventory, {host: own})
        return seen
    environment = {
        **os.environ,
        # The scripts beside this interpreter, also when the environment is not activated.
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', os.defpath)}",
        "ANSIBLE_STDOUT_CALLBACK": "ansible.posix.json",
        "ANSIBLE_LOAD_CALLBACK_PLUGINS": "1",
        "ANSIBLE_DEPRECATION_WARNINGS": "0",
        "LC_ALL": "C.UTF-8",
    }
    forks = str(min(len(commands), _MAX_PARALLEL))
    argv = ["ansible", "--inventory", str(inventory), "--become", "--forks", forks, ",".join(commands)]
    # raw: no module has to be carried over, and no interpreter looked for.
    argv += ["--module-name", "ansible.builtin.raw", "--args", line]
    done = subprocess.run(argv, env=environment, capture_output=True, text=True, check=False)
    try:
        results = json.loads(done.stdout)["plays"][0]["tasks"][0]["hosts"]
    except (ValueError, LookupError):
        why = _last_line(done.stderr) or _last_line(done.stdout) or f"ansible ended with exit {done.returncode}"
        return {host: Observation(host=host, error=why) for host in commands}
    return {host: _ansible_observation(host, results.get(host, {})) for host in commands}


def _ansible_observation(host: str, result: Mapping[str, Any]) -> Observation:
    if result.get("unreachable") or "rc" not in result:
        return _not_reached(host, str(result.get("msg", "")) or "Ansible gave no answer", connected=False)
    return _observation(host, result["rc"], result.get("stdout", ""), result.get("stderr", "") or result.get("msg", ""))


def _observation(host: str, rc: int, stdout: str, stderr: str) -> Observation:
    if rc != 0:
        return _not_reached(host, stderr or f"the observer ended with exit {rc}", connected=True)
    try:
        # A login banner may come before it.
        return Observation(host=host, seen=json.loads(stdout.strip().splitlines()[-1]))
    except (ValueError, IndexError):
        return Observation(host=host, error=f"the observer printed no JSON: {_last_line(stdout)!r}")


def _not_reached(host: str, text: str, *, connected: bool) -> Observation:
    """What ssh, sudo or Ansible said, and what it means where that is known."""
    known = causes.diagnose(text, connected=connected)
    meaning = f": {known.cause}. {known.remedy.replace('HOST', host)}" if known else ""
    return Observation(host=host, error=_last_line(text).rstrip(".") + meaning)


def _last_line(text: str) -> str:
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[-1][:500] if lines else ""


def _needs_ansible(variables: Mapping[str, Any]) -> bool:
    connection = str(variables.get("ansible_connection", "")).removeprefix("ansible.builtin.")
    return connection not in _PLAIN_CONNECTIONS or any(
        variables.get(name, "") not in ("", *plain) for name, plain in _NEEDS_ANSIBLE.items()
    )


def _write_inventory(path: Path, variables: Mapping[str, Mapping[str, Any]]) -> None:
    path.touch(mode=0o600)
    path.write_text(yaml.dump({"all": {"hosts": dict(variables)}}, Dumper=_InventoryDumper), encoding="utf-8")


class _InventoryDumper(yaml.SafeDumper):
    """Writes text with braces as ``!unsafe``: it is resolved, and a password may look like a template."""


def _represent_text(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
    return dumper.represent_scalar("!unsafe" if "{" in text else "tag:yaml.org,2002:str", text)


_InventoryDumper.add_representer(str, _represent_text)
