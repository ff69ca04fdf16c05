#!/usr/bin/env python3
"""Supervise Ray and LMDeploy's api_server inside the engine container.

The container's only supervised process (`launcher.py run`, below docker-init). On every node it keeps `ray
start --block` up; on the head it also waits until the whole replica is there, starts api_server, proves it
with a one-token completion and keeps proving it. What it reports in status.json was observed, never
assumed.

Recovery is always the same, because a tensor-parallel group cannot be repaired in part (NCCL communicators
do not heal, and LMDeploy's own collective timeout is effectively infinite):

- a rank, GPU or worker is lost, or api_server is dead or unhealthy: stop api_server, wait until every
  expected GPU is alive again exactly once, start api_server anew;
- the head is lost or replaced: a worker ends its Ray and exits with 1. Docker starts the container again,
  and the launcher then waits for the head and joins. The head's own Ray ending is handled in the same way.

Standard library only and Python >= 3.10, which LMDeploy's images up to 0.12 have: the file is mounted as it
is. Ray is imported in child processes alone (`watch`), so that a crash in Ray's bindings never takes the
supervisor with it.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import http.client
import importlib.metadata
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import IO, Any, NoReturn

CONFIG_DIR = Path("/etc/deploy-dsv3/engine")
STATE_DIR = Path("/var/lib/deploy-dsv3/state")
SCHEMA = 1

TICK_S = 0.5  # how quickly a signal or the end of a child is noticed
HEARTBEAT_S = 10.0  # how often status.json is rewritten although nothing changed
WATCH_INTERVAL_S = 2.0
STALE_AFTER_S = 20.0  # no word from the cluster for so long: what was seen last no longer counts
REFUSED_AFTER_S = 3.0  # a GCS that refuses connections is gone for good: it keeps nothing on disk
ABSENT_AFTER_S = 5.0
HEALTH_INTERVAL_S = 5.0
ENGINE_GRACE_S = 5.0  # with RAY_GRACE_S below Docker's default 10 s before SIGKILL
LOST_GRACE_S = 2.0  # peers are gone: an orderly end would only hang in a collective
RAY_GRACE_S = 3.0
RANK_GRACE_S = 10.0  # time for api_server to say itself why a rank died
LEFTOVER_RANKS_S = 30.0  # ranks of the last run still hold GPU memory
FIRST_DELAY_S = 5.0
LONGEST_DELAY_S = 300.0
STABLE_AFTER_S = 600.0  # served for so long: the next failure is the first again
KEPT_SESSIONS = 3

PHASES = (
    "starting",
    "waiting-for-head",
    "ray-up",
    "waiting-for-gpus",
    "waiting-for-serve",
    "loading",
    "serving",
    "degraded",
    "stopping",
)

# Defaults for every process of ours; the container's environment wins.
RAY_ENVIRONMENT = {
    # Ray 2.60 drains for 30 s on SIGTERM: longer than a whole restart takes.
    "RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S": "0",
    "RAY_USAGE_STATS_ENABLED": "0",
    # Ray's own logs lie in the container's writable layer: 5 x 512 MB a process is too much there.
    "RAY_ROTATION_MAX_BYTES": "67108864",
    "RAY_ROTATION_BACKUP_COUNT": "2",
    # Ray's monitor serves its metrics on every interface, without the token; it goes on when it cannot.
    "AUTOSCALER_METRIC_PORT": "-1",
}
# A raylet looks for a lost GCS for 60 s; on a worker the launcher has noticed long before.
WORKER_ENVIRONMENT = {"RAY_gcs_rpc_server_reconnect_timeout_s": "20"}
# LMDeploy's Ray actor, one per rank.
RANK_CLASS = "RayWorkerWrapper"


class ConfigError(Exception):
    """A file the launcher was given is missing or wrong; the message names file and key."""


# ------------------------------------------------------------------------------------------------------
# Configuration


class Section:
    """Typed access to one JSON object; every error names the file and the full key."""

    def __init__(self, source: str, data: object, prefix: str = "") -> None:
        if not isinstance(data, dict):
            raise ConfigError(
                f"{source}: {prefix.rstrip('.') or 'the document'}: expected an object, found {_kind(data)}"
            )
        self._source, self._data, self._prefix = source, data, prefix

    def section(self, key: str) -> Section:
        return Section(self._source, self._get(key), f"{self._prefix}{key}.")

    def text(self, key: str, choices: Sequence[str] = (), *, empty: bool = False) -> str:
        value = self._get(key)
        if not isinstance(value, str) or (not value and not empty):
            raise self._wrong(key, "a text" if empty else "a text that is not empty", value)
        if choices and value not in choices:
            raise self._wrong(key, f"one of {', '.join(choices)}", value)
        return value

    def integer(self, key: str, low: int, high: int = 2**63) -> int:
        value = self._get(key)
        if not isinstance(value, int) or isinstance(value, bool) or not low <= value <= high:
            bounds = f"{low} to {high}" if high < 2**63 else f"{low} or more"
            raise self._wrong(key, f"a whole number, {bounds}", value)
        return value

    def seconds(self, key: str) -> float:
        value = self._get(key)
        if not isinstance(value, int | float) or isinstance(value, bool) or value <= 0:
            raise self._wrong(key, "seconds, more than 0", value)
        return float(value)

    def texts(self, key: str) -> tuple[str, ...]:
        value = self._get(key)
        if not isinstance(value, list) or not value or not all(isinstance(item, str) for item in value):
            raise self._wrong(key, "a list of texts that is not empty", value)
        return tuple(value)

    def _get(self, key: str) -> object:
        if key not in self._data:
            raise ConfigError(f"{self._source}: {self._prefix}{key}: missing")
        return self._data[key]

    def _wrong(self, key: str, expected: str, found: object) -> ConfigError:
        return ConfigError(
            f"{self._source}: {self._prefix}{key}: expected {expected}, found {_kind(found)} {json.dumps(found)}"
        )


def _kind(value: object) -> str:
    names = {
        dict: "an object",
        list: "a list",
        str: "text",
        bool: "a boolean",
        int: "number",
        float: "number",
    }
    return "nothing" if value is None else names.get(type(value), type(value).__name__)


@dataclass(frozen=True, kw_only=True)
class RayPorts:
    port: int
    node_manager_port: int
    object_manager_port: int
    runtime_env_agent_port: int
    dashboard_agent_grpc_port: int
    dashboard_agent_listen_port: int
    metrics_export_port: int
    dashboard_port: int
    min_worker_port: int
    max_worker_port: int
    client_server_port: int


@dataclass(frozen=True, kw_only=True)
class Node:
    """node.json: this node's place in its replica. Times in seconds, memory in bytes (0: Ray decides)."""

    replica: str
    role: str
    node_address: str
    head_address: str
    ports: RayPorts
    object_store_memory_bytes: int
    num_gpus: int
    expected_nodes: int
    expected_gpus: int
    join_s: float
    load_s: float
    unhealthy_s: float
    canary_interval_s: float
    canary_timeout_s: float

    @property
    def head(self) -> str:
        """HOST:PORT of the head's GCS."""
        return f"{self.head_address}:{self.ports.port}"


