"""A run that fails or is stopped says why and where, leaves no lock, and the next one puts it right."""

from __future__ import annotations

import json
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import sight
import yaml
from product import Product, Run

from deploy_dsv3.lab.fleet import Lab

pytestmark = pytest.mark.usefixtures("deployed")

#: LMDeploy reads it as a boolean when it is imported, and stops at this.
BROKEN = ("--extra-vars", json.dumps({"engine_environment": {"LMDEPLOY_SKIP_WARMUP": "perhaps"}}))
PAGE = "docs/runbooks/troubleshooting.md#empty-environment"


def _runs(product: Product, lab: Lab) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = product("history", "--inventory", lab.inventory, "--json").document["runs"]
    return found


@pytest.fixture(scope="module")
def failed(product: Product, lab: Lab) -> Run:
    """A deploy of an engine that cannot start, for a reason that its log names."""
    return product("--inventory", lab.inventory, *BROKEN, "--json", expect=4, what="deploy of a broken engine")


def test_a_failing_deploy_tells_the_first_cause(failed: Run, lab: Lab, product: Product) -> None:
    first = failed.document["failures"][0]
    assert (first["host"], first["stage"], first["code"]) == ("gpu-01", "engine", "empty-environment")
    assert first["cause"] and first["remedy"] and first["page"] == PAGE
    assert "LMDEPLOY_SKIP_WARMUP=perhaps" in first["message"]
    report = (Path(failed.document["log"]) / "report.txt").read_text()
    assert "FAILED stage engine, host gpu-01" in report and PAGE in report
    last = _runs(product, lab)[-1]
    assert last["result"] == "failed" and last["failure"]["page"] == PAGE


def test_status_and_verify_tell_it_as_well(failed: Run, product: Product, lab: Lab) -> None:
    (replica,) = product("status", "--inventory", lab.inventory, "--json", expect=5).document["replicas"]
    assert replica["nodes"][0]["cause"]["page"] == PAGE
    assert PAGE in product("status", "--inventory", lab.inventory, expect=5).out
    red = product("verify", "--inventory", lab.inventory, *BROKEN, "--json", expect=5).document["checks"]
    told = {check["check"]: check["message"] for check in red if check["outcome"] == "failed"}
    assert PAGE in told["The engine's log names no failure that is known"]


def test_the_next_run_puts_it_right(failed: Run, product: Product, lab: Lab, endpoint: str) -> None:
    product("--inventory", lab.inventory, what="run after one that failed")
    assert sight.serves(endpoint)


#: Written at boot and when driver or toolkit change; it counts before the one that the role keeps in /etc/cdi.
CDI_SPEC = "/var/run/cdi/nvidia.yaml"


def test_gpus_that_no_container_gets_are_told_and_the_engine_is_left_alone(
    product: Product, lab: Lab, endpoint: str
) -> None:
    """On one host the specification knows nothing of a GPU, on the other it names a device that is gone."""
    one, other = lab.hosts
    before = [sight.started_at(host) for host in lab]
    try:
        spec = yaml.safe_load(one.run(["cat", CDI_SPEC]).stdout)
        lost = {"path": "/dev/nvidia7"}
        spec["devices"] = [device for device in spec["devices"] if device["containerEdits"]["deviceNodes"] != [lost]]
        spec["devices"][-1]["containerEdits"]["deviceNodes"].remove(lost)
        one.run(["tee", CDI_SPEC], stdin=json.dumps(spec).encode())
        other.run(["sed", "--in-place", "s:/dev/nvidia7:/dev/nvidia9:", CDI_SPEC])
        run = product(
            "--inventory", lab.inventory, "--tags", "container", "--json", expect=4, what="a GPU is not given"
        )
    finally:
        for host in lab:
            host.run(["systemctl", "restart", "nvidia-cdi-refresh.service"])
    told = {failure["host"]: failure for failure in run.document["failures"]}
    assert {failure["stage"] for failure in told.values()} == {"container"}
    assert {failure["page"] for failure in told.values()} == {"docs/runbooks/troubleshooting.md#no-gpu-in-container"}
    uuid = one.run(["nvidia-smi", "--query-gpu=uuid", "--format=csv,noheader", "--id=7"]).stdout.strip()
    assert "sees 7 of the host's 8 GPUs" in told[one.name]["message"] and uuid in told[one.name]["message"]
    assert (
        "sees 0 of the host's 8 GPUs" in told[other.name]["message"] and "/dev/nvidia9" in told[other.name]["message"]
    )
    assert all("nvidia-cdi-refresh.service" in failure["remedy"] for failure in told.values())
    assert [sight.started_at(host) for host in lab] == before and sight.serves(endpoint)
    for host in lab:
        assert "deploy-dsv3-look" not in host.run(["docker", "ps", "--all", "--format", "{{.Names}}"]).stdout


def test_sigterm_while_it_verifies_gives_the_lock_back(product: Product, lab: Lab, tmp_path: Path) -> None:
    log = tmp_path / "log"
    with product.started("--inventory", lab.inventory, "--full", log=log) as running:
        sight.eventually(lambda: " verify: " in log.read_text(), "it verifies", within_s=600)
        stopped = time.monotonic()
        running.send_signal(signal.SIGTERM)
        assert running.wait(timeout=60) == 143
        assert time.monotonic() - stopped < 30
    assert "Run the same command again" in log.read_text()
    last = _runs(product, lab)[-1]
    assert (last["result"], last["exit_code"]) == ("stopped", 143)
    product("--inventory", lab.inventory, what="run after one that was stopped")
