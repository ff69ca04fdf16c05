"""Servers of several kinds, and what is wrong with some, through the host stage: what is said, done, and undone.

A lab of its own, beside the one of the other files: no engine is started on it. The tests are its story, in order.
"""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import sight
from conftest import up
from product import Product, Run, Times
from rich.console import Console

from deploy_dsv3 import ports
from deploy_dsv3.lab import bringup, hardware
from deploy_dsv3.lab.fleet import Lab
from deploy_dsv3.lab.hosts import Host
from deploy_dsv3.lab.paths import default_paths
from deploy_dsv3.lab.progress import Steps

NAME = "hosts"
RUNBOOK = Path(__file__).parents[2] / "docs" / "runbooks" / "prepare-a-server.md"
PROFILES = (
    "h20-roce",
    str(Path(__file__).parent / "profiles" / "h20-roce-mlx5.yml"),
    "old-driver",
    "fabric-mismatch",
    "nouveau",
    "debian12",
)
#: Two servers of one replica, and four that have nothing to do with each other.
INVENTORY = """\
[roce_head]
{0}
[roce_workers]
{1}
[roce:children]
roce_head
roce_workers

[old_head]
{2}
[old:children]
old_head

[mismatch_head]
{3}
[mismatch:children]
mismatch_head

[nouveau_head]
{4}
[nouveau:children]
nouveau_head

[pcie_head]
{5}
[pcie:children]
pcie_head

[dsv3:children]
roce
old
mismatch
nouveau
pcie
"""
#: Two prepared servers with InfiniBand as one replica.
PAIR = """\
[dsv3_head]
{2}
[dsv3_workers]
{3}
"""
#: Two servers that have to be rebooted, and nothing else in common.
AT_ONCE = """\
[new_head]
{0.name} ansible_host={0.address}
[new:children]
new_head

[other_head]
{1.name} ansible_host={1.address} nvidia_driver_branch="'570'"
[other:children]
other_head

[dsv3:children]
new
other

[dsv3:vars]
nvidia_driver_reboot_batch=0
docker_engine_hold_packages=True
"""
OFED, OLD, MISMATCH, NOUVEAU, PCIE = "gpu-02", "gpu-03", "gpu-04", "gpu-05", "gpu-06"
NVSWITCH = ("gpu-01", OFED, OLD, MISMATCH, NOUVEAU)
WANTED = "580.105.08"


@dataclass(frozen=True, kw_only=True)
class Servers:
    """The lab with its inventories, and its hosts as they were born."""

    lab: Lab
    inventory: Path
    pair: Path
    born: dict[str, sight.State]
    boots: dict[str, str]

    def options(self, *more: str) -> tuple[str | Path, ...]:
        """What a run of the host stage takes."""
        return ("--inventory", self.inventory, "--tags", "host", "--json", *more)


@pytest.fixture(scope="module")
def servers(times: Times, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Servers]:
    """Six servers, gone in the end."""
    folder = tmp_path_factory.mktemp("servers")
    _down()
    wish = bringup.Wish(name=NAME, hosts=len(PROFILES), profiles=PROFILES, inventory=folder / "lab")
    lab = up(wish, times)
    # As the lab's own inventory has them: a host of another release says more of itself.
    written = (lab.inventory / "hosts.ini").read_text().splitlines()
    lines = [next(line for line in written if line.startswith(f"{host.name} ")) for host in lab]
    inventories = {}
    for name, text in (("kinds", INVENTORY), ("pair", PAIR)):
        (folder / name / "group_vars").mkdir(parents=True)
        (folder / name / "hosts.ini").write_text(text.format(*lines))
        site = (lab.inventory / "group_vars" / "all.yml").read_text()
        (folder / name / "group_vars" / "all.yml").write_text(site)
        inventories[name] = folder / name
    yield Servers(
        lab=lab,
        inventory=inventories["kinds"],
        pair=inventories["pair"],
        born={host.name: sight.state(host) for host in lab},
        boots=_boots(lab),
    )
    _down()


