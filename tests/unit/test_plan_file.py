"""A plan that is kept is applied only to what it was made from."""

from __future__ import annotations

import json
import stat
from pathlib import Path

import pytest
from converged_hosts import DEPLOYMENT, HEAD, WORKER, bare, converged, inputs, planned

from deploy_dsv3 import plan, plan_file
from deploy_dsv3.errors import PreflightError, UnreachableError, UsageError


@pytest.fixture
def kept(tmp_path: Path) -> Path:
    """The plan of a converged deployment, in a file."""
    path = tmp_path / "plan.json"
    plan_file.save(planned(converged()), path)
    return path


def test_the_same_hosts_and_settings_are_accepted(kept: Path) -> None:
    plan_file.check(planned(converged()), kept)


def test_it_is_private_and_holds_the_plan(kept: Path) -> None:
    assert stat.S_IMODE(kept.stat().st_mode) == 0o600
    assert json.loads(kept.read_text())["plan"]["verb"] == "plan"


def test_a_plan_of_bare_hosts_is_accepted_as_well(tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    plan_file.save(planned(bare()), path)
    plan_file.check(planned(bare()), path)


def test_changed_hosts_are_refused_by_host_and_key(kept: Path) -> None:
    documents = converged()
    documents[WORKER]["state"]["sysctls"]["vm.swappiness"] = "1"
    with pytest.raises(PreflightError, match=r"gpu-02: sysctl vm\.swappiness was 60, is 1") as refused:
        plan_file.check(planned(documents), kept)
    assert refused.value.exit_code == 3 and "plan --out" in refused.value.remedy


def test_many_changes_are_summed_up(kept: Path) -> None:
    with pytest.raises(PreflightError, match=r"and \d+ more"):
        plan_file.check(planned(bare()), kept)


def test_changed_settings_are_refused(kept: Path) -> None:
    with pytest.raises(UsageError, match="gpu-01") as refused:
        plan_file.check(planned(converged(), endpoint_port=8001), kept)
    assert refused.value.exit_code == 2 and WORKER not in str(refused.value)


def test_a_host_that_is_away_is_refused(kept: Path) -> None:
    known = inputs(converged())
    known[HEAD] = type(known[HEAD])(host=HEAD, facts=None, settings=known[HEAD].settings)
    with pytest.raises(UnreachableError, match="gpu-01: no route"):
        plan_file.check(plan.make(DEPLOYMENT, known, unreachable={HEAD: "no route"}), kept)


@pytest.mark.parametrize(
    "content",
    [
        "",
        "[]",
        '{"schema": 1}',
        '{"schema": 2, "fingerprint": "", "states": {}, "wants": {}}',
        '{"schema": 1, "fingerprint": "", "states": {"a": []}, "wants": {}}',
        "\x00",
    ],
)
def test_what_is_no_plan_is_refused(tmp_path: Path, content: str) -> None:
    path = tmp_path / "other.json"
    path.write_text(content)
    with pytest.raises(UsageError, match=r"other\.json"):
        plan_file.check(planned(converged()), path)


@pytest.mark.parametrize("name", ["missing.json", "."])
def test_what_cannot_be_read_is_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(UsageError, match="cannot be read"):
        plan_file.check(planned(converged()), tmp_path / name)


def test_where_it_cannot_be_written(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="cannot be written"):
        plan_file.save(planned(converged()), tmp_path / "no" / "folder" / "plan.json")
