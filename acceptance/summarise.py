#!/usr/bin/env python3
"""Turn what an acceptance run left into summary.json and summary.md.

    summarise.py OUTPUT             reads phases.tsv, host.json, engine.log, start-*.json, … there
    summarise.py --source OUTPUT    one line: what a recording of this machine's server is a recording of

Where a file is missing (a phase failed or was left out) its part of the summary is missing too.
"""

from __future__ import annotations

import csv
import json
import re
import sys
from collections.abc import Iterable, Mapping, Sequence
from datetime import datetime, timedelta
from itertools import pairwise
from pathlib import Path
from typing import Any

from deploy_dsv3 import capacity, signatures

# Lines of LMDeploy 0.18's log at level INFO, in order; each ends the step before it.
MILESTONES = {
    "imports of the server": "input backend=",
    "imports of the engine process": "Init ray cluster.",
    "joining Ray": "Init ray workers.",
    "asking for the ranks": "Init distributed environment by device.",
    "ranks: imports and process group": "Building Model.",
    "model and weights": "Updating configs.",
    "cache plan": "Building GraphRunner",
    "graph runner": "Building CacheEngine with config",
    "cache": "Warming up model.",
    "warm-up and graph capture": "Engine warmup completed in",
}
_TIME = re.compile(r"(\d{4}-\d\d-\d\d \d\d:\d\d:\d\d,\d{3}) - lmdeploy")
# Docker's own time before a line of the launcher, in UTC to the nanosecond.
_STARTING = re.compile(r"^(\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{6})\d*Z .*launcher\| loading: api_server starts")
# What the engine settled for; what it was asked for stands before that, in the configuration of the backend.
_CACHE = re.compile(r"CacheConfig\([^()]*?\bblock_size=(\d+),[^()]*?\bnum_gpu_blocks=(\d+)")


def main() -> int:
    folder = Path(sys.argv[-1])
    host = _json(folder / "host.json")
    if sys.argv[1] == "--source":
        print(source(host))
        return 0
    engine = _lines(folder / "engine.log")
    cause = signatures.first_cause(engine)
    summary = {
        "host": host,
        "phases": phases(folder / "phases.tsv"),
        "launcher": {
            one.stem.removeprefix("start-"): _json(one).get("phases", []) for one in sorted(folder.glob("start-*.json"))
        },
        "engine_starts": [*start_breakdowns(_lines(folder / "engine-first.log")), *start_breakdowns(engine)],
        "profiles": {
            path.parent.name.removeprefix("profile-"): json.loads(path.read_text(encoding="utf-8"))
            for path in sorted(folder.glob("profile-*/start.json"))
        },
        "imports": _json(folder / "imports.json"),
        "throughput": _json(folder / "throughput.json"),
        "cache": cache(engine, host, _json(folder / "serve.json").get("argv", [])),
        "answers": {path.stem: _json(path) for path in sorted(folder.glob("answer-*.json"))},
        "benchmark": benchmark(folder / "benchmark"),
        "first_known_line": cause.as_dict() if cause else None,
    }
    (folder / "summary.json").write_text(json.dumps(summary, indent=1) + "\n", encoding="utf-8")
    text = "\n".join([markdown(summary), *_lines(folder / "throughput.md"), ""])
    (folder / "summary.md").write_text(text, encoding="utf-8")
    print(text)
    return 0


def phases(file: Path) -> list[dict[str, Any]]:
    """Name, seconds and result of each phase, in order."""
    if not file.exists():
        return []
    rows = (line.split("\t") for line in file.read_text(encoding="utf-8").splitlines())
    return [{"name": name, "seconds": float(seconds), "result": result} for name, seconds, result in rows]


def source(host: Mapping[str, Any]) -> str:
    """What a recording was made of, in the words of `tests/contract/recorded`."""
    gpus = [gpu["name"] for gpu in host.get("gpus", [])]
    versions = ", ".join(f"{name} {version}" for name, version in host.get("versions", {}).items())
    return (
        f"LMDeploy's PyTorch engine on {len(gpus)} x {gpus[0] if gpus else '?'}, Ray; {versions}; the random-weight "
        f"model of acceptance/make_model.py; keyed_* with --api-keys sk-sample; recorded {host.get('date', '')}; "
        "request and response of each exchange, and the metrics without their values"
    )


def start_breakdowns(log: Iterable[str]) -> list[list[dict[str, Any]]]:
    """Seconds of each step of every start of the engine, from the times in its log."""
    starts: list[list[dict[str, Any]]] = []
    waiting = list(MILESTONES.items())
    last: datetime | None = None
    begun: datetime | None = None
    for line in log:
        if starting := _STARTING.match(line):
            starts.append([])
            waiting, begun = list(MILESTONES.items()), datetime.fromisoformat(starting[1])
            continue
        stamp = _TIME.search(line)
        if not stamp or not starts:
            continue
        now = datetime.strptime(stamp[1], "%Y-%m-%d %H:%M:%S,%f")
        if begun is not None:
            # LMDeploy writes local time: a whole number of quarter hours from UTC.
            last = begun + timedelta(minutes=15 * round((now - begun) / timedelta(minutes=15)))
            begun = None
        if last is None:
            continue
        reached = next((index for index, (_, text) in enumerate(waiting) if text in line), None)
        if reached is None:
            continue
        starts[-1].append({"step": waiting[reached][0], "seconds": round((now - last).total_seconds(), 1)})
        last, waiting = now, waiting[reached + 1 :]
    return starts


