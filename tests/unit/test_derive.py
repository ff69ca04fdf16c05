"""What hosts are to be: ranks, sizes, environment and endpoint; and what an operator may not set."""

from __future__ import annotations

import json
from typing import Any

import pytest
from recorded_hosts import host_input, recorded, replica_of

from deploy_dsv3.derive import NodePlan, derive
from deploy_dsv3.findings import Finding


def two_hosts(**settings: Any) -> tuple[dict[str, NodePlan], list[Finding]]:
    """The plans of the recorded InfiniBand pair, both with these settings."""
    return derive(
        *replica_of(
            host_input("gpu1", recorded("h800-ib-1"), **settings),
            host_input("gpu2", recorded("h800-ib-2"), **settings),
        )
    )


def test_the_two_node_cluster_of_the_guide() -> None:
    plans, findings = two_hosts()
    assert findings == []
    head, worker = plans["gpu1"], plans["gpu2"]
    assert (head.role, head.rank, worker.role, worker.rank) == ("head", 0, "worker", 1)
    assert (head.address, worker.address) == ("192.0.2.11", "192.0.2.12")
    assert worker.head_host == "gpu1" and worker.head_address == "192.0.2.11"
    assert [(peer.host, peer.address) for peer in worker.peers] == [("gpu1", "192.0.2.11")]
    assert (head.gpus, head.tp, head.expected.nodes, head.expected.gpus) == (8, 16, 2, 16)
    assert head.endpoint == worker.endpoint == "http://192.0.2.11:8000"
    argv = head.serve_file["argv"]
    assert argv[argv.index("--tp") + 1] == "16"
    assert worker.node_file["ray"]["num_gpus"] == 8
    assert worker.node_file["expected"] == {"nodes": 2, "gpus": 16}
    assert (worker.node_file["node_address"], worker.node_file["head_address"]) == (
        "192.0.2.12",
        "192.0.2.11",
    )


def test_the_environment_is_complete_on_every_host() -> None:
    plans, _ = two_hosts()
    assert plans["gpu2"].environment == {
        "RAY_ADDRESS": "192.0.2.11:6379",
        "RAY_USAGE_STATS_ENABLED": "0",
        "LMDEPLOY_DIST_MASTER_ADDR": "192.0.2.11",
        "LMDEPLOY_DIST_MASTER_PORT": "29500",
        "HF_HUB_OFFLINE": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "LMDEPLOY_ENABLE_CHECK_ENV": "0",
        "TRITON_CACHE_DIR": "/var/cache/deploy-dsv3/triton",
        "TRITON_CACHE_AUTOTUNING": "1",
        "TORCHINDUCTOR_CACHE_DIR": "/var/cache/deploy-dsv3/inductor",
        "DG_JIT_CACHE_DIR": "/var/cache/deploy-dsv3/deep_gemm",
        "TILELANG_CACHE_DIR": "/var/cache/deploy-dsv3/tilelang",
        "CUDA_CACHE_PATH": "/var/cache/deploy-dsv3/cuda",
        "NCCL_SOCKET_IFNAME": "=eno1",
        "GLOO_SOCKET_IFNAME": "eno1",
        "NCCL_IB_HCA": "=" + ",".join(f"ibp{n}s0:1" for n in (24, 42, 58, 93, 154, 171, 186, 219)),
    }


def test_hosts_of_different_hca_names_and_none_get_their_own_devices() -> None:
    plans, _ = derive(
        *replica_of(
            host_input("a", recorded("h800-ib-1")),
            host_input("b", recorded("h800-ib-2")),
            host_input("c", recorded("l20-pcie")),
        )
    )
    assert [plan.hcas[:1] for plan in plans.values()] == [("mlx5_0:1",), ("ibp24s0:1",), ()]
    assert len(plans["a"].devices) == 26 and plans["c"].devices == ()
    # RDMA needs a counterpart on every host.
    assert {plan.environment.get("NCCL_IB_DISABLE") for plan in plans.values()} == {"1"}
    assert not any("NCCL_IB_HCA" in plan.environment for plan in plans.values())
    assert "because c has none" in plans["a"].warnings[0]


def test_a_plan_is_plain_data() -> None:
    plans, _ = two_hosts()
    data = plans["gpu2"].to_json()
    assert json.loads(json.dumps(data)) == data
    assert data["peers"] == [{"host": "gpu1", "address": "192.0.2.11"}]
    assert data["expected"] == {"nodes": 2, "gpus": 16}
    assert data["warnings"] == []


def test_each_host_tries_the_port_that_its_peer_will_open() -> None:
    plans, _ = two_hosts(ray_cluster_port=7000, ray_cluster_node_manager_port=7001)
    assert [(target.host, target.port, target.source) for target in plans["gpu1"].reach] == [
        ("gpu2", 7001, "192.0.2.11")
    ]
    assert [(target.host, target.port) for target in plans["gpu2"].reach] == [("gpu1", 7000)]


def test_ports_follow_the_settings() -> None:
    plans, _ = two_hosts(ray_cluster_port=7000, lmdeploy_dist_port=7100)
    environment = plans["gpu2"].environment
    assert environment["RAY_ADDRESS"] == "192.0.2.11:7000"
    assert environment["LMDEPLOY_DIST_MASTER_PORT"] == "7100"


