"""Settings of a host: the roles' defaults under its variables, each of its type."""

from __future__ import annotations

from typing import Any

import pytest

from deploy_dsv3 import hostvars


def test_defaults_hold_without_variables() -> None:
    settings = hostvars.settings_of({"gpu1": {}}, "gpu1")
    assert settings["ray_cluster_port"] == 6379 and settings["model_weights_path"] == "/data/models/DeepSeek-V3"


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        ("lmdeploy_tp", 16, 16),
        ("lmdeploy_tp", "16", 16),
        ("rdma_required", "yes", True),
        ("rdma_gid_index", "-1", -1),
        ("preflight_max_clock_skew_s", "0.5", 0.5),
        ("preflight_max_clock_skew_s", 2, 2.0),
        ("rdma_hcas", "mlx5_0:1,mlx5_1:1", ["mlx5_0:1", "mlx5_1:1"]),
        ("rdma_hcas", ("mlx5_0:1",), ["mlx5_0:1"]),
        ("engine_environment", '{"NCCL_DEBUG": "INFO"}', {"NCCL_DEBUG": "INFO"}),
        ("nvidia_driver_branch", 570, "570"),
    ],
)
def test_values_are_of_their_settings_type(name: str, value: Any, expected: Any) -> None:
    found = hostvars.settings_of({"gpu1": {name: value}}, "gpu1")[name]
    assert found == expected and type(found) is type(expected)


@pytest.mark.parametrize(
    ("name", "value", "wanted"),
    [
        ("lmdeploy_tp", "many", "int"),
        ("lmdeploy_tp", [8], "int"),
        ("rdma_required", "perhaps", "bool"),
        ("engine_environment", 7, "dict"),
    ],
)
def test_a_value_of_another_type_names_host_key_and_type(name: str, value: Any, wanted: str) -> None:
    with pytest.raises(hostvars.SettingError) as raised:
        hostvars.settings_of({"gpu1": {name: value}}, "gpu1")
    assert str(raised.value).startswith(f"gpu1: {name} is a value of type")
    assert str(raised.value).endswith(f"cannot be taken as {wanted}")


def test_a_refused_value_is_not_shown() -> None:
    variables = {"gpu1": {"endpoint_api_keys": {"key": "s3cret-canary"}, "lmdeploy_tp": "s3cret-canary"}}
    with pytest.raises(hostvars.SettingError) as raised:
        hostvars.settings_of(variables, "gpu1")
    assert "s3cret-canary" not in f"{raised.value}{raised.value.__cause__}"


def test_facts_are_found_injected_or_not() -> None:
    assert hostvars.fact({"dsv3_node": {"rank": 1}}, "dsv3_node") == {"rank": 1}
    assert hostvars.fact({"ansible_facts": {"dsv3_node": {"rank": 2}}}, "dsv3_node") == {"rank": 2}
    assert hostvars.fact({}, "dsv3_node") is None
