"""What we know of LMDeploy's command line is what its own parser says.

`parse_for_real` is the check that other tests use on commands rendered by the product.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from serving_parser import parse_for_real, real_options

from deploy_dsv3.lab.engine import standin
from deploy_dsv3.lab.engine.standin.cli import build_parser

OPTIONS = Path(standin.__file__).parent / "options.json"
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
    assert json.loads(OPTIONS.read_text()) == answer["options"]


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
