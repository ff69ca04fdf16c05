"""Somebody changes what was deployed: `verify` says what, the next run puts it right."""

from __future__ import annotations

import pytest
import sight
from product import Product

from deploy_dsv3.lab.fleet import Lab

pytestmark = pytest.mark.usefixtures("deployed")


@pytest.fixture(scope="module", autouse=True)
def _drifted(lab: Lab) -> None:
    """The worker's container would not come back after a reboot any more; the endpoint is stopped."""
    lab.hosts[1].run(["docker", "update", "--restart=no", sight.CONTAINER])
    lab.hosts[0].run(["systemctl", "stop", "dsv3-endpoint.service"])


def test_verify_names_check_and_host(product: Product, lab: Lab) -> None:
    run = product("verify", "--inventory", lab.inventory, "--json", expect=5)
    red = {
        (check["host"], check["suite"]): check["message"]
        for check in run.document["checks"]
        if check["outcome"] in ("failed", "error")
    }
    assert "restart" in red["gpu-02", "container"]
    assert ("gpu-01", "endpoint") in red
    assert ("gpu-01", "container") not in red
    text = product("verify", "--inventory", lab.inventory, expect=5).out
    assert "gpu-02: " in text and "did not pass" in text


def test_the_next_run_puts_it_right(product: Product, lab: Lab, endpoint: str) -> None:
    run = product("--inventory", lab.inventory, what="run that repairs")
    for stage in ("preflight", "container", "engine", "verify"):
        assert f" {stage}: " in run.out, "plain lines where there is no terminal"
    assert "container: gpu-02: changed: " in run.out
    assert "engine: gpu-01: changed: " in run.out
    assert "a completion came back" in run.out
    assert sight.container(lab.hosts[1])["HostConfig"]["RestartPolicy"]["Name"] == "unless-stopped"
    assert sight.serves(endpoint)