@dataclass(frozen=True, kw_only=True)
class Serve:
    """serve.json: what the head runs.

    `fingerprint` changes with the file and with the key file; `digest` is the file's own SHA-256, which
    status.json repeats, so that whoever wrote the file can see that it is the one being served.
    """

    argv: tuple[str, ...]
    address: str
    port: int
    model_name: str
    api_keys_file: str
    fingerprint: str
    digest: str


def load_node(path: Path) -> Node:
    """Read node.json; ConfigError names file and key."""
    top = _document(path, _read(path))
    ray, expected, times = top.section("ray"), top.section("expected"), top.section("timeouts")
    ports = RayPorts(**{name: ray.integer(name, 1, 65535) for name in RayPorts.__dataclass_fields__})
    if ports.min_worker_port > ports.max_worker_port:
        raise ConfigError(f"{path}: ray.min_worker_port: {ports.min_worker_port} is above ray.max_worker_port")
    return Node(
        replica=top.text("replica"),
        role=top.text("role", ("head", "worker")),
        node_address=top.text("node_address"),
        head_address=top.text("head_address"),
        ports=ports,
        object_store_memory_bytes=ray.integer("object_store_memory_bytes", 0),
        num_gpus=ray.integer("num_gpus", 0),
        expected_nodes=expected.integer("nodes", 1),
        expected_gpus=expected.integer("gpus", 0),
        join_s=times.seconds("join_s"),
        load_s=times.seconds("load_s"),
        unhealthy_s=times.seconds("unhealthy_s"),
        canary_interval_s=times.seconds("canary_interval_s"),
        canary_timeout_s=times.seconds("canary_timeout_s"),
    )


def load_serve(path: Path) -> Serve:
    """Read serve.json and the key file it names; ConfigError names file and key."""
    raw = _read(path)
    top = _document(path, raw)
    server = top.section("server")
    keys_file = top.text("api_keys_file", empty=True)
    argv = top.texts("argv")
    # LMDeploy's parser takes underscores and unambiguous abbreviations as well.
    if any(item.replace("_", "-").startswith("--api") for item in argv):
        raise ConfigError(f"{path}: argv: --api-keys would show in the process list; name a file in api_keys_file")
    secret = "\n".join(read_keys(Path(keys_file))) if keys_file else ""
    return Serve(
        argv=argv,
        address=server.text("address"),
        port=server.integer("port", 1, 65535),
        model_name=top.text("model_name"),
        api_keys_file=keys_file,
        fingerprint=hashlib.sha256(raw.encode() + b"\0" + secret.encode()).hexdigest(),
        digest=hashlib.sha256(raw.encode()).hexdigest(),
    )


def read_keys(path: Path) -> tuple[str, ...]:
    """Read API keys, one a line; the errors name file and line and never the key."""
    keys = []
    for number, line in enumerate(_read(path).splitlines(), 1):
        if not (key := line.strip()):
            continue
        if key.startswith("-") or any(character.isspace() for character in key):
            raise ConfigError(f"{path}: line {number}: a key must not start with '-' nor hold white space")
        keys.append(key)
    if not keys:
        raise ConfigError(f"{path}: no key in it: write one a line, or leave api_keys_file empty in serve.json")
    return tuple(keys)


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: cannot be read: {error}") from error


def _document(path: Path, raw: str) -> Section:
    try:
        top = Section(str(path), json.loads(raw))
    except json.JSONDecodeError as error:
        raise ConfigError(f"{path}: not JSON: line {error.lineno}: {error.msg}") from error
    if (schema := top.integer("schema", 1)) != SCHEMA:
        raise ConfigError(f"{path}: schema: this launcher reads {SCHEMA}, found {schema}")
    return top


# ------------------------------------------------------------------------------------------------------
# Command lines


@dataclass(frozen=True, kw_only=True)
class RayExtras:
    """What the image's Ray was installed with besides its core; LMDeploy's images have neither."""

    dashboard: bool = False
    client: bool = False


def ray_start_argv(node: Node, ray: str, extras: RayExtras) -> list[str]:
    """Return `ray start` for this node, with every port and address pinned.

    The node's address is pinned because LMDeploy's placement group asks for the resource `node:<address>`,
    which is another one on a host with several NICs. The dashboard, where the image's Ray has one, stays on
    loopback.
    """
    ports = node.ports
    if node.role == "head":
        argv = [
            ray,
            "start",
            "--head",
            f"--port={ports.port}",
            "--dashboard-host=127.0.0.1",
            f"--dashboard-port={ports.dashboard_port}",
        ]
        if not extras.dashboard:
            argv.append("--include-dashboard=false")
        if extras.client:  # a Ray without it refuses the option
            argv.append(f"--ray-client-server-port={ports.client_server_port}")
    else:
        argv = [ray, "start", f"--address={node.head}"]
    argv += [
        f"--node-ip-address={node.node_address}",
        f"--node-manager-port={ports.node_manager_port}",
        f"--object-manager-port={ports.object_manager_port}",
        f"--runtime-env-agent-port={ports.runtime_env_agent_port}",
        f"--dashboard-agent-grpc-port={ports.dashboard_agent_grpc_port}",
        f"--dashboard-agent-listen-port={ports.dashboard_agent_listen_port}",
        f"--metrics-export-port={ports.metrics_export_port}",
        f"--min-worker-port={ports.min_worker_port}",
        f"--max-worker-port={ports.max_worker_port}",
        f"--num-gpus={node.num_gpus}",
    ]
    if node.object_store_memory_bytes:
        argv.append(f"--object-store-memory={node.object_store_memory_bytes}")
    return [*argv, "--disable-usage-stats", "--block"]


def engine_argv(serve: Serve, python: str) -> list[str]:
    """Return what is executed for api_server; API keys are never part of it."""
    if not serve.api_keys_file:
        return list(serve.argv)
    return [python, str(Path(__file__).resolve()), "engine", serve.api_keys_file, "--", *serve.argv]


def find_tool(name: str) -> str:
    """Return the path of a command of the image; ConfigError when the image lacks it."""
    found = shutil.which(name)
    if not found:
        raise ConfigError(f"{name}: no such command on PATH ({os.environ.get('PATH', '')}): not an LMDeploy image?")
    return found


