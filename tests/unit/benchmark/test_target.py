"""What an inventory's hosts say about what is measured."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from deploy_dsv3 import settings
from deploy_dsv3.benchmark.profiles import Wishes, find_profile, make_plan
from deploy_dsv3.benchmark.target import (
    Target,
    fitting_concurrency,
    make_target,
    nccl_transport,
    needed_change,
    running_batch_size,
)
from deploy_dsv3.errors import UnreachableError
from deploy_dsv3.observation import Observation
from deploy_dsv3.topology import Replica

ROWS = make_plan(find_profile("published"), Wishes()).rows
REPLICA = Replica(name="dsv3", head="gpu1", workers=("gpu2",))
RELEASE = {
    "image": {"name": "openmmlab/lmdeploy:v0.18.0-cu12.8", "digest": "sha256:12"},
    "versions": {"lmdeploy": "0.18.0", "ray": "2.60.0"},
    "model": {"name": "deepseek-ai/DeepSeek-V3", "path": "/data/models/DeepSeek-V3"},
    "serve": {"argv": ["lmdeploy", "serve", "api_server", "/data/models/DeepSeek-V3", "--tp", "16"]},
}
GPU = {"name": "NVIDIA H800", "driver_version": "580.95.05", "memory_total_mib": 81559}


def observed(host: str, **seen: Any) -> Observation:
    return Observation(host=host, seen={"facts": {"gpus": [GPU] * 8}, **seen})


def default_settings(**changes: Any) -> dict[str, Any]:
    return {**{name: setting.default for name, setting in settings.catalogue().items()}, **changes}


def target_of(**changes: Any) -> Target:
    inspect = {
        "Image": "sha256:34",
        "Config": {"Env": ["NCCL_IB_HCA==mlx5_0:1,mlx5_1:1", "NCCL_IB_GID_INDEX=3", "SECRET=not-told", "PATH=/bin"]},
    }
    documents = {"release": RELEASE, "node": {"node_address": "198.18.0.11"}}
    seen = {
        "gpu1": observed("gpu1", documents=documents, container={"inspect": inspect}),
        "gpu2": observed("gpu2"),
    }
    return make_target(REPLICA, seen, default_settings(**changes), {"ansible_host": "192.0.2.1"})


def test_the_endpoint_is_the_one_that_clients_use() -> None:
    target = target_of(endpoint_api_keys=["sk-first", "sk-second"])
    assert (target.base_url, target.api_key, target.ca_file) == ("http://198.18.0.11:8000", "sk-first", "")
    assert "sk-first" not in repr(target)
    assert (target.replica, target.head, target.image) == ("dsv3", "gpu1", "sha256:34")
    assert target.model == "deepseek-ai/DeepSeek-V3"
    tls = target_of(
        endpoint_url="https://llm.example.com",
        endpoint_tls_certificate_path="/etc/ssl/llm.pem",
        endpoint_tls_ca_path="/etc/ssl/ca.pem",
    )
    assert (tls.base_url, tls.ca_file) == ("https://llm.example.com", "/etc/ssl/ca.pem")


def test_what_runs_is_described_without_secrets() -> None:
    environment = target_of(endpoint_api_keys=["sk-first"]).environment
    assert environment["layout"] == "TP16 on 2 nodes"
    assert environment["gpus"] == {"name": "NVIDIA H800", "per_node": {"gpu1": 8, "gpu2": 8}, "memory_mib": 81559}
    assert (environment["driver"], environment["image"]["digest"]) == ("580.95.05", "sha256:12")
    assert environment["nccl_transport"] == "RDMA over mlx5_0:1,mlx5_1:1, GID index 3"
    assert "not-told" not in str(environment)
    assert "sk-first" not in str(environment)


def test_a_host_with_nothing_deployed_is_refused() -> None:
    with pytest.raises(UnreachableError, match=r"gpu1: nothing is deployed there \(no release.json\)"):
        make_target(REPLICA, {"gpu1": observed("gpu1"), "gpu2": observed("gpu2")}, default_settings(), {})


@pytest.mark.parametrize(
    ("variables", "told"),
    [
        ({"NCCL_IB_DISABLE": "1", "NCCL_SOCKET_IFNAME": "=eth0"}, "TCP sockets over eth0 (RDMA is switched off)"),
        ({"NCCL_IB_HCA": "=ibp3s0:1"}, "RDMA over ibp3s0:1"),
        ({}, "chosen by NCCL"),
    ],
)
def test_the_nccl_transport_is_as_configured(variables: dict[str, str], told: str) -> None:
    assert nccl_transport(variables) == told


@pytest.mark.parametrize(
    ("argv", "version", "gpu", "expected"),
    [
        (["--max-batch-size", "256"], "0.18.0", "NVIDIA H800", (256, "the serving command")),
        (["--max-batch-size=64"], "", "", (64, "the serving command")),
        ([], "0.18.0", "NVIDIA H800", (1024, "LMDeploy 0.18.0's default for NVIDIA H800")),
        ([], "0.18.0", "NVIDIA H20", (128, "LMDeploy 0.18.0's default for NVIDIA H20")),
        ([], "0.18.0", "NVIDIA H200", (1024, "LMDeploy 0.18.0's default for NVIDIA H200")),
        ([], "0.7.2", "NVIDIA H800", (512, "LMDeploy 0.7.2's default for NVIDIA H800")),
        ([], "0.9.2.post1", "NVIDIA A100-SXM4-80GB", (256, "LMDeploy 0.9.2.post1's default for NVIDIA A100-SXM4-80GB")),
        ([], "", "NVIDIA H800", (0, "")),
    ],
)
def test_the_running_batch_size(argv: list[str], version: str, gpu: str, expected: tuple[int, str]) -> None:
    release = {"serve": {"argv": ["lmdeploy", *argv]}, "versions": {"lmdeploy": version}}
    assert running_batch_size(release, gpu) == expected


def test_rows_that_need_another_batch_size_are_found() -> None:
    running_1024 = needed_change(Target(base_url="x", max_batch_size=1024), ROWS)
    assert {size: [row.output_len for row in rows] for size, rows in running_1024.items()} == {128: [16384, 32768]}
    assert [len(rows) for rows in needed_change(Target(base_url="x", max_batch_size=512), ROWS).values()] == [4, 2]
    assert needed_change(Target(base_url="x"), ROWS) == {}
    assert needed_change(Target(base_url="x", max_batch_size=1), find_profile("smoke").rows) == {}


def test_requests_in_flight_are_held_where_the_endpoint_would_drop_them() -> None:
    roomy = Target(base_url="x", max_connections=16384, idle_timeout_s=200_000)
    assert [fitting_concurrency(roomy, row) for row in ROWS] == [(0, "")] * 6
    few = Target(base_url="x", max_connections=4096)
    assert fitting_concurrency(few, ROWS[0])[0] == 1280
    assert "endpoint_max_connections" in fitting_concurrency(few, ROWS[0])[1]
    assert fitting_concurrency(few, ROWS[5]) == (0, "")  # 2000 requests fit
    hasty = Target(base_url="x", idle_timeout_s=14400)
    # 10000 requests at 3.4/s are done in 49 minutes, at 1.62/s in 103; at 0.71/s they take 3 h 55 min, too close to 4 h
    # for a cluster that is slower; 2000 at 0.02/s take more than a day.
    assert [fitting_concurrency(hasty, row)[0] for row in ROWS] == [0, 0, 1280, 1280, 160, 160]
    most, why = fitting_concurrency(hasty, ROWS[5])
    assert most == 160
    assert "gives up after 14400 s of silence (endpoint_idle_timeout_s)" in why
    assert fitting_concurrency(few, find_profile("custom").rows[0]) == (0, "")


def test_the_defaults_of_the_endpoint_take_a_row_of_the_guide_at_once() -> None:
    target = target_of()
    assert [fitting_concurrency(target, row)[0] for row in ROWS] == [0, 0, 1280, 1280, 160, 160]
    assert fitting_concurrency(target_of(endpoint_mode="direct"), ROWS[5]) == (0, "")


def test_an_inventory_of_bare_hosts_is_looked_at_and_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The whole way, on this machine as the only host."""
    from contextlib import redirect_stderr
    from io import StringIO

    from deploy_dsv3 import cli

    inventory = tmp_path / "bare.ini"
    inventory.write_text("[dsv3_head]\nhere ansible_connection=local node_network_address=192.0.2.1\n")
    monkeypatch.chdir(tmp_path)
    error = StringIO()
    with redirect_stderr(error):
        status = cli.run(["benchmark", "--inventory", str(inventory), "--profile", "smoke"])
    assert (status, "nothing is deployed there" in error.getvalue()) == (6, True), error.getvalue()
    assert list(tmp_path.iterdir()) == [inventory]
