"""The serving command and the launcher's files: what each setting becomes."""

from __future__ import annotations

from typing import Any

import pytest

from deploy_dsv3 import serving
from deploy_dsv3.hostvars import role_defaults


def settings(**own: Any) -> dict[str, Any]:
    return {**role_defaults(), **own}


def value_of(argv: list[str], option: str) -> str:
    return argv[argv.index(option) + 1]


def test_the_guide_s_command() -> None:
    argv = serving.serve_argv(settings(), tp=16)
    assert argv[:4] == ["lmdeploy", "serve", "api_server", "/data/models/DeepSeek-V3"]
    assert value_of(argv, "--backend") == "pytorch"
    assert value_of(argv, "--tp") == "16"
    assert value_of(argv, "--model-name") == "deepseek-ai/DeepSeek-V3"


def test_behind_the_proxy_the_engine_listens_on_loopback_only() -> None:
    assert value_of(serving.serve_argv(settings(), tp=8), "--server-name") == "127.0.0.1"
    direct = serving.serve_argv(settings(endpoint_mode="direct"), tp=8)
    assert value_of(direct, "--server-name") == "0.0.0.0"


def test_zero_and_empty_leave_the_choice_to_lmdeploy() -> None:
    argv = serving.serve_argv(settings(), tp=16)
    assert "--session-len" not in argv
    assert "--max-batch-size" not in argv
    assert "--eager-mode" not in argv


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"enable-prefix-caching": True}, ["--enable-prefix-caching"]),
        ({"enable_prefix_caching": True}, ["--enable-prefix-caching"]),
        ({"enable-prefix-caching": False}, []),
        ({"cudagraph-capture-batch-sizes": [1, 8]}, ["--cudagraph-capture-batch-sizes", "1", "8"]),
        ({"hf-overrides": {"a": 1}}, ["--hf-overrides", '{"a": 1}']),
    ],
)
def test_passed_through_options(options: dict[str, Any], words: list[str]) -> None:
    plain = serving.serve_argv(settings(), tp=16)
    assert serving.serve_argv(settings(lmdeploy_options=options), tp=16) == plain + words


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        (
            {"enable-prefix-cachin": True},
            "no option of `lmdeploy serve api_server`; did you mean 'enable-prefix-caching'?",
        ),
        ({"tp": 8}, "which is the setting lmdeploy_tp"),
        ({"api_keys": ["k"]}, "which is the setting endpoint_api_keys"),
        ({"dp": 2}, "another layout"),
        ({"max-concurrent-requests": 64}, "a busy engine would look dead"),
        ({"enable-prefix-caching": "yes"}, "takes true or false"),
        ({"device": "rocm"}, "takes one of cuda, ascend, maca, camb"),
        ({"num-gpu-blocks": 1.5}, "takes a whole number"),
        ({"dllm-confidence-threshold": "x"}, "takes a number"),
        ({"chat-template": "a\nb"}, "takes a text or a number"),
    ],
)
def test_wrong_options_are_told(options: dict[str, Any], problem: str) -> None:
    (found,) = serving.option_problems(options)
    assert problem in found


def test_keys_go_by_file_and_only_without_a_proxy() -> None:
    keys = ["sk-0123456789abcdef"]
    behind = serving.serve_file(settings(endpoint_api_keys=keys), tp=16)
    direct = serving.serve_file(settings(endpoint_api_keys=keys, endpoint_mode="direct"), tp=16)
    assert behind["api_keys_file"] == ""
    assert direct["api_keys_file"] == "/etc/deploy-dsv3/engine/secrets/api_keys"
    assert keys[0] not in str(behind) + str(direct)


def test_node_file_has_every_port() -> None:
    content = serving.node_file(
        settings(ray_cluster_port=7000),
        replica="dsv3",
        role="worker",
        address="192.0.2.12",
        head_address="192.0.2.11",
        gpus=8,
        expected={"nodes": 2, "gpus": 16},
    )
    assert content["ray"]["port"] == 7000
    assert content["ray"]["max_worker_port"] == 10999
    assert content["ray"]["num_gpus"] == 8
    assert content["timeouts"]["load_s"] == 3600
