#!/usr/bin/env python3
"""Show where a start of the engine goes: py-spy on every process of it, from outside the container.

    profile_start.py record FOLDER [--seconds S] [--rate HZ]    until SIGTERM; start it before the engine
    profile_start.py report FOLDER [--log ENGINE_LOG]           writes FOLDER/start.json and start.md

`record` looks for the processes in /proc: the server, what it spawns (its engine, a check of the environment) and the
ranks, which are Ray workers. They are sampled without being stopped, so that a profiled start takes as long as
another. Needs root and `py-spy` on the PATH.

`report` says for each process how many seconds went into what, and for imports into which packages. With the
engine's log (level INFO) the ranks' warm-up is told apart by batch size.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

PROC = Path("/proc")
LOOK_EVERY_S = 0.2
LONGEST_WRITE_S = 20.0
# A Ray worker that was only started beforehand does nothing; one that becomes a rank begins by importing LMDeploy.
BUSY_CPU_S = 0.3
# What a frame's function is doing, by the innermost frame that is named here: file (end of its path), function, label.
ACTIVITIES: Sequence[tuple[str, str, str]] = (
    ("triton/compiler/compiler.py", "compile", "Triton compiles"),
    ("triton/compiler/compiler.py", "_init_handles", "Triton loads a kernel"),
    ("triton/backends/nvidia/driver.py", "", "Triton loads a kernel"),
    ("triton/runtime/autotuner.py", "", "Triton tries out configurations"),
    ("triton/testing.py", "", "Triton tries out configurations"),
    ("triton/runtime/jit.py", "", "Triton launches"),
    ("torch/_inductor/", "", "TorchInductor compiles"),
    ("torch/_dynamo/", "", "TorchDynamo traces"),
    ("torch/_functorch/", "", "TorchDynamo traces"),
    ("torch/cuda/graphs.py", "", "CUDA graph capture"),
    ("<frozen importlib._bootstrap>", "_find_and_load", "imports"),
    ("torch/distributed/distributed_c10d.py", "", "process group"),
    ("lmdeploy/pytorch/weight_loader/", "", "weights"),
    ("lmdeploy/pytorch/models/", "", "model"),
    ("lmdeploy/pytorch/kernels/", "", "kernels"),
    ("multiprocessing/connection.py", "", "waits for another process"),
    ("multiprocessing/popen_fork.py", "poll", "waits for another process"),
    ("concurrent/futures/_base.py", "result", "waits for another process"),
    ("ray/_private/worker.py", "get", "waits for Ray"),
    ("selectors.py", "", "waits for requests"),
)
WARM_UP = ("lmdeploy/pytorch/engine/model_agent/agent.py", "warmup")
_GRAPH = re.compile(r"(\d{4}-\d\d-\d\d \d\d:\d\d:\d\d,\d{3}) - lmdeploy.*CUDASingleGraphRunner with max_batches=(\d+)")
# Where packages lie: an environment's folder, that of build_image.sh, the standard library.
_PACKAGES = tuple(
    re.compile(pattern)
    for pattern in (r".*(?:site|dist)-packages/([^/]+)", r"/srv/[^/]+/([^/]+)", r".*/python3\.\d+/([^/]+)")
)


@dataclass(frozen=True, kw_only=True)
class Process:
    """One process as /proc shows it; `cpu_s` in seconds, `started` in seconds since the epoch."""

    pid: int
    parent: int
    argv: tuple[str, ...]
    cpu_s: float
    started: float

    @property
    def program(self) -> str:
        return Path(self.argv[0]).name if self.argv else ""


# ------------------------------------------------------------------------------------------------------
# record


def processes() -> dict[int, Process]:
    """All processes but this one and those that started it."""
    tick = os.sysconf("SC_CLK_TCK")
    boot = next(
        float(line.split()[1]) for line in (PROC / "stat").read_text().splitlines() if line.startswith("btime ")
    )
    found = {}
    for folder in PROC.iterdir():
        if not folder.name.isdigit():
            continue
        try:
            argv = tuple((folder / "cmdline").read_text(errors="replace").rstrip("\0").split("\0"))
            fields = (folder / "stat").read_text(errors="replace").rpartition(")")[2].split()
        except OSError:  # it has ended
            continue
        found[int(folder.name)] = Process(
            pid=int(folder.name),
            parent=int(fields[1]),
            argv=argv,
            cpu_s=(int(fields[11]) + int(fields[12])) / tick,
            started=boot + int(fields[19]) / tick,
        )
    mine: int | None = os.getpid()
    while mine in found:
        mine = found.pop(mine).parent
    return found


def role_of(process: Process, roles: Mapping[int, str]) -> str:
    """What a process is to a start: ``server``, ``engine``, ``check``, ``ray-worker``; "" for any other.

    `roles` has those of the processes that are known already.
    """
    argv = process.argv
    if argv[0].startswith("ray::") or any(part.endswith("default_worker.py") for part in argv):
        return "ray-worker"
    if not process.program.startswith("python"):  # the container's init and Docker's client have the same arguments
        return ""
    if any(argv[index : index + 2] == ("serve", "api_server") for index in range(len(argv))):
        # A manager process of multiprocessing is a fork: it has its parent's arguments, and imports nothing.
        return "" if process.parent in roles else "server"
    if any("spawn_main" in part for part in argv):
        return {"server": "engine", "engine": "check"}.get(roles.get(process.parent, ""), "")
    return ""


def record(folder: Path, seconds: float, rate: int) -> None:
    """Sample every process of a start until SIGTERM, or for so many seconds."""
    folder.mkdir(parents=True, exist_ok=True)
    stopped = False

    def stop(*_: object) -> None:
        nonlocal stopped
        stopped = True

    signal.signal(signal.SIGTERM, stop)
    signal.signal(signal.SIGINT, stop)
    roles: dict[int, str] = {}
    watched: dict[int, subprocess.Popen[bytes]] = {}
    at_rest: dict[int, float] = {}
    notes: list[dict[str, Any]] = []
    before = set(processes())
    deadline = time.monotonic() + seconds
    try:
        while not stopped and time.monotonic() < deadline:
            for pid, process in sorted(processes().items()):
                if pid in watched or pid in before:
                    continue
                role = role_of(process, roles)
                if not role:
                    continue
                if role == "ray-worker":
                    # At rest once it has a title of its own; what it does from then on is worth seeing.
                    if not process.argv[0].startswith("ray::"):
                        continue
                    rest = at_rest.setdefault(pid, process.cpu_s)
                    if process.cpu_s - rest < BUSY_CPU_S:
                        continue
                roles[pid] = role
                output = folder / f"{role}-{pid}.json"
                watched[pid] = subprocess.Popen(
                    [
                        *("py-spy", "record", "--pid", str(pid), "--rate", str(rate), "--nonblocking", "--idle"),
                        *("--full-filenames", "--nolineno", "--format", "chrometrace", "--output", str(output)),
                    ],
                    stdin=subprocess.DEVNULL,
                    stdout=subprocess.DEVNULL,
                    stderr=(folder / f"{role}-{pid}.log").open("wb"),
                    start_new_session=True,
                )
                notes.append(
                    {
                        "pid": pid,
                        "role": role,
                        "file": output.name,
                        "started": round(process.started, 2),
                        "sampled_from": round(time.time(), 2),
                    }
                )
                (folder / "processes.json").write_text(json.dumps(notes, indent=1) + "\n")
            time.sleep(LOOK_EVERY_S)
    finally:
        for spy in watched.values():
            if spy.poll() is None:
                spy.send_signal(signal.SIGINT)
        until = time.monotonic() + LONGEST_WRITE_S
        for spy in watched.values():
            try:
                spy.wait(max(0.1, until - time.monotonic()))
            except subprocess.TimeoutExpired:
                spy.kill()
        names = ", ".join(f"{note['role']} {note['pid']}" for note in notes)
        print(f"sampled {names or 'nothing'}")


# ------------------------------------------------------------------------------------------------------
# report

Frame = tuple[str, str]
"""File and function."""


def intervals(events: Iterable[Mapping[str, Any]]) -> Iterator[tuple[int, float, float, tuple[Frame, ...]]]:
    """Thread, begin and end [s after the first sample] and stack (outermost first) from a Chrome trace."""
    stacks: dict[int, list[Frame]] = defaultdict(list)
    since: dict[int, float] = {}
    for event in events:
        thread, now = event["tid"], event["ts"] / 1e6
        stack = stacks[thread]
        if stack and now > since[thread]:
            yield thread, since[thread], now, tuple(stack)
        since[thread] = now
        if event["ph"] == "B":
            # Since Python 3.11 a name has its class before it.
            stack.append((event["args"]["filename"], event["name"].rpartition(".")[2]))
        elif stack:
            stack.pop()


def activity(stack: Sequence[Frame]) -> str:
    """What a stack is busy with, in a few words."""
    for file, function in reversed(stack):
        for where, name, label in ACTIVITIES:
            at = where in file if where.endswith("/") else file.endswith(where)
            if at and name in ("", function):
                return label
    return "else"


def package(stack: Sequence[Frame]) -> str:
    """The package whose module is being imported: the innermost module body on the stack."""
    for file, function in reversed(stack):
        if function == "<module>" and "importlib" not in file:
            found = next((match for pattern in _PACKAGES if (match := pattern.match(file))), None)
            return (found[1] if found else Path(file).name).removesuffix(".py")
    return "?"


def graphs(log: Iterable[str]) -> list[tuple[float, int]]:
    """When the capture of each batch size began [s since the epoch], from the log of the engine's last start."""
    found: list[tuple[float, int]] = []
    for line in log:
        if match := _GRAPH.search(line):
            moment = datetime.strptime(match[1], "%Y-%m-%d %H:%M:%S,%f").timestamp()
            # The largest comes first: a new start begins.
            if found and int(match[2]) >= found[-1][1]:
                found = []
            found.append((moment, int(match[2])))
    return found


