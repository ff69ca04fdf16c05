"""The serving command and the launcher's files, rendered from settings.

Everything here is pure: settings and a node's place in the replica in, the content of
`/etc/deploy-dsv3/engine/{node,serve}.json` out. Roles only write the result to the host.
"""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from importlib import resources
from typing import Any, Literal

LAUNCHER_SCHEMA = 1
KEYS_FILE = "/etc/deploy-dsv3/engine/secrets/api_keys"

# Settings of role `lmdeploy` with an option of their own; 0 and "" mean LMDeploy's default.
_TYPED: Mapping[str, str] = {
    "lmdeploy_session_len": "session-len",
    "lmdeploy_max_batch_size": "max-batch-size",
    "lmdeploy_cache_max_entry_count": "cache-max-entry-count",
    "lmdeploy_max_prefill_token_num": "max-prefill-token-num",
    "lmdeploy_capture_batch_sizes": "cudagraph-capture-batch-sizes",
    "lmdeploy_log_level": "log-level",
    "lmdeploy_eager_mode": "eager-mode",
    "lmdeploy_trust_remote_code": "trust-remote-code",
}
# Options that follow from other settings.
_SETTINGS: Mapping[str, str] = {
    "model-path": "model_weights_path",
    "tp": "lmdeploy_tp",
    "model-name": "lmdeploy_model_name",
    "server-name": "endpoint_address",
    "server-port": "lmdeploy_server_port",
    "api-keys": "endpoint_api_keys",
    "ssl": "endpoint_tls_certificate_path",
    **{option: setting for setting, option in _TYPED.items()},
}
# Options that would break the layout or a promise, with the reason.
_REFUSED: Mapping[str, str] = {
    "backend": "is always pytorch: DeepSeek-V3 runs on no other engine",
    "distributed-executor-backend": "is always ray: the launcher forms the cluster",
    "dp": "belongs to another layout than tensor parallelism, the only one so far",
    "ep": "belongs to another layout than tensor parallelism, the only one so far",
    "nnodes": "has no effect on tensor parallelism over Ray",
    "node-rank": "has no effect on tensor parallelism over Ray",
    "role": "belongs to another layout than tensor parallelism, the only one so far",
    "allow-terminate-by-client": "would let any client stop the service",
    "max-concurrent-requests": "also throttles /health, so that a busy engine would look dead",
}

Kind = Literal["flag", "value", "values"]


@dataclass(frozen=True, kw_only=True)
class Option:
    """One option of `lmdeploy serve api_server`, as LMDeploy's own parser declares it.

    `name` without dashes; `kind` says how many values follow; `choices` is empty where any value goes;
    `type` is the parser's own conversion (``int``, ``float``, ``str``, ``json`` or another callable's name).
    """

    name: str
    kind: Kind
    type: str
    choices: tuple[str, ...]


def options_file() -> str:
    """The options of LMDeploy's parser as JSON: a list of arguments to ``add_argument``, with `names`.

    Source: LMDeploy 0.18.0's parser itself; `tests/contract` compares the two.
    """
    return resources.files("deploy_dsv3").joinpath("data/lmdeploy-options.json").read_text(encoding="utf-8")


@cache
def known_options() -> Mapping[str, Option]:
    """The options of the newest LMDeploy that this version knows, by name."""
    return {
        entry["names"][0].removeprefix("--"): Option(
            name=entry["names"][0].removeprefix("--"),
            kind=_kind_of(entry),
            type=entry.get("type", ""),
            choices=tuple(str(choice) for choice in entry.get("choices", ()) if choice is not None),
        )
        for entry in json.loads(options_file())
        if entry["names"][0].startswith("--")
    }


def _kind_of(entry: Mapping[str, Any]) -> Kind:
    if entry.get("action") == "store_true":
        return "flag"
    return "values" if "nargs" in entry else "value"


def option_problems(options: Mapping[str, Any]) -> list[str]:
    """What is wrong with `lmdeploy_options`: the ends of sentences that begin with its name."""
    problems = []
    known = known_options()
    for key, value in options.items():
        name = _dashed(key)
        if name in _SETTINGS:
            problems.append(f"has {key!r}, which is the setting {_SETTINGS[name]}")
        elif name in _REFUSED:
            problems.append(f"has {key!r}, which {_REFUSED[name]}")
        elif name not in known:
            near = difflib.get_close_matches(name, known, n=1, cutoff=0.6)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            problems.append(f"has {key!r}, which is no option of `lmdeploy serve api_server`{hint}")
        elif wrong := _value_problem(known[name], value):
            problems.append(f"has {key!r}: {value!r}, and --{name} {wrong}")
    return problems


