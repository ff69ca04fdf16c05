"""The suite that asks the service as clients do, against a small service that can be broken."""

import json
import shutil
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from deploy_dsv3 import content, hostvars, verification
from deploy_dsv3.topology import Deployment, Replica
from deploy_dsv3.verification import Check, VerificationReport

MODEL = "deepseek-ai/DeepSeek-V3"
KEY = "sk-valid"
WORDS = ["red", "green", "blue"]
UNLIMITED = 10**9


class Service:
    """Behaves like a sound endpoint until a test says otherwise."""

    def __init__(self) -> None:
        self.health = 200
        self.models = [MODEL]
        self.asks_for_keys = True
        self.open_routes: set[str] = set()
        self.words: Callable[[int], list[str]] = lambda _count: WORDS
        self.order: Callable[[list[str]], list[str]] = list
        self.longest_prompt = UNLIMITED
        self.most_at_once = UNLIMITED
        self.at_once = 0
        self.lock = threading.Lock()
        self.completions = 0


def handler(service: Service) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def send(self, code: int, text: str) -> None:
            self.send_response(code)
            self.send_header("Content-Length", str(len(text)))
            self.end_headers()
            self.wfile.write(text.encode())

        def refuse(self) -> bool:
            refused = service.asks_for_keys and self.headers.get("Authorization") != f"Bearer {KEY}"
            if refused:
                self.send(401, "{}")
            return refused

        def do_GET(self) -> None:
            if self.path == "/health":
                self.send(service.health, "{}")
            elif self.path == "/v1/models":
                if not self.refuse():
                    self.send(200, json.dumps({"data": [{"id": name} for name in service.models]}))
            else:
                self.send(405 if self.path in service.open_routes else 404, "{}")

        def do_POST(self) -> None:
            request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            if self.refuse():
                return
            with service.lock:
                service.at_once += 1
                service.completions += 1
                too_many = service.at_once > service.most_at_once
                words = service.words(service.completions)
            if service.most_at_once < UNLIMITED:
                time.sleep(0.05)
            self.answer(request, words, too_many=too_many)
            with service.lock:
                service.at_once -= 1

        def answer(self, request: dict[str, Any], words: list[str], *, too_many: bool) -> None:
            length = len(request.get("prompt", "").split())
            if too_many or length > service.longest_prompt:
                return self.send(503 if too_many else 400, "{}")
            if request.get("stream"):
                return self.send(200, "".join(f"{line}\n\n" for line in service.order(chunks(words))))
            choice = {
                "text": " ".join(words),
                "message": {"content": " ".join(words)},
                "finish_reason": "length",
            }
            usage = {"prompt_tokens": length, "completion_tokens": len(words)}
            return self.send(200, json.dumps({"choices": [choice], "usage": usage}))

        def log_message(self, format: str, *args: Any) -> None:
            """Keeps the test's output quiet."""

    return Handler


def chunks(words: list[str]) -> list[str]:
    texts = [*words[:1], *(f" {word}" for word in words[1:])]
    choices: list[dict[str, Any]] = [{"delta": {"content": text}} for text in texts]
    choices.append({"delta": {"content": ""}, "finish_reason": "length"})
    return [*(f"data: {json.dumps({'choices': [choice]})}" for choice in choices), "data: [DONE]"]


@contextmanager
def served(service: Service) -> Iterator[str]:
    """Serves it; gives the URL."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler(service))
    server.socket.listen(128)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def verify(folder: Path, settings: Mapping[str, Mapping[str, Any]]) -> VerificationReport:
    """Runs the suite once against many services; `settings` has each one's, by a name of its own."""
    for name in ("conftest.py", "fleet.py", "test_service.py"):
        shutil.copy(content.testinfra() / name, folder)
    common = {
        **hostvars.role_defaults(),
        "endpoint_api_keys": [KEY],
        "lmdeploy_max_prefill_token_num": 1000,
    }
    return verification.verify(
        Deployment(replicas=tuple(Replica(name=name, head=name) for name in settings)),
        {name: {**common, **own} for name, own in settings.items()},
        {name: {"ansible_connection": "local"} for name in settings},
        suites=folder,
    )


