"""The load generator: sends a row's requests to an OpenAI-compatible endpoint and times what streams back.

Timing is upstream's (`async_request_openai_completions`): the clock of a request starts before its connection
does; TTFT ends at the first event with text; ITL is the time between such events; latency ends at the last
line received. Each request has a connection of its own, as upstream's has, so a keep-alive that the server
closes can never look like a failed request.

What differs, on purpose: the request asks for `usage`, so that the tokens the server counted stand beside the
tokens asked for; an `error` event or a stream that ends early is a failure; and a row whose endpoint is gone
stops instead of failing ten thousand times.
"""

from __future__ import annotations

import asyncio
import json
import resource
import ssl
import time
from array import array
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import aiohttp

from deploy_dsv3.benchmark.workload import Request, Workload
from deploy_dsv3.errors import DeployError, UnreachableError, UsageError

# After so many failures with no success between, the service is asked whether it is still there. Not each of
# them means that it is gone: a request that is refused at once ends long before one that is served.
_FAILURES_WORTH_ASKING = 64
# Files a process has open beside its connections.
_FILES_APART = 64
# A read takes what has arrived, up to this; events of one stream are small.
_READ_BUFFER_BYTES = 1 << 16
_PROBE_TIMEOUT_S = 30.0
# Until Python 3.11, which the engine's image may not have, asyncio's timeout is a class of its own.
_NETWORK_ERRORS = (aiohttp.ClientError, asyncio.TimeoutError, OSError)


@dataclass(frozen=True, kw_only=True)
class Endpoint:
    """Where clients reach the service, and how."""

    base_url: str
    """`https://host:port`, without `/v1`."""
    api_key: str = field(default="", repr=False)
    ca_file: str = ""
    """CA that signed the endpoint's certificate; empty: the system's."""
    model: str = ""
    """Empty: the first that `/v1/models` names, as upstream has it."""


@dataclass
class Outcome:
    """What became of one request. Times in seconds."""

    index: int
    prompt_len: int
    asked_len: int
    started: float = 0.0
    """After the start of the row."""
    ttft: float | None = None
    """None: no text arrived."""
    latency: float = 0.0
    itl: array[float] = field(default_factory=lambda: array("f"))
    error: str = ""
    """Empty: the request succeeded."""
    counted_prompt_tokens: int | None = None
    """The server's own count, where it gave one."""
    counted_output_tokens: int | None = None


@dataclass
class Timeline:
    """How a row went: per bin of time, events received, requests completed, failed, and open at most.

    Bins double in width when there are more than `most` of them, so a row of a day takes no more than a row
    of a minute. Moments are seconds after the row's start.
    """

    most: int = 1200
    bin_s: float = 0.25
    events: list[int] = field(default_factory=list)
    completed: list[int] = field(default_factory=list)
    failed: list[int] = field(default_factory=list)
    open: list[int] = field(default_factory=list)
    in_flight: int = 0
    """Requests open now."""

    def opened(self, moment: float) -> None:
        """A request was sent."""
        self.in_flight += 1
        place = self._bin(moment)
        self.open[place] = max(self.open[place], self.in_flight)

    def received(self, moment: float, events: int) -> None:
        """Events of a stream arrived."""
        place = self._bin(moment)
        self.events[place] += events

    def ended(self, moment: float, *, failed: bool) -> None:
        """A request ended."""
        place = self._bin(moment)
        (self.failed if failed else self.completed)[place] += 1
        self.in_flight -= 1

    def _bin(self, moment: float) -> int:
        while (place := int(moment / self.bin_s)) >= self.most:
            self._halve()
        while place >= len(self.events):
            self.events.append(0)
            self.completed.append(0)
            self.failed.append(0)
            self.open.append(self.in_flight)
        return place

    def _halve(self) -> None:
        self.bin_s *= 2
        for name, joined in (("events", sum), ("completed", sum), ("failed", sum), ("open", max)):
            series: list[int] = getattr(self, name)
            setattr(self, name, [joined(series[place : place + 2]) for place in range(0, len(series), 2)])


