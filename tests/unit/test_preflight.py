"""Each check finds what is wrong with a recorded host, and a good fleet passes."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from recorded_hosts import document, host_input, recorded, replica_of

from deploy_dsv3.derive import HostInput
from deploy_dsv3.driver import kernel_modules, min_driver
from deploy_dsv3.facts import HostFacts, load_facts
from deploy_dsv3.findings import Finding, describe
from deploy_dsv3.preflight import check

GIB = 1024**3
OURS = "5e" * 32


def edited(name: str, **changes: Any) -> HostFacts:
    """A recorded host with fields changed: "section__field" inside of a section, "section" as a whole."""
    content = document(name)
    for key, value in changes.items():
        section, _, field = key.partition("__")
        if field:
            content[section] = {**content[section], field: value}
        else:
            content[section] = value
    return load_facts(content)


def container(name: str, image: str, *, state: str = "running", ours: bool = False, id: str = OURS) -> dict[str, Any]:
    labels = {"io.deploy-dsv3.managed": "true", "io.deploy-dsv3.role": "head"} if ours else {}
    return {"name": name, "id": id, "image": image, "labels": labels, "state": state}


def listener(port: int, process: str = "python3", address: str = "0.0.0.0", **fields: Any) -> dict[str, Any]:
    return {"address": address, "port": port, "process": process, "pid": 4711, **fields}


def judge(*inputs: HostInput) -> dict[str, list[Finding]]:
    replica, hosts = replica_of(*inputs)
    return check([replica], hosts)


def judge_one(facts: HostFacts, **settings: Any) -> dict[str, Finding]:
    """The findings of a lone host by code."""
    return {finding.code: finding for finding in judge(host_input("gpu1", facts, **settings))["gpu1"]}


def judge_pair(first: HostFacts, second: HostFacts) -> list[tuple[str, str, str]]:
    """(host, severity, code) of two hosts' findings."""
    found = judge(host_input("gpu1", first), host_input("gpu2", second))
    return [(finding.host, finding.severity, finding.code) for findings in found.values() for finding in findings]


@pytest.mark.parametrize("names", [("h800-ib-1", "h800-ib-2"), ("h20-roce-1", "h20-roce-2"), ("l20-pcie",)])
def test_good_fleets_have_no_findings(names: tuple[str, ...]) -> None:
    # Each as it was found: the H20s run Rocky Linux with a driver of branch 570.
    settings: dict[str, Any] = {}
    if "h20" in names[0]:
        settings = {"nvidia_driver_branch": "570", "docker_engine_source": "repository"}
    found = judge(*(host_input(name, recorded(name), **settings) for name in names))
    assert found == {name: [] for name in names}


def test_a_prepared_host_without_systemd_is_warned_of() -> None:
    prepared = {
        "nvidia_driver_source": "preinstalled",
        "docker_engine_source": "preinstalled",
        "nvidia_container_toolkit_source": "preinstalled",
    }
    facts = edited("l20-pcie", os__init="other")
    assert judge_one(facts, **prepared)["init"].severity == "error"
    assert judge_one(facts, **prepared, endpoint_mode="direct")["init"].severity == "warning"


