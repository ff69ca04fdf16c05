"""`lmdeploy` on the command line: the options of the real command, from a table made from its own parser.

The table is the product's own (data/lmdeploy-options.json; tests/contract checks it); the recipe lays a copy beside
this file.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import re
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from . import IMITATES, __version__

_NOTICE = (
    f"lmdeploy {__version__}: a STAND-IN of the deploy-dsv3 lab, not LMDeploy {IMITATES}. It pretends to generate."
)
_DEFAULT_PORT = 23333
_IN_IMAGE = Path(__file__).parent / "options.json"
_OPTIONS = _IN_IMAGE if _IN_IMAGE.exists() else Path(__file__).parents[3] / "data" / "lmdeploy-options.json"
# lmdeploy.messages.QuantPolicy
_QUANT_POLICIES = {
    "none": 0,
    "int4": 4,
    "int8": 8,
    "fp8": 16,
    "fp8_e4m3": 16,
    "fp8_e5m2": 17,
    "turbo_quant": 42,
}


def _quant_policy(text: str) -> int:
    known = _QUANT_POLICIES.get(text.lower())
    value = int(text) if known is None else known
    if value not in _QUANT_POLICIES.values():
        raise ValueError(f"invalid quant_policy: {text!r}")
    return value


# Read by lmdeploy/pytorch/envs.py when it is imported: anything but these words stops the engine there.
_BOOLEANS = (
    "LMDEPLOY_RANDOM_LOAD_WEIGHT",
    "LMDEPLOY_RAY_NSYS_ENABLE",
    "LMDEPLOY_PROFILE_CPU",
    "LMDEPLOY_PROFILE_CUDA",
    "LMDEPLOY_RAY_TIMELINE_ENABLE",
    "LMDEPLOY_ENABLE_REQUEST_CACHE_USAGE_METRIC",
    "LMDEPLOY_ENABLE_CHECK_ENV",
    "LMDEPLOY_SKIP_WARMUP",
    "LMDEPLOY_ENABLE_FLASHINFER_ALLREDUCE",
    "LMDEPLOY_ENABLE_SYMM_MEM_ALLREDUCE",
    "LMDEPLOY_ENABLE_SYMM_MEM_LMHEAD",
)
_WORDS = ("true", "1", "yes", "on", "false", "0", "no", "off")

_TYPES: dict[str, Callable[[str], Any]] = {
    "str": str,
    "int": int,
    "float": float,
    "json": json.loads,
    "quant_policy": _quant_policy,
}


class _DashedParser(argparse.ArgumentParser):
    """Takes underscores for dashes in option names, as LMDeploy's parser does."""

    def parse_args(self, args: Any = None, namespace: Any = None) -> Any:
        words = sys.argv[1:] if args is None else list(args)
        return super().parse_args(
            [re.sub(r"^--[^.=]*", lambda m: m[0].replace("_", "-"), word) for word in words], namespace
        )


def build_parser() -> argparse.ArgumentParser:
    """Return the parser for `lmdeploy serve api_server` and `lmdeploy --version`."""
    parser = _DashedParser(prog="lmdeploy", description=_NOTICE)
    parser.add_argument("-v", "--version", action="version", version=__version__)
    commands = parser.add_subparsers(title="Commands", dest="command")
    serve = commands.add_parser("serve", help="Serve LLMs with openai API")
    api_server = serve.add_subparsers(title="Commands").add_parser("api_server", description=_NOTICE)
    for option in json.loads(_OPTIONS.read_text()):
        names = option.pop("names")
        if kind := option.pop("type", None):
            option["type"] = _TYPES[kind]
        api_server.add_argument(*names, **option)
    api_server.set_defaults(run=serve_api)
    return parser


def run(argv: Sequence[str] | None = None) -> None:
    """Run the command line."""
    arguments = build_parser().parse_args(argv)
    if hasattr(arguments, "run"):
        arguments.run(arguments)
    else:
        build_parser().print_help()


def serve_api(arguments: argparse.Namespace) -> None:
    """Start the ranks, let them load, then open the port: refused connections mean loading or dead."""
    logging.basicConfig(
        level=logging.DEBUG if arguments.log_level == "NOTSET" else arguments.log_level,
        format="%(asctime)s - lmdeploy - %(levelname)s - %(filename)s:%(lineno)d - %(message)s",
    )
    print(_NOTICE, flush=True)
    _check_environment()
    time.sleep(float(os.environ.get("STANDIN_START_SECONDS", "0")))

    import prometheus_client
    import uvicorn

    from . import engine, executors, server
    from .metrics import Metrics

    if arguments.dp > 1:
        raise SystemExit("The stand-in serves one replica (dp 1) only.")
    name = arguments.model_name or arguments.model_path
    executor = executors.choose(arguments.model_path, arguments.tp, arguments.distributed_executor_backend)
    executor.load()
    registry = prometheus_client.REGISTRY
    ready = engine.Engine(
        executor,
        context=engine.context_length(arguments.model_path, arguments.session_len),
        max_batch=arguments.max_batch_size or engine.DEFAULT_BATCH,
        metrics=Metrics(name, registry),
    )
    options = server.Options(
        model_name=name,
        api_keys=tuple(key for key in arguments.api_keys or () if key),
        docs=not arguments.disable_fastapi_docs,
        metrics=not arguments.disable_metrics,
        allow_terminate=arguments.allow_terminate_by_client,
        allow_abort=arguments.enable_abort_handling,
    )
    uvicorn.run(
        server.create_app(ready, options, registry),
        host=arguments.server_name,
        port=arguments.server_port if arguments.server_port is not None else _DEFAULT_PORT,
        log_level=os.environ.get("UVICORN_LOG_LEVEL", "info").lower(),
        timeout_keep_alive=int(os.environ.get("UVICORN_TIMEOUT_KEEP_ALIVE", "5")),
    )


def _check_environment() -> None:
    for name in _BOOLEANS:
        value = os.environ.get(name)
        if value is not None and value.lower().strip() not in _WORDS:
            raise ValueError(f"Cannot convert environment variable '{name}={value}' to boolean.")
