"""What was changed by hand is found by host and key, and nothing else is."""

from __future__ import annotations

from typing import Any

import pytest
from converged_hosts import ENGINE, HEAD, Change, by_hand, converged, inputs, planned

from deploy_dsv3 import drift
from deploy_dsv3.drift import Drift


def container(**config: Any) -> Change:
    def change(facts: dict[str, Any]) -> None:
        facts["docker"]["containers"][0]["config"] |= config

    return change


def at(*keys: str | int, value: Any = None) -> Change:
    """Set a value in the facts, or remove it."""

    def change(facts: Any) -> None:
        for key in keys[:-1]:
            facts = facts[key]
        if value is None:
            del facts[keys[-1]]
        else:
            facts[keys[-1]] = value

    return change


def new_file(path: str) -> Change:
    return at("state", "files", path, value={"mode": "0644", "owner": "0:0", "sha256": "ab" * 32, "link": ""})


#: What somebody does, the key that tells, its kind, and the role that makes the thing.
BY_HAND: dict[str, tuple[Change, str, str, str]] = {
    "docker update --restart": (
        container(restart_policy="no"),
        "container restart_policy",
        "container",
        "engine",
    ),
    "a container made anew, privileged": (container(privileged=True), "container privileged", "container", "engine"),
    "a container with another capability": (
        container(capabilities=["IPC_LOCK", "SYS_ADMIN"]),
        "container capabilities",
        "container",
        "engine",
    ),
    "a container of another image": (container(image_id="sha256:other"), "container image_id", "image", "engine"),
    "another variable of the engine": (
        at("docker", "containers", 0, "config", "environment", "NCCL_DEBUG", value="INFO"),
        "container environment NCCL_DEBUG",
        "container",
        "engine",
    ),
    "docker stop": (at("docker", "containers", 0, "state", value="exited"), "container state", "container", "engine"),
    "a key of daemon.json": (
        at("docker", "daemon_json", "live-restore", value=False),
        "daemon.json live-restore",
        "daemon.json",
        "docker_engine",
    ),
    "a broken daemon.json": (
        lambda facts: facts["docker"].update(daemon_json_error="line 1"),
        "daemon.json",
        "daemon.json",
        "docker_engine",
    ),
    "systemctl stop": (
        at("state", "units", "dsv3-endpoint.service", "active", value="inactive"),
        "unit dsv3-endpoint.service active",
        "unit",
        "endpoint",
    ),
    "systemctl disable": (
        at("state", "units", "docker.service", "enabled", value="disabled"),
        "unit docker.service enabled",
        "unit",
        "docker_engine",
    ),
    "a drop-in of a unit": (
        new_file("/etc/systemd/system/docker.service.d/hand.conf"),
        "file /etc/systemd/system/docker.service.d/hand.conf",
        "file",
        "",
    ),
    "the proxy's configuration": (
        at("state", "files", "/etc/deploy-dsv3/endpoint/haproxy.cfg", "sha256", value="cd" * 32),
        "file /etc/deploy-dsv3/endpoint/haproxy.cfg",
        "file",
        "endpoint",
    ),
    "rights of a secret": (
        at("state", "files", f"{ENGINE}/secrets/ray_token", "mode", value="0644"),
        f"file {ENGINE}/secrets/ray_token",
        "file",
        "engine",
    ),
    "a removed file": (
        at("state", "files", "/etc/cdi/nvidia.yaml"),
        "file /etc/cdi/nvidia.yaml",
        "file",
        "nvidia_container_toolkit",
    ),
    "sysctl -w": (at("state", "sysctls", "vm.swappiness", value="10"), "sysctl vm.swappiness", "sysctl", ""),
    "a driver's package": (
        at("state", "packages", "nvidia-driver-cuda", value="590.1-1"),
        "package nvidia-driver-cuda",
        "package",
        "nvidia_driver",
    ),
    "a removed package": (
        at("state", "packages", "nvidia-fabricmanager"),
        "package nvidia-fabricmanager",
        "package",
        "fabric_manager",
    ),
    "another driver loaded": (at("driver", "loaded_version", value="590.1"), "driver", "driver", ""),
    "another kernel": (at("os", "kernel", value="6.99"), "kernel", "kernel", ""),
    "a GPU that is gone": (lambda facts: facts["gpus"].pop(), "gpu 7", "gpu", ""),
    "a cable pulled": (at("infiniband", "ports", 0, "state", value="DOWN"), "hca mlx5_0:1", "rdma", ""),
}