@pytest.mark.parametrize(
    ("changes", "settings", "code", "said"),
    [
        ({"os__version_id": "11"}, {}, "os", "debian 11"),
        ({"os__id": "arch", "os__family": "other"}, {}, "os", "arch"),
        ({"os__arch": "aarch64"}, {}, "arch", "aarch64"),
        ({"os__init": "other"}, {}, "init", "systemd"),
        ({"os__python": "3.7.3"}, {}, "python", "3.7.3"),
        ({"user": {"uid": 1000}}, {}, "root", "1000"),
        ({"memory__total_bytes": 32 * GIB}, {}, "memory", "32.0 GiB"),
        ({"memory__total_bytes": 600 * GIB}, {"preflight_min_memory_gib": 700}, "memory", "700 GiB"),
        ({"pci_gpus": []}, {}, "gpu-none", "no GPU"),
        ({"docker__daemon_json_error": "Expecting ',' delimiter: line 3"}, {}, "daemon-json", "line 3"),
        ({"os__secure_boot": True}, {}, "secure-boot", "Secure Boot"),
        ({}, {"docker_engine_source": "preinstalled"}, "docker-down", "does not answer"),
        ({}, {"nvidia_driver_source": "preinstalled"}, "driver-none", "no NVIDIA driver"),
        ({"driver__nouveau_loaded": True}, {"nvidia_driver_source": "preinstalled"}, "nouveau", "nouveau"),
        (
            {
                "nvidia_smi": {
                    "path": "/usr/bin/nvidia-smi",
                    "rc": 9,
                    "error": "Driver/library version mismatch",
                }
            },
            {"nvidia_driver_source": "preinstalled"},
            "nvidia-smi",
            "version mismatch",
        ),
    ],
)
def test_a_bad_host_is_refused(changes: dict[str, Any], settings: dict[str, Any], code: str, said: str) -> None:
    finding = judge_one(edited("l20-pcie", **changes), **settings)[code]
    assert finding.severity == "error"
    assert finding.message.startswith("gpu1: ") and said in finding.message
    assert finding.cause and finding.remedy


@pytest.mark.parametrize(
    ("changes", "settings", "code"),
    [
        ({"driver__nouveau_loaded": True}, {"nvidia_driver_allow_reboot": True}, "driver-reboot"),
        ({"nvidia_smi": {"path": "/usr/bin/nvidia-smi", "rc": 9, "error": "x"}}, {}, "nvidia-smi"),
        ({"errors": {"docker": "PermissionError"}}, {}, "probe-section"),
        (
            {"os__version_id": "11", "driver__loaded_version": "580.82.07", "docker__running": True},
            {
                "nvidia_driver_source": "preinstalled",
                "docker_engine_source": "preinstalled",
                "nvidia_container_toolkit_source": "preinstalled",
            },
            "os",
        ),
    ],
)
def test_what_a_later_stage_repairs_is_a_warning(changes: dict[str, Any], settings: dict[str, Any], code: str) -> None:
    found = judge_one(edited("l20-pcie", **changes), **settings)
    assert {(finding.code, finding.severity) for finding in found.values()} == {(code, "warning")}


def disks(docker_free_gib: float, **model: Any) -> list[dict[str, Any]]:
    return [
        {"path": "/var/lib/docker", "exists_path": "/var/lib", "free_bytes": int(docker_free_gib * GIB)},
        {"path": "/data/models/DeepSeek-V3", "exists_path": "/data/models/DeepSeek-V3", **model},
    ]


def test_a_full_disk_is_refused() -> None:
    finding = judge_one(edited("l20-pcie", disks=disks(12.5)))["disk"]
    assert "12.5 GiB free for /var/lib/docker (on /var/lib), 60 GiB is required" in finding.message


MIRRORED = {"engine_image_name": "registry.example.com:5000/lmdeploy"}


@pytest.mark.parametrize(
    ("image", "settings", "free", "refused"),
    [
        ("openmmlab/lmdeploy:latest-cu12", {}, 12.5, False),
        ("openmmlab/lmdeploy:latest-cu12", {}, 0.5, True),
        ("openmmlab/lmdeploy@sha256:" + "ab" * 32, {}, 12.5, False),
        (
            "openmmlab/lmdeploy@sha256:" + "ab" * 32,
            {"engine_image_digest": "sha256:" + "ab" * 32},
            12.5,
            False,
        ),
        (
            "openmmlab/lmdeploy@sha256:" + "ab" * 32,
            {"engine_image_digest": "sha256:" + "cd" * 32},
            12.5,
            True,
        ),
        ("registry.example.com/other:1", {}, 12.5, True),
        ("registry.example.com:5000/lmdeploy@sha256:" + "ab" * 32, MIRRORED, 12.5, False),
        ("registry.example.com:5000/other:1", MIRRORED, 12.5, True),
    ],
)
def test_a_host_that_runs_the_image_needs_little_space(
    image: str, settings: dict[str, Any], free: float, refused: bool
) -> None:
    facts = edited("l20-pcie", disks=disks(free), docker__containers=[container("lmdeploy", image, ours=True)])
    assert ("disk" in judge_one(facts, **settings)) is refused