def interpreter_of(script: str) -> str:
    """Return the Python that a console script runs under: the launcher's own may have other packages."""
    with Path(script).open("rb") as file:
        first = file.readline(512).decode(errors="replace").strip()
    words = first.removeprefix("#!").split() if first.startswith("#!") else []
    if words and Path(words[0]).name == "env":
        words = [shutil.which(words[-1]) or ""]
    if words and "python" in Path(words[0]).name and os.access(words[0], os.X_OK):
        return words[0]
    return sys.executable


def find_extras(python: str) -> RayExtras:
    """Tell what the image's Ray was installed with: [default] brings aiohttp_cors, [client] grpc."""
    probe = (
        "from importlib.util import find_spec; "
        "print(*(find_spec(name) is not None for name in ('aiohttp_cors', 'grpc')))"
    )
    done = subprocess.run([python, "-c", probe], capture_output=True, text=True, check=False)
    words = done.stdout.split()
    return RayExtras(dashboard=words[:1] == ["True"], client=words[1:] == ["True"])


def run_with_keys(keys_file: Path, argv: Sequence[str]) -> None:
    """Run a console script in this process with `--api-keys` added to sys.argv only.

    /proc/PID/cmdline, docker inspect and Ray's job table keep what the process was started with;
    multiprocessing hands sys.argv to its children through a pipe. So no key shows anywhere.
    """
    name = Path(argv[0]).name
    entries = importlib.metadata.entry_points(group="console_scripts", name=name)
    if not entries:
        raise ConfigError(f"{name}: {sys.executable} has no such console script")
    here = str(Path(__file__).resolve().parent)
    sys.path[:] = [entry for entry in sys.path if entry != here]
    sys.argv = [*argv, "--api-keys", *read_keys(keys_file)]
    next(iter(entries)).load()()


# ------------------------------------------------------------------------------------------------------
# The cluster, as Ray tells it


@dataclass(frozen=True, kw_only=True)
class RayNode:
    address: str
    alive: bool
    gpus: int
    node_id: str

    def as_json(self) -> dict[str, object]:
        return {"address": self.address, "alive": self.alive, "gpus": self.gpus, "node_id": self.node_id}


@dataclass(frozen=True, kw_only=True)
class Cluster:
    """One look at Ray's tables. `ranks` and `dead_ranks` belong to the newest job that has any."""

    seen_at: float
    nodes: tuple[RayNode, ...] = ()
    ranks: int = 0
    ranks_since: float = 0.0
    dead_ranks: tuple[str, ...] = ()

    @property
    def alive(self) -> tuple[RayNode, ...]:
        return tuple(node for node in self.nodes if node.alive)

    @property
    def gpus(self) -> int:
        return sum(node.gpus for node in self.alive)

    def lacks(self, nodes: int, gpus: int) -> str:
        """Say what keeps the cluster from being exactly the expected one; empty when nothing does.

        A worker that was killed and is back may be listed twice, alive both times, for about 20 s (its old
        entry ends with Ray's health check): its GPUs would be counted twice and ranks placed on a node that
        is gone.
        """
        addresses = [node.address for node in self.alive]
        twice = sorted({address for address in addresses if addresses.count(address) > 1})
        if twice:
            return f"{', '.join(twice)} listed twice: Ray has not yet noticed that the former one ended"
        if len(addresses) == nodes and self.gpus == gpus:
            return ""
        seen = ", ".join(f"{node.address} ({node.gpus} GPUs)" for node in self.alive) or "none"
        return f"{len(addresses)} of {nodes} nodes and {self.gpus} of {gpus} GPUs alive: {seen}"

    def lost_since(self, before: Cluster) -> str:
        """Say which node of an earlier look is gone or was replaced; empty when none."""
        now = {node.node_id: node for node in self.alive}
        gone = [node.address for node in before.alive if node.node_id not in now]
        known = {node.node_id for node in before.alive}
        back = [node.address for node in self.alive if node.node_id not in known]
        replaced = [address for address in back if address in {node.address for node in before.alive}]
        if gone or replaced:
            return f"Ray lost {', '.join(sorted(set(gone + replaced)))}"
        return ""


def parse_cluster(line: str, now: float) -> Cluster:
    """Turn one line of `watch` into a Cluster."""
    data = json.loads(line)
    return Cluster(
        seen_at=now,
        nodes=tuple(RayNode(**node) for node in data["nodes"]),
        ranks=data["ranks"],
        ranks_since=data["ranks_since"],
        dead_ranks=tuple(data["dead_ranks"]),
    )


def watch(address: str, interval: float, *, once: bool) -> None:
    """Print one JSON line per look at the cluster. Runs in its own process, the only one that imports Ray.

    Reads the GCS tables without registering a driver. Ray aborts this process when another cluster answers
    at the address, which is how a replaced head shows first.
    """
    from ray._private.state import GlobalState  # type: ignore[import-not-found,unused-ignore]
    from ray._raylet import GcsClientOptions  # type: ignore[import-not-found,unused-ignore]

    state = GlobalState()
    state._initialize_global_state(
        GcsClientOptions.create(address, None, allow_cluster_id_nil=True, fetch_cluster_id_if_nil=False)
    )
    while True:
        nodes = [
            RayNode(
                address=node["NodeManagerAddress"],
                alive=bool(node["Alive"]),
                gpus=int((node.get("Resources") or {}).get("GPU", 0)),
                node_id=node["NodeID"],
            ).as_json()
            for node in state.node_table()
        ]
        print(json.dumps({"nodes": nodes, **summarise_ranks(state.actor_table(None).values())}), flush=True)
        if once:
            return
        time.sleep(interval)


def summarise_ranks(actors: Iterable[Mapping[str, Any]]) -> dict[str, object]:
    """Count the ranks of the newest job among Ray's actors, and say why those that died did."""
    ranks = [actor for actor in actors if str(actor["ActorClassName"]).endswith(RANK_CLASS)]
    if not ranks:
        return {"ranks": 0, "ranks_since": 0.0, "dead_ranks": []}
    newest = max(str(actor["JobID"]) for actor in ranks)
    mine = [actor for actor in ranks if actor["JobID"] == newest]
    dead = [
        f"the rank with pid {actor['Pid']} on {actor['Address']['IPAddress'] or 'an unknown node'} died"
        f"{_death_cause(actor.get('DeathCause'))}"
        for actor in mine
        if actor["State"] == "DEAD"
    ]
    return {
        "ranks": sum(actor["State"] == "ALIVE" for actor in mine),
        "ranks_since": max(float(actor["StartTime"]) for actor in mine) / 1000,
        "dead_ranks": dead,
    }


def _death_cause(cause: Any) -> str:
    message = str(getattr(getattr(cause, "actor_died_error_context", None), "error_message", "")).strip()
    return f": {message.splitlines()[0]}" if message else ""