def cache(log: Iterable[str], host: Mapping[str, Any], argv: Sequence[str]) -> dict[str, Any]:
    """Cache blocks that the engine reported, beside those that `deploy_dsv3.capacity` predicts.

    `argv` is the serving command: the model's folder and the options that memory depends on.
    """
    reported = _CACHE.search("\n".join(log))
    gpu = (host.get("gpus") or [None])[0]
    if not reported or gpu is None or len(argv) < 4:
        return {}
    size, blocks = map(int, reported.groups())
    given = dict(pairwise(argv))
    layout = capacity.Layout(tp=int(given.get("--tp", "1")))
    predicted = capacity.estimate(
        capacity.load_model(argv[3]),
        capacity.Serving(
            gpus=layout.gpus,
            gpu_memory_mib=gpu["memory_mib"],
            gpu_name=gpu["name"],
            layout=layout,
            flash_mla=size == 64,
            cache_max_entry_count=float(given.get("--cache-max-entry-count", "0.8")),
            max_batch_size=int(given.get("--max-batch-size", "0")),
            max_prefill_token_num=int(given.get("--max-prefill-token-num", "8192")),
        ),
    )
    return {
        "reported_blocks": blocks,
        "block_size": size,
        "predicted_blocks": predicted.blocks,
        "ratio": round(predicted.blocks / blocks, 5),
    }


def benchmark(folder: Path) -> list[dict[str, str]]:
    """The rows of every CSV that the benchmark wrote."""
    rows: list[dict[str, str]] = []
    for file in sorted(folder.rglob("*.csv")):
        with file.open(encoding="utf-8", newline="") as text:
            rows += [{"file": file.name, **row} for row in csv.DictReader(text)]
    return rows


def markdown(summary: Mapping[str, Any]) -> str:
    host = summary["host"]
    gpus = ", ".join(f"{gpu['name']} ({gpu['memory_mib']} MiB)" for gpu in host.get("gpus", []))
    versions = ", ".join(f"{name} {version}" for name, version in host.get("versions", {}).items())
    lines = ["# Acceptance run", "", f"{host.get('date', '')}: {gpus}; {versions}", ""]
    lines += _table("phase", [(row["name"], row["seconds"], row["result"]) for row in summary["phases"]])
    lines += _columns(
        "start, as the launcher tells it [s]",
        {name: {row["name"]: row["seconds"] for row in rows} for name, rows in summary["launcher"].items()},
    )
    lines += _columns(
        "start, as the engine's log tells it [s]",
        {str(n): {row["step"]: row["seconds"] for row in rows} for n, rows in enumerate(summary["engine_starts"], 1)},
    )
    if found := summary["cache"]:
        lines += [
            f"Cache: {found['reported_blocks']} blocks of {found['block_size']} tokens, predicted "
            f"{found['predicted_blocks']} (ratio {found['ratio']}).",
            "",
        ]
    cause = summary["first_known_line"]
    if cause and any(row["result"] != "passed" for row in summary["phases"]):
        lines += [f"Known line in the engine's log: {cause['id']}, {cause['line'].strip()[:300]}", ""]
    return "\n".join(lines)


def _table(title: str, rows: list[tuple[str, float, str]]) -> list[str]:
    if not rows:
        return []
    return [f"| {title} | seconds | |", "| --- | --- | --- |", *(f"| {a} | {b} | {c} |" for a, b, c in rows), ""]


def _columns(title: str, columns: Mapping[str, Mapping[str, float]]) -> list[str]:
    """A column a start, a row a step, and the sum of each."""
    if not columns:
        return []
    steps = list(dict.fromkeys(step for column in columns.values() for step in column))
    rows = [(step, [column.get(step, "") for column in columns.values()]) for step in steps]
    rows.append(("**all**", [round(sum(column.values()), 1) for column in columns.values()]))
    return [
        f"| {' | '.join([title, *columns])} |",
        f"| --- |{' ---: |' * len(columns)}",
        *(f"| {' | '.join([step, *map(str, values)])} |" for step, values in rows),
        "",
    ]


def _lines(file: Path) -> list[str]:
    return file.read_text(errors="replace").splitlines() if file.is_file() else []


def _json(file: Path) -> dict[str, Any]:
    try:
        document = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return document if isinstance(document, dict) else {}


if __name__ == "__main__":
    sys.exit(main())
