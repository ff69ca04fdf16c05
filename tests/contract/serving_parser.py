"""Ask LMDeploy's real parser from a test; it lives in an environment of its own (see README.md)."""

from __future__ import annotations

import functools
import json
import subprocess
from pathlib import Path
from typing import Any

ENVIRONMENT = Path(__file__).parents[2] / ".venv-lmdeploy"
SCRIPT = Path(__file__).parent / "real_parser.py"


def parse_for_real(argv: list[str]) -> dict[str, Any]:
    """Parse a whole command (argv[0] is `lmdeploy`) with LMDeploy's parser.

    Returns:
        {"accepted": True, "values": the parsed namespace} or
        {"accepted": False, "error": argparse's complaint}.
    """
    return _ask({"argv": argv})


@functools.cache
def real_options() -> dict[str, Any]:
    """LMDeploy's version and the options of `serve api_server`, as arguments to add_argument."""
    return _ask({"options": True})


def _ask(question: dict[str, Any]) -> dict[str, Any]:
    python = ENVIRONMENT / "bin" / "python"
    assert python.exists(), f"{ENVIRONMENT} is missing: `./dev test` makes it from requirements/lmdeploy-parser.lock"
    done = subprocess.run([python, SCRIPT], input=json.dumps(question), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    answer: dict[str, Any] = json.loads(done.stdout)
    return answer
