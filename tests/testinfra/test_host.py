"""The host itself: driver, Docker, container toolkit, network cards."""

from collections.abc import Callable

import pytest
import yaml
from fleet import Fleet, Node

from deploy_dsv3.derive import NodePlan
from deploy_dsv3.facts import HostFacts
from deploy_dsv3.rdma import gpudirect

INSTALLED = {
    "nvidia-smi": "nvidia_driver_source",
    "dockerd": "docker_engine_source",
    "nvidia-ctk": "nvidia_container_toolkit_source",
}


def test_reached(any_node: Node) -> None:
    """The host can be looked at."""
    assert any_node.observation.reached, any_node.observation.error


def test_readable(node: Node) -> None:
    """Everything about the host could be read."""
    errors = {**node.seen["errors"], **node.seen.get("facts", {}).get("errors", {})}
    assert not errors, "\n".join(f"{part}: {error}" for part, error in errors.items())


def test_fits(node: Node) -> None:
    """The host is what the inventory's settings need."""
    errors = [finding for finding in node.findings if finding.severity == "error"]
    assert not errors, "\n".join(f"{error.message}. Remedy: {error.remedy}" for error in errors)


def test_installed(node: Node) -> None:
    """Driver, Docker and container toolkit are installed."""
    problems = []
    for command, setting in INSTALLED.items():
        found, source = node.seen["commands"][command], node.settings[setting]
        if command == "nvidia-ctk" and source == "preinstalled":
            continue  # then the CDI specification counts, whoever wrote it
        if not found["path"]:
            problems.append(f"there is no {command}; {setting} is {source}")
        elif not found["package"] and source != "preinstalled":
            problems.append(f"{found['path']} belongs to no package; {setting} is {source}")
    assert not problems, "\n".join(problems)


def test_gpus(node: Node, facts: HostFacts, plan: NodePlan) -> None:
    """The driver lists every GPU."""
    smi = facts.nvidia_smi
    assert smi.rc == 0, f"nvidia-smi ends with exit {smi.rc}: {smi.error}"
    wanted = node.observation.document("node").get("ray", {}).get("num_gpus", plan.gpus)
    assert len(facts.gpus) == wanted, f"nvidia-smi lists {len(facts.gpus)} GPUs, {wanted} were deployed"


def test_driver_version(node: Node, facts: HostFacts, fleet: Fleet) -> None:
    """The driver is the same version on every host of the replica."""
    versions = {
        other.name: sorted({gpu.driver_version for gpu in other.facts.gpus})
        for other in fleet.of(node.replica)
        if other.facts
    }
    assert all(found == versions[node.name] for found in versions.values()), f"versions: {versions}"
    loaded = facts.driver.loaded_version
    assert not loaded or [loaded] == versions[node.name], (
        f"the kernel module is {loaded}, the tools are {versions[node.name]}: a reboot is due"
    )


def test_fabric(node: Node, facts: HostFacts) -> None:
    """The NVSwitch fabric is formed, by a fabric manager of the driver's version."""
    if facts.fabric is None:
        pytest.skip("the host has no NVSwitch")
    found, loaded = facts.fabric_manager_version, facts.driver.loaded_version
    assert (facts.fabric.state, facts.fabric.status) == ("Completed", "Success"), (
        f"fabric state {facts.fabric.state or 'unknown'}, status {facts.fabric.status or 'unknown'}; "
        f"the fabric manager is {found or 'not there'}, the driver {loaded}"
    )
    assert found in ("", loaded), f"the fabric manager is {found}, the driver {loaded}: it ends at its next start"


def test_docker(node: Node, facts: HostFacts) -> None:
    """Docker runs, and will after a reboot."""
    assert facts.docker.running, f"the Docker daemon does not answer: {facts.docker.error or 'no socket'}"
    if facts.os.init == "systemd":
        unit = node.seen["units"]["docker.service"]
        assert unit["enabled"] == "enabled", f"docker.service is {unit['enabled']}: not started at boot"


def test_daemon_json(node: Node, facts: HostFacts) -> None:
    """The Docker daemon is configured as the settings say."""
    assert not facts.docker.daemon_json_error, facts.docker.daemon_json_error
    if node.settings["docker_engine_source"] == "preinstalled":
        pytest.skip("docker_engine_source is preinstalled")
    found = facts.docker.daemon_json
    assert found is not None, "there is no /etc/docker/daemon.json"
    wanted = {"live-restore": node.settings["docker_engine_live_restore"]}
    for key, setting in (
        ("registry-mirrors", "registry_mirrors"),
        ("insecure-registries", "insecure_registries"),
    ):
        if node.settings[f"docker_engine_{setting}"]:
            wanted[key] = node.settings[f"docker_engine_{setting}"]
    wanted |= node.settings["docker_engine_options"]
    differing = {key: found.get(key) for key, value in wanted.items() if not _contains(found.get(key), value)}
    assert not differing, f"/etc/docker/daemon.json has {differing}, the settings say {wanted}"
    root = node.settings["docker_engine_data_path"]
    assert facts.docker.root_dir == root, f"Docker keeps its data in {facts.docker.root_dir}, not in {root}"


def _contains(found: object, wanted: object) -> bool:
    if isinstance(wanted, dict):
        return isinstance(found, dict) and all(_contains(found.get(key), wanted[key]) for key in wanted)
    return found == wanted


def test_cdi(node: Node, facts: HostFacts) -> None:
    """The CDI specification names every GPU."""
    path = node.settings["nvidia_container_toolkit_cdi_spec_path"]
    assert node.seen["cdi_spec"], f"there is no {path}; `nvidia-ctk cdi generate` makes one"
    spec = yaml.safe_load(node.seen["cdi_spec"])
    names = {str(device["name"]) for device in spec["devices"]}
    missing = {str(gpu.index) for gpu in facts.gpus} - names
    assert spec["kind"] == "nvidia.com/gpu", f"{path} describes {spec['kind']}"
    assert not missing, f"{path} knows nothing of the GPUs {', '.join(sorted(missing))}: generate it anew"
    for device in node.settings["engine_gpu_devices"]:
        assert device.rpartition("=")[2] in names, f"{path} has no {device}, only {', '.join(sorted(names))}"


def test_hca_ports(facts: HostFacts, record_property: Callable[[str, object], None]) -> None:
    """Every HCA port is listed with its state, rate and link layer, and how it reaches the GPUs."""
    if not facts.infiniband.ports:
        pytest.skip("the host has no HCA")
    for port in facts.infiniband.ports:
        record_property(
            f"{port.device}:{port.port}", f"{port.state} {port.phys_state}, {port.rate_gbps:g} Gb/s, {port.link_layer}"
        )
    record_property("GPUDirect", gpudirect(facts))
    record_property("OFED", facts.infiniband.ofed or "none: rdma-core")
    assert facts.infiniband.devices, "HCAs, and nothing in /dev/infiniband: the module ib_uverbs is not loaded"


def test_hcas(engine: Node, facts: HostFacts) -> None:
    """Every HCA port that the engine was told to use is active."""
    told = engine.environment.get("NCCL_IB_HCA", "").lstrip("=")
    if not told:
        pytest.skip("the engine uses no HCA on this host")
    active = {f"{port.device}:{port.port}" for port in facts.infiniband.ports if port.state == "ACTIVE"}
    down = [hca for hca in told.split(",") if (hca if ":" in hca else f"{hca}:1") not in active]
    assert not down, f"not active: {', '.join(down)}; active: {', '.join(sorted(active)) or 'none'}"