# ------------------------------------------------------------------------------------------------------
# Is the engine well?


@dataclass(frozen=True, kw_only=True)
class Answer:
    """One HTTP exchange; `status` 0 with `error` when there was none."""

    status: int = 0
    body: str = ""
    error: str = ""
    timed_out: bool = False


def ask(serve: Serve, method: str, path: str, payload: object = None, *, timeout: float) -> Answer:
    """Send one request to api_server. http.client on purpose: proxy variables must not matter here."""
    host = "127.0.0.1" if serve.address in ("0.0.0.0", "::") else serve.address
    headers = {"Connection": "close"}
    if serve.api_keys_file:
        headers["Authorization"] = f"Bearer {read_keys(Path(serve.api_keys_file))[0]}"
    body = None
    if payload is not None:
        body, headers["Content-Type"] = json.dumps(payload), "application/json"
    connection = http.client.HTTPConnection(host, serve.port, timeout=timeout)
    try:
        connection.request(method, path, body=body, headers=headers)
        response = connection.getresponse()
        return Answer(status=response.status, body=response.read(4_000_000).decode(errors="replace"))
    except TimeoutError:
        return Answer(error=f"no answer within {timeout:g} s", timed_out=True)
    except (OSError, http.client.HTTPException) as error:
        return Answer(error=f"{type(error).__name__}: {error}")
    finally:
        connection.close()


def generated_tokens(metrics: Answer) -> float | None:
    """Return LMDeploy's count of generated tokens, None when it has no metrics."""
    if metrics.status != 200:
        return None
    found = re.findall(r"^lmdeploy:generation_tokens_total(?:\{[^}]*\})? ([0-9.eE+]+)$", metrics.body, re.MULTILINE)
    return sum(map(float, found)) if found else None


def judge_canary(answer: Answer, before: float | None, after: float | None, health: Answer) -> str:
    """Return what is wrong with a one-token completion; empty when the engine is proven alive.

    A canary that waits behind a full queue is no fault: tokens came out meanwhile. Without metrics to tell
    (before and after None), LMDeploy's own stall detection behind /health has the last word.
    """
    if answer.status == 200:
        try:
            tokens = json.loads(answer.body)["usage"]["completion_tokens"]
        except (ValueError, KeyError, TypeError):
            return f"the canary's answer is no completion: {answer.body[:200]!r}"
        return "" if isinstance(tokens, int) and tokens >= 1 else "the canary's completion has no token"
    if answer.timed_out:
        if before is not None and after is not None:
            return "" if after > before else f"canary: {answer.error}, and no token was generated meanwhile"
        return "" if health.status == 200 else f"canary: {answer.error}"
    return f"canary: {answer.error or f'HTTP {answer.status} {answer.body[:200]!r}'}"


class Vitals:
    """What probing has shown of one api_server, and since when it is not well. Times are monotonic."""

    def __init__(self) -> None:
        self.port_open_at = self.healthy_at = self.first_token_at = 0.0
        self.asleep = False
        self.trouble: dict[str, tuple[float, str]] = {}
        self.last_seen = "nothing listens yet"

    def note_health(self, answer: Answer, now: float) -> None:
        if answer.status:
            self.port_open_at = self.port_open_at or now
        self.asleep = answer.status == 200 and '"sleeping"' in answer.body
        if answer.status == 200:
            self.healthy_at = self.healthy_at or now
        self._note("health", "" if answer.status == 200 else _say("/health", answer), now)

    def note_canary(self, fault: str, now: float) -> None:
        if not fault:
            self.first_token_at = self.first_token_at or now
        self._note("canary", fault, now)

    def unwell(self, now: float) -> tuple[float, str]:
        """Return for how many seconds without a break something was wrong, and what; (0, "") when well."""
        if not self.trouble:
            return 0.0, ""
        since, reason = min(self.trouble.values())
        return now - since, reason

    def _note(self, what: str, fault: str, now: float) -> None:
        if fault:
            self.last_seen = fault
            self.trouble[what] = (self.trouble.get(what, (now, ""))[0], fault)
        else:
            self.trouble.pop(what, None)


def _say(path: str, answer: Answer) -> str:
    return f"{path}: {answer.error or f'HTTP {answer.status} {answer.body[:200]}'}"


class Prober(threading.Thread):
    """Asks one api_server for its health and for a token, until stopped; writes into `vitals`."""

    def __init__(self, serve: Serve, node: Node) -> None:
        super().__init__(name="prober", daemon=True)
        self.vitals = Vitals()
        self._serve, self._node = serve, node
        self._stopped = threading.Event()

    def stop(self) -> None:
        self._stopped.set()

    def run(self) -> None:
        next_canary, tokens = 0.0, None
        while not self._stopped.wait(1.0 if not self.vitals.first_token_at else HEALTH_INTERVAL_S):
            with contextlib.suppress(ConfigError):  # the key file is being replaced: the next round reads it again
                health = ask(self._serve, "GET", "/health", timeout=HEALTH_INTERVAL_S * 2)
                self.vitals.note_health(health, time.monotonic())
                if health.status == 200 and not self.vitals.asleep and time.monotonic() >= next_canary:
                    tokens = self._canary(tokens, health)
                    wait = self._node.canary_interval_s if not self.vitals.trouble else HEALTH_INTERVAL_S
                    next_canary = time.monotonic() + wait

    def _canary(self, last: float | None, health: Answer) -> float | None:
        before = self._tokens()
        # Two or more tokens since the last look were not the last canary's: the engine is at work, spare it
        # this one.
        if self.vitals.first_token_at and before is not None and last is not None and before > last + 1:
            self.vitals.note_canary("", time.monotonic())
            return before
        payload = {"model": self._serve.model_name, "prompt": "1 2 3", "max_tokens": 1, "temperature": 0}
        answer = ask(self._serve, "POST", "/v1/completions", payload, timeout=self._node.canary_timeout_s)
        after = self._tokens()
        self.vitals.note_canary(judge_canary(answer, before, after, health), time.monotonic())
        return after

    def _tokens(self) -> float | None:
        return generated_tokens(ask(self._serve, "GET", "/metrics", timeout=HEALTH_INTERVAL_S * 2))


# ------------------------------------------------------------------------------------------------------
# Why did it end?

