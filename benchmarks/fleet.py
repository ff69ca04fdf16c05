#!/usr/bin/env python3
"""Times a run that finds nothing to do over 2, 8 and 24 lab hosts, beside the full walk, plain ssh and pyinfra.

Not a test: it judges nothing. All hosts of a lab run on this machine, so whatever a host computes is paid for here
too, by every way alike; keep the machine otherwise idle.

Two tables, made in one run. **Without an engine**, for every number of hosts: they are prepared up to the stage `host`
(driver, container toolkit, Docker), which 24 hosts fit in little memory. There

- *plain ssh* sends the product's probe through one `ssh` a host, all at the same time;
- *plan* is `deploy-dsv3 plan`: what a deploy does before it knows whether there is anything to do (inventory, settings,
  probe of every host, comparison, capacity);
- *fast path* is all of a deploy that finds nothing to do but its line of history: the plan, then the verification of
  every host with the facts of that plan, over the same connections. The checks of the engine fail here, as they must;
- *pyinfra* asks for the same packages, services, files (mode, owner, content), kernel settings and GPUs;
- *full walk* is `deploy-dsv3 --tags host`, which finds nothing to change: only the first of the stages that a full walk
  has, so the comparison favours it.

**With an engine**, for the numbers of hosts that `--engines` names: *nothing to do* is `deploy-dsv3` as an operator
runs it, which plans, verifies every host and the endpoints, and leaves a line of history; *full walk* is the same
with `--full`.

    python benchmarks/fleet.py [--hosts 2 8 24] [--engines 2 8] [--runs 3] [--json]

pyinfra is installed into a virtual environment of this script's own, in the lab's cache. 24 hosts need more inotify
instances than most systems give a user; `lab up` says how many.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import resource
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
import venv
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from deploy_dsv3 import observation, probing, verbs
from deploy_dsv3.lab import bringup
from deploy_dsv3.lab.fleet import Lab
from deploy_dsv3.lab.hosts import Host
from deploy_dsv3.lab.images import ADMIN_USER
from deploy_dsv3.lab.paths import default_paths
from deploy_dsv3.lab.progress import Steps
from deploy_dsv3.options import Options

NAME = "fleet"
PYINFRA = "pyinfra>=3.4,<4"
#: Hosts of a replica; the lab's GPUs need no more for a layout that preflight accepts.
REPLICA = 2


#: What `deploy_dsv3.verbs.deploy` does where the plan finds nothing to do.
FAST_PATH = """
import sys
from pathlib import Path
from deploy_dsv3 import observation, verbs, verification
from deploy_dsv3.options import Options

options = Options(inventories=(Path(sys.argv[1]),), json=True)
with observation.shared_connections():
    target = verbs.load(options, whole_replicas=True)
    plan, fleet = verbs.make_plan(target, options)
    assert not plan.unreachable and not plan.errors
    connections = target.connections(options)
    found = verification.verify(target.deployment, target.plain_settings, connections, facts=fleet.documents)
    assert not found.unreachable and len(found.checks) > 10 * len(target.hosts)