@pytest.mark.parametrize(("change", "key", "kind", "role"), BY_HAND.values(), ids=list(BY_HAND))
def test_a_change_is_found_by_host_and_key_and_nothing_else(change: Change, key: str, kind: str, role: str) -> None:
    plan = by_hand(HEAD, change)
    assert [(one.host, one.key, one.kind, one.role) for one in plan.drift] == [(HEAD, key, kind, role)]
    assert key in str(plan.drift[0])
    assert not plan.nothing_to_do


def test_all_of_them_at_once() -> None:
    documents = converged()
    together = {name: case for name, case in BY_HAND.items() if name != "a key of daemon.json"}
    for change, *_ in together.values():
        change(documents[HEAD])
    assert {one.key for one in planned(documents).drift} == {key for _, key, *_ in together.values()}


def test_a_converged_host_has_no_drift() -> None:
    assert planned(converged()).drift == ()


def test_every_key_of_a_host_has_a_kind() -> None:
    for known in inputs(converged()).values():
        assert known.facts
        for key in drift.state_of(known.facts, "lmdeploy"):
            assert drift.classify(key)[0]


def test_a_key_of_no_kind_is_a_defect() -> None:
    with pytest.raises(ValueError, match="weather"):
        drift.classify("weather")


def test_a_container_made_by_somebody_else_is_told_by_its_image() -> None:
    documents = converged()
    documents[HEAD]["docker"]["containers"][0]["config"] = None
    assert "container restart_policy" in {one.key for one in planned(documents).drift}


@pytest.mark.parametrize(
    ("key", "recorded", "found", "told"),
    [
        ("container restart_policy", "no", "always", "was no, is always"),
        ("container capabilities", ["A", "B"], ["B", "C"], "has C more, no A"),
        ("container command", ["a", "b"], ["b", "a"], "has another order"),
        ("sysctl vm.swappiness", "60", None, "is gone"),
        ("container environment S3_KEY", "sha256:a", "sha256:b", "has another value"),
        ("container environment S3_KEY", None, "sha256:b", "is new"),
        ("container image_id", "sha256:a", "sha256:b", "was sha256:a, is sha256:b"),
        ("daemon.json debug", None, True, "is new: true"),
        ("file /x", "0644 0:0 aa", "0600 0:0 aa", "has mode 0600 instead of 0644"),
        ("file /x", "0644 0:0 aa", "0644 7:7 bb", "has owner 7:7 instead of 0:0, other content"),
        ("file /x", "0777 0:0 -> /a", "0777 0:0 -> /b", "has other content (-> /b)"),
        ("file /x", None, "0644 0:0 aa", "is new"),
    ],
)
def test_what_is_told_of_a_difference(key: str, recorded: Any, found: Any, told: str) -> None:
    before = {} if recorded is None else {key: recorded}
    after = {} if found is None else {key: found}
    (one,) = drift.find("gpu-01", before, after)
    assert str(one) == f"{key} {told}"


def test_no_hash_of_a_file_is_told() -> None:
    plan = by_hand(HEAD, at("state", "files", f"{ENGINE}/secrets/ray_token", "sha256", value="cd" * 32))
    assert "cd" * 32 not in str(plan.drift[0])


def test_as_data() -> None:
    one = Drift(host="a", key="kernel", kind="kernel", role="", recorded="6.1", found="6.2")
    assert one.as_dict() == {
        "host": "a",
        "key": "kernel",
        "kind": "kernel",
        "role": "",
        "recorded": "6.1",
        "found": "6.2",
    }