def test_a_missing_model_folder_is_named() -> None:
    finding = judge_one(edited("l20-pcie", disks=disks(500, exists_path="/data")))["model-missing"]
    assert finding.severity == "error"
    assert "/data/models/DeepSeek-V3" in finding.message and "/data" in finding.message


@pytest.mark.parametrize(
    ("port", "setting"),
    [
        (6379, "ray_cluster_port"),
        (6380, "ray_cluster_node_manager_port"),
        (8265, "ray_cluster_dashboard_port"),
        (10001, "ray_cluster_client_server_port"),
        (23333, "lmdeploy_server_port"),
        (29500, "lmdeploy_dist_port"),
        (8000, "endpoint_port"),
        (52365, "ray_cluster_dashboard_agent_listen_port"),
    ],
)
def test_a_port_in_use_names_the_process(port: int, setting: str) -> None:
    facts = edited("l20-pcie", listening=[listener(port, "redis-server", unit="redis-server.service")])
    finding = judge_one(facts)["port-taken"]
    assert finding.severity == "error"
    assert f"port {port} ({setting}) is in use by redis-server (pid 4711) of redis-server.service" in finding.message


def test_a_port_of_another_container_names_it() -> None:
    vllm = container("vllm-qwen", "registry.example.com/inference:1", id="9f" * 32)
    facts = edited("l20-pcie", docker__containers=[vllm], listening=[listener(8000, "vllm", container_id="9f" * 32)])
    assert "by vllm (pid 4711) in container 'vllm-qwen'" in judge_one(facts)["port-taken"].message


def test_a_listener_in_the_worker_range_is_a_warning() -> None:
    finding = judge_one(edited("l20-pcie", listening=[listener(10500, "node_exporter")]))["port-taken"]
    assert finding.severity == "warning" and "node_exporter" in finding.message


def test_head_ports_are_free_to_others_on_workers() -> None:
    busy = edited("h800-ib-2", listening=[listener(8000), listener(6379), listener(29500)])
    assert judge_pair(recorded("h800-ib-1"), busy) == []


def test_the_endpoint_port_is_not_used_in_direct_mode() -> None:
    facts = edited("l20-pcie", listening=[listener(8000)])
    assert judge_one(facts, endpoint_mode="direct") == {}


def test_our_own_listeners_are_expected() -> None:
    facts = edited(
        "l20-pcie",
        docker__containers=[container("lmdeploy", "openmmlab/lmdeploy:latest-cu12", ours=True)],
        listening=[
            listener(6379, "gcs_server", container_id=OURS),
            listener(6380, "raylet", container_id=OURS),
            listener(23333, "lmdeploy", "127.0.0.1", container_id=OURS),
            listener(10500, "ray::worker", container_id=OURS),
            listener(8000, "haproxy", unit="dsv3-endpoint.service"),
        ],
    )
    assert judge_one(facts) == {}


def test_a_foreign_haproxy_is_not_ours() -> None:
    facts = edited("l20-pcie", listening=[listener(8000, "haproxy", unit="haproxy.service")])
    assert "haproxy.service" in judge_one(facts)["port-taken"].message