def _down() -> None:
    with Steps(Console(stderr=True)) as steps:
        bringup.down(default_paths(), NAME, steps)


def _boots(lab: Lab) -> dict[str, str]:
    return {host.name: said(host, "cat", "/proc/sys/kernel/random/boot_id") for host in lab}


def said(host: Host, *argv: str) -> str:
    """What a command prints on a host."""
    return host.run(list(argv)).stdout.strip()


def findings(run: Run) -> dict[tuple[str, str], dict[str, Any]]:
    """The findings of a run by host and code."""
    return {(finding["host"], finding["code"]): finding for finding in run.document["findings"]}


# ---------------------------------------------------------------------- nobody consented


@pytest.fixture(scope="module")
def refused(product: Product, servers: Servers) -> Run:
    """The host stage without anybody's consent to a reboot."""
    return product(*servers.options(), expect=3, what="host stage, six kinds of server, without consent")


def test_without_consent_nothing_restarts(refused: Run, servers: Servers) -> None:
    errors = {key: finding for key, finding in findings(refused).items() if finding["severity"] == "error"}
    assert set(errors) == {(OLD, "driver-reboot"), (NOUVEAU, "driver-reboot")}
    assert "driver 535.261.03 is loaded, 580 is wanted" in errors[OLD, "driver-reboot"]["message"]
    assert "nouveau holds the GPUs" in errors[NOUVEAU, "driver-reboot"]["message"]
    assert all("nvidia_driver_allow_reboot=true" in finding["remedy"] for finding in errors.values())
    assert _boots(servers.lab) == servers.boots
    for host in servers.lab:
        assert sight.changes(servers.born[host.name], sight.state(host)) == {}, host.name


def test_the_plan_names_what_would_restart(product: Product, servers: Servers) -> None:
    run = product("plan", "--inventory", servers.inventory, "--json", expect=3)
    rebooted = {
        host["host"]
        for replica in run.document["replicas"]
        for host in replica["hosts"]
        for action in host["actions"]
        if action["kind"] == "rebooted"
    }
    assert rebooted == {OLD, NOUVEAU}


def test_a_fabric_manager_of_another_version_is_named(refused: Run) -> None:
    found = findings(refused)[MISMATCH, "fabric-mismatch"]
    assert found["severity"] == "warning"
    assert "580.95.05" in found["message"] and WANTED in found["message"]


def test_a_key_of_somebody_else_is_not_trusted(refused: Run, product: Product, servers: Servers) -> None:
    other = "nvidia_driver_repository_key_fingerprint=EB693B3035CD5710E231E123A4B469963BF863CC"
    run = product(*servers.options("--limit", "pcie", "--extra-vars", other), expect=4)
    (failure,) = run.document["failures"]
    assert failure["host"] == PCIE and "EB693B3035CD5710E231E123A4B469963BF863CC" in failure["message"]
    source = "/etc/apt/sources.list.d/deploy-dsv3-nvidia-driver.sources"
    assert servers.lab[PCIE].run(["test", "-e", source], check=False).returncode == 1


# ---------------------------------------------------------------------- with consent


@pytest.fixture(scope="module")
def prepared(product: Product, servers: Servers, refused: Run) -> Run:
    """The host stage with consent."""
    assert refused.exit_code == 3
    consent = ("--extra-vars", "nvidia_driver_allow_reboot=true")
    return product(*servers.options(*consent), what="host stage, six kinds of server, two reboots")


def test_only_those_that_have_to_are_rebooted(prepared: Run, servers: Servers) -> None:
    now = _boots(servers.lab)
    assert {name for name, boot in now.items() if boot != servers.boots[name]} == {OLD, NOUVEAU}
    told = findings(prepared)
    assert {host for host, code in told if code == "driver-reboot"} == {OLD, NOUVEAU}