HEALTH = "The endpoint answers and calls itself healthy"
MODELS = "The endpoint offers the model"
KEYS = "A client without a valid key is refused"
ADMINISTRATION = "The engine's administration is closed to clients"
COMPLETION = "A completion comes back"
REPEATABLE = "The same question gets the same answer"
STREAMING = "Tokens stream in order, and the stream ends as it should"
LONG = "A prompt that takes more than one prefill step is answered"
CONCURRENT = "64 requests at the same time are all answered"


def changing(count: int) -> list[str]:
    return [*WORDS, str(count)]


# What is broken, and exactly what says so.
FAULTS: dict[str, tuple[dict[str, Any], set[str]]] = {
    "sound": ({}, set()),
    "unhealthy": ({"health": 503}, {HEALTH}),
    "another model": ({"models": ["other"]}, {MODELS}),
    "keys not asked for": ({"asks_for_keys": False}, {KEYS}),
    "administration open": ({"open_routes": {"/sleep"}}, {ADMINISTRATION}),
    "no token": ({"words": lambda _count: []}, {COMPLETION, LONG, CONCURRENT}),
    "answers change": ({"words": changing}, {REPEATABLE, STREAMING}),
    "stream out of order": ({"order": lambda lines: [lines[1], lines[0], *lines[2:]]}, {STREAMING}),
    "stream cut short": ({"order": lambda lines: lines[:-1]}, {STREAMING}),
    "long prompts refused": ({"longest_prompt": 1000}, {LONG}),
    "few at once": ({"most_at_once": 16}, {CONCURRENT}),
}
# Not faults of a service: nothing listens; a context that is shorter than a prefill step.
NOTHING, SHORT = "nothing listens", "short context"


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> VerificationReport:
    """One run of the suite against every service."""
    settings: dict[str, dict[str, Any]] = {NOTHING: {"endpoint_url": "http://127.0.0.1:1"}}
    with ExitStack() as stack:
        for name, (damage, _) in FAULTS.items():
            service = Service()
            for attribute, value in damage.items():
                setattr(service, attribute, value)
            settings[name] = {"endpoint_url": stack.enter_context(served(service))}
        small = Service()
        small.longest_prompt = 400
        settings[SHORT] = {"endpoint_url": stack.enter_context(served(small)), "lmdeploy_session_len": 800}
        return verify(tmp_path_factory.mktemp("suites"), settings)


def of(report: VerificationReport, name: str) -> list[Check]:
    return [check for check in report.checks if check.host == name]


@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_is_found_and_nothing_else_is_blamed(report: VerificationReport, name: str) -> None:
    failures = [check for check in of(report, name) if not check.good]
    assert {check.check for check in failures} == FAULTS[name][1], failures


def test_a_sound_service_passes_every_check(report: VerificationReport) -> None:
    checks = of(report, "sound")
    assert {check.outcome for check in checks} == {"passed"}
    assert {check.check for check in checks} == set().union(*(expected for _, expected in FAULTS.values()))


def test_the_answer_is_kept_for_comparison(report: VerificationReport) -> None:
    [answer] = [check.details["answer"] for check in of(report, "sound") if check.details]
    assert answer == "red green blue"


def test_nothing_listening_is_one_failure(report: VerificationReport) -> None:
    checks = of(report, NOTHING)
    [failure] = [check for check in checks if not check.good]
    assert failure.check == HEALTH and "refused" in failure.message
    assert {check.outcome for check in checks if check is not failure} == {"skipped"}


def test_a_short_context_is_respected(report: VerificationReport) -> None:
    assert all(check.outcome == "passed" for check in of(report, SHORT))
