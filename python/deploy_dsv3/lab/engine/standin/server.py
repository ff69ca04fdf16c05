"""The HTTP interface of LMDeploy's api_server, in front of the pretended engine.

Routes, bodies and errors are those recorded from the real server (tests/contract); what is not simulated
says so with status 501. FastAPI and Starlette are the real server's too, so their own answers (404, 405,
CORS) come by themselves.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import os
import re
import secrets
import signal
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

import prometheus_client
from fastapi import Depends, FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.middleware.cors import CORSMiddleware
from fastapi.responses import JSONResponse, Response, StreamingResponse
from starlette.datastructures import Headers
from starlette.routing import Mount
from starlette.types import ASGIApp, Receive, Scope, Send

from .engine import Engine, EngineDead, Sampling, Step, tokenize, tokenize_chat
from .protocol import (
    AbortRequest,
    ChatRequest,
    CompletionRequest,
    GenerateRequest,
    StreamOptions,
    model_list,
    random_id,
    usage,
)

_ERROR_TYPES = {401: "authentication_error", 404: "not_found_error", 500: "server_error", 503: "server_error"}
_OPEN_PREFIXES = ("/health", "/docs", "/redoc", "/nodes")
_GENERATING = {
    "/v1/chat/completions",
    "/v1/completions",
    "/v1/responses",
    "/v1/messages",
    "/generate",
}
_NOT_SIMULATED = (
    "GET /anthropic/v1/models",
    "GET /distserve/engine_info",
    "GET /update_weights_from_ipc",
    "POST /destroy_weights_update_group",
    "POST /distserve/free_cache",
    "POST /distserve/p2p_connect",
    "POST /distserve/p2p_drop_connect",
    "POST /distserve/p2p_initialize",
    "POST /get_ppl",
    "POST /init_weights_update_group",
    "POST /pooling",
    "POST /update_weights",
    "POST /update_weights_from_distributed",
    "POST /update_weights_from_ipc",
    "POST /v1/embeddings",
    "POST /v1/encode",
    "POST /v1/messages",
    "POST /v1/messages/count_tokens",
    "POST /v1/responses",
)


@dataclass(frozen=True, kw_only=True)
class Options:
    """What the command line says about the HTTP interface."""

    model_name: str
    api_keys: tuple[str, ...] = ()
    docs: bool = True
    metrics: bool = True
    allow_terminate: bool = False
    allow_abort: bool = False


def error(status: int, message: str) -> JSONResponse:
    """An error as the real server words it."""
    kind = _ERROR_TYPES.get(status, "invalid_request_error")
    body = {"message": message, "type": kind, "code": status, "param": None, "object": "error"}
    return JSONResponse(body, status_code=status)


def create_app(engine: Engine, options: Options, registry: prometheus_client.CollectorRegistry) -> FastAPI:
    """Build the application around an engine that has loaded."""
    health = {"status": "initializing", "message": "Engine health monitor is starting."}

    async def monitor() -> None:
        while True:
            health["status"], health["message"] = engine.health()
            await asyncio.sleep(1)

    @asynccontextmanager
    async def lifespan(_app: FastAPI) -> AsyncIterator[None]:
        engine.start()
        task = asyncio.create_task(monitor())
        yield
        task.cancel()
        await engine.stop()

    documented: dict[str, Any] = (
        {"docs_url": "/"} if options.docs else dict.fromkeys(("docs_url", "redoc_url", "openapi_url"))
    )
    app = FastAPI(lifespan=lifespan, **documented)

    @app.get("/health")
    async def get_health() -> JSONResponse:
        if health["status"] == "unhealthy":
            health["status"], health["message"] = engine.health()
        return JSONResponse(health, status_code=200 if health["status"] in ("healthy", "sleeping") else 503)

    @app.get("/v1/models")
    def models() -> dict[str, Any]:
        return model_list(options.model_name, int(time.time()))

    _add_management(app, engine, options)
    _add_generation(app, engine, options)
    for route in _NOT_SIMULATED:
        method, path = route.split()
        app.add_api_route(path, _not_simulated(path), methods=[method])
    app.add_exception_handler(RequestValidationError, _on_invalid)
    app.add_exception_handler(EngineDead, _on_dead)
    if options.metrics:
        mounted = Mount("/metrics", prometheus_client.make_asgi_app(registry=registry))
        # As the real server: without this /metrics redirects to /metrics/.
        mounted.path_regex = re.compile("^/metrics(?P<path>.*)$")
        app.routes.append(mounted)
    app.add_middleware(
        CORSMiddleware, allow_origins=["*"], allow_credentials=True, allow_methods=["*"], allow_headers=["*"]
    )
    if options.api_keys:
        app.add_middleware(_KeyCheck, keys=options.api_keys)
    app.add_middleware(_SleepCheck, engine=engine)
    return app


def _add_management(app: FastAPI, engine: Engine, options: Options) -> None:
    @app.get("/terminate")
    async def terminate() -> Response:
        if not options.allow_terminate:
            return error(
                400,
                "The server can not be terminated. Please add --allow-terminate-by-client when start the server.",
            )
        os.kill(os.getpid(), signal.SIGTERM)
        return Response(status_code=200)

    @app.post("/sleep", dependencies=[Depends(_require_json)])
    async def sleep() -> Response:
        engine.sleeping = {"weights", "kv_cache"}
        return Response(status_code=200)

    @app.post("/wakeup", dependencies=[Depends(_require_json)])
    async def wakeup(request: Request) -> Response:
        tags = request.query_params.getlist("tags")
        engine.sleeping = engine.sleeping - set(tags) if tags else set()
        return Response(status_code=200)

    @app.get("/is_sleeping")
    async def is_sleeping() -> dict[str, bool]:
        return {"is_sleeping": bool(engine.sleeping)}

    @app.post("/abort_request")
    async def abort_request(body: AbortRequest) -> Response:
        if not options.allow_abort:
            text = "This server does not support abort requests. Enable with --enable-abort-handling flag."
            return Response(text, status_code=501)
        if not body.abort_all:
            return error(400, f"Session {body.session_id} not found.")
        return Response(status_code=200)


def _add_generation(app: FastAPI, engine: Engine, options: Options) -> None:
    def refuse(model: str | None, fault: str, prompt_lengths: list[int]) -> Response | None:
        if model is not None and model != options.model_name:
            return error(404, f"The model {model!r} does not exist.")
        if fault:
            return error(400, fault)
        for length in prompt_lengths:
            if length >= engine.context:
                return error(
                    400,
                    f"Input length ({length}) must be smaller than the model context length ({engine.context}).",
                )
        return None

    @app.post("/v1/chat/completions", dependencies=[Depends(_require_json)])
    async def chat(body: ChatRequest) -> Any:
        prompt = tokenize_chat(body.messages)
        if refusal := refuse(body.model, body.fault(), [len(prompt)]):
            return refusal
        sampling = _sampling(body, body.max_completion_tokens or body.max_tokens)
        head = {"id": f"chatcmpl-{random_id()}", "created": int(time.time()), "model": body.model}
        if body.stream:

            def chat_chunk(step: Step) -> dict[str, Any]:
                return {"delta": {"role": "assistant", "content": step.text}}

            return _stream(
                {**_named(head, "chat.completion.chunk")},
                [(len(prompt), engine.generate(prompt, sampling))],
                chat_chunk,
                body.stream_options,
                cached=True,
            )
        text, tokens, reason = await _collect(engine.generate(prompt, sampling))
        choice = {
            "index": 0,
            "message": {"role": "assistant", "content": text, "reasoning_content": None, "tool_calls": None},
            "logprobs": None,
            "output_token_logprobs": None,
            "finish_reason": reason,
            "output_ids": None,
            "routed_experts": None,
        }
        return {
            **_named(head, "chat.completion"),
            "choices": [choice],
            "usage": usage(len(prompt), len(tokens), cached=True),
            "service_tier": None,
        }

    @app.post("/v1/completions", dependencies=[Depends(_require_json)])
    async def completions(body: CompletionRequest) -> Any:
        texts = body.prompt if isinstance(body.prompt, list) else [body.prompt]
        prompts = [tokenize(text) if isinstance(text, str) else list(text) for text in texts]
        if refusal := refuse(body.model, body.fault(), [len(prompt) for prompt in prompts]):
            return refusal
        sampling = _sampling(body, body.max_completion_tokens or body.max_tokens)
        head = _named({"id": "-1", "created": int(time.time()), "model": body.model}, "text_completion")
        runs = [(len(prompt), engine.generate(prompt, sampling)) for prompt in prompts]
        if body.stream:
            return _stream(head, runs, lambda step: {"text": step.text}, body.stream_options, cached=False)
        done = await asyncio.gather(*[_collect(steps) for _, steps in runs])
        choices = [
            {"index": index, "text": text, "logprobs": None, "finish_reason": reason}
            for index, (text, _, reason) in enumerate(done)
        ]
        lengths = sum(map(len, prompts)), sum(len(tokens) for _, tokens, _ in done)
        return {**head, "choices": choices, "usage": usage(*lengths, cached=False)}

    @app.post("/generate", dependencies=[Depends(_require_json)])
    async def generate(body: GenerateRequest) -> Any:
        prompt = tokenize(body.prompt) if body.prompt is not None else list(body.input_ids or ())
        if refusal := refuse(None, body.fault(), [len(prompt)]):
            return refusal
        steps = engine.generate(prompt, _sampling(body, body.max_tokens))

        def answer(text: str, tokens: list[int], produced: int, reason: str | None) -> dict[str, Any]:
            meta = {
                "prompt_tokens": len(prompt),
                "completion_tokens": produced,
                "finish_reason": {"type": reason} if reason else None,
                "output_token_logprobs": None,
                "input_token_logprobs": None,
                "output_top_logprobs": None,
                "input_top_logprobs": None,
                "routed_experts": None,
            }
            return {"text": text, "output_ids": tokens, "meta_info": meta}

        if not body.stream:
            text, tokens, reason = await _collect(steps)
            return answer(text, tokens, len(tokens), reason)

        async def events() -> AsyncIterator[str]:
            produced = 0
            async for step in steps:
                tokens = [] if step.token is None else [step.token]
                produced += len(tokens)
                yield _event(answer(step.text, tokens, produced, step.finish_reason), compact=True)
            yield "data: [DONE]\n\n"

        return StreamingResponse(events(), media_type="text/event-stream")


def _named(head: dict[str, Any], kind: str) -> dict[str, Any]:
    return {"id": head["id"], "object": kind, "created": head["created"], "model": head["model"]}


def _sampling(body: ChatRequest | CompletionRequest | GenerateRequest, max_tokens: int | None) -> Sampling:
    return Sampling(
        max_tokens=max_tokens,
        temperature=body.temperature,
        seed=body.seed,
        ignore_eos=bool(body.ignore_eos),
        stop=body.stop_words(),
    )


async def _collect(steps: AsyncIterator[Step]) -> tuple[str, list[int], str]:
    text, tokens, reason = "", [], ""
    async for step in steps:
        text += step.text
        if step.token is not None:
            tokens.append(step.token)
        reason = step.finish_reason or reason
    return text, tokens, reason


def _event(data: dict[str, Any], *, compact: bool = False) -> str:
    separators = (",", ":") if compact else None
    return f"data: {json.dumps(data, separators=separators)}\n\n"


def _stream(
    head: dict[str, Any],
    runs: list[tuple[int, AsyncIterator[Step]]],
    part: Callable[[Step], dict[str, Any]],
    options: StreamOptions | None,
    *,
    cached: bool,
) -> StreamingResponse:
    counted = bool(options and options.include_usage)

    async def events() -> AsyncIterator[str]:
        prompt_tokens = produced = 0
        try:
            for length, steps in runs:
                prompt_tokens += length
                async for step in steps:
                    produced += step.token is not None
                    choice = {"index": 0, **part(step)}
                    if step.finish_reason:
                        choice["finish_reason"] = step.finish_reason
                    chunk = {**head, "choices": [choice]}
                    yield _event({**chunk, "usage": None} if counted else chunk)
        except EngineDead:
            yield _event({"error": json.loads(bytes(_dead().body))})
            counts = False
        else:
            counts = counted
        if counts:
            total = {
                key: value for key, value in usage(prompt_tokens, produced, cached=cached).items() if value is not None
            }
            yield _event({**head, "choices": [], "usage": total}, compact=cached)
        yield "data: [DONE]\n\n"

    return StreamingResponse(events(), media_type="text/event-stream")


def _require_json(request: Request) -> None:
    if request.headers.get("content-type", "").lower().split(";", 1)[0] != "application/json":
        raise RequestValidationError(errors=["Unsupported Media Type: Only 'application/json' is allowed"])


def _dead() -> JSONResponse:
    return error(500, "An internal server error occurred.")


async def _on_dead(_request: Request, _fault: Exception) -> JSONResponse:
    return _dead()


async def _on_invalid(_request: Request, fault: Exception) -> JSONResponse:
    assert isinstance(fault, RequestValidationError)
    first: Any = next(iter(fault.errors()), {})
    if not isinstance(first, dict):
        first = {"msg": str(first)}
    place = ".".join(str(part) for part in first.get("loc", ()) if part != "body")
    detail = first.get("msg", "Invalid request body.")
    return error(400, f"{place}: {detail}" if place else detail)


def _not_simulated(path: str) -> Callable[[], JSONResponse]:
    def answer() -> JSONResponse:
        return error(501, f"The stand-in engine does not simulate {path}.")

    return answer


class _KeyCheck:
    """Bearer keys, checked before anything else as the real middleware does."""

    def __init__(self, app: ASGIApp, keys: tuple[str, ...]) -> None:
        self._app = app
        self._digests = [hashlib.sha256(key.encode()).digest() for key in keys]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and scope["method"] != "OPTIONS" and not scope["path"].startswith(_OPEN_PREFIXES):
            scheme, _, key = Headers(scope=scope).get("authorization", "").partition(" ")
            digest = hashlib.sha256(key.encode()).digest()
            if scheme.lower() != "bearer" or not any(secrets.compare_digest(digest, known) for known in self._digests):
                await error(401, "Unauthorized.")(scope, receive, send)
                return
        await self._app(scope, receive, send)


class _SleepCheck:
    """No generation while the engine is put to sleep."""

    def __init__(self, app: ASGIApp, engine: Engine) -> None:
        self._app, self._engine = app, engine

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if (
            scope["type"] == "http"
            and scope["method"] == "POST"
            and scope["path"] in _GENERATING
            and self._engine.sleeping
        ):
            text = "Engine is sleeping; call POST /wakeup before inference (e.g. tags=weights&tags=kv_cache)."
            await error(503, text)(scope, receive, send)
            return
        await self._app(scope, receive, send)
