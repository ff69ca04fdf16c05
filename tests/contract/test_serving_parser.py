"""What we know of LMDeploy's command line is what its own parser says.

`parse_for_real` is the check that other tests use on commands rendered by the product.
"""

from __future__ import annotations

import json
from typing import Any

import pytest
from serving_parser import parse_for_real, real_options

from deploy_dsv3 import serving
from deploy_dsv3.hostvars import role_defaults
from deploy_dsv3.lab.engine import standin
from deploy_dsv3.lab.engine.standin.cli import build_parser

COMMAND = [
    "lmdeploy",
    "serve",
    "api_server",
    "/data/models/DeepSeek-V3",
    "--backend",
    "pytorch",
    "--tp",
    "16",
]


def test_the_table_of_options_is_that_of_the_real_parser() -> None:
    answer = real_options()
    assert answer["version"] == standin.IMITATES
    assert json.loads(serving.options_file()) == answer["options"]


@pytest.mark.parametrize(
    "options",
    [
        [],
        ["--server-name", "192.0.2.11", "--server-port", "23333", "--model-name", "deepseek-ai/DeepSeek-V3"],
        ["--cache-max-entry-count", "0.7", "--max-prefill-token-num", "4096", "--enable-prefix-caching"],
        ["--quant_policy", "fp8", "--hf-overrides", '{"rope_theta": 10000}'],
        ["--cudagraph-capture-batch-sizes", "1", "8", "64", "--api-keys", "sk-one", "sk-two"],
    ],
    ids=lambda options: options[0] if options else "none",
)
def test_the_stand_in_reads_a_command_as_the_real_parser_does(options: list[str]) -> None:
    real = parse_for_real([*COMMAND, *options])
    assert real["accepted"]
    ours = vars(build_parser().parse_args([*COMMAND, *options][1:]))
    del ours["run"]
    assert ours == real["values"]


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        (["--tensor-parallel", "16"], "unrecognized arguments"),
        (["--server-port", "http"], "invalid int value"),
        (["--device", "rocm"], "invalid choice"),
        (["--quant-policy", "int5"], "invalid _parse value"),
    ],
)
def test_a_wrong_command_is_refused_by_both(options: list[str], complaint: str) -> None:
    real = parse_for_real([*COMMAND, *options])
    assert not real["accepted"]
    assert complaint in real["error"]
    with pytest.raises(SystemExit):
        build_parser().parse_args([*COMMAND, *options][1:])


OWN_SETTINGS = [
    {},
    {"lmdeploy_session_len": 32768, "lmdeploy_max_batch_size": 128, "lmdeploy_eager_mode": True},
    {"lmdeploy_capture_batch_sizes": [1, 8, 64]},
    {"lmdeploy_model_name": "dsv3", "endpoint_mode": "direct", "endpoint_api_keys": ["canary-key"]},
    {
        "lmdeploy_options": {
            "enable-prefix-caching": True,
            "disable_metrics": False,
            "reasoning-parser": "deepseek-v3",
            "allow-origins": ["https://a.example", "https://b.example"],
            "hf-overrides": {"rope_theta": 10000},
            "speculative-algorithm": "deepseek_mtp",
        }
    },
]


@pytest.mark.parametrize("own", OWN_SETTINGS, ids=["defaults", "typed", "list", "direct", "passed-through"])
def test_the_real_parser_accepts_what_the_product_renders(own: dict[str, Any]) -> None:
    settings = {**role_defaults(), **own}
    assert not serving.option_problems(settings["lmdeploy_options"])
    argv = serving.serve_argv(settings, tp=16)
    answer = parse_for_real(argv)
    assert answer["accepted"], answer
    values = answer["values"]
    assert (values["tp"], values["backend"]) == (16, "pytorch")
    assert values["model_path"] == settings["model_weights_path"]
    assert values["model_name"] == serving.served_model(settings)
    assert values["api_keys"] is None
    assert not any("canary-key" in word for word in argv)
    for option, value in settings["lmdeploy_options"].items():
        assert values[option.replace("-", "_")] == value


# What the product refuses as a mistake, the real parser refuses too.
MISTAKES = [
    {"enable-prefix-cashing": True},
    {"device": "rocm"},
    {"num-gpu-blocks": "many"},
    {"dllm-confidence-threshold": "high"},
]


@pytest.mark.parametrize("mistake", MISTAKES, ids=lambda mistake: next(iter(mistake)))
def test_a_mistake_is_one_for_the_real_parser_too(mistake: dict[str, Any]) -> None:
    assert serving.option_problems(mistake)
    settings = {**role_defaults(), "lmdeploy_options": mistake}
    assert not parse_for_real(serving.serve_argv(settings, tp=16))["accepted"]
