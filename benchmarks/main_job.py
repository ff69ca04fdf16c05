#!/usr/bin/env python3
"""Times the main job on two bare lab hosts: wall and CPU time of the first deploy and of a second run, stage by stage.

Not a test: it judges nothing. The lab's hosts run on this machine too, so two CPU times are told: that of the
control process with all that it starts here, and that of the whole machine, hosts included. Keep the machine
otherwise idle.

    python benchmarks/main_job.py [--hosts N] [--gpus N] [--json]
"""

from __future__ import annotations

import argparse
import json
import os
import re
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table

from deploy_dsv3.lab import bringup
from deploy_dsv3.lab.fleet import Lab
from deploy_dsv3.lab.paths import default_paths
from deploy_dsv3.lab.progress import Steps

NAME = "timing"
TICKS_PER_S = os.sysconf("SC_CLK_TCK")
#: A line of progress: "12:00:00 +  3.4s ray: every node …".
STAGE = re.compile(r"^\S+ \+ *[\d.]+s (?P<stage>[\w-]+): ")


@dataclass(frozen=True, kw_only=True)
class Spent:
    """Time spent on something [seconds]; `control` is None where it is not known."""

    what: str
    wall: float
    machine: float
    control: float | None = None


def main() -> int:
    """Time both runs, print what they took."""
    options = _options()
    console = Console(stderr=True)
    with _lab(options, console) as lab, tempfile.TemporaryDirectory() as folder:
        runs = {
            title: timed_run(lab.inventory, Path(folder))
            for title in ("first deploy, bare hosts", "second run, nothing to do")
        }
    if options.json:
        print(json.dumps({title: [asdict(row) for row in rows] for title, rows in runs.items()}, indent=2))
        return 0
    for title, rows in runs.items():
        table = Table("stage", "wall [s]", "CPU, machine [s]", "CPU, control [s]", title=title, title_justify="left")
        for row in rows:
            control = "" if row.control is None else f"{row.control:.1f}"
            table.add_row(row.what, f"{row.wall:.1f}", f"{row.machine:.1f}", control)
        Console().print(table)
    return 0


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--hosts", type=int, default=2)
    parser.add_argument("--gpus", type=int, default=8, help="GPUs of each host")
    parser.add_argument("--json", action="store_true", help="one JSON document on standard output")
    return parser.parse_args()


@contextmanager
def _lab(options: argparse.Namespace, console: Console) -> Iterator[Lab]:
    """A lab of its own, gone in the end."""
    paths = default_paths()
    wish = bringup.Wish(name=NAME, hosts=options.hosts, gpus=options.gpus)
    try:
        with Steps(console) as steps:
            bringup.down(paths, NAME, steps)
            lab = bringup.up(wish, paths, steps)
        yield lab
    finally:
        with Steps(console) as steps:
            bringup.down(paths, NAME, steps)


def timed_run(inventory: Path, folder: Path) -> list[Spent]:
    """Run the main job once.

    Returns:
        A row for each stage in the order they were passed, then one for the whole run.

    Raises:
        subprocess.CalledProcessError: it failed; what it said was shown as it came.
    """
    program = Path(sys.executable).with_name("deploy-dsv3")
    command = [str(program), "--inventory", str(inventory), "--json"]
    before, began = _children_cpu(), time.monotonic()
    machine_began = _machine_cpu()
    rows, stage, since, cpu_since = [], "start", began, machine_began
    with subprocess.Popen(command, cwd=folder, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True) as running:
        assert running.stderr is not None
        for line in running.stderr:
            sys.stderr.write(line)
            found = STAGE.match(line)
            if found and found["stage"] != stage:
                now, cpu = time.monotonic(), _machine_cpu()
                rows.append(Spent(what=stage, wall=now - since, machine=cpu - cpu_since))
                stage, since, cpu_since = found["stage"], now, cpu
    if running.returncode:
        raise subprocess.CalledProcessError(running.returncode, command)
    now, cpu = time.monotonic(), _machine_cpu()
    rows.append(Spent(what=stage, wall=now - since, machine=cpu - cpu_since))
    whole = Spent(what="all", wall=now - began, machine=cpu - machine_began, control=_children_cpu() - before)
    return [*rows, whole]


def _children_cpu() -> float:
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def _machine_cpu() -> float:
    """CPU time that the machine has spent on anything since it was started (proc(5), /proc/stat)."""
    user, nice, system, _idle, _iowait, irq, softirq, *_ = map(
        int, Path("/proc/stat").read_text().splitlines()[0].split()[1:]
    )
    return (user + nice + system + irq + softirq) / TICKS_PER_S


if __name__ == "__main__":
    sys.exit(main())