_ANSI = re.compile(r"\x1b\[[0-9;]*[A-Za-z]")
_RAY_PREFIX = re.compile(r"^\([^()]*pid=[^()]*\)\s?")
_EXCEPTION = re.compile(
    r"^([A-Za-z_][\w.]*(?:Error|Exception|Exit|Interrupt|Timeout|Failure)\w*(?:\([\w.]*\))?)(?::|$)"
)
_ARGUMENT_ERROR = re.compile(r"^\S.*: error: ")
_RANK_ERROR = re.compile(r"RayTaskError\(.*\bip=([\w.:]+)")
_CHATTER = re.compile(r"^(?:INFO|DEBUG):")
_ERROR_LINE = re.compile(r"\b(?:ERROR|CRITICAL|FATAL)\b|\b(?:fatal|out of memory)\b")


class CauseFinder:
    """Finds in a process's output the line that says why it ended.

    The first traceback of the last minute wins: later ones are consequences of it (Python prints the root
    of a chain first, and LMDeploy's own main loop fails after its rank did). Then argparse's complaint,
    then an error line.
    """

    WINDOW_S = 60.0

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._found: dict[str, deque[tuple[float, str]]] = {
            kind: deque(maxlen=50) for kind in ("exception", "argument", "error", "line")
        }
        self._in_traceback = False
        self._where = ""

    def feed(self, line: str) -> None:
        text = _RAY_PREFIX.sub("", _ANSI.sub("", line)).rstrip()
        if not text.strip() or _CHATTER.match(text):
            return
        self._add("line", text)
        if text.lstrip().startswith("Traceback (most recent call last)"):
            self._in_traceback, self._where = True, ""
        elif self._in_traceback and not text.startswith(" "):
            # An error of a rank: Ray says where, the rank's own traceback and exception follow.
            if rank := _RANK_ERROR.search(text):
                self._where = f" (on {rank[1]})"
                return
            self._in_traceback = False
            if _EXCEPTION.match(text):
                self._add("exception", text + self._where)
        elif _ARGUMENT_ERROR.match(text):
            self._add("argument", text)
        elif _ERROR_LINE.search(text):
            self._add("error", text)

    def cause(self) -> str:
        """Return the line, at most 500 characters; empty when nothing was printed."""
        now = self._clock()
        for kind in ("exception", "argument", "error"):
            for at, text in self._found[kind]:
                if now - at <= self.WINDOW_S:
                    return text.strip()[:500]
        lines = self._found["line"]
        return lines[-1][1].strip()[:500] if lines and now - lines[-1][0] <= self.WINDOW_S else ""

    def _add(self, kind: str, text: str) -> None:
        self._found[kind].append((self._clock(), text))


def describe_exit(code: int) -> str:
    """Say how a process ended; negative codes are signals."""
    if code >= 0:
        return f"exit status {code}"
    name = signal.Signals(-code).name if -code in {item.value for item in signal.Signals} else str(-code)
    hint = ": out of memory?" if name == "SIGKILL" else ""
    return f"{name}{hint}"


def restart_delay(failures: int) -> float:
    """Return the seconds to wait after the n-th failure in a row: none, then 5, 10, 20, ... at most 300."""
    return 0.0 if failures <= 1 else min(FIRST_DELAY_S * 2 ** (min(failures, 20) - 2), LONGEST_DELAY_S)


# ------------------------------------------------------------------------------------------------------
# Status and log

_print_lock = threading.Lock()


def log(message: str, source: str = "launcher") -> None:
    """Print one line to the container's log, with UTC time and source."""
    now = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
    # A full disk must not stop an engine that serves: its output is read by the thread that prints here.
    with _print_lock, contextlib.suppress(OSError):
        print(f"{now} {source}| {message}", flush=True)


_PROBE_LINE = re.compile(r'"GET /(?:health|metrics) HTTP/1\.[01]" 200')


def log_engine(line: str) -> None:
    """Print a line of api_server; that a probe was answered well, every few seconds, is not worth one."""
    if not _PROBE_LINE.search(line):
        log(line, "engine")


@dataclass(kw_only=True)
class Status:
    """status.json: what this node does now, written atomically whenever it changes and as a heartbeat."""

    path: Path
    role: str
    phase: str = "starting"
    since: float = field(default_factory=time.time)
    message: str = ""
    last_error: str = ""
    nodes: tuple[RayNode, ...] = ()
    engine: dict[str, Any] = field(
        default_factory=lambda: {"pid": 0, "started_at": 0.0, "healthy_at": 0.0, "restarts": 0, "serve": ""}
    )
    phases: list[dict[str, Any]] = field(default_factory=list)
    _mark: float = field(default_factory=time.monotonic)
    _written: float = 0.0
    _last: str = ""

    def enter(self, phase: str, message: str) -> None:
        """Go to a phase; the one before is closed with the seconds it took."""
        if phase != self.phase:
            if self.phase in ("starting", "waiting-for-head", "waiting-for-gpus", "waiting-for-serve"):
                self.close(self.phase)
            self.phase, self.since = phase, time.time()
            log(f"{phase}: {message}")
        elif message != self.message:
            log(f"{phase}: {message}")
        self.message = message
        self.write()

    def close(self, name: str) -> None:
        """Record that something of this name took the time since the last record, once more or first."""
        now = time.monotonic()
        if not (known := next((phase for phase in self.phases if phase["name"] == name), None)):
            known = {"name": name, "seconds": 0.0}
            self.phases.append(known)
        known["seconds"] = round(known["seconds"] + now - self._mark, 1)
        self._mark = now

    def begin(self) -> None:
        """Forget the phases of the last start: a new one begins."""
        self.phases, self._mark = [], time.monotonic()

    def fail(self, error: str) -> None:
        if error != self.last_error:
            log(f"error: {error}")
        self.last_error = error
        self.write()

    def beat(self) -> None:
        if time.monotonic() - self._written >= HEARTBEAT_S:
            self.write(force=True)

    def write(self, *, force: bool = False) -> None:
        data = {
            "schema": SCHEMA,
            "role": self.role,
            "phase": self.phase,
            "since": round(self.since, 3),
            "message": self.message,
            "nodes": [node.as_json() for node in self.nodes],
            "gpus_alive": sum(node.gpus for node in self.nodes if node.alive),
            "engine": self.engine,
            "phases": self.phases,
            "last_error": self.last_error,
        }
        text = json.dumps(data)
        if text == self._last and not force:
            return
        self._last, self._written = text, time.monotonic()
        temporary = self.path.with_suffix(".tmp")
        try:
            temporary.write_text(json.dumps({**data, "updated": round(time.time(), 3)}) + "\n", encoding="utf-8")
            temporary.replace(self.path)
        except OSError as error:
            log(f"error: {self.path} cannot be written: {error}")