"""


@dataclass(frozen=True, kw_only=True)
class Spent:
    """The quickest of several runs [seconds]; `control` is CPU time of the control process and what it starts."""

    hosts: int
    way: str
    wall: float
    control: float
    runs: int


def main() -> int:
    """Measure, and print tables as they stand in docs/reference/plan.md."""
    options = _options()
    console = Console(stderr=True)
    rows: list[Spent] = []
    with tempfile.TemporaryDirectory() as folder:
        measure = Measure(folder=Path(folder), runs=options.runs, console=console)
        with _lab(console) as paths:
            pyinfra = _install_pyinfra(paths.cache / "pyinfra", console)
            # The most first: the smaller fleets are what is left of it, prepared already.
            for count in sorted(options.hosts, reverse=True):
                rows += without_engine(measure, _up(count, options.gpus, console), pyinfra)
            for count in sorted(options.engines, reverse=True):
                rows += with_engine(measure, _up(count, options.gpus, console))
    if options.json:
        print(json.dumps([asdict(row) for row in rows], indent=2))
    else:
        print("\n\n".join(tables(rows)))
    return 0


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--hosts", type=int, nargs="*", default=[2, 8, 24], help="numbers of hosts, even ones")
    parser.add_argument("--engines", type=int, nargs="*", default=[2, 8], help="numbers of hosts with an engine")
    parser.add_argument("--gpus", type=int, default=1, help="GPUs of each host")
    parser.add_argument("--runs", type=int, default=3, help="the quickest of so many runs counts; one full walk")
    parser.add_argument("--json", action="store_true", help="one JSON document on standard output")
    return parser.parse_args()


# ---------------------------------------------------------------------- the two measurements


@dataclass(frozen=True, kw_only=True)
class Measure:
    """Runs things and times them.

    Attributes:
        folder: for inventories and what the product remembers.
        runs: how often each is run.
    """

    folder: Path
    runs: int
    console: Console

    def __call__(self, hosts: int, way: str, run: Callable[[], None], *, runs: int = 0) -> Spent:
        """The quickest of several runs."""
        best: tuple[float, float] | None = None
        for _ in range(runs or self.runs):
            cpu, began = _cpu(), time.monotonic()
            run()
            spent = time.monotonic() - began, _cpu() - cpu
            best = min(best or spent, spent)
            self.console.print(f"{hosts} hosts, {way}: {spent[0]:.2f} s, {spent[1]:.2f} s of CPU")
        assert best
        return Spent(hosts=hosts, way=way, wall=best[0], control=best[1], runs=runs or self.runs)

    def product(self, *arguments: str | Path, expect: int) -> Callable[[], None]:
        """The product with these arguments, whose exit status must be that."""
        argv = [str(Path(sys.executable).with_name("deploy-dsv3")), *map(str, arguments)]
        return lambda: self.command(argv, expect=expect)

    def command(self, argv: Sequence[str], *, expect: int = 0) -> None:
        """Run a command; what it says is shown only if it ends otherwise than expected."""
        environment = {**os.environ, "XDG_STATE_HOME": str(self.folder / "state")}
        done = subprocess.run(argv, cwd=self.folder, env=environment, capture_output=True, text=True, check=False)
        if done.returncode != expect:
            self.console.print(done.stdout[-4000:], done.stderr[-4000:], markup=False)
            raise SystemExit(f"{shlex.join(argv)}: exit status {done.returncode}, not {expect}")


def without_engine(measure: Measure, lab: Lab, pyinfra: Path) -> list[Spent]:
    """Every way over hosts that are prepared up to the stage `host`."""
    count = len(lab.hosts)
    inventory = _inventory(lab, measure.folder / f"inventory-{count}")
    walk = measure.product("--inventory", inventory, "--tags", "host", "--yes", expect=0)
    measure.console.print(f"preparing {count} hosts")
    walk()
    checks = _pyinfra_files(lab, measure.folder / f"pyinfra-{count}")
    settings = verbs.load(Options(inventories=(inventory,)), whole_replicas=True).plain_settings
    arguments = {host: probing.arguments(values) for host, values in settings.items()}
    return [
        measure(count, "plain ssh", lambda: asyncio.run(_probe_by_ssh(lab, arguments))),
        measure(count, "plan", measure.product("plan", "--inventory", inventory, expect=10)),
        measure(count, "fast path", lambda: measure.command([sys.executable, "-c", FAST_PATH, str(inventory)])),
        measure(count, "pyinfra", lambda: measure.command([str(pyinfra), "-y", "--sudo", *map(str, checks)])),
        measure(count, "full walk", walk, runs=1),
    ]


def with_engine(measure: Measure, lab: Lab) -> list[Spent]:
    """The whole product over hosts that serve."""
    count = len(lab.hosts)
    inventory = _inventory(lab, measure.folder / f"inventory-{count}")
    measure.console.print(f"deploying to {count} hosts")
    measure.product("--inventory", inventory, "--yes", expect=0)()
    return [
        measure(count, "nothing to do", measure.product("--inventory", inventory, "--yes", expect=0)),
        measure(count, "full walk, engine", measure.product("--inventory", inventory, "--full", expect=0), runs=1),
    ]


# ---------------------------------------------------------------------- the lab


@contextmanager
def _lab(console: Console) -> Iterator[Any]:
    """Nothing is left of the lab in the end."""
    paths = default_paths()
    try:
        with Steps(console) as steps:
            bringup.down(paths, NAME, steps)
        yield paths
    finally:
        with Steps(console) as steps:
            bringup.down(paths, NAME, steps)


def _up(hosts: int, gpus: int, console: Console) -> Lab:
    with Steps(console) as steps:
        return bringup.up(bringup.Wish(name=NAME, hosts=hosts, gpus=gpus), default_paths(), steps)


def _inventory(lab: Lab, folder: Path) -> Path:
    """Replicas of two hosts each, with the lab's own variables."""
    shutil.copytree(lab.inventory / "group_vars", folder / "group_vars", dirs_exist_ok=True)
    variables = (folder / "group_vars" / "all.yml").read_text()
    if "preflight_require_capacity" not in variables:
        (folder / "group_vars" / "all.yml").write_text(variables + "\npreflight_require_capacity: false\n")
    lines, names = [], []
    for number, at in enumerate(range(0, len(lab.hosts), REPLICA), 1):
        head, *workers = lab.hosts[at : at + REPLICA]
        names.append(f"r{number:02d}")
        lines += [f"[{names[-1]}_head]", _host_line(head), f"[{names[-1]}_workers]", *map(_host_line, workers)]
        lines += [f"[{names[-1]}:children]", f"{names[-1]}_head", f"{names[-1]}_workers"]
    (folder / "hosts.ini").write_text("\n".join([*lines, "[dsv3:children]", *names]) + "\n")
    return folder


def _host_line(host: Host) -> str:
    return f"{host.name} ansible_host={host.address}"


# ---------------------------------------------------------------------- plain ssh


