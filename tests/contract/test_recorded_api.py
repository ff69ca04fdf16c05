"""The stand-in engine answers as the real one did when it was recorded."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from exchanges import Exchange, form, load, read_metrics, read_routes, send, usages, wait_until_healthy

RECORDING, EXCHANGES = load()


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    (folder / "config.json").write_text(json.dumps({"max_position_embeddings": 32768}))
    (folder / "model.safetensors").touch()
    return folder


def serve(model: Path, *options: str) -> Iterator[str]:
    """Run the stand-in with one GPU, for which LMDeploy needs no Ray either; yields its URL."""
    port = free_port()
    command = [sys.executable, "-m", "deploy_dsv3.lab.engine.standin", "serve", "api_server", str(model)]
    command += ["--backend", "pytorch", "--model-name", "dsv3", "--server-name", "127.0.0.1"]
    process = subprocess.Popen([*command, "--server-port", str(port), *options])
    try:
        wait_until_healthy(f"http://127.0.0.1:{port}", timeout_s=60)
        yield f"http://127.0.0.1:{port}"
    finally:
        process.terminate()
        process.wait(20)


@pytest.fixture(scope="module")
def open_server(model: Path) -> Iterator[str]:
    yield from serve(model)


@pytest.fixture(scope="module")
def keyed_server(model: Path) -> Iterator[str]:
    yield from serve(model, "--api-keys", "sk-sample", "sk-other")


@pytest.mark.parametrize("exchange", EXCHANGES, ids=lambda exchange: exchange.name)
def test_an_answer_has_the_recorded_form(exchange: Exchange, request: pytest.FixtureRequest) -> None:
    url = request.getfixturevalue("keyed_server" if exchange.keyed else "open_server")
    answer = send(url, exchange.request)
    assert form(answer) == form(exchange.response)


def test_an_error_has_the_recorded_words(open_server: str, keyed_server: str) -> None:
    refused = [exchange for exchange in EXCHANGES if exchange.response["status"] >= 400]
    assert len(refused) >= 10
    for exchange in refused:
        answer = send(keyed_server if exchange.keyed else open_server, exchange.request)
        assert form(answer["json"]) == form(exchange.response["json"]), exchange.name


@pytest.mark.parametrize("exchange", EXCHANGES, ids=lambda exchange: exchange.name)
def test_tokens_add_up(exchange: Exchange, request: pytest.FixtureRequest) -> None:
    """In the recording as in the stand-in; how many a prompt has differs with the tokenizer."""
    url = request.getfixturevalue("keyed_server" if exchange.keyed else "open_server")
    answer = send(url, exchange.request)
    assert len(list(usages(answer))) == len(list(usages(exchange.response)))
    for usage in (*usages(answer), *usages(exchange.response)):
        assert usage["total_tokens"] == usage["prompt_tokens"] + usage["completion_tokens"]
        assert usage["prompt_tokens"] > 0


def test_the_routes_are_the_recorded_ones(open_server: str) -> None:
    assert read_routes(open_server) == sorted(RECORDING["routes"])


def test_the_metrics_are_the_recorded_ones(open_server: str) -> None:
    recorded = {metric["name"]: metric for metric in RECORDING["metrics"]}
    assert {metric["name"]: metric for metric in read_metrics(open_server)} == recorded


def test_a_recording_compares_unequal_when_a_field_is_missing() -> None:
    chat = next(exchange for exchange in EXCHANGES if exchange.name == "chat")
    broken = json.loads(json.dumps(chat.response))
    del broken["json"]["usage"]["prompt_tokens_details"]
    assert form(broken) != form(chat.response)
