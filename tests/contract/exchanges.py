"""Recorded exchanges with a real api_server: send one again, and tell whether the answer is of the same form.

Form means everything but what a server makes up anew for each request: identifiers, times, and the
generated text and tokens, of which only the type counts. Of a stream, equal events in a row count once.
"""

from __future__ import annotations

import json
import re
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

RECORDED = Path(__file__).parent / "recorded"

#: The model's name in a recording.
MODEL = "dsv3"

_MADE_UP = {"id", "created", "content", "text", "output_ids"}
#: How many tokens a prompt has is the tokenizer's matter, which a recording does not hold.
_COUNTED = {"prompt_tokens", "total_tokens"}
_COUNTED_LENGTH = re.compile(r"(?<=Input length \()\d+(?=\))")
_HEADERS = ("server", "content-type", "vary", "allow")


@dataclass(frozen=True, kw_only=True)
class Exchange:
    """One request and what came back; `keyed` when the server ran with an API key."""

    name: str
    keyed: bool
    request: dict[str, Any]
    response: dict[str, Any]


def load(version: str = "0.18.0") -> tuple[dict[str, Any], list[Exchange]]:
    """Return a whole recording and its exchanges."""
    recording: dict[str, Any] = json.loads((RECORDED / f"lmdeploy-{version}.json").read_text())
    exchanges = [
        Exchange(
            name=item["name"],
            keyed=item.get("keyed", False),
            request=item["request"],
            response=item["response"],
        )
        for item in recording["exchanges"]
    ]
    return recording, exchanges


def send(base_url: str, request: dict[str, Any], *, model: str = MODEL) -> dict[str, Any]:
    """Send a recorded request to a server that serves `model`; returns a response in the recording's form."""
    headers = dict(request.get("headers", {}))
    body = None
    if "json" in request:
        payload = dict(request["json"])
        if payload.get("model") == MODEL:
            payload["model"] = model
        if isinstance(payload.get("prompt"), dict):  # written short: a prompt beyond the context's length
            payload["prompt"] = payload["prompt"]["repeat"] * payload["prompt"]["times"]
        body = json.dumps(payload).encode()
        headers["Content-Type"] = "application/json"
    elif "text" in request:
        body = request["text"].replace(f'"{MODEL}"', f'"{model}"').encode()
    message = urllib.request.Request(base_url + request["path"], body, headers, method=request["method"])
    try:
        with urllib.request.urlopen(message, timeout=60) as answer:
            return _response(answer.status, answer.headers, answer.read().decode().replace(model, MODEL))
    except urllib.error.HTTPError as answer:
        return _response(answer.code, answer.headers, answer.read().decode().replace(model, MODEL))


def form(value: Any, key: str = "") -> Any:
    """Return a response with what is made up anew, or counted by a tokenizer, replaced by its type."""
    if key in _MADE_UP and not isinstance(value, dict | None):
        return [type(item).__name__ for item in value] if isinstance(value, list) else type(value).__name__
    if key in _COUNTED:
        return type(value).__name__
    if isinstance(value, str):
        return _COUNTED_LENGTH.sub("N", value)
    if isinstance(value, dict):
        return {name: form(item, name) for name, item in value.items()}
    if isinstance(value, list):
        items = [form(item) for item in value]
        return _without_repeats(items) if key == "events" else items
    return value


def usages(value: Any) -> Iterator[dict[str, Any]]:
    """Yield every account of tokens in a response."""
    if isinstance(value, dict):
        if "total_tokens" in value:
            yield value
        for item in value.values():
            yield from usages(item)
    elif isinstance(value, list):
        for item in value:
            yield from usages(item)


def read_metrics(base_url: str, headers: dict[str, str] | None = None) -> list[dict[str, Any]]:
    """Return name, type, help and labels of a server's own metrics, in a recording's form."""
    message = urllib.request.Request(f"{base_url}/metrics", headers=headers or {})
    with urllib.request.urlopen(message, timeout=60) as answer:
        lines = answer.read().decode().splitlines()
    found: dict[str, dict[str, Any]] = {}
    texts: dict[str, str] = {}
    for line in lines:
        words = line.split(" ", 3)
        if line.startswith("# HELP lmdeploy:"):
            texts[words[2]] = words[3]
        elif line.startswith("# TYPE lmdeploy:"):
            found[words[2]] = {"name": words[2], "type": words[3], "help": texts[words[2]], "labels": []}
        elif line.startswith("lmdeploy:") and "{" in line:
            series, _, rest = line.partition("{")
            metric = found[_family(series, found)]
            labels = {pair.partition("=")[0] for pair in rest.rpartition("}")[0].split(",")} - {"le"}
            metric["labels"] = sorted(labels.union(metric["labels"]))
    return list(found.values())


def read_routes(base_url: str) -> list[str]:
    """Return a server's documented routes as "METHOD /path", sorted."""
    with urllib.request.urlopen(f"{base_url}/openapi.json", timeout=60) as answer:
        paths = json.load(answer)["paths"]
    return sorted(f"{method.upper()} {path}" for path, methods in paths.items() for method in methods)


def wait_until_healthy(base_url: str, timeout_s: float) -> None:
    """Wait for /health to say 200; TimeoutError when it does not."""
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        try:
            with urllib.request.urlopen(f"{base_url}/health", timeout=5) as answer:
                if answer.status == 200:
                    return
        except OSError:
            pass
        time.sleep(0.1)
    raise TimeoutError(f"{base_url} was not healthy within {timeout_s:g} s")


def _response(status: int, headers: Any, text: str) -> dict[str, Any]:
    kept = {name: headers[name] for name in _HEADERS if headers[name] is not None}
    if not kept["content-type"].startswith("text/event-stream"):
        return {"status": status, "headers": kept, "json": json.loads(text)}
    events = [event.removeprefix("data: ") for event in text.strip().split("\n\n")]
    parsed = [event if event == "[DONE]" else json.loads(event) for event in events]
    return {"status": status, "headers": kept, "events": parsed}


def _without_repeats(items: list[Any]) -> list[Any]:
    return [item for index, item in enumerate(items) if index == 0 or item != items[index - 1]]


def _family(series: str, found: dict[str, Any]) -> str:
    for suffix in ("", "_bucket", "_count", "_sum", "_info"):
        if suffix and not series.endswith(suffix):
            continue
        name = series.removesuffix(suffix)
        if name in found:
            return name
    raise KeyError(series)