@dataclass
class RowRun:
    """Everything seen while a row ran."""

    duration: float = 0.0
    """From the first request sent until the last one ended [s]."""
    outcomes: list[Outcome] = field(default_factory=list)
    """Finished requests, in the order they ended."""
    itls: array[float] = field(default_factory=lambda: array("f"))
    """Inter-token latencies of successful requests [s]; one array, as there can be tens of millions."""
    timeline: Timeline = field(default_factory=Timeline)
    gone: str = ""
    """Why the row stopped early, if it did."""

    @property
    def failures(self) -> Counter[str]:
        """How often each error was seen."""
        return Counter(outcome.error for outcome in self.outcomes if outcome.error)


def check_open_files(connections: int) -> None:
    """Make sure that this process may hold so many connections, raising its soft limit if need be.

    Raises:
        UsageError: the hard limit is lower.
    """
    wanted = connections + _FILES_APART
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft >= wanted or soft == resource.RLIM_INFINITY:
        return
    if hard != resource.RLIM_INFINITY and hard < wanted:
        raise UsageError(
            f"the row opens {connections} connections at once and this process may open {hard} files",
            remedy=f"Raise it (ulimit -n {max(wanted, 65536)}), or limit the row: --concurrency {hard // 2}.",
        )
    resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


class Client:
    """An HTTP session to one endpoint; use as an asynchronous context manager."""

    def __init__(self, endpoint: Endpoint) -> None:
        self._endpoint = endpoint
        self._url = endpoint.base_url.rstrip("/")
        self._session: aiohttp.ClientSession | None = None

    async def __aenter__(self) -> Client:
        headers = {"Authorization": f"Bearer {self._endpoint.api_key}"} if self._endpoint.api_key else {}
        connector = aiohttp.TCPConnector(limit=0, force_close=True, ssl=_tls(self._endpoint))
        self._session = aiohttp.ClientSession(
            connector=connector,
            headers=headers,
            timeout=aiohttp.ClientTimeout(total=None),
            read_bufsize=_READ_BUFFER_BYTES,
        )
        return self

    async def __aexit__(self, *_: object) -> None:
        if self._session is not None:
            await self._session.close()

    @property
    def _http(self) -> aiohttp.ClientSession:
        if self._session is None:
            raise RuntimeError("Client is used outside its `async with`")
        return self._session

    async def find_model(self) -> str:
        """The model to ask for: the endpoint's `model`, checked, or the first that the service names.

        Raises:
            UsageError: the key is refused, the model is not served, or the certificate is not trusted.
            UnreachableError: nothing answers, or what answers is not a service ready to serve.
        """
        url = f"{self._url}/v1/models"
        try:
            async with self._http.get(url, timeout=aiohttp.ClientTimeout(total=_PROBE_TIMEOUT_S)) as answer:
                body = await answer.text()
        except aiohttp.ClientConnectorCertificateError as error:
            raise UsageError(
                f"{url}: the certificate is not trusted ({error.certificate_error})",
                remedy="Name the CA that signed it: --ca-file FILE.",
            ) from error
        except _NETWORK_ERRORS as error:
            raise UnreachableError(
                f"{url}: {_reason(error)}",
                remedy="The port opens only after the weights are loaded: see `deploy-dsv3 status`. "
                "Then check address, port and firewall.",
            ) from error
        if answer.status in (401, 403):
            fault = "wrong" if self._endpoint.api_key else "missing"
            raise UsageError(
                f"{url}: HTTP {answer.status}, the API key is {fault}",
                remedy="Give one of endpoint_api_keys: --api-key-file FILE, or the inventory that sets it.",
            )
        if answer.status != 200:
            raise UnreachableError(
                f"{url}: HTTP {answer.status} {_first_line(body)}",
                remedy="The engine is loading or down: see `deploy-dsv3 status`.",
            )
        try:
            served = [model["id"] for model in json.loads(body)["data"]]
        except (ValueError, KeyError, TypeError) as error:
            raise UnreachableError(
                f"{url} is not an OpenAI-compatible service: {_first_line(body)}",
                remedy="Give the address that clients use, without /v1.",
            ) from error
        wanted = self._endpoint.model or (served[0] if served else "")
        if wanted not in served:
            raise UsageError(
                f"{url}: model {wanted!r} is not served; served: {', '.join(served) or 'none'}",
                remedy="Leave --model out, or name one of those.",
            )
        return str(wanted)

    async def warm_up(self, model: str, request: Request, *, run: RowRun | None = None) -> Outcome:
        """Send one request and wait for it; upstream does so before each row.

        Args:
            model: name in the request.
            request: the row's first, at its full length.
            run: filled as it goes, for whoever reports progress; made if not given.

        Raises:
            UnreachableError: it failed.
        """
        run = run or RowRun()
        outcome = await self._send(model, request, run, time.perf_counter())
        if outcome.error:
            raise UnreachableError(
                f"{self._url}/v1/completions: the warm-up request failed: {outcome.error}",
                remedy="Nothing was measured. `deploy-dsv3 status` tells what the engine's log says.",
            )
        return outcome

    async def run(
        self,
        model: str,
        workload: Workload,
        *,
        concurrency: int = 0,
        finished: Callable[[Outcome], None] = lambda outcome: None,
        run: RowRun | None = None,
    ) -> RowRun:
        """Send a row's requests and wait for all of them.

        Args:
            model: name in the request.
            workload: what to send, and when.
            concurrency: most requests in flight; 0: no limit. A request that waits for its turn has not
                started: its times begin when it is sent.
            finished: called with each outcome as it ends.
            run: filled as the row goes, for whoever reports progress; made if not given.

        Returns:
            The filled run. `gone` says why it stopped, if the endpoint vanished under it.
        """
        run = run or RowRun()
        turn = asyncio.Semaphore(concurrency) if concurrency else None
        begun = time.perf_counter()
        failures_in_a_row = 0

        async def ask() -> None:
            nonlocal failures_in_a_row
            last = run.outcomes[-1].error
            try:
                await self.find_model()
            except DeployError as error:
                run.gone = f"{_FAILURES_WORTH_ASKING} requests in a row failed ({last}), and then {error.message}"
                for task in tasks:
                    task.cancel()
            else:
                failures_in_a_row = 0

        async def one(request: Request) -> None:
            nonlocal failures_in_a_row
            try:
                outcome = await self._send(model, request, run, begun)
            finally:
                if turn:
                    turn.release()
            run.outcomes.append(outcome)
            if not outcome.error:
                run.itls.extend(outcome.itl)
            outcome.itl = array("f")
            finished(outcome)
            failures_in_a_row = failures_in_a_row + 1 if outcome.error else 0
            if failures_in_a_row == _FAILURES_WORTH_ASKING:
                await ask()

        tasks: set[asyncio.Task[None]] = set()
        try:
            for request, arrival in zip(workload.requests, workload.arrivals, strict=True):
                if turn:
                    await turn.acquire()
                if (early := begun + arrival - time.perf_counter()) > 0:
                    await asyncio.sleep(early)
                if run.gone:
                    break
                tasks.add(asyncio.create_task(one(request)))
            await asyncio.gather(*tasks)
        except asyncio.CancelledError:
            if not run.gone:
                raise
        finally:
            run.duration = time.perf_counter() - begun
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
        return run

    async def _send(self, model: str, request: Request, run: RowRun, begun: float) -> Outcome:
        outcome = Outcome(request.index, request.prompt_len, request.output_len)
        body = {
            "model": model,
            "prompt": request.prompt,
            "temperature": 0.0,
            "max_tokens": request.output_len,
            "stream": True,
            "stream_options": {"include_usage": True},
            "ignore_eos": True,
        }
        timeline = run.timeline
        started = time.perf_counter()
        outcome.started = started - begun
        timeline.opened(outcome.started)
        try:
            async with self._http.post(f"{self._url}/v1/completions", json=body) as answer:
                if answer.status == 200:
                    await self._read(answer, outcome, timeline, started, begun)
                else:
                    outcome.error = f"HTTP {answer.status} {_first_line(await answer.text())}".strip()
        except _NETWORK_ERRORS as error:
            outcome.error = _reason(error)
        finally:
            timeline.ended(time.perf_counter() - begun, failed=bool(outcome.error))
        return outcome

    async def _read(
        self,
        answer: aiohttp.ClientResponse,
        outcome: Outcome,
        timeline: Timeline,
        started: float,
        begun: float,
    ) -> None:
        # The loop that decides how much load one core can make: one clock read and one bin per read of the
        # socket, and the common event costs one JSON parse.
        clock, parse = time.perf_counter, json.loads
        last_text = started
        rest = b""
        done = False
        async for data in answer.content.iter_any():
            now = clock()
            events = 0
            lines = (rest + data).split(b"\n")
            rest = lines.pop()
            for line in lines:
                if not line.startswith(b"data:"):
                    continue
                payload = line[5:].strip()
                if payload == b"[DONE]":
                    done = True
                    continue
                try:
                    event = parse(payload)
                    choices = event.get("choices")
                    if choices:
                        choice = choices[0]
                        if choice.get("text"):
                            if outcome.ttft is None:
                                outcome.ttft = now - started
                            else:
                                outcome.itl.append(now - last_text)
                            last_text = now
                            events += 1
                        elif not choice.get("finish_reason"):
                            events += 1
                    if usage := event.get("usage"):
                        outcome.counted_prompt_tokens = usage.get("prompt_tokens")
                        outcome.counted_output_tokens = usage.get("completion_tokens")
                except (ValueError, AttributeError, TypeError, KeyError):
                    shown = _first_line(payload.decode("utf-8", "replace"))
                    outcome.error = f"not an event of a completion stream: {shown}"
                    return
                if "error" in event:
                    outcome.error = f"the stream broke off: {_error_text(event['error'])}"
                    return
            outcome.latency = now - started
            if events:
                timeline.received(now - begun, events)
        if not done:
            outcome.error = "the stream ended without [DONE]"