def read_health(status: Mapping[str, Any], now: float) -> tuple[bool, str]:
    """Judge a status.json: is this container doing what it is there for? Returns (well, one line why)."""
    phase, message = str(status["phase"]), str(status["message"])
    age = now - float(status["updated"])
    if age > 6 * HEARTBEAT_S:
        return False, f"the launcher has written nothing for {age:.0f} s; last: {phase}: {message}"
    # A head that waits for serve.json was not yet asked to serve.
    well = ("ray-up",) if status["role"] == "worker" else ("serving", "waiting-for-serve")
    error = f" (last error: {status['last_error']})" if status["last_error"] and phase not in well else ""
    return phase in well, f"{phase}: {message}{error}"


# ------------------------------------------------------------------------------------------------------
# Processes


class Child:
    """A process in a session of its own, whose output is read line by line in a thread."""

    def __init__(self, name: str, argv: Sequence[str], environment: Mapping[str, str], on_line: Callable[[str], None]):
        self.name = name
        self.cause = CauseFinder()
        self._process = subprocess.Popen(
            list(argv),
            env=dict(environment),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            text=True,
            errors="replace",
        )
        self.pid = self._process.pid
        assert self._process.stdout is not None
        self._reader = threading.Thread(target=self._read, args=(self._process.stdout, on_line), daemon=True)
        self._reader.start()

    def poll(self) -> int | None:
        """Return the exit code, None while it runs."""
        return self._process.poll()

    def why(self) -> str:
        """Say how it ended and what it printed as the reason."""
        self._reader.join(timeout=1.0)
        code = self._process.poll()
        how = "still running" if code is None else describe_exit(code)
        # Who is killed says nothing of it: its last line is about something else.
        cause = "" if code == -signal.SIGKILL else self.cause.cause()
        return f"{self.name} ended ({how})" + (f": {cause}" if cause else "")

    def stop(self, grace_s: float) -> None:
        """SIGTERM, then after the grace SIGKILL to what is left of its session. Safe to call again."""
        if self._process.poll() is None:
            self._process.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(grace_s)
        # A leader that is gone may leave children behind: LMDeploy's engine process is one of api_server.
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self.pid, signal.SIGKILL)
        self._process.wait()

    def _read(self, stream: IO[str], on_line: Callable[[str], None]) -> None:
        for line in stream:
            text = line.rstrip("\n")
            self.cause.feed(text)
            on_line(text)


class Watcher:
    """Keeps `watch` running against one GCS and holds the last look at the cluster."""

    def __init__(self, python: str, node: Node, environment: Mapping[str, str]) -> None:
        self.cluster = Cluster(seen_at=0.0)
        self._node = node
        self._argv = [python, str(Path(__file__).resolve()), "watch", node.head, str(WATCH_INTERVAL_S)]
        self._environment = environment
        self._child: Child | None = None
        self._started = self._next_start = 0.0
        self.trouble = ""

    def keep_running(self) -> None:
        """Start the process when there is none; a look that is stale makes room for a new one."""
        now = time.monotonic()
        if self._child and self._child.poll() is not None:
            self.trouble = self._child.why()
            self._child, self._next_start = None, now + 1.0
        elif self._child and now - max(self.cluster.seen_at, self._started) > 2 * STALE_AFTER_S:
            self.stop()
        if self._child is None and now >= self._next_start:
            # Ray's client takes many seconds to give up on a port where nothing listens yet.
            if fault := connect_fault(self._node.head_address, self._node.ports.port):
                self.trouble, self._next_start = fault, now + 0.5
                return
            self._started = now
            self._child = Child("watcher", self._argv, self._environment, self._take)

    def age(self) -> float:
        """Return the seconds since the last look."""
        return time.monotonic() - self.cluster.seen_at

    def stop(self) -> None:
        if self._child:
            self._child.stop(0.2)
            self._child = None

    def _take(self, line: str) -> None:
        if line.startswith("{"):
            self.cluster = parse_cluster(line, time.monotonic())
            self.trouble = ""


# ------------------------------------------------------------------------------------------------------
# The supervisor


class Stopped(Exception):
    """SIGTERM or SIGINT came."""


class RayEnded(Exception):
    """Ray on this node ended, or its cluster did; the message says why."""


@dataclass(frozen=True, kw_only=True)
class End:
    """Why one api_server run is over: `lost` peers, own `failure`, or a `change` of serve.json."""

    kind: str
    reason: str


class Membership:
    """Tells from one look after the other whether a worker still belongs to its head's cluster."""

    def __init__(self) -> None:
        self._absent_since = self._unreachable_since = 0.0

    def lost(self, *, listed: bool, unreachable: str, now: float) -> str:
        """Say what happened to the head when it is gone; empty while it is there or may only be slow.

        Args:
            listed: the head listed this node as alive when last asked.
            unreachable: why no connection to the head stands, empty when one does.
            now: monotonic time in seconds.
        """
        self._absent_since = 0.0 if listed else self._absent_since or now
        self._unreachable_since = (self._unreachable_since or now) if unreachable else 0.0
        if self._absent_since and now - self._absent_since > ABSENT_AFTER_S:
            return "no longer lists this node: it was restarted, or lost sight of this node"
        patience = REFUSED_AFTER_S if "refused" in unreachable else STALE_AFTER_S
        if self._unreachable_since and now - self._unreachable_since > patience:
            return f"is gone: {unreachable}"
        return ""