def busiest(trace: Sequence[tuple[int, float, float, tuple[Frame, ...]]]) -> int:
    """The thread that counts: where the warm-up ran, else the one that imported most, which is the main one."""
    weight: Counter[int] = Counter()
    for thread, begin, end, stack in trace:
        labels = {activity(stack)} - {"else", "waits for requests", "waits for another process", "waits for Ray"}
        weight[thread] += int(1e6 * (end - begin) * (100 if _warming(stack) else bool(labels)))
    return weight.most_common(1)[0][0] if weight else 0


def _warming(stack: Sequence[Frame]) -> bool:
    return any(file.endswith(WARM_UP[0]) and name == WARM_UP[1] for file, name in stack)


def summarise(folder: Path, log: Iterable[str]) -> list[dict[str, Any]]:
    """One entry a process: seconds by activity, by package imported, and for ranks by step of the warm-up."""
    captures = graphs(log)
    found = []
    notes = folder / "processes.json"
    for note in json.loads(notes.read_text()) if notes.exists() else []:
        file = folder / note["file"]
        if not file.exists():
            continue
        events = json.loads(file.read_text())
        trace = list(intervals(events))
        thread = busiest(trace)
        by_activity: dict[str, float] = defaultdict(float)
        by_package: dict[str, float] = defaultdict(float)
        by_step: dict[str, dict[str, float]] = defaultdict(lambda: defaultdict(float))
        for this, begin, end, stack in trace:
            if this != thread:
                continue
            label = activity(stack)
            by_activity[label] += end - begin
            if label == "imports":
                by_package[package(stack)] += end - begin
            if _warming(stack):
                moment = note["sampled_from"] + begin
                batch = next((size for at, size in reversed(captures) if at <= moment), None)
                by_step[f"batch size {batch}" if batch else "prefill"][label] += end - begin
        entry: dict[str, Any] = {
            "role": "rank" if note["role"] == "ray-worker" and by_step else note["role"],
            "pid": note["pid"],
            "unseen_s": round(note["sampled_from"] - note["started"], 1),
            "activities": _rounded(by_activity),
            "imports": _rounded(by_package, most=25),
            "warm_up": {step: _rounded(labels) for step, labels in by_step.items()},
        }
        if note["role"] != "ray-worker" or by_step:
            found.append(entry)
    return found