def _value_problem(option: Option, value: Any) -> str:
    if option.kind == "flag":
        return "" if isinstance(value, bool) else "is a flag: it takes true or false"
    if option.type == "json":
        return "" if isinstance(value, dict | str) else "takes a mapping"
    several = option.kind == "values" and isinstance(value, list)
    return next((wrong for one in (value if several else [value]) if (wrong := _item_problem(option, one))), "")


def _item_problem(option: Option, value: Any) -> str:
    if isinstance(value, bool) or not isinstance(value, str | int | float) or "\n" in str(value):
        return "takes a text or a number"
    if option.choices and str(value) not in option.choices:
        return f"takes one of {', '.join(option.choices)}"
    if option.type == "int" and not re.fullmatch(r"-?[0-9]+", str(value)):
        return "takes a whole number"
    if option.type == "float" and not _is_number(value):
        return "takes a number"
    return ""


def _is_number(value: Any) -> bool:
    try:
        float(str(value))
    except ValueError:
        return False
    return True


def _dashed(key: Any) -> str:
    return str(key).lstrip("-").replace("_", "-")


def serve_argv(settings: Mapping[str, Any], *, tp: int) -> list[str]:
    """The serving command of a replica: ``["lmdeploy", "serve", "api_server", MODEL, …]``.

    `settings` holds every public setting by name. Keys are never part of it (see `serve_file`).
    """
    direct = settings["endpoint_mode"] == "direct"
    argv = [
        *("lmdeploy", "serve", "api_server", str(settings["model_weights_path"])),
        *("--backend", "pytorch"),
        # Even one GPU goes through Ray, so that a replica is one thing whatever its size.
        *("--distributed-executor-backend", "ray"),
        *("--tp", str(tp)),
        *("--model-name", served_model(settings)),
        *("--server-name", "0.0.0.0" if direct else "127.0.0.1"),
        *("--server-port", str(settings["lmdeploy_server_port"])),
    ]
    for setting, option in _TYPED.items():
        value = settings[setting]
        if value not in (0, "", []):
            argv += _render(option, value)
    for key, value in settings["lmdeploy_options"].items():
        argv += _render(_dashed(key), value)
    return argv


def _render(name: str, value: Any) -> list[str]:
    if value is True:
        return [f"--{name}"]
    if value is False:
        return []
    if isinstance(value, list):
        return [f"--{name}", *(str(one) for one in value)]
    if isinstance(value, dict):
        return [f"--{name}", json.dumps(value)]
    return [f"--{name}", str(value)]


def served_model(settings: Mapping[str, Any]) -> str:
    """The name that clients ask for."""
    return str(settings["lmdeploy_model_name"] or settings["model_weights_name"])


def serve_file(settings: Mapping[str, Any], *, tp: int) -> dict[str, Any]:
    """Content of serve.json: the command, where it listens, and which file holds the keys (``""``: none)."""
    direct = settings["endpoint_mode"] == "direct"
    return {
        "schema": LAUNCHER_SCHEMA,
        "argv": serve_argv(settings, tp=tp),
        "server": {"address": "127.0.0.1", "port": settings["lmdeploy_server_port"]},
        "model_name": served_model(settings),
        "api_keys_file": KEYS_FILE if direct and settings["endpoint_api_keys"] else "",
    }


_RAY_PORTS: Sequence[str] = (
    "port",
    "node_manager_port",
    "object_manager_port",
    "runtime_env_agent_port",
    "dashboard_agent_grpc_port",
    "dashboard_agent_listen_port",
    "metrics_export_port",
    "dashboard_port",
    "client_server_port",
    "min_worker_port",
    "max_worker_port",
)


def node_file(
    settings: Mapping[str, Any],
    *,
    replica: str,
    role: str,
    address: str,
    head_address: str,
    gpus: int,
    expected: Mapping[str, int],
) -> dict[str, Any]:
    """Content of node.json: what the launcher of one host needs to know. Seconds and bytes throughout."""
    return {
        "schema": LAUNCHER_SCHEMA,
        "replica": replica,
        "role": role,
        "node_address": address,
        "head_address": head_address,
        "ray": {
            **{name: settings[f"ray_cluster_{name}"] for name in _RAY_PORTS},
            "object_store_memory_bytes": settings["ray_cluster_object_store_memory_bytes"],
            "num_gpus": gpus,
        },
        "expected": dict(expected),
        "timeouts": {
            "join_s": settings["ray_cluster_join_timeout_s"],
            "load_s": settings["lmdeploy_load_timeout_s"],
            "unhealthy_s": settings["engine_unhealthy_timeout_s"],
            "canary_interval_s": settings["engine_canary_interval_s"],
            "canary_timeout_s": settings["engine_canary_timeout_s"],
        },
    }
