"""`./dev test` runs every molecule scenario, and each role of the host has one."""

from __future__ import annotations

import re
from pathlib import Path

import yaml

from deploy_dsv3 import content

ROOT = Path(__file__).parents[2]


def run_in_order() -> list[str]:
    found = re.search(r"^SCENARIOS=\((.*?)\)", (ROOT / "dev").read_text(), re.MULTILINE | re.DOTALL)
    assert found
    return found[1].split()


def test_every_scenario_is_run() -> None:
    assert sorted(run_in_order()) == sorted(path.parent.name for path in ROOT.glob("molecule/*/molecule.yml"))


def test_each_role_of_the_host_has_one_in_the_order_of_a_deployment() -> None:
    (play,) = yaml.safe_load(content.playbook("prepare").read_text())
    roles = [entry["role"] for entry in play["roles"]]
    assert [name for name in run_in_order() if name in roles] == roles