def _reboots(log: Path) -> dict[str, tuple[str, str]]:
    """Host to when its reboot began and ended, from the log of a run."""
    spans: dict[str, list[str]] = {}
    for line in (log / "events.jsonl").read_text().splitlines():
        event = json.loads(line)
        data = event.get("event_data", {})
        if data.get("task", "").endswith("Reboot") and event["event"] in ("runner_on_start", "runner_on_ok"):
            spans.setdefault(data["host"], []).append(event["created"])
    return {host: (times[0], times[-1]) for host, times in spans.items()}


def test_one_is_back_before_the_next_goes(prepared: Run) -> None:
    reboots = _reboots(Path(prepared.document["log"]))
    assert set(reboots) == {OLD, NOUVEAU}
    (first, second) = sorted(reboots.values())
    assert first[1] <= second[0], "the second host went before the first was back"


def test_every_host_has_the_driver_that_was_asked_for(prepared: Run, servers: Servers) -> None:
    for host in servers.lab:
        query = said(host, "nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader").splitlines()
        assert query == [WANTED] * 8, host.name
        assert "Open Kernel Module" in said(host, "cat", "/proc/driver/nvidia/version"), host.name
        assert said(host, "systemctl", "is-active", "nvidia-persistenced") == "active", host.name
        # The package starts the daemon in a mode in which it keeps nothing.
        modes = said(host, "nvidia-smi", "--query-gpu=persistence_mode", "--format=csv,noheader").splitlines()
        assert modes == ["Enabled"] * 8, host.name
        assert WANTED in said(host, "dkms", "status"), host.name


def test_the_fabric_is_formed_by_a_manager_of_the_drivers_version(prepared: Run, servers: Servers) -> None:
    for host in servers.lab:
        if host.name not in NVSWITCH:
            assert host.run(["systemctl", "cat", "nvidia-fabricmanager"], check=False).returncode != 0
            continue
        assert WANTED in said(host, "nv-fabricmanager", "--version"), host.name
        state = said(host, "nvidia-smi", "--query-gpu=fabric.state,fabric.status", "--format=csv,noheader")
        assert set(state.splitlines()) == {"Completed, Success"}, host.name
    assert (MISMATCH, "fabric-mismatch") in findings(prepared)


def test_nouveau_is_kept_off_and_an_initramfs_made_only_for_it(prepared: Run, servers: Servers) -> None:
    for host in servers.lab:
        assert "blacklist nouveau" in said(host, "cat", "/etc/modprobe.d/deploy-dsv3-nouveau.conf")
        assert "nouveau" not in said(host, "lsmod"), host.name
        made = host.run(["test", "-d", "/var/lib/dsv3-initramfs"], check=False).returncode == 0
        assert made is (host.name == NOUVEAU), host.name


def test_upgrades_of_the_system_leave_the_driver_alone(prepared: Run, servers: Servers) -> None:
    for host in servers.lab:
        held = set(said(host, "apt-mark", "showhold").splitlines())
        assert {"nvidia-driver-cuda", "nvidia-kernel-open-dkms", "libcuda1", "nvidia-persistenced"} <= held, host.name
        assert {"nvidia-container-toolkit", "nvidia-container-toolkit-base", "libnvidia-container1"} <= held, host.name
        assert ("nvidia-fabricmanager" in held) is (host.name in NVSWITCH), host.name
        upgrade = said(host, "apt-get", "--simulate", "dist-upgrade")
        assert "Inst nvidia-driver-cuda" not in upgrade, host.name


def test_the_container_runtime_knows_every_gpu(prepared: Run, servers: Servers) -> None:
    for host in servers.lab:
        devices = said(host, "nvidia-ctk", "cdi", "list").splitlines()
        assert {f"nvidia.com/gpu={index}" for index in range(8)} <= set(devices), host.name
        if host.name != PCIE:
            assert json.loads(said(host, "docker", "info", "--format", "{{json .CDISpecDirs}}")), host.name


