"""What somebody changed is planned and put back; one run at a time; a killed run is continued by the next."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import sight
from product import Product, Run

from deploy_dsv3.lab.fleet import Lab

pytestmark = pytest.mark.usefixtures("deployed")

#: What somebody does on the first host or the second, and the key that tells.
BY_HAND = (
    (0, "docker update --restart=no " + sight.CONTAINER, "container restart_policy"),
    (0, "echo '# by hand' >> /etc/deploy-dsv3/endpoint/haproxy.cfg", "file /etc/deploy-dsv3/endpoint/haproxy.cfg"),
    (0, "systemctl --quiet disable dsv3-endpoint.service", "unit dsv3-endpoint.service enabled"),
    (0, "rm /etc/deploy-dsv3/release.json", "file /etc/deploy-dsv3/release.json"),
    (0, "chmod 0600 /etc/deploy-dsv3/engine/serve.json", "file /etc/deploy-dsv3/engine/serve.json"),
    (1, "echo >> /etc/deploy-dsv3/engine/node.json", "file /etc/deploy-dsv3/engine/node.json"),
    (
        1,
        'sed --in-place \'s/live-restore": true/live-restore": true, "debug": true/\' /etc/docker/daemon.json',
        "daemon.json debug",
    ),
    (1, "systemctl stop nvidia-persistenced.service", "unit nvidia-persistenced.service active"),
    (1, "sysctl --quiet --write net.ipv4.ip_local_port_range='20000 60000'", "sysctl net.ipv4.ip_local_port_range"),
    (1, "echo '# by hand' >> /etc/cdi/nvidia.yaml", "file /etc/cdi/nvidia.yaml"),
    (
        1,
        "mkdir -p /etc/systemd/system/docker.service.d && touch /etc/systemd/system/docker.service.d/hand.conf",
        "file /etc/systemd/system/docker.service.d/hand.conf",
    ),
    (
        1,
        "apt-get remove --yes --allow-change-held-packages nvidia-container-toolkit",
        "package nvidia-container-toolkit",
    ),
)
#: What undoes of it what no role does.
UNDONE = (
    """sed --in-place -e 's/, "debug": true//' -e '/"debug"/d' /etc/docker/daemon.json""",
    "sysctl --quiet --write net.ipv4.ip_local_port_range='32768 60999'",
    "rm -r /etc/systemd/system/docker.service.d",
)
STAGES = ("host", "image", "weights", "container", "ray", "engine", "first-token", "verify")


@pytest.fixture(scope="module")
def changed(product: Product, lab: Lab, deployed: Run) -> Iterator[Run]:
    """The plan after all of it was done by hand."""
    assert product("plan", "--inventory", lab.inventory, what="plan, nothing to do").out.endswith("nothing to do\n")
    for index, command, _ in BY_HAND:
        lab.hosts[index].run(["sh", "-euc", command])
    yield product("plan", "--inventory", lab.inventory, "--json", expect=10)
    for command in UNDONE:
        lab.hosts[1].run(["sh", "-euc", command])


def test_all_that_was_changed_by_hand_is_found_and_nothing_else(changed: Run, lab: Lab) -> None:
    (replica,) = changed.document["replicas"]
    found = [(one["host"], one["key"]) for host in replica["hosts"] for one in host["drift"]]
    assert sorted(found) == sorted((lab.hosts[index].name, key) for index, _, key in BY_HAND)


def test_status_tells_it_as_well(changed: Run, product: Product, lab: Lab) -> None:
    text = product("status", "--inventory", lab.inventory).out
    for index, _, key in BY_HAND:
        assert f"{lab.hosts[index].name}: {key} " in text


def test_the_next_run_puts_back_what_a_role_makes(changed: Run, product: Product, lab: Lab, endpoint: str) -> None:
    run = product("--inventory", lab.inventory, "--json", what="run of the roles that differ")
    assert run.document["verification"]["passed"] is True
    assert sight.container(lab.hosts[0])["HostConfig"]["RestartPolicy"]["Name"] == "unless-stopped"
    assert "by hand" not in lab.hosts[0].run(["cat", "/etc/deploy-dsv3/endpoint/haproxy.cfg"]).stdout
    assert sight.serves(endpoint)
    product("plan", "--inventory", lab.inventory)
    full = product("--inventory", lab.inventory, "--full", "--json", what="full walk afterwards")
    assert [stats["changed"] for stats in full.document["hosts"].values()] == [0, 0]


def test_a_kept_plan_is_refused_once_a_host_has_changed(product: Product, lab: Lab, tmp_path: Path) -> None:
    kept = tmp_path / "plan.json"
    product("plan", "--inventory", lab.inventory, "--out", kept)
    lab.hosts[1].run(["sysctl", "--quiet", "--write", "net.ipv4.ip_local_port_range=20001 60000"])
    told = product("--inventory", lab.inventory, "--plan", kept, expect=3).err
    assert "gpu-02: sysctl net.ipv4.ip_local_port_range" in told
    lab.hosts[1].run(["sysctl", "--quiet", "--write", "net.ipv4.ip_local_port_range=20000 60000"])
    assert product("--inventory", lab.inventory, "--plan", kept).exit_code == 0


def test_of_two_at_once_one_wins_and_the_other_is_told_who(product: Product, lab: Lab, tmp_path: Path) -> None:
    with product.started("--inventory", lab.inventory, "--full", log=tmp_path / "log") as first:
        sight.eventually(lambda: lock_of(product, lab), "it has the lock", within_s=600)
        told = product("--inventory", lab.inventory, expect=7).told
        assert "the deployment is locked by" in told and f"process {first.pid}" in told
        assert product("status", "--inventory", lab.inventory).exit_code == 0
        assert first.wait(timeout=600) == 0
    assert lock_of(product, lab) is None


def test_ctrl_c_gives_the_lock_back(product: Product, lab: Lab, tmp_path: Path) -> None:
    with product.started("--inventory", lab.inventory, "--full", log=tmp_path / "log") as run:
        sight.eventually(lambda: lock_of(product, lab), "it has the lock", within_s=600)
        run.send_signal(2)
        assert run.wait(timeout=120) == 130
    assert lock_of(product, lab) is None


def test_a_run_killed_at_each_stage_is_continued_by_the_next(product: Product, lab: Lab, tmp_path: Path) -> None:
    """Each run takes the lock over from the one that was killed before it."""
    changes = ("--extra-vars", "engine_log_max_size=50m lmdeploy_session_len=8192", "--full")
    for stage in STAGES:
        log = tmp_path / stage
        with product.started("--inventory", lab.inventory, *changes, log=log) as run:
            sight.eventually(partial(says, log, f" {stage}: ", run), f"stage {stage}", within_s=600)
            run.kill()
    product("--inventory", lab.inventory, *changes, what="run after eight that were killed")
    assert product("plan", "--inventory", lab.inventory, *changes[:2]).out.endswith("nothing to do\n")
    runs = product("history", "--inventory", lab.inventory, "--json").document["runs"]
    assert [run["result"] for run in runs][-1 - len(STAGES) :] == ["died"] * len(STAGES) + ["done"]
    product("--inventory", lab.inventory, what="run back to the settings before")


def says(log: Path, words: str, run: subprocess.Popen[bytes]) -> bool:
    """Whether a run that goes on has said so by now."""
    said = words in log.read_text()
    assert said or run.poll() is None, "the run ended before"
    return said


def lock_of(product: Product, lab: Lab) -> dict[str, Any] | None:
    """Who holds the lock, as `plan` tells it."""
    run = subprocess.run(
        product.argv("plan", "--inventory", lab.inventory, "--json"),
        cwd=product.folder,
        env=product.environment,
        capture_output=True,
        check=False,
    )
    (replica,) = Run(argv=(), exit_code=0, out=run.stdout.decode(), err="", seconds=0).document["replicas"]
    found: dict[str, Any] | None = replica["lock"]
    return found