@pytest.mark.parametrize(
    ("found", "code", "said"),
    [
        (
            container("lmdeploy", "openmmlab/lmdeploy:v0.9.2", state="exited"),
            "container-foreign",
            "did not create",
        ),
        (container("lmdeploy", "postgres:17"), "container-foreign", "postgres:17"),
        (container("vllm-qwen", "vllm/vllm-openai:v0.10.1"), "engine-foreign", "vllm-qwen"),
        (container("x", "registry.example.com/SGLang:1"), "engine-foreign", "SGLang"),
        (container("old-name", "openmmlab/lmdeploy:v0.9.2", ours=True), "container-left", "old-name"),
    ],
)
def test_containers_in_the_way_are_refused(found: dict[str, Any], code: str, said: str) -> None:
    findings = judge_one(edited("l20-pcie", docker__containers=[found]))
    assert set(findings) == {code}
    assert findings[code].severity == "error" and said in findings[code].message


@pytest.mark.parametrize(
    "found",
    [
        container("lmdeploy", "openmmlab/lmdeploy:v0.9.2", ours=True),
        container("old-name", "openmmlab/lmdeploy:v0.9.2", ours=True, state="exited"),
        container("vllm-qwen", "vllm/vllm-openai:v0.10.1", state="exited"),
        container("node-exporter", "prom/node-exporter:v1.9.1"),
    ],
)
def test_other_containers_are_none_of_our_business(found: dict[str, Any]) -> None:
    assert judge_one(edited("l20-pcie", docker__containers=[found])) == {}


def test_everything_wrong_with_a_recorded_host_is_found_at_once() -> None:
    findings = judge(host_input("vm", recorded("cloud-vm")))["vm"]
    assert sorted((finding.code, finding.severity) for finding in findings) == [
        ("capacity", "error"),
        ("container-foreign", "error"),
        ("driver-reboot", "error"),
        ("engine-foreign", "error"),
        ("port-taken", "error"),
        ("port-taken", "error"),
        ("port-taken", "warning"),
    ]
    text = describe(findings)
    assert text.index("[error]") < text.index("[warning]")
    assert text.count("remedy:") == 7


@pytest.mark.parametrize(
    ("changes", "settings", "refused"),
    [
        ({"os__version_id": "12"}, {}, True),  # what Debian 12 carries
        ({"os__version_id": "12"}, {"docker_engine_source": "repository"}, False),
        ({}, {}, False),
        ({"docker__version": "20.10.24"}, {}, True),
        ({"docker__version": "20.10.24"}, {"docker_engine_source": "repository"}, False),
        (
            {"docker__version": "24.0.7", "docker__running": True},
            {"docker_engine_source": "preinstalled"},
            True,
        ),
        ({"docker__version": "28.4.0"}, {}, False),
        # `docker run --gpus` needs none.
        ({"os__version_id": "12"}, {"engine_gpu_mode": "legacy"}, False),
        ({"docker__version": "20.10.24"}, {"engine_gpu_mode": "legacy"}, False),
        ({"docker__version": "19.03.15"}, {"engine_gpu_mode": "legacy"}, True),
    ],
)
def test_a_docker_without_cdi_is_refused(changes: dict[str, Any], settings: dict[str, Any], refused: bool) -> None:
    findings = judge_one(edited("l20-pcie", **changes), **settings)
    assert ("docker-old" in findings) is refused


@pytest.mark.parametrize(
    ("changes", "settings", "refused"),
    [
        ({"os__version_id": "12"}, {}, True),
        ({"os__version_id": "12"}, {"docker_engine_source": "repository"}, False),
        ({"docker__version": "20.10.24"}, {}, True),
        ({"docker__version": "23.0.6"}, {}, False),
        ({"os__version_id": "12"}, {"docker_engine_proxy_url": ""}, False),
    ],
)
def test_a_docker_that_would_not_start_with_proxies_is_refused(
    changes: dict[str, Any], settings: dict[str, Any], refused: bool
) -> None:
    legacy = {"engine_gpu_mode": "legacy", "docker_engine_proxy_url": "http://192.0.2.9:3128"}
    findings = judge_one(edited("l20-pcie", **changes), **(legacy | settings))
    assert ("docker-proxy" in findings) is refused


