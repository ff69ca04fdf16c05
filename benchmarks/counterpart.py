"""A server to measure a load generator against: the streaming half of LMDeploy's API, and nothing behind it.

It batches as an engine does: every step gives each active stream one token, each in a write of its own, and
requests above the batch size wait. With `step_s` 0 it answers as fast as it can. It also fails on request, so
that tests can see what becomes of failures. Answers have the form of LMDeploy 0.18's.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import ssl
import threading
import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any

_BACKLOG = 4096
# Bytes that may wait for a slow reader before its stream is left out of a step.
_MOST_UNSENT = 1 << 16


@dataclass
class Behaviour:
    """How the server behaves; may be changed while it runs."""

    step_s: float = 0.0
    """Time between two tokens of a stream [s]."""
    max_batch: int = 0
    """Streams served at once; 0: all."""
    api_key: str = ""
    model: str = "dsv3"
    text: str = " token"
    loading: bool = False
    """Answer 503 to everything, as an engine does that is not ready."""
    fail_every: int = 0
    """Every so manieth completion gets HTTP 500."""
    break_every: int = 0
    """Every so manieth stream is cut in the middle."""
    error_event_every: int = 0
    """Every so manieth stream ends in an `error` event, as LMDeploy's do."""
    vanish_after: int = 0
    """Close the port and all connections after so many completions."""
    uncounted: int = 0
    """Tokens that the server's `usage` says fewer than were asked for."""


@dataclass
class Seen:
    """What the server saw."""

    bodies: list[dict[str, Any]] = field(default_factory=list)
    authorization: set[str] = field(default_factory=set)
    completions: int = 0
    tokens: int = 0
    most_open: int = 0


@dataclass
class _Stream:
    transport: asyncio.Transport
    left: int
    body: dict[str, Any]
    number: int