async def _probe_by_ssh(lab: Lab, arguments: Mapping[str, Any]) -> None:
    """The product's probe on every host at the same time, with nothing around it."""
    script = observation.module("dsv3_probe").encode()

    async def one(host: Host) -> None:
        command = f"sudo -n python3 -IS - {shlex.quote(json.dumps(arguments[host.name]))}"
        running = await asyncio.create_subprocess_exec(
            *("ssh", "-o", "BatchMode=yes", "-o", f"UserKnownHostsFile={lab.known_hosts}", "-i", str(lab.key)),
            f"{ADMIN_USER}@{host.address}",
            command,
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
        )
        out, _ = await running.communicate(script)
        json.loads(out)["dsv3_facts"]["os"]

    await asyncio.gather(*(one(host) for host in lab.hosts))


# ---------------------------------------------------------------------- pyinfra


def _install_pyinfra(folder: Path, console: Console) -> Path:
    """The program of a virtual environment that has pyinfra."""
    program = folder / "bin" / "pyinfra"
    if not program.is_file():
        venv.create(folder, with_pip=True, clear=True)
        subprocess.run([folder / "bin" / "pip", "install", "--quiet", PYINFRA], check=True)
    said = subprocess.run([program, "--version"], capture_output=True, text=True, check=True)
    console.print(said.stdout.strip() or said.stderr.strip())
    return program


def _pyinfra_files(lab: Lab, folder: Path) -> tuple[Path, Path]:
    """Inventory and operations for pyinfra: what the probe finds on the first host, asked for on every host.

    Files that differ from host to host are asked for by mode and owner only.
    """
    folder.mkdir(parents=True, exist_ok=True)
    script = observation.module("dsv3_probe").encode()
    states = [
        json.loads(host.run(["python3", "-IS", "-", '{"only": ["state"]}'], stdin=script).stdout)["dsv3_facts"]["state"]
        for host in lab.hosts
    ]
    state = states[0]
    operations = [
        "from pyinfra import host",
        "from pyinfra.facts.server import Command",
        "from pyinfra.operations import apt, files, server, systemd",
        f"apt.packages(name='packages', packages={sorted(state['packages'])!r})",
    ]
    for name, unit in state["units"].items():
        if unit["active"] == "active":
            enabled = ", enabled=True" if unit["enabled"] == "enabled" else ""
            operations.append(f"systemd.service(name={name!r}, service={name!r}, running=True{enabled})")
    for path, file in state["files"].items():
        given = f"name={path!r}, user='root', group='root', mode={file['mode']!r}"
        if file["link"] or file["owner"] != "0:0":
            continue
        if any(other["files"].get(path, {}).get("sha256") != file["sha256"] for other in states):
            operations.append(f"files.file(path={path!r}, {given})")
            continue
        source = folder / path.strip("/").replace("/", "_")
        source.write_text(lab.hosts[0].run(["cat", path]).stdout)
        operations.append(f"files.put(src={str(source)!r}, dest={path!r}, {given})")
    operations += [
        f"server.sysctl(name={name!r}, key={name!r}, value={value.split() if ' ' in value else value!r})"
        for name, value in state["sysctls"].items()
    ]
    operations.append("assert 'GPU 0' in host.get_fact(Command, command='nvidia-smi -L')")
    (folder / "deploy.py").write_text("\n".join(operations) + "\n")
    data = {
        "ssh_user": ADMIN_USER,
        "ssh_key": str(lab.key),
        "ssh_known_hosts_file": str(lab.known_hosts),
        "ssh_strict_host_key_checking": "yes",
    }
    hosts = [(host.address, data) for host in lab.hosts]
    (folder / "inventory.py").write_text(f"hosts = {hosts!r}\n")
    return folder / "inventory.py", folder / "deploy.py"


# ---------------------------------------------------------------------- the tables


def tables(rows: Sequence[Spent]) -> list[str]:
    """Markdown: seconds by number of hosts and way, with what a host more costs."""
    found = {(row.hosts, row.way): row for row in rows}
    made = []
    for ways in (("plain ssh", "plan", "fast path", "pyinfra", "full walk"), ("nothing to do", "full walk, engine")):
        counts = sorted({row.hosts for row in rows if row.way == ways[0]})
        if not counts:
            continue
        lines = [f"| hosts | {' | '.join(ways)} |", f"| --- |{' --- |' * len(ways)}"]
        for count in counts:
            cells = [f"{found[count, way].wall:.1f} ({found[count, way].control:.1f})" for way in ways]
            lines.append(f"| {count} | {' | '.join(cells)} |")
        if len(counts) > 1:
            first, last = counts[0], counts[-1]
            more = [(found[last, way].wall - found[first, way].wall) / (last - first) for way in ways]
            growth = [found[last, way].wall / found[first, way].wall for way in ways]
            lines.append(f"| one host more costs | {' | '.join(f'{seconds:.2f}' for seconds in more)} |")
            lines.append(f"| {last} hosts / {first} hosts | {' | '.join(f'{times:.1f}' for times in growth)} |")
        made.append("\n".join(lines))
    return made


def _cpu() -> float:
    return sum(
        usage.ru_utime + usage.ru_stime
        for usage in (resource.getrusage(resource.RUSAGE_CHILDREN), resource.getrusage(resource.RUSAGE_SELF))
    )


if __name__ == "__main__":
    sys.exit(main())