@pytest.mark.parametrize(
    ("daemon_json", "settings", "warned"),
    [
        (None, {}, True),
        ({"exec-opts": ["native.cgroupdriver=systemd"]}, {}, True),
        ({"exec-opts": ["native.cgroupdriver=cgroupfs"]}, {}, False),
        (None, {"engine_gpu_mode": "cdi"}, False),
        # The role writes it itself.
        (None, {"docker_engine_source": "distribution"}, False),
    ],
)
def test_gpus_that_a_preinstalled_docker_may_lose_are_warned_of(
    daemon_json: dict[str, Any] | None, settings: dict[str, Any], warned: bool
) -> None:
    facts = edited("l20-pcie", docker__version="26.1.5", docker__running=True, docker__daemon_json=daemon_json)
    given = {"engine_gpu_mode": "legacy", "docker_engine_source": "preinstalled", **settings}
    assert ("docker-cgroups" in judge_one(facts, **given)) is warned


def test_a_docker_that_keeps_its_data_elsewhere_is_told() -> None:
    facts = edited("cloud-vm", docker__root_dir="/mnt/docker")
    assert "/mnt/docker" in judge_one(facts)["docker-data"].message


def gpus(count: int, name: str = "NVIDIA H800", memory: int = 81559) -> list[dict[str, Any]]:
    return [{"index": n, "name": name, "memory_total_mib": memory} for n in range(count)]


@pytest.mark.parametrize(
    ("second", "expected"),
    [
        ({"gpus": gpus(7)}, [("gpu2", "error", "gpu-count"), ("gpu2", "error", "gpu-missing")]),
        ({"gpus": gpus(8, "NVIDIA H20")}, [("gpu2", "error", "gpu-model")]),
        ({"gpus": gpus(8, memory=97871)}, [("gpu2", "error", "gpu-memory")]),
        ({"gpus": gpus(8, memory=81251)}, []),
        (
            {"gpus": gpus(4), "pci_gpus": document("h800-ib-2")["pci_gpus"][:4]},
            [("gpu2", "error", "gpu-count")],
        ),
        (
            {"gpus": [*gpus(7), *gpus(1, "NVIDIA H20")]},
            [("gpu2", "error", "gpu-mixed"), ("gpu2", "error", "gpu-model")],
        ),
    ],
)
def test_gpus_are_equal_across_a_replica(second: dict[str, Any], expected: list[tuple[str, str, str]]) -> None:
    assert judge_pair(recorded("h800-ib-1"), edited("h800-ib-2", **second)) == expected


def test_gpus_are_compared_by_pci_device_before_there_is_a_driver() -> None:
    bare = {"gpus": [], "nvidia_smi": {"path": ""}, "driver": {"loaded_version": ""}}
    other = [{**gpu, "device": "0x2330"} for gpu in document("h800-ib-2")["pci_gpus"]]
    first, second = edited("h800-ib-1", **bare), edited("h800-ib-2", **bare, pci_gpus=other)
    assert [code for _, _, code in judge_pair(first, second)] == ["gpu-model"]


def test_the_odd_one_out_of_three_is_named() -> None:
    found = judge(
        host_input("a", recorded("h800-ib-1")),
        host_input("b", edited("h800-ib-2", gpus=gpus(7), pci_gpus=document("h800-ib-2")["pci_gpus"][:7])),
        host_input("c", edited("h800-ib-2", connection={"server_address": "192.0.2.12"}), "192.0.2.12"),
    )
    assert [f.code for f in found["b"] if f.code.startswith("gpu")] == ["gpu-count"]
    assert not [f for f in found["a"] + found["c"] if f.code.startswith("gpu")]


def test_tp_and_network_findings_are_part_of_it() -> None:
    found = judge_one(recorded("l20-pcie"), lmdeploy_tp=16, node_network_interface="eth9")
    assert {finding.code for finding in found.values()} == {"tp-gpus", "interface-missing"}