def _tls(endpoint: Endpoint) -> ssl.SSLContext | bool:
    if not endpoint.ca_file:
        return True
    try:
        return ssl.create_default_context(cafile=endpoint.ca_file)
    except OSError as error:
        raise UsageError(
            f"CA file {endpoint.ca_file}: {error.strerror or error}",
            remedy="Give a PEM file of certificates.",
        ) from error


def _reason(error: BaseException) -> str:
    if isinstance(error, aiohttp.ClientConnectorError):
        return f"cannot connect ({error.os_error.strerror or error.os_error})"
    if isinstance(error, aiohttp.ServerDisconnectedError):
        return "the server closed the connection before it answered"
    if isinstance(error, aiohttp.ClientPayloadError):
        return "the connection broke while the answer streamed"
    if isinstance(error, asyncio.TimeoutError):
        return "no answer in time"
    return f"{type(error).__name__}: {error}" if str(error) else type(error).__name__


def _error_text(error: Any) -> str:
    return _first_line(str(error.get("message", error) if isinstance(error, dict) else error))


def _first_line(text: str, most: int = 160) -> str:
    """What an answer says, short: the `message` of an LMDeploy error, or its first line."""
    try:
        found = json.loads(text)
        if isinstance(found, dict):
            text = str(found.get("message") or found.get("detail") or text)
    except ValueError:
        pass
    line = text.strip().splitlines()[0] if text.strip() else ""
    return line if len(line) <= most else line[: most - 1] + "…"
