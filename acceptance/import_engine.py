#!/usr/bin/env python3
"""Import what a start of the engine imports, so that Python leaves its bytecode beside it: import_engine.py FILE

FILE gets how long that took, now and once more in a new process, and which modules still have no bytecode: those that
every process of every start compiles again.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

# Of the server, of the engine's own process, of a rank, and what torch.compile brings at its first use.
MODULES = (
    "lmdeploy.cli.entrypoint",
    "lmdeploy.serve.openai.api_server",
    "lmdeploy.pytorch.engine.engine",
    "lmdeploy.pytorch.engine.executor.ray_executor",
    "lmdeploy.pytorch.models.deepseek_v2",
    "lmdeploy.pytorch.backends.cuda.op_backend",
    "lmdeploy.pytorch.backends.cuda.graph_runner.runner",
    "torch._dynamo",
    "torch._inductor.compile_fx",
    "transformers.models.auto.tokenization_auto",
)


def load() -> dict[str, Any]:
    """Import everything; seconds, and what has no bytecode or could not be imported."""
    began = time.monotonic()
    failed = {}
    for name in MODULES:
        try:
            importlib.import_module(name)
        except Exception as error:  # another release has other modules
            failed[name] = repr(error)
    cached = [path for module in list(sys.modules.values()) if (path := getattr(module, "__cached__", None))]
    missing = sorted({path for path in cached if not Path(path).exists()})
    return {"seconds": round(time.monotonic() - began, 1), "modules": len(cached), "missing": missing, "failed": failed}


def main() -> int:
    with contextlib.redirect_stdout(sys.stderr):
        found = load()
    if len(sys.argv) < 2:
        print(json.dumps(found))
        return 0
    again = subprocess.run([sys.executable, __file__], capture_output=True, text=True, check=True).stdout
    document = {"first": found, "again": json.loads(again.splitlines()[-1])}
    Path(sys.argv[1]).write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    for name, one in document.items():
        counts = f"{one['modules']} modules, {len(one['missing'])} without bytecode"
        print(f"{name}: {one['seconds']} s, {counts}", one["failed"] or "")
    return 0


if __name__ == "__main__":
    sys.exit(main())