def test_a_host_that_cannot_reach_another_names_both() -> None:
    reach = [
        {"host": "gpu2", "address": "192.0.2.12", "port": 6380, "reachable": False, "error": "timed out"},
        {"host": "gpu3", "address": "192.0.2.13", "port": 6380, "reachable": True},
    ]
    findings = judge_one(edited("l20-pcie", reach=reach))
    assert set(findings) == {"unreachable-peer"}
    assert findings["unreachable-peer"].message == "gpu1: cannot reach gpu2 at 192.0.2.12, TCP port 6380: timed out"


@pytest.mark.parametrize(
    ("first", "second", "refused"),
    [
        ((-0.1, 0.1), (0.0, 0.2), False),
        ((-0.1, 0.1), (1.0, 1.3), False),  # could be 0.9 s apart
        ((-0.1, 0.1), (1.2, 1.3), True),
        ((-3.0, 3.0), (2.0, 5.0), False),  # a slow round trip proves nothing
        ((0.0, 0.1), (-7.5, -7.4), True),
    ],
)
def test_clocks_are_refused_only_when_the_measurement_proves_it(
    first: tuple[float, float], second: tuple[float, float], refused: bool
) -> None:
    def at(name: str, bounds: tuple[float, float]) -> HostFacts:
        return edited(name, clock={"offset_low": bounds[0], "offset_high": bounds[1]})

    found = judge_pair(at("h800-ib-1", first), at("h800-ib-2", second))
    assert found == ([("gpu1", "error", "clock"), ("gpu2", "error", "clock")] if refused else [])


def test_the_one_wrong_clock_of_three_is_named() -> None:
    clocks = {"a": 0.0, "b": -3600.0, "c": 0.1}
    found = judge(
        *(
            host_input(
                host,
                edited("l20-pcie", clock={"offset_low": offset, "offset_high": offset}, hostname=host),
                f"192.0.2.{50 + number}",
            )
            for number, (host, offset) in enumerate(clocks.items())
        )
    )
    clock = {host: [f.message for f in findings if f.code == "clock"] for host, findings in found.items()}
    assert clock["a"] == clock["c"] == []
    assert "3600.0 s behind a" in clock["b"][0] and "behind c" in clock["b"][0]


def test_one_machine_under_two_names_is_refused() -> None:
    facts = recorded("h800-ib-1")
    found = judge(host_input("gpu1", facts), host_input("gpu2", facts))
    message = next(finding.message for finding in found["gpu2"] if finding.code == "same-machine")
    assert "gpu2 and gpu1 are the same machine" in message


@pytest.mark.parametrize("field", ["machine_id", "boot_id", "hostname"])
def test_clones_and_containers_are_not_the_same_machine(field: str) -> None:
    first = document("h800-ib-1")
    second = {**document("h800-ib-2"), **{key: first[key] for key in ("machine_id", "boot_id", "hostname")}}
    second[field] = "another"
    assert judge_pair(load_facts(first), load_facts(second)) == []


@pytest.mark.parametrize(
    ("name", "changes", "settings", "reason"),
    [
        ("h800-ib-1", {"driver__loaded_version": "535.261.03"}, {}, "driver 535.261.03 is loaded, 580 is wanted"),
        ("h800-ib-1", {}, {"nvidia_driver_branch": "580.95.05"}, "driver 580.82.07 is loaded, 580.95.05 is wanted"),
        ("h800-ib-1", {"driver__installed_version": "580.95.05"}, {}, "580.82.07 is loaded, 580.95.05 is installed"),
        (
            "h800-ib-1",
            {"driver__flavour": "proprietary"},
            {"nvidia_driver_kernel_modules": "open"},
            "the proprietary kernel modules are loaded, the open ones are wanted",
        ),
        ("l20-pcie", {"driver__nouveau_loaded": True}, {}, "nouveau holds the GPUs"),
    ],
)
def test_a_reboot_needs_consent(name: str, changes: dict[str, Any], settings: dict[str, Any], reason: str) -> None:
    serving = container("lmdeploy", "openmmlab/lmdeploy:latest-cu12", ours=True)
    facts = edited(name, **changes, docker__containers=[serving])
    refused = judge_one(facts, **settings)["driver-reboot"]
    assert refused.severity == "error" and reason in refused.message and "lmdeploy" in refused.message
    assert "nvidia_driver_allow_reboot=true" in refused.remedy
    agreed = judge_one(facts, **settings, nvidia_driver_allow_reboot=True)["driver-reboot"]
    assert agreed.severity == "warning" and reason in agreed.message
    assert "driver-reboot" not in judge_one(facts, **settings, nvidia_driver_source="preinstalled")