class Server:
    """The server; `url` is known once it runs."""

    def __init__(self, behaviour: Behaviour | None = None, *, keep_bodies: bool = True) -> None:
        self.behaviour = behaviour or Behaviour()
        self.seen = Seen()
        self.url = ""
        self._keep_bodies = keep_bodies
        self._active: list[_Stream] = []
        self._waiting: deque[_Stream] = deque()
        self._work = asyncio.Event()
        self._server: asyncio.Server | None = None
        self._open: set[asyncio.Transport] = set()

    async def serve(
        self, *, port: int = 0, tls: ssl.SSLContext | None = None, started: threading.Event | None = None
    ) -> None:
        """Serve until cancelled."""
        self._work = asyncio.Event()
        loop = asyncio.get_running_loop()
        self._server = await loop.create_server(lambda: _Connection(self), "127.0.0.1", port, backlog=_BACKLOG, ssl=tls)
        self.url = f"http{'s' if tls else ''}://127.0.0.1:{self._server.sockets[0].getsockname()[1]}"
        if started:
            started.set()
        try:
            await self._steps()
        finally:
            self.vanish()

    def vanish(self) -> None:
        """Close the port and every connection."""
        if self._server:
            self._server.close()
        for transport in list(self._open):
            transport.abort()

    def answer(self, transport: asyncio.Transport, head: str, body: bytes) -> None:
        """Handle one request."""
        request_line, *headers = head.split("\r\n")
        _, path, _ = request_line.split(" ", 2)
        given = next((line[15:].strip() for line in headers if line.lower().startswith("authorization: ")), "")
        self.seen.authorization.add(given)
        how = self.behaviour
        if how.loading:
            return _plain(transport, 503, {"status": "initializing", "message": "loading weights"})
        if how.api_key and given != f"Bearer {how.api_key}":
            return _plain(transport, 401, {"message": "Unauthorized.", "type": "authentication_error"})
        if path == "/v1/models":
            return _plain(transport, 200, {"object": "list", "data": [{"id": how.model, "object": "model"}]})
        if path != "/v1/completions":
            return _plain(transport, 404, {"detail": "Not Found"})
        asked = json.loads(body)
        self.seen.completions += 1
        number = self.seen.completions
        if self._keep_bodies:
            self.seen.bodies.append(asked)
        if how.vanish_after and number > how.vanish_after:
            return self.vanish()
        if how.fail_every and number % how.fail_every == 0:
            return _plain(transport, 500, {"message": "engine error", "type": "internal_error"})
        transport.write(
            b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream; charset=utf-8\r\n"
            b"transfer-encoding: chunked\r\nconnection: close\r\n\r\n"
        )
        self._waiting.append(_Stream(transport, int(asked["max_tokens"]), asked, number))
        self._work.set()
        return None

    def opened(self, transport: asyncio.Transport) -> None:
        """Note a connection."""
        self._open.add(transport)
        self.seen.most_open = max(self.seen.most_open, len(self._open))

    def closed(self, transport: asyncio.Transport) -> None:
        """Forget a connection."""
        self._open.discard(transport)

    async def _steps(self) -> None:
        loop = asyncio.get_running_loop()
        token = b""
        made_of = ""
        due = loop.time()
        while True:
            how = self.behaviour
            if not self._active and not self._waiting:
                self._work.clear()
                await self._work.wait()
                due = loop.time()
            while self._waiting and (not how.max_batch or len(self._active) < how.max_batch):
                self._active.append(self._waiting.popleft())
            if made_of != how.text or not token:
                made_of, token = how.text, _event(_choice(how.text))
            ended = []
            for stream in self._active:
                transport = stream.transport
                if transport.is_closing():
                    ended.append(stream)
                    continue
                if transport.get_write_buffer_size() > _MOST_UNSENT:
                    continue
                transport.write(token)
                self.seen.tokens += 1
                stream.left -= 1
                if stream.left <= 0 or self._breaks(stream):
                    ended.append(stream)
                    self._end(stream)
            if ended:
                gone = set(map(id, ended))
                self._active = [stream for stream in self._active if id(stream) not in gone]
            # A pace, not a pause: a step that came late is made up for, so that a busy machine keeps the rate.
            due = max(due + how.step_s, loop.time() - 1)
            await asyncio.sleep(max(0.0, due - loop.time()))

    def _breaks(self, stream: _Stream) -> bool:
        every = self.behaviour.break_every
        return bool(every and stream.number % every == 0 and stream.left <= stream.body["max_tokens"] // 2)

    def _end(self, stream: _Stream) -> None:
        how, transport = self.behaviour, stream.transport
        if self._breaks(stream):
            return transport.abort()
        if how.error_event_every and stream.number % how.error_event_every == 0:
            transport.write(_event({"error": {"message": "out of memory", "type": "server_error"}}))
        else:
            transport.write(_event(_choice("", finish_reason="length")))
            if (stream.body.get("stream_options") or {}).get("include_usage"):
                counted = stream.body["max_tokens"] - how.uncounted
                prompt = len(stream.body["prompt"].split())
                usage = {"prompt_tokens": prompt, "completion_tokens": counted, "total_tokens": prompt + counted}
                transport.write(_event({"id": "-1", "choices": [], "usage": usage}))
        transport.write(_chunk(b"data: [DONE]\n\n") + b"0\r\n\r\n")
        return transport.close()


class _Connection(asyncio.Protocol):
    def __init__(self, server: Server) -> None:
        self._server = server
        self._data = bytearray()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = transport
        self._server.opened(transport)  # type: ignore[arg-type]

    def connection_lost(self, error: Exception | None) -> None:
        self._server.closed(self._transport)  # type: ignore[arg-type]

    def data_received(self, data: bytes) -> None:
        self._data += data
        head, found, body = bytes(self._data).partition(b"\r\n\r\n")
        if not found:
            return
        lengths = [line for line in head.lower().split(b"\r\n") if line.startswith(b"content-length:")]
        if len(body) >= (int(lengths[0][15:]) if lengths else 0):
            self._data.clear()
            self._server.answer(self._transport, head.decode("latin-1"), body)  # type: ignore[arg-type]


def _choice(text: str, **more: str) -> dict[str, Any]:
    choice = {"index": 0, "text": text, **more}
    return {"id": "-1", "object": "text_completion", "created": 1795472050, "model": "dsv3", "choices": [choice]}


def _event(data: dict[str, Any]) -> bytes:
    return _chunk(b"data: " + json.dumps(data).encode() + b"\n\n")


def _chunk(data: bytes) -> bytes:
    return f"{len(data):x}\r\n".encode() + data + b"\r\n"


def _plain(transport: asyncio.Transport, status: int, data: dict[str, Any]) -> None:
    body = json.dumps(data).encode()
    transport.write(
        f"HTTP/1.1 {status} -\r\ncontent-type: application/json\r\ncontent-length: {len(body)}\r\n"
        "connection: close\r\n\r\n".encode()
        + body
    )
    transport.close()


@contextmanager
def running(behaviour: Behaviour | None = None, *, tls: ssl.SSLContext | None = None) -> Iterator[Server]:
    """A server in a thread of its own, for tests."""
    server = Server(behaviour)
    loop = asyncio.new_event_loop()
    started = threading.Event()
    task = loop.create_task(server.serve(tls=tls, started=started))

    def serve() -> None:
        with suppress(asyncio.CancelledError):
            loop.run_until_complete(task)

    thread = threading.Thread(target=serve, daemon=True)
    thread.start()
    if not started.wait(10):
        raise RuntimeError("the test server did not start")
    try:
        yield server
    finally:
        loop.call_soon_threadsafe(task.cancel)
        thread.join(10)


def main() -> None:
    """Serve until stopped, and say how much was served."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--port", type=int, default=0)
    parser.add_argument("--step-ms", type=float, default=0.0, help="time between two tokens of a stream")
    parser.add_argument("--max-batch", type=int, default=0, help="streams served at once; 0: all")
    arguments = parser.parse_args()
    server = Server(Behaviour(step_s=arguments.step_ms / 1000, max_batch=arguments.max_batch), keep_bodies=False)

    async def serve() -> None:
        task = asyncio.create_task(server.serve(port=arguments.port))
        while not server.url:
            await asyncio.sleep(0.01)
        print(server.url, flush=True)
        await task

    with suppress(KeyboardInterrupt):
        asyncio.run(serve())
    print(f"served {server.seen.tokens} tokens, CPU {time.process_time():.1f} s", flush=True)


if __name__ == "__main__":
    main()