@pytest.mark.parametrize(
    ("settings", "endpoint"),
    [
        ({"endpoint_port": 80}, "http://192.0.2.11:80"),
        ({"endpoint_address": "198.51.100.11"}, "http://198.51.100.11:8000"),
        ({"endpoint_address": "0.0.0.0"}, "http://192.0.2.11:8000"),
        ({"endpoint_tls_certificate_path": "/etc/ssl/dsv3.crt"}, "https://192.0.2.11:8000"),
        ({"endpoint_url": "https://llm.example.com/"}, "https://llm.example.com"),
        ({"endpoint_mode": "direct"}, "http://192.0.2.11:23333"),
    ],
)
def test_the_endpoint_is_the_address_that_clients_use(settings: dict[str, Any], endpoint: str) -> None:
    plans, _ = two_hosts(**settings)
    assert {plan.endpoint for plan in plans.values()} == {endpoint}


def test_ipv6_addresses_are_bracketed() -> None:
    plans, _ = derive(*replica_of(host_input("vm", recorded("cloud-vm"), connect_address="2001:db8:0:1::41")))
    assert plans["vm"].environment["RAY_ADDRESS"] == "[2001:db8:0:1::41]:6379"
    assert plans["vm"].endpoint == "http://[2001:db8:0:1::41]:8000"


@pytest.mark.parametrize("tp", [0, 16])
def test_tp_that_fits(tp: int) -> None:
    plans, findings = two_hosts(lmdeploy_tp=tp)
    assert findings == [] and plans["gpu1"].tp == 16


def test_tp_that_does_not_fit_is_refused() -> None:
    _, findings = two_hosts(lmdeploy_tp=8)
    assert [(finding.code, finding.host, finding.severity) for finding in findings] == [
        ("tp-gpus", "gpu1", "error"),
        ("tp-gpus", "gpu2", "error"),
    ]
    assert "lmdeploy_tp is 8" in findings[0].message and "16 GPUs" in findings[0].message


def test_the_operators_environment_wins() -> None:
    plans, findings = two_hosts(engine_environment={"NCCL_IB_HCA": "=mlx5_0:1", "NCCL_DEBUG": "INFO", "N": 4})
    assert findings == []
    environment = plans["gpu1"].environment
    assert (environment["NCCL_IB_HCA"], environment["NCCL_DEBUG"], environment["N"]) == (
        "=mlx5_0:1",
        "INFO",
        "4",
    )


@pytest.mark.parametrize(
    ("name", "value", "cause"),
    [
        ("http_proxy", "http://proxy.example.com:3128", "proxy"),
        ("HTTPS_PROXY", "http://proxy.example.com:3128", "proxy"),
        ("all_proxy", "", "proxy"),
        ("NCCL_DEBUG", "INFO\nLD_PRELOAD=/tmp/x.so", "line break"),
        ("LMDEPLOY_SKIP_WARMUP", "", "empty LMDEPLOY_"),
        ("LMDEPLOY_SKIP_WARMUP", " ", "empty LMDEPLOY_"),
        ("NCCL DEBUG", "INFO", "letters"),
        ("1ST", "x", "letters"),
        ("NCCL_IB_TIMEOUT", True, "found bool"),
        ("NCCL_IB_TIMEOUT", ["22"], "found list"),
        ("RAY_AUTH_TOKEN", "s3cret-canary", "docker inspect"),
    ],
)
def test_environment_that_would_break_the_engine_is_refused(name: str, value: Any, cause: str) -> None:
    plans, findings = two_hosts(engine_environment={name: value})
    assert {(finding.code, finding.severity) for finding in findings} == {("environment", "error")}
    assert {finding.host for finding in findings} == {"gpu1", "gpu2"}
    assert name in findings[0].message and cause in findings[0].cause
    assert name not in plans["gpu1"].environment


@pytest.mark.parametrize("name", ["RAY_AUTH_TOKEN", "http_proxy", "NCCL DEBUG"])
def test_a_refused_value_is_not_shown(name: str) -> None:
    _, findings = two_hosts(engine_environment={name: "s3cret-canary"})
    assert findings and "s3cret-canary" not in str(findings)


def test_no_proxy_is_harmless() -> None:
    plans, findings = two_hosts(engine_environment={"no_proxy": "*"})
    assert findings == [] and plans["gpu1"].environment["no_proxy"] == "*"


def test_a_host_that_was_not_looked_at_counts_for_the_others() -> None:
    plans, findings = derive(
        *replica_of(host_input("gpu1", None, "192.0.2.11"), host_input("gpu2", recorded("h800-ib-2")))
    )
    assert set(plans) == {"gpu2"} and findings == []
    assert plans["gpu2"].head_address == "192.0.2.11"
    assert plans["gpu2"].expected.gpus == 16


def test_no_plan_without_the_heads_address() -> None:
    plans, _ = derive(*replica_of(host_input("gpu1", None), host_input("gpu2", recorded("h800-ib-2"))))
    assert plans == {}


def test_a_host_without_an_address_has_no_plan_and_says_why() -> None:
    plans, findings = derive(
        *replica_of(
            host_input("gpu1", recorded("h800-ib-1")),
            host_input("gpu2", recorded("h800-ib-2"), node_network_interface="eth7"),
        )
    )
    assert set(plans) == {"gpu1"}
    assert [(finding.code, finding.host) for finding in findings] == [("interface-missing", "gpu2")]


def test_a_lone_host_is_a_replica() -> None:
    plans, findings = derive(*replica_of(host_input("one", recorded("l20-pcie"))))
    assert findings == []
    assert plans["one"].peers == () and plans["one"].reach == () and plans["one"].tp == 8


def test_no_secret_gets_into_a_plan() -> None:
    canary = "sk-canary-1d9f"
    plans, _ = two_hosts(endpoint_api_keys=[canary], engine_image_registry_password=canary, endpoint_mode="direct")
    assert canary not in json.dumps([plan.to_json() for plan in plans.values()])