@pytest.mark.parametrize(
    ("device", "settings", "loaded", "modules"),
    [
        ("0x1db1", {}, "", "proprietary"),  # V100
        ("0x2324", {}, "", "open"),  # H800
        ("0x2324", {}, "proprietary", "proprietary"),  # what serves well stays
        ("0x2324", {"nvidia_driver_branch": "590"}, "proprietary", "open"),  # replaced anyway
        ("0x2324", {"nvidia_driver_kernel_modules": "proprietary"}, "", "proprietary"),
        ("0x2901", {}, "proprietary", "open"),  # B200
    ],
)
def test_kernel_modules_fit_the_gpus(device: str, settings: dict[str, Any], loaded: str, modules: str) -> None:
    gpus = [{"slot": "0000:18:00.0", "vendor": "0x10de", "device": device, "class": "0x030200"}]
    facts = edited("h800-ib-1", pci_gpus=gpus, driver={"loaded_version": "580.82.07", "flavour": loaded})
    assert kernel_modules(facts, host_input("gpu1", facts, **settings).settings) == modules


@pytest.mark.parametrize(("device", "wish"), [("0x1db1", "open"), ("0x2901", "proprietary")])
def test_kernel_modules_that_do_not_know_the_gpus(device: str, wish: str) -> None:
    gpus = [{"slot": "0000:18:00.0", "vendor": "0x10de", "device": device, "class": "0x030200"}]
    found = judge_one(edited("l20-pcie", pci_gpus=gpus), nvidia_driver_kernel_modules=wish)["driver-modules"]
    assert found.severity == "error" and device in found.message


#: Docker's own packages.
CE = {"docker_engine_source": "repository"}


@pytest.mark.parametrize(
    ("name", "settings", "code"),
    [
        ("l20-pcie", {"nvidia_driver_source": "distribution", "nvidia_driver_branch": "580"}, "driver-source"),
        ("l20-pcie", {"nvidia_driver_source": "distribution", "nvidia_driver_branch": "550"}, None),
        ("h800-ib-1", {"nvidia_driver_source": "distribution"}, None),  # Ubuntu has every branch
        ("h20-roce-1", {"nvidia_driver_source": "distribution", "nvidia_driver_branch": "570", **CE}, "driver-source"),
        ("h20-roce-1", {"nvidia_driver_branch": "570"}, "docker-source"),
        ("l20-pcie", {"nvidia_driver_branch": "570", "engine_image_name": "lmdeploy:v1-cu13"}, "driver-old"),
        ("l20-pcie", {"nvidia_driver_branch": "580", "engine_image_name": "lmdeploy:v1-cu13"}, None),
    ],
)
def test_the_source_has_a_driver_that_the_image_takes(name: str, settings: dict[str, Any], code: str | None) -> None:
    found = judge_one(recorded(name), **settings)
    # A lone server of eight does not hold the model.
    assert set(found) - {"capacity"} == ({code} if code else set())


