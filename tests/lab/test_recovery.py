"""Whatever is lost, head or worker: it serves again by itself. Nobody runs anything."""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial

import pytest
import sight
from product import Product, Times

from deploy_dsv3.lab.fleet import Lab
from deploy_dsv3.lab.hosts import Host

pytestmark = pytest.mark.usefixtures("deployed")

#: Serving again within [seconds]; a loaded machine of 2 cores starts 16 ranks slowly.
DEADLINE_S = 300


def _kill(host: Host) -> None:
    """SIGKILL, from outside, to the main process of the container."""
    host.run(["kill", "-KILL", str(sight.engine_process(host))])


def _reboot(host: Host) -> None:
    host.reboot()


def _wait_until_served(lab: Lab, endpoint: str, since: float) -> float:
    """Wait for an engine that was started after a moment, on all GPUs; returns the seconds since then."""
    head = lab.hosts[0]

    def served() -> bool:
        status = sight.launcher_status(head)
        fresh = status.get("phase") == "serving" and status["engine"]["healthy_at"] > since
        return fresh and sight.serves(endpoint)

    sight.eventually(
        served, "serving again", within_s=DEADLINE_S, seen=lambda: sight.launcher_status(head) or "no status"
    )
    return time.time() - since


@pytest.mark.parametrize("role", ["worker", "head"])
@pytest.mark.parametrize(
    ("fault", "strike"), [("container killed", _kill), ("host rebooted", _reboot)], ids=["killed", "rebooted"]
)
def test_it_serves_again(
    lab: Lab, endpoint: str, times: Times, role: str, fault: str, strike: Callable[[Host], None]
) -> None:
    head, worker = lab.hosts
    struck = {"head": head, "worker": worker}[role]
    identifier, before = sight.started_at(struck)
    since = time.time()
    strike(struck)
    times.note(f"{role}: {fault}, until it serves again", _wait_until_served(lab, endpoint, since))
    assert sight.started_at(struck)[0] == identifier, "the same container, started again"
    assert sight.started_at(struck)[1] > before
    status = sight.launcher_status(head)
    alive = [node for node in status["nodes"] if node["alive"]]
    assert sorted(node["address"] for node in alive) == [head.address, worker.address], "no stale node"
    assert status["gpus_alive"] == 16


def test_a_worker_without_power(product: Product, lab: Lab, endpoint: str, times: Times) -> None:
    """`status` says so while it is off; it rejoins when it is on again."""
    head, worker = lab.hosts
    since = time.time()
    worker.stop(power_cut=True)
    try:
        sight.eventually(
            lambda: sight.launcher_status(head)["phase"] != "serving",
            "the head notices",
            within_s=120,
            seen=lambda: sight.launcher_status(head),
        )
        times.note("worker: power lost, until the head says so", time.time() - since)
        run = product("status", "--inventory", lab.inventory, "--json", expect=6)
        (replica,) = run.document["replicas"]
        assert run.document["unreachable"] == [worker.name]
        assert replica["whole"] is False
        assert replica["engine"]["phase"] != "serving"
        text = product("status", "--inventory", lab.inventory, expect=6).out
        assert f"{worker.name} was not reached: " in text
    finally:
        back = time.time()
        worker.start()
    _wait_until_served(lab, endpoint, back)
    times.note("worker: power back, until it serves again", time.time() - back)


@pytest.mark.parametrize("role", ["worker", "head"])
def test_a_restarted_daemon_leaves_the_engine_alone(lab: Lab, endpoint: str, times: Times, role: str) -> None:
    host = lab.hosts[0 if role == "head" else 1]
    before = sight.started_at(host)
    since = time.time()
    host.run(["systemctl", "restart", "docker"])
    sight.eventually(lambda: sight.serves(endpoint), "serving", within_s=DEADLINE_S)
    times.note(f"{role}: dockerd restarted, until a completion came back", time.time() - since)
    assert sight.started_at(host) == before, "the container went on"


def test_everything_is_as_it_was_deployed(product: Product, lab: Lab) -> None:
    for host in lab:  # Docker looks every 15 s
        sight.eventually(partial(sight.is_healthy, host), f"{host.name} is healthy", within_s=60)
    assert "all passed" in product("verify", "--inventory", lab.inventory).out