def test_a_docker_without_cdi_is_asked_in_the_old_way(prepared: Run, servers: Servers) -> None:
    """What Debian 12 itself carries; systemd must not manage its cgroups, or GPUs get lost."""
    host = servers.lab[PCIE]
    assert said(host, "cat", "/etc/debian_version").startswith("12.")
    version, driver = said(host, "docker", "info", "--format", "{{.ServerVersion}} {{.CgroupDriver}}").split()
    assert version.startswith("20.10.") and driver == "cgroupfs"


def test_rdma_is_the_distributions_or_an_ofed_and_never_both(prepared: Run, servers: Servers) -> None:
    for host in servers.lab:
        has_core = host.run(["dpkg", "--status", "rdma-core"], check=False).returncode == 0
        modules = host.run(["cat", "/etc/modules-load.d/deploy-dsv3-rdma.conf"], check=False).stdout.split()
        peermem = "nvidia_peermem" in said(host, "lsmod")
        if host.name == PCIE:  # without an HCA there is nothing to do
            assert (has_core, modules, peermem) == (False, [], False)
        elif host.name == OFED:
            assert not has_core and peermem and modules[-1] == "nvidia_peermem"
        else:
            assert has_core and not peermem and modules[-1] == "rdma_ucm", host.name


def test_the_kernel_keeps_the_engines_ports(prepared: Run, servers: Servers) -> None:
    for host in servers.lab:
        reserved = ports.parse(said(host, "cat", "/proc/sys/net/ipv4/ip_local_reserved_ports"))
        assert {6380, 8000, *range(10002, 11000)} <= reserved or host.name == "gpu-02", host.name
        assert {6380, *range(10002, 11000)} <= reserved, host.name
        assert "ip_local_reserved_ports" in said(host, "cat", "/etc/sysctl.d/90-deploy-dsv3.conf"), host.name


def test_a_second_run_changes_nothing(prepared: Run, product: Product, servers: Servers) -> None:
    """And needs no consent any more."""
    run = product(*servers.options(), what="host stage again, six kinds of server")
    assert {host: stats["changed"] for host, stats in run.document["hosts"].items()} == dict.fromkeys(servers.born, 0)
    codes = {code for _, code in findings(run)}
    assert "driver-reboot" not in codes and "fabric-mismatch" not in codes


# ---------------------------------------------------------------------- what is derived and said of the hardware


def test_each_host_gets_the_gid_that_fits_it(prepared: Run, product: Product, servers: Servers) -> None:
    run = product("plan", "--inventory", servers.inventory, "--json", expect=10)
    environments = {
        host["host"]: host["environment"] for replica in run.document["replicas"] for host in replica["hosts"]
    }
    assert environments["gpu-01"]["NCCL_IB_HCA"].startswith("=rocep25s0f0:1,rocep25s0f1:1,")
    assert environments["gpu-02"]["NCCL_IB_HCA"].startswith("=mlx5_0:1,mlx5_1:1,")
    assert environments["gpu-01"]["NCCL_IB_GID_INDEX"] == "3"
    assert environments["gpu-02"]["NCCL_IB_GID_INDEX"] == "5"
    assert environments[PCIE]["NCCL_IB_DISABLE"] == "1"
    told = {host["host"]: host for replica in run.document["replicas"] for host in replica["hosts"]}
    assert {told[name]["gpudirect"] for name in NVSWITCH} == {"dma-buf"} and told[PCIE]["gpudirect"] == "none"
    # No finished deploy is on record, so the roles are walked once more; none has anything to do.
    host_stage = [action for host in told.values() for action in host["actions"] if action["stage"] == "host"]
    assert {action["kind"] for action in host_stage} == {"checked"}


