"""A pretended engine: deterministic tokens, batches, steps through the ranks, and a health that can fail."""

from __future__ import annotations

import asyncio
import hashlib
import json
import logging
import os
import random
import re
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .executors import Executor
from .metrics import Metrics

logger = logging.getLogger("lmdeploy")

_SYLLABLES = [consonant + vowel for consonant in "bdfgklmnprstvz" for vowel in "aeiou"]
VOCABULARY = [first + second for first in _SYLLABLES for second in _SYLLABLES]

# LMDeploy's table for `max_batch_size` has 1024 for H100, H200 and H800.
DEFAULT_BATCH = 1024
DEFAULT_CONTEXT = 32768

# A batch passes through all ranks once a step, but not more often than this: 16 remote calls a token are
# too many for a small machine. The first step of a request always does.
_RANK_INTERVAL_S = 0.2


class EngineDead(RuntimeError):
    """The engine lost a rank and serves no more."""


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How to generate; `max_tokens` None means up to the context's end."""

    max_tokens: int | None = None
    temperature: float | None = None
    seed: int | None = None
    ignore_eos: bool = False
    stop: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Step:
    """One step of one request; the last has a finish reason and no token."""

    token: int | None = None
    text: str = ""
    finish_reason: str | None = None


@dataclass(kw_only=True, eq=False)
class _Request:
    prompt: list[int]
    limit: int
    eos_after: int
    sampling: Sampling
    randomness: random.Random | None
    arrived: float = field(default_factory=time.monotonic)
    admitted: float = 0.0
    first_token: float = 0.0
    last_token: float = 0.0
    produced: int = 0
    tail: str = ""
    out: asyncio.Queue[Step | BaseException] = field(default_factory=asyncio.Queue)


def tokenize(text: str) -> list[int]:
    """Split at white space; the space before a word belongs to it, one at the end is a token of its own."""
    return [
        int.from_bytes(hashlib.blake2s(piece.encode(), digest_size=3).digest())
        for piece in re.findall(r"\s*\S+|\s+$", text)
    ]


def tokenize_chat(messages: list[dict[str, Any]]) -> list[int]:
    """Tokens of a chat: beginning, role and content of each message, assistant."""
    tokens = [0]
    for message in messages:
        content = message.get("content") or ""
        if isinstance(content, list):
            content = " ".join(str(part.get("text", "")) for part in content)
        tokens += [*tokenize(str(message.get("role", "user"))), *tokenize(content)]
    return [*tokens, 1]


def context_length(model_path: str, session_len: int | None) -> int:
    """The option, else what config.json says, else a default."""
    if session_len:
        return session_len
    config = Path(model_path) / "config.json"
    known = json.loads(config.read_text()).get("max_position_embeddings") if config.is_file() else None
    return int(known or DEFAULT_CONTEXT)


class Engine:
    """Generates for any number of requests at once, a token each a step."""

    def __init__(self, executor: Executor, *, context: int, max_batch: int, metrics: Metrics) -> None:
        self.context = context
        self.sleeping: set[str] = set()
        self._executor, self._max_batch, self._metrics = executor, max_batch, metrics
        self._waiting: list[_Request] = []
        self._running: list[_Request] = []
        self._wake = asyncio.Event()
        self._loop: asyncio.Task[None] | None = None
        self._fault: BaseException | None = None
        self._ranks_at = 0.0

    def start(self) -> None:
        self._loop = asyncio.create_task(self._run(), name="MainLoop")

    async def stop(self) -> None:
        if self._loop:
            self._loop.cancel()
            await asyncio.gather(self._loop, return_exceptions=True)
        self._executor.close()

    def health(self) -> tuple[str, str]:
        """Status and message as /health gives them."""
        if self.sleeping:
            return "sleeping", "Engine is sleeping."
        if self._loop is None or self._loop.done():
            return "unhealthy", "PyTorch engine main loop has stopped."
        return "healthy", "PyTorch engine is healthy."

    async def generate(self, prompt: list[int], sampling: Sampling) -> AsyncIterator[Step]:
        """Yield the steps of one request.

        Raises:
            EngineDead: a rank was lost before the end.
        """
        if self._fault:
            raise EngineDead(str(self._fault)) from self._fault
        room = self.context - len(prompt)
        digest = hashlib.blake2s(json.dumps(prompt).encode()).digest()
        request = _Request(
            prompt=prompt,
            limit=min(sampling.max_tokens or room, room),
            eos_after=8 + digest[0] % 57,
            sampling=sampling,
            randomness=random.Random(sampling.seed) if sampling.temperature not in (0, 0.0) else None,
        )
        self._waiting.append(request)
        self._wake.set()
        try:
            while True:
                step = await request.out.get()
                if isinstance(step, BaseException):
                    raise EngineDead(str(step)) from step
                yield step
                if step.finish_reason:
                    return
        finally:
            for queue in (self._waiting, self._running):
                if request in queue:
                    queue.remove(request)

    async def _run(self) -> None:
        pause = float(os.environ.get("STANDIN_STEP_SECONDS", "0"))
        try:
            while True:
                if not self._running and not self._waiting:
                    self._wake.clear()
                    self._metrics.schedule(running=0, waiting=0)
                    await self._wake.wait()
                await self._step()
                await asyncio.sleep(pause)
        except Exception as fault:
            logger.exception("Engine main loop failed.")
            self._fault = fault
            for request in self._running + self._waiting:
                request.out.put_nowait(fault)
            raise

    async def _step(self) -> None:
        fresh = self._waiting[: max(0, self._max_batch - len(self._running))]
        del self._waiting[: len(fresh)]
        now = time.monotonic()
        for request in fresh:
            request.admitted = now
            self._running.append(request)
        if fresh or now - self._ranks_at >= _RANK_INTERVAL_S:
            await self._executor.forward()
            self._ranks_at = time.monotonic()
        self._metrics.schedule(running=len(self._running), waiting=len(self._waiting))
        for request in list(self._running):
            self._advance(request)

    def _advance(self, request: _Request) -> None:
        now = time.monotonic()
        ended = not request.sampling.ignore_eos and request.produced >= request.eos_after
        if request.produced >= request.limit or ended:
            self._finish(request, "stop" if ended and request.produced < request.limit else "length", now)
            return
        token = self._token(request)
        text = f"{' ' if request.produced else ''}{VOCABULARY[token]}"
        self._metrics.iteration(
            prompt_tokens=0 if request.produced else len(request.prompt),
            since_arrival=None if request.produced else now - request.arrived,
            since_last=now - request.last_token if request.produced else None,
        )
        request.produced += 1
        request.first_token = request.first_token or now
        request.last_token = now
        request.tail = (request.tail + text)[-200:]
        if any(word in request.tail for word in request.sampling.stop):
            self._finish(request, "stop", now)
            return
        request.out.put_nowait(Step(token=token, text=text))

    def _token(self, request: _Request) -> int:
        if request.randomness:
            return request.randomness.randrange(len(VOCABULARY))
        seed = f"{request.prompt[-64:]}{len(request.prompt)}{request.produced}"
        return int.from_bytes(hashlib.blake2s(seed.encode(), digest_size=4).digest()) % len(VOCABULARY)

    def _finish(self, request: _Request, reason: str, now: float) -> None:
        self._running.remove(request)
        request.out.put_nowait(Step(finish_reason=reason))
        self._metrics.finish(
            prompt_tokens=len(request.prompt),
            generated=request.produced,
            queued_s=request.admitted - request.arrived,
            prefill_s=(request.first_token or now) - request.admitted,
            total_s=now - request.arrived,
        )
