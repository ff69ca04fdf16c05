"""The service as clients get it: from this machine, through the address that clients use."""

import json
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import pytest
from fleet import Node

from deploy_dsv3.derive import endpoint_url
from deploy_dsv3.serving import served_model
from deploy_dsv3.status import client

ANSWER_TIMEOUT_S = 300
CONCURRENT_REQUESTS = 64
# Another client's request in the same batch can turn a rounding, and so a token. A broken engine differs every time.
ATTEMPTS = 4
PROMPT = "The three primary colours are"
# Asked with GET, which none of them does anything on.
ADMINISTRATION = ("/sleep", "/wakeup", "/update_weights", "/abort_request", "/distserve/p2p_connect", "/docs")

Complete = Callable[[str, int], dict[str, Any]]


@pytest.fixture(scope="session")
def url(any_node: Node) -> str:
    address = any_node.observation.document("node").get("node_address", "")
    if not address and not any_node.settings["endpoint_url"]:
        pytest.skip("nothing is deployed on the head, so the endpoint has no address")
    return endpoint_url(any_node.settings, address)


@pytest.fixture(scope="session")
def endpoint(any_node: Node, url: str) -> Iterator[httpx.Client]:
    """A client with a valid key; skips where nothing answers, which `test_health` says."""
    with client(any_node.settings, url, timeout_s=ANSWER_TIMEOUT_S) as http:
        try:
            http.get("/health", timeout=20)
        except httpx.HTTPError:
            pytest.skip("the endpoint does not answer")
        yield http


@pytest.fixture(scope="session")
def complete(any_node: Node, endpoint: httpx.Client) -> Complete:
    """Asks for a completion; gives the answer's JSON."""
    model = served_model(any_node.settings)

    def ask(prompt: str, max_tokens: int) -> dict[str, Any]:
        request = {"model": model, "prompt": prompt, "max_tokens": max_tokens, "temperature": 0}
        answer = endpoint.post("/v1/completions", json=request)
        assert answer.status_code == 200, f"/v1/completions: {answer.status_code} {answer.text[:500]}"
        body: dict[str, Any] = answer.json()
        return body

    return ask


def test_health(any_node: Node, url: str) -> None:
    """The endpoint answers and calls itself healthy."""
    try:
        with client(any_node.settings, url) as http:
            answer = http.get("/health")
    except httpx.HTTPError as error:
        pytest.fail(f"{url}/health: {error}. A firewall may be in the way, or the endpoint is down.", pytrace=False)
    assert answer.status_code == 200, f"{url}/health: {answer.status_code} {answer.text[:500]}"


def test_models(any_node: Node, endpoint: httpx.Client) -> None:
    """The endpoint offers the model."""
    answer = endpoint.get("/v1/models")
    assert answer.status_code == 200, f"/v1/models: {answer.status_code} {answer.text[:500]}"
    names = [entry["id"] for entry in answer.json()["data"]]
    assert served_model(any_node.settings) in names, f"/v1/models offers {names}"


def test_keys(any_node: Node, endpoint: httpx.Client) -> None:
    """A client without a valid key is refused."""
    if not any_node.settings["endpoint_api_keys"]:
        pytest.skip("endpoint_api_keys is empty: no key is asked for")
    for headers in ({"Authorization": ""}, {"Authorization": "Bearer not-a-key"}):
        answer = endpoint.get("/v1/models", headers=headers)
        assert answer.status_code == 401, f"{headers}: {answer.status_code} {answer.text[:200]}"


def test_administration(any_node: Node, endpoint: httpx.Client) -> None:
    """The engine's administration is closed to clients."""
    if any_node.settings["endpoint_mode"] == "direct":
        pytest.skip("endpoint_mode is direct: clients reach the engine itself")
    answers = {path: endpoint.get(path).status_code for path in ADMINISTRATION}
    assert set(answers.values()) == {404}, f"{answers}: a client can reach what is not 404"


def test_completion(complete: Complete) -> None:
    """A completion comes back."""
    answer = complete(PROMPT, 8)
    assert answer["usage"]["completion_tokens"] > 0, f"no token came: {answer}"
    assert answer["choices"][0]["finish_reason"] in ("length", "stop"), f"it ended oddly: {answer}"


def test_repeatable(complete: Complete, record_property: Callable[[str, object], None]) -> None:
    """The same question gets the same answer."""
    answers = []
    for _ in range(ATTEMPTS):
        answers.append(complete(PROMPT, 32)["choices"][0]["text"])
        if answers[-1] in answers[:-1]:
            break
    # Kept in the report, so that it can be compared with the one after a restart or an upgrade.
    record_property("answer", answers[-1])
    assert answers[-1] in answers[:-1], f"at temperature 0, one after the other: {answers}"


def test_streaming(any_node: Node, endpoint: httpx.Client) -> None:
    """Tokens stream in order, and the stream ends as it should."""
    request = {
        "model": served_model(any_node.settings),
        "messages": [{"role": "user", "content": PROMPT}],
        "max_tokens": 16,
        "temperature": 0,
    }
    differing = []
    for _ in range(ATTEMPTS):
        whole = endpoint.post("/v1/chat/completions", json=request).json()["choices"][0]["message"]
        streamed = stream(endpoint, request)
        expected = {part: whole.get(part) or "" for part in streamed}
        if streamed == expected:
            return
        differing.append(f"streamed {streamed}, in one piece {expected}")
    pytest.fail("\n".join(differing), pytrace=False)


def stream(endpoint: httpx.Client, request: dict[str, Any]) -> dict[str, str]:
    """The answer to a streamed request, put together in the order in which it came."""
    with endpoint.stream("POST", "/v1/chat/completions", json={**request, "stream": True}) as answer:
        assert answer.status_code == 200, f"/v1/chat/completions: {answer.status_code}"
        lines = [line for line in answer.iter_lines() if line.startswith("data: ")]
    assert lines and lines[-1] == "data: [DONE]", f"the stream ends with {lines[-1:]}"
    choices = [json.loads(line.removeprefix("data: "))["choices"][0] for line in lines[:-1]]
    reasons = [choice.get("finish_reason") for choice in choices]
    assert reasons and reasons[-1] in ("length", "stop") and not any(reasons[:-1]), f"finish reasons: {reasons}"
    return {
        part: "".join(choice["delta"].get(part) or "" for choice in choices)
        for part in ("content", "reasoning_content")
    }


def test_long_prompt(any_node: Node, complete: Complete) -> None:
    """A prompt that takes more than one prefill step is answered."""
    words = any_node.settings["lmdeploy_max_prefill_token_num"] * 5 // 4
    limit = any_node.settings["lmdeploy_session_len"]
    if limit:
        words = min(words, limit // 2)
    answer = complete("one " * words, 4)
    usage = answer["usage"]
    assert usage["prompt_tokens"] >= words // 2, f"{words} words became {usage['prompt_tokens']} tokens"
    assert usage["completion_tokens"] > 0, f"no token came: {answer}"


def test_concurrency(complete: Complete) -> None:
    """64 requests at the same time are all answered."""
    with ThreadPoolExecutor(max_workers=CONCURRENT_REQUESTS) as pool:
        answers = list(pool.map(lambda number: complete(f"{number} {PROMPT}", 8), range(CONCURRENT_REQUESTS)))
    empty = [answer for answer in answers if not answer["usage"]["completion_tokens"]]
    assert not empty, f"{len(empty)} of {CONCURRENT_REQUESTS} got no token: {empty[:1]}"