@pytest.mark.parametrize(
    ("name", "settings", "refused"),
    [
        ("l20-pcie", {}, True),
        ("l20-pcie", {"nvidia_driver_source": "distribution", "nvidia_driver_branch": "550"}, True),
        ("h800-ib-1", {}, False),  # its driver is loaded and stays
        ("h800-ib-1", {"nvidia_driver_branch": "590", "nvidia_driver_allow_reboot": True}, True),
        # Canonical signs its own.
        ("h800-ib-1", {"nvidia_driver_source": "distribution", "nvidia_driver_branch": "590"}, False),
    ],
)
def test_secure_boot_takes_only_signed_modules(name: str, settings: dict[str, Any], refused: bool) -> None:
    found = judge_one(edited(name, os__secure_boot=True), **settings)
    assert ("secure-boot" in found) is refused


def test_drivers_that_stay_are_equal_within_a_replica() -> None:
    newer = edited("h800-ib-2", driver__loaded_version="580.95.05")
    found = judge(host_input("gpu1", recorded("h800-ib-1")), host_input("gpu2", newer))
    (finding,) = found["gpu2"]
    assert finding.code == "driver-differs" and "nvidia_driver_branch to the exact version 580.82.07" in finding.remedy
    # One of another branch is replaced.
    older = edited("h800-ib-2", driver__loaded_version="570.172.08")
    found = judge(host_input("gpu1", recorded("h800-ib-1")), host_input("gpu2", older, nvidia_driver_allow_reboot=True))
    assert [finding.code for finding in found["gpu2"]] == ["driver-reboot"]


def test_preinstalled_drivers_are_equal_and_new_enough() -> None:
    inputs = [
        host_input(name, recorded(name), nvidia_driver_source="preinstalled", engine_image_name=image)
        for name, image in (("h800-ib-1", "openmmlab/lmdeploy:v0.18.0-cu13.0"),)
    ]
    assert [one.code for one in judge(*inputs)["h800-ib-1"]] == ["capacity"], "eight of them are too few for the model"
    old = edited("h800-ib-2", driver__loaded_version="560.35.05")
    found = judge(
        host_input("gpu1", recorded("h800-ib-1"), nvidia_driver_source="preinstalled"),
        host_input("gpu2", old, nvidia_driver_source="preinstalled", engine_image_name="lmdeploy:v0.18.0-cu12.8"),
    )
    assert [finding.code for finding in found["gpu1"] + found["gpu2"]] == ["driver-differs", "driver-old"]


@pytest.mark.parametrize(
    ("image", "branch"),
    [
        ("openmmlab/lmdeploy:latest-cu12", 525),
        ("openmmlab/lmdeploy:v0.18.0-cu12.8", 570),
        ("openmmlab/lmdeploy:v0.18.0-cu13.0", 580),
        ("registry.example.com:5000/lmdeploy:mine", 0),
        ("openmmlab/lmdeploy", 0),
    ],
)
def test_the_driver_that_an_image_needs(image: str, branch: int) -> None:
    assert min_driver(image) == branch


def test_a_host_that_was_not_looked_at_has_no_findings() -> None:
    found = judge(host_input("gpu1", None, "192.0.2.11"), host_input("gpu2", recorded("h800-ib-2")))
    assert found == {"gpu1": [], "gpu2": []}


def test_every_code_is_documented_and_every_documented_code_exists() -> None:
    root = Path(__file__).parents[2]
    table = (root / "docs/reference/preflight.md").read_text(encoding="utf-8")
    documented = {
        code
        for line in table.splitlines()
        if line.startswith("| `")
        for code in re.findall(r"`([a-z-]+)`", line.split("|")[1])
    }
    package = root / "python/deploy_dsv3"
    source = "".join(
        (package / f"{name}.py").read_text(encoding="utf-8")
        for name in ("facts", "network", "rdma", "derive", "driver", "host_checks", "preflight", "fit")
    )
    pattern = r'code="([a-z-]+)"|(?:refuse|_unequal|_unequal_finding)\(\s*"([a-z-]+)"'
    used = {first or second for first, second in re.findall(pattern, source)}
    assert documented == used