@pytest.mark.parametrize(
    ("fault", "code", "severity", "words"),
    [
        ("port-down", "rdma-port-down", "error", ("mlx5_3:1", "DOWN")),
        ("port-slow", "rdma-rate", "warning", ("mlx5_5:1", "200 Gb/s", "400 Gb/s")),
        ("gpu-missing", "gpu-count", "error", ("7 GPUs", "8")),
    ],
)
def test_what_is_broken_is_named(
    prepared: Run,
    product: Product,
    servers: Servers,
    fault: str,
    code: str,
    severity: str,
    words: tuple[str, ...],
) -> None:
    host = servers.lab[MISMATCH]
    broken = hardware.describe(hardware.load(fault), host=host.name, number=host.record.number)
    host.change_hardware(broken)
    try:
        options = ("--inventory", servers.pair, "--tags", "preflight", "--json")
        run = product(*options, expect=3 if severity == "error" else 0)
    finally:
        host.change_hardware(host.description())
    found = findings(run)[MISMATCH, code]
    assert found["severity"] == severity
    assert all(word in found["message"] for word in (MISMATCH, *words)), found["message"]


# ---------------------------------------------------------------------- undone, and from the beginning by the book


def test_absent_undoes_what_the_roles_did(prepared: Run, product: Product, servers: Servers) -> None:
    run = product(
        *("destroy", "--inventory", servers.inventory, "--remove-drivers", "--yes", "--json"),
        what="destroy with drivers, six kinds of server",
    )
    assert run.document["failures"] == []
    for host in servers.lab:
        left = sight.changes(servers.born[host.name], sight.state(host))
        ours = {name for name in left if "dsv3" in name and "/var/lib/deploy-dsv3" not in name}
        # An initramfs is made anew with the next kernel.
        assert {name for name in ours if not name.startswith("files: /var/lib/dsv3-initramfs")} == set(), host.name
        assert not [name for name in left if "nvidia-persistenced.service.d" in name], host.name
        installed = {name for name, (_, now) in left.items() if name.startswith("packages: ") and "installed" in now}
        assert not {name for name in installed if "nvidia" in name or "docker" in name}, host.name
        assert said(host, "apt-mark", "showhold") == "", host.name
        assert said(host, "cat", "/proc/sys/net/ipv4/ip_local_reserved_ports") == "", host.name
    again = product("destroy", "--inventory", servers.inventory, "--remove-drivers", "--yes", "--json")
    assert {stats["changed"] for stats in again.document["hosts"].values()} == {0}


def test_the_runbook(product: Product, servers: Servers, tmp_path: Path) -> None:
    """Every command of "Preparing a new GPU server", in its order, on a server on which nouveau holds the GPUs.

    And, at once with it, on one whose loaded driver is of another branch.
    """
    new, other = servers.lab[NOUVEAU], servers.lab[MISMATCH]
    servers.lab.reset(new)
    (tmp_path / "group_vars").mkdir()
    (tmp_path / "hosts.ini").write_text(AT_ONCE.format(new, other))
    (tmp_path / "group_vars" / "all.yml").write_text((servers.lab.inventory / "group_vars" / "all.yml").read_text())
    commands = re.findall(r"<!-- exit status (\d+) -->\n```console\n(.+)\n```", RUNBOOK.read_text())
    assert len(commands) == RUNBOOK.read_text().count("```console")
    for status, line in commands:
        program, *words = shlex.split(line)
        assert program == "deploy-dsv3"
        product(*(str(tmp_path) if word == "prod.ini" else word for word in words), expect=int(status))
        if "nvidia_driver_allow_reboot=true" in words:
            reboots = _reboots(max((product.state / "runs").iterdir()))
            assert all("docker.io" in said(host, "apt-mark", "showhold").split() for host in (new, other))
    assert set(reboots) == {NOUVEAU, MISMATCH}
    (first, second) = sorted(reboots.values())
    assert second[0] < first[1], "the second host waited until the first was back"
    assert [said(host, "apt-mark", "showhold") for host in (new, other)] == ["", ""]
