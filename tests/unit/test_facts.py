"""The model takes what the probe writes, forgives what is missing and refuses what is wrong."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from recorded_hosts import NAMES, document, recorded

from deploy_dsv3 import facts
from deploy_dsv3.facts import FactsError, load_facts

REFERENCE = Path(__file__).parents[2] / "docs" / "reference" / "probe-facts.md"


@pytest.mark.parametrize("name", NAMES)
def test_recorded_hosts_load(name: str) -> None:
    host = recorded(name)
    assert host.hostname == document(name)["hostname"]
    assert host.gpu_count == 8


def test_missing_sections_are_empty() -> None:
    host = load_facts({"schema": 1, "hostname": "bare"})
    assert host.docker.containers == () and host.infiniband.ports == () and host.clock is None
    assert host.gpu_count == 0


def test_fields_of_a_newer_probe_are_ignored() -> None:
    assert load_facts({"schema": 1, "liquid_cooling": {"ok": True}, "os": {"id": "debian", "edition": "x"}}).os.id


@pytest.mark.parametrize(
    ("document", "field"),
    [
        ({"schema": 1, "gpus": [{"memory_total_mib": "much"}]}, "gpus.0.memory_total_mib"),
        ({"schema": 1, "network": {"interfaces": [{"mtu": 1500}]}}, "network.interfaces.0.name"),
        ({"schema": 1, "os": {"family": "Plan9"}}, "os.family"),
        ({"schema": 2}, "schema 2"),
    ],
)
def test_wrong_documents_are_refused_by_field(document: dict[str, object], field: str) -> None:
    with pytest.raises(FactsError, match=field):
        load_facts(document)


def test_gpus_are_counted_on_the_bus_before_there_is_a_driver() -> None:
    bare = recorded("l20-pcie")
    assert bare.gpus == () and bare.gpu_count == 8


def test_unread_sections_become_warnings() -> None:
    host = recorded("l20-pcie", errors={"listening": "PermissionError: /proc/net/tcp"})
    (finding,) = facts.unread_sections("gpu1", host)
    assert finding.severity == "warning"
    assert "gpu1" in finding.message and "listening" in finding.message and "PermissionError" in finding.message


def test_the_reference_is_current() -> None:
    made = subprocess.run(
        [sys.executable, "-m", "deploy_dsv3.facts"], capture_output=True, text=True, check=True
    ).stdout
    assert REFERENCE.read_text(encoding="utf-8") == made