class Supervisor:
    """Runs one node until it is told to stop (`run` returns 0) or its Ray is over (`run` returns 1)."""

    def __init__(self, node: Node, config_dir: Path, state_dir: Path) -> None:
        self._node = node
        self._serve_path = config_dir / "serve.json"
        self.status = Status(path=state_dir / "status.json", role=node.role)
        self._signal = 0
        self._ray_tool = find_tool("ray")
        self._python = interpreter_of(self._ray_tool)
        role = WORKER_ENVIRONMENT if node.role == "worker" else {}
        self._environment = {**RAY_ENVIRONMENT, **role, **os.environ, "RAY_ADDRESS": node.head}
        self._ray: Child | None = None
        self._watcher = Watcher(self._python, node, self._environment)

    def run(self) -> int:
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._on_signal)
        self.status.write()
        log(
            f"{self._node.role} of replica {self._node.replica}, "
            f"address {self._node.node_address}, head {self._node.head}"
        )
        try:
            self._head() if self._node.role == "head" else self._worker()
        except Stopped:
            self.status.enter("stopping", f"{signal.Signals(self._signal).name} came")
            return 0
        except RayEnded as error:
            self.status.fail(str(error))
            self.status.enter("stopping", "Ray is over on this node; the container ends and Docker starts it again")
            return 1
        finally:
            self._watcher.stop()
            if self._ray:
                self._ray.stop(RAY_GRACE_S)
        return 0

    # -- both roles

    def _on_signal(self, number: int, _frame: FrameType | None) -> None:
        self._signal = number

    def _tick(self, *, watching: bool = True) -> None:
        """Sleep a moment; raise when it is time to end. Every wait goes through here."""
        time.sleep(TICK_S)
        if self._signal:
            raise Stopped
        if self._ray and self._ray.poll() is not None:
            raise RayEnded(self._ray.why())
        if watching:
            self._watcher.keep_running()
            self.status.nodes = self._watcher.cluster.nodes
        self.status.beat()

    def _start_ray(self) -> None:
        prune_sessions(Path("/tmp/ray"))
        argv = ray_start_argv(self._node, self._ray_tool, find_extras(self._python))
        log(f"starting {' '.join(argv)}")
        self._ray = Child("ray", argv, self._environment, lambda line: log(line, "ray"))

    def _await_membership(self) -> None:
        """Wait until Ray lists this node as alive."""
        deadline = time.monotonic() + self._node.join_s
        while not self._is_member():
            if time.monotonic() > deadline:
                seen = self._watcher.trouble or self._watcher.cluster.lacks(
                    self._node.expected_nodes, self._node.expected_gpus
                )
                raise RayEnded(
                    f"Ray at {self._node.head} did not list this node within {self._node.join_s:g} s: {seen}"
                )
            self._tick()

    def _is_member(self) -> bool:
        return any(node.address == self._node.node_address for node in self._watcher.cluster.alive)

    # -- worker

    def _worker(self) -> None:
        self._await_head()
        self.status.enter("starting", f"joining {self._node.head}")
        self._start_ray()
        self._await_membership()
        self.status.enter("ray-up", f"joined {self._node.head}")
        membership = Membership()
        while True:
            self._tick()
            age = self._watcher.age()
            unreachable = "" if age < 2 * WATCH_INTERVAL_S else self._connect_fault()
            listed = age > STALE_AFTER_S or self._is_member()
            if reason := membership.lost(listed=listed, unreachable=unreachable, now=time.monotonic()):
                raise RayEnded(f"the head at {self._node.head} {reason}")

    def _await_head(self) -> None:
        """Wait for a GCS that answers, without an end: the head may be down for hours."""
        began, reported, attempt = time.monotonic(), 0.0, 0
        while True:
            attempt += 1
            fault = self._connect_fault() or self._health_check()
            if not fault:
                return
            waited = time.monotonic() - began
            self.status.enter("waiting-for-head", f"{self._node.head} does not answer yet: {fault}")
            if waited - reported >= 30:
                log(f"still waiting for {self._node.head} after {waited:.0f} s, attempt {attempt}: {fault}")
                reported = waited
            if waited > self._node.join_s:
                self.status.fail(f"no Ray head at {self._node.head} for {self._node.join_s:g} s: {fault}")
            for _ in range(4):
                self._tick(watching=False)

    def _connect_fault(self) -> str:
        return connect_fault(self._node.head_address, self._node.ports.port)

    def _health_check(self) -> str:
        """Ask the GCS through Ray's own client: version, token and protocol must fit. Returns the fault."""
        argv = [self._ray_tool, "health-check", f"--address={self._node.head}"]
        try:
            done = subprocess.run(
                argv,
                env=self._environment,
                capture_output=True,
                text=True,
                errors="replace",
                timeout=30,
                check=False,
            )
        except subprocess.TimeoutExpired:
            return "`ray health-check` did not end within 30 s"
        if done.returncode == 0:
            return ""
        finder = CauseFinder()
        for line in (done.stdout + done.stderr).splitlines():
            finder.feed(line)
        return f"`ray health-check`: {finder.cause() or describe_exit(done.returncode)}"

    # -- head

    def _head(self) -> None:
        self._start_ray()
        self._await_membership()
        self.status.enter("ray-up", f"Ray answers at {self._node.head}")
        failures = 0
        while True:
            serve = self._await_ready()
            began = time.monotonic()
            end = self._serve(serve)
            restarts = 0 if end.kind == "change" else self.status.engine["restarts"] + 1
            self.status.engine.update(pid=0, healthy_at=0.0, restarts=restarts)
            self.status.begin()
            if end.kind == "change":
                failures = 0
                self.status.enter("waiting-for-serve", end.reason)
                continue
            self.status.fail(end.reason)
            if end.kind == "lost":
                self.status.enter("degraded", end.reason)
                continue
            failures = 1 if time.monotonic() - began > STABLE_AFTER_S else failures + 1
            self._pause(restart_delay(failures), serve, failures)

    def _await_ready(self) -> Serve:
        """Wait until every expected GPU is alive, no former engine is left, and serve.json is there."""
        began = time.monotonic()
        while True:
            cluster = self._watcher.cluster
            lack = cluster.lacks(self._node.expected_nodes, self._node.expected_gpus)
            if self._watcher.age() > STALE_AFTER_S:
                lack = f"Ray does not answer: {self._watcher.trouble or 'no word for a while'}"
            if not lack and cluster.ranks and time.monotonic() - began < LEFTOVER_RANKS_S:
                lack = f"{cluster.ranks} ranks of the last engine have not ended yet"
            if lack:
                self.status.enter("waiting-for-gpus", lack)
                if time.monotonic() - began > self._node.join_s:
                    self.status.fail(f"not all GPUs within {self._node.join_s:g} s: {lack}")
            else:
                try:
                    return load_serve(self._serve_path)
                except ConfigError as error:
                    if self._serve_path.exists():
                        self.status.fail(str(error))
                    self.status.enter(
                        "waiting-for-serve", f"all {cluster.gpus} GPUs alive; no usable {self._serve_path}"
                    )
            self._tick()

    def _serve(self, serve: Serve) -> End:
        """Run api_server once, to its end."""
        before, began = self._watcher.cluster, time.monotonic()
        try:
            argv = engine_argv(serve, interpreter_of(find_tool(serve.argv[0])))
            log(f"starting {' '.join(argv)}")
            child = Child("api_server", argv, self._environment, log_engine)
        except (ConfigError, OSError) as error:
            return End(kind="failure", reason=str(error))
        started_at = time.time()
        self.status.engine.update(pid=child.pid, started_at=round(started_at, 3), healthy_at=0.0, serve=serve.digest)
        self.status.enter("loading", "api_server starts")
        prober = Prober(serve, self._node)
        prober.start()
        progress = Progress(self.status, self._node, serve, started_at)
        grace, dying_since = ENGINE_GRACE_S, 0.0
        try:
            while True:
                self._tick()
                now, cluster, vitals = time.monotonic(), self._watcher.cluster, prober.vitals
                if child.poll() is not None:
                    return End(kind="failure", reason=child.why())
                if self._changed(serve):
                    return End(kind="change", reason=f"{self._serve_path} changed")
                if lost := cluster.lost_since(before):
                    grace = LOST_GRACE_S
                    return End(kind="lost", reason=lost)
                if cluster.dead_ranks and cluster.ranks_since >= started_at:
                    dying_since = dying_since or now
                    if now - dying_since > RANK_GRACE_S:
                        grace = LOST_GRACE_S
                        return End(kind="failure", reason=cluster.dead_ranks[0])
                unwell_s, fault = vitals.unwell(now)
                if not vitals.first_token_at:
                    if now - began > self._node.load_s:
                        return End(
                            kind="failure",
                            reason=f"not serving after {self._node.load_s:g} s: {vitals.last_seen}",
                        )
                elif unwell_s > self._node.unhealthy_s:
                    return End(kind="failure", reason=f"unhealthy for {unwell_s:.0f} s: {fault}")
                progress.update(cluster, vitals, fault)
        finally:
            prober.stop()
            child.stop(grace)
            log(f"api_server stopped after {time.monotonic() - began:.0f} s")

    def _changed(self, serve: Serve) -> bool:
        """Tell whether serve.json or its keys are other ones now; a broken file changes nothing yet."""
        try:
            return load_serve(self._serve_path).fingerprint != serve.fingerprint
        except ConfigError as error:
            self.status.fail(str(error))
            return not self._serve_path.exists()

    def _pause(self, delay_s: float, serve: Serve, failures: int) -> None:
        self.status.enter(
            "degraded",
            f"api_server failed {failures} time(s) in a row; next start in {delay_s:g} s: {self.status.last_error}",
        )
        deadline = time.monotonic() + delay_s
        while time.monotonic() < deadline and not self._changed(serve):
            self._tick()


