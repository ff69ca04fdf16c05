"""Runs the product's Ansible modules in-process with given arguments."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from ansible.module_utils.testing import patch_module_args

LIBRARY = Path(__file__).parents[2] / "playbooks" / "library"


def load(name: str) -> ModuleType:
    """The module `name` of playbooks/library as a Python module."""
    spec = importlib.util.spec_from_file_location(name, LIBRARY / f"{name}.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def run(name: str, capsys: pytest.CaptureFixture[str], args: Mapping[str, Any]) -> dict[str, Any]:
    """The result that Ansible would get from module `name` called with `args`."""
    module = load(name)
    with patch_module_args(dict(args)), pytest.raises(SystemExit):
        module.main()
    return json.loads(capsys.readouterr().out)
