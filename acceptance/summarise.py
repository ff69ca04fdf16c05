#!/usr/bin/env python3
"""Turn what an acceptance run left into summary.json and summary.md.

    summarise.py OUTPUT     reads phases.tsv, host.json, engine.log, status.json, … there

Where a file is missing (a phase failed or was left out) its part of the summary is missing too.
"""

from __future__ import annotations

import csv
import json
import re
import sys
from collections.abc import Iterable, Mapping, Sequence
from datetime import datetime
from itertools import pairwise
from pathlib import Path
from typing import Any

from deploy_dsv3 import capacity, signatures

# Lines of LMDeploy 0.18's log at level INFO, in order; each ends the step before it.
MILESTONES = {
    "server process": "input backend=",
    "imports of the engine process": "Init ray cluster.",
    "joining Ray": "Init ray workers.",
    "Ray worker: start and imports": "Init distributed environment by device.",
    "process group": "Building Model.",
    "model and weights": "Updating configs.",
    "cache plan": "Building GraphRunner",
    "graph runner": "Building CacheEngine with config",
    "cache": "Warming up model.",
    "warm-up and graph capture": "Engine warmup completed in",
}
_TIME = re.compile(r"(\d{4}-\d\d-\d\d \d\d:\d\d:\d\d,\d{3}) - lmdeploy")
_BLOCKS = re.compile(r"num_gpu_blocks=(\d+)")
_BLOCK_SIZE = re.compile(r"\bblock_size=(\d+)")


def main() -> int:
    folder = Path(sys.argv[1])
    host = _json(folder / "host.json")
    log = folder / "engine.log"
    engine = log.read_text(errors="replace").splitlines() if log.is_file() else []
    cause = signatures.first_cause(engine)
    summary = {
        "host": host,
        "phases": phases(folder / "phases.tsv"),
        "launcher": _json(folder / "status.json").get("phases", []),
        "engine_start": start_breakdown(engine),
        "cache": cache(engine, host, _json(folder / "serve.json").get("argv", [])),
        "answers": {path.stem: _json(path) for path in sorted(folder.glob("answer-*.json"))},
        "benchmark": benchmark(folder / "benchmark"),
        "first_known_line": cause.as_dict() if cause else None,
    }
    (folder / "summary.json").write_text(json.dumps(summary, indent=1) + "\n", encoding="utf-8")
    (folder / "summary.md").write_text(markdown(summary), encoding="utf-8")
    print(markdown(summary))
    return 0


def phases(file: Path) -> list[dict[str, Any]]:
    """Name, seconds and result of each phase, in order."""
    if not file.exists():
        return []
    rows = (line.split("\t") for line in file.read_text(encoding="utf-8").splitlines())
    return [{"name": name, "seconds": float(seconds), "result": result} for name, seconds, result in rows]


def start_breakdown(log: Iterable[str]) -> list[dict[str, Any]]:
    """Seconds of each step of the engine's first start, from the times in its log."""
    steps: list[dict[str, Any]] = []
    waiting = list(MILESTONES.items())
    last: datetime | None = None
    for line in log:
        stamp = _TIME.search(line)
        if not stamp:
            continue
        now = datetime.strptime(stamp.group(1), "%Y-%m-%d %H:%M:%S,%f")
        last = last or now
        reached = next((index for index, (_, text) in enumerate(waiting) if text in line), None)
        if reached is None:
            continue
        steps.append({"step": waiting[reached][0], "seconds": round((now - last).total_seconds(), 1)})
        last, waiting = now, waiting[reached + 1 :]
    return steps


def cache(log: Iterable[str], host: Mapping[str, Any], argv: Sequence[str]) -> dict[str, Any]:
    """Cache blocks that the engine reported, beside those that `deploy_dsv3.capacity` predicts.

    `argv` is the serving command: the model's folder and the options that memory depends on.
    """
    text = "\n".join(log)
    reported, size = _BLOCKS.search(text), _BLOCK_SIZE.search(text)
    gpu = (host.get("gpus") or [None])[0]
    if not reported or not size or gpu is None or len(argv) < 4:
        return {}
    given = dict(pairwise(argv))
    predicted = capacity.estimate(
        capacity.load_model(argv[3]),
        capacity.Serving(
            gpus=1,
            gpu_memory_mib=gpu["memory_mib"],
            gpu_name=gpu["name"],
            layout=capacity.Layout(),
            flash_mla=size.group(1) == "64",
            cache_max_entry_count=float(given.get("--cache-max-entry-count", "0.8")),
            max_batch_size=int(given.get("--max-batch-size", "0")),
            max_prefill_token_num=int(given.get("--max-prefill-token-num", "8192")),
        ),
    )
    blocks = int(reported.group(1))
    if not blocks:
        return {}
    return {
        "reported_blocks": blocks,
        "block_size": int(size.group(1)),
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
    lines += _table("start of the engine", [(row["step"], row["seconds"], "") for row in summary["engine_start"]])
    lines += _table("launcher", [(row["name"], row["seconds"], "") for row in summary["launcher"]])
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


def _json(file: Path) -> dict[str, Any]:
    try:
        document = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return document if isinstance(document, dict) else {}


if __name__ == "__main__":
    sys.exit(main())