class Progress:
    """Turns what is seen of a starting engine into phases and messages, one step after the other."""

    def __init__(self, status: Status, node: Node, serve: Serve, started_at: float) -> None:
        self._status, self._node, self._serve, self._started_at = status, node, serve, started_at
        self._done: set[str] = set()

    def update(self, cluster: Cluster, vitals: Vitals, fault: str) -> None:
        status = self._status
        ranks = cluster.ranks if cluster.ranks_since >= self._started_at else 0
        if vitals.port_open_at:
            self._step("loading:model")
        elif ranks >= self._node.expected_gpus:
            self._step("loading:ranks")
        if vitals.healthy_at:
            self._step("loading:health")
            status.engine["healthy_at"] = status.engine["healthy_at"] or round(time.time(), 3)
        if not vitals.first_token_at:
            steps = (
                ("loading:health", "healthy; waiting for the first token"),
                ("loading:model", f"the model is loaded; {vitals.last_seen}"),
                ("loading:ranks", f"all {ranks} ranks are up and load the model"),
            )
            starting = f"{ranks} of {self._node.expected_gpus} ranks up" if ranks else "api_server starts"
            waiting = next((text for name, text in steps if name in self._done), starting)
            status.enter("loading", waiting)
            return
        self._step("loading:first-token")
        if vitals.asleep:
            status.enter("degraded", "the engine was put to sleep: POST /wakeup wakes it")
        elif fault:
            status.enter("degraded", fault)
        else:
            status.enter("serving", f"{self._serve.model_name} on {self._serve.address}:{self._serve.port}")

    def _step(self, name: str) -> None:
        if name not in self._done:
            self._done.add(name)
            self._status.close(name)


def connect_fault(host: str, port: int) -> str:
    """Try a TCP connection; return what went wrong, empty when it stood."""
    try:
        with socket.create_connection((host, port), timeout=1.5):
            return ""
    except OSError as error:
        return f"cannot connect to {host}:{port}: {error.strerror or error}"


def prune_sessions(root: Path) -> None:
    """Remove Ray's folders of former runs but the newest: each restart of the container leaves one."""
    sessions = sorted(path for path in root.glob("session_2*") if path.is_dir() and not path.is_symlink())
    for path in sessions[: -KEPT_SESSIONS or None]:
        shutil.rmtree(path, ignore_errors=True)


# ------------------------------------------------------------------------------------------------------
# Command line


def main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog="launcher.py", description="Supervise Ray and LMDeploy's api_server.")
    parser.add_argument("--config-dir", type=Path, default=CONFIG_DIR, help="where node.json and serve.json are")
    parser.add_argument("--state-dir", type=Path, default=STATE_DIR, help="where status.json is written")
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("run", help="supervise this node until stopped")
    commands.add_parser("health", help="exit 0 when this node does what it is there for, else 1; one line why")
    commands.add_parser("nodes", help="print the nodes as Ray tells them from here, as JSON")
    commands.add_parser("status", help="print status.json")
    watcher = commands.add_parser("watch", help="(internal) print the cluster's state, a JSON line each interval")
    watcher.add_argument("address")
    watcher.add_argument("interval", type=float)
    watcher.add_argument("--once", action="store_true")
    engine = commands.add_parser("engine", help="(internal) run a console script with API keys out of sight")
    engine.add_argument("keys_file", type=Path)
    engine.add_argument("argv", nargs="+")
    arguments = parser.parse_args(argv)
    status_path = arguments.state_dir / "status.json"
    try:
        if arguments.command == "run":
            return Supervisor(
                load_node(arguments.config_dir / "node.json"), arguments.config_dir, arguments.state_dir
            ).run()
        if arguments.command == "watch":
            watch(arguments.address, arguments.interval, once=arguments.once)
        elif arguments.command == "engine":
            run_with_keys(arguments.keys_file, arguments.argv)
        elif arguments.command == "nodes":
            return _print_nodes(load_node(arguments.config_dir / "node.json"))
        elif arguments.command == "health":
            well, line = read_health(json.loads(_read(status_path)), time.time())
            print(line)
            return 0 if well else 1
        else:
            print(_read(status_path), end="")
    except ConfigError as error:
        print(f"launcher: {error}", file=sys.stderr)
        return 1
    return 0


def _print_nodes(node: Node) -> int:
    python = interpreter_of(find_tool("ray"))
    argv = [python, str(Path(__file__).resolve()), "watch", node.head, "0", "--once"]
    try:
        done = subprocess.run(argv, capture_output=True, text=True, timeout=60, check=False)
    except subprocess.TimeoutExpired:
        print(f"launcher: Ray at {node.head} did not answer within 60 s", file=sys.stderr)
        return 1
    lines = [line for line in done.stdout.splitlines() if line.startswith("{")]
    if done.returncode or not lines:
        print(done.stderr[-2000:] or f"launcher: Ray at {node.head} told nothing", file=sys.stderr)
        return 1
    print(json.dumps(json.loads(lines[-1])["nodes"]))
    return 0


def _exit() -> NoReturn:
    sys.exit(main(sys.argv[1:]))


if __name__ == "__main__":
    _exit()