def _rounded(seconds: Mapping[str, float], most: int = 0) -> dict[str, float]:
    ordered = sorted(seconds.items(), key=lambda item: -item[1])[: most or None]
    return {name: round(value, 1) for name, value in ordered if value >= 0.05}


def markdown(found: Sequence[Mapping[str, Any]]) -> str:
    """The tables for people."""
    lines = ["# Where the start went", ""]
    for process in found:
        title = f"{process['role']} (pid {process['pid']}), the first {process['unseen_s']} s not seen"
        lines += [f"## {title}", "", "| what | seconds |", "| --- | ---: |"]
        lines += [f"| {name} | {seconds} |" for name, seconds in process["activities"].items()]
        if process["imports"]:
            names = ", ".join(f"{name} {seconds}" for name, seconds in process["imports"].items())
            lines += ["", f"Imports, seconds by package: {names}."]
        if process["warm_up"]:
            lines += ["", "| warm-up | seconds | of which |", "| --- | ---: | --- |"]
            for step, labels in process["warm_up"].items():
                parts = ", ".join(f"{name} {seconds}" for name, seconds in labels.items())
                lines.append(f"| {step} | {round(sum(labels.values()), 1)} | {parts} |")
        lines.append("")
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    recorder = commands.add_parser("record")
    recorder.add_argument("folder", type=Path)
    recorder.add_argument("--seconds", type=float, default=600.0)
    recorder.add_argument("--rate", type=int, default=25)
    reporter = commands.add_parser("report")
    reporter.add_argument("folder", type=Path)
    reporter.add_argument("--log", type=Path)
    options = parser.parse_args(arguments)
    if options.command == "record":
        record(options.folder, options.seconds, options.rate)
        return 0
    log = options.log.read_text(errors="replace").splitlines() if options.log and options.log.exists() else []
    found = summarise(options.folder, log)
    (options.folder / "start.json").write_text(json.dumps(found, indent=1) + "\n")
    (options.folder / "start.md").write_text(markdown(found) + "\n")
    print(markdown(found))
    return 0


if __name__ == "__main__":
    sys.exit(main())
