"""What is measured: the endpoint, who may reach it, and what runs behind it.

The one module here that knows inventory, settings and hosts; the rest takes a `Target`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from deploy_dsv3 import observation
from deploy_dsv3.benchmark.plan import Row
from deploy_dsv3.derive import endpoint_url
from deploy_dsv3.errors import UnreachableError, UsageError
from deploy_dsv3.observation import Observation
from deploy_dsv3.options import Options
from deploy_dsv3.serving import served_model
from deploy_dsv3.topology import Deployment, Replica
from deploy_dsv3.verbs import Target as Loaded

# LMDeploy's batch size where its command line has none, by GPU (`get_max_batch_size`, lmdeploy/utils.py).
_DEFAULT_BATCH = {"a100": 384, "a800": 384, "h100": 1024, "h800": 1024, "l20y": 1024, "h200": 1024}
_DEFAULT_BATCH_BEFORE_0_10 = {"a100": 256, "a800": 256, "h100": 512, "h800": 512}
_DEFAULT_BATCH_OF_OTHERS = 128
# A cluster that is so many times slower than the published one must still not run into the endpoint's patience.
_SLOWER_AT_MOST = 2
# Requests that wait in the engine beside those it works on, so that its batch never runs dry.
_QUEUE_SHARE = 0.25


@dataclass(frozen=True, kw_only=True)
class Target:
    """A service to measure."""

    base_url: str
    api_key: str = field(default="", repr=False)
    ca_file: str = ""
    """On the control machine; empty: the system's CAs."""
    model: str = ""
    """Empty: the first that the service names."""
    replica: str = ""
    head: str = ""
    """Inventory name; empty where the service was given by its URL alone."""
    weights_path: str = ""
    """The model's folder on the head."""
    max_batch_size: int = 0
    """What the running engine has; 0: not known."""
    batch_size_from: str = ""
    """Where that is known from, for people."""
    max_connections: int = 0
    """Connections that the endpoint takes at once; 0: not known."""
    idle_timeout_s: float = 0.0
    """Silence after which the endpoint gives a request up; 0: not known."""
    environment: Mapping[str, Any] = field(default_factory=dict)
    """Release, digest, driver, GPUs, layout, NCCL transport: stored with each row."""
    image: str = ""
    """ID of the engine's image on the head."""


def find_target(loaded: Loaded, options: Options, replica_name: str) -> Target:
    """The service of one replica of an inventory, looked at now.

    Raises:
        UsageError: several replicas and none chosen, or an unknown one.
        UnreachableError: a host of the replica cannot be looked at, or nothing is deployed there.
    """
    replica = _choose(loaded.deployment, replica_name)
    connections = {host: loaded.connections(options)[host] for host in replica.hosts}
    seen = observation.look(connections, loaded.plain_settings, deep=False)
    for host in replica.hosts:
        if seen[host].error:
            raise UnreachableError(
                f"{host}: {seen[host].error}; nothing was measured",
                remedy="`deploy-dsv3 status` looks at every host.",
            )
    return make_target(replica, seen, loaded.settings.of(replica.head), connections[replica.head])


def make_target(
    replica: Replica,
    seen: Mapping[str, Observation],
    settings: Mapping[str, Any],
    connection: Mapping[str, Any],
) -> Target:
    """The service of a replica whose hosts were looked at.

    Args:
        replica: its hosts.
        seen: what was seen of each.
        settings: the head's.
        connection: the head's variables for connecting.

    Raises:
        UnreachableError: nothing is deployed there.
    """
    head = seen[replica.head]
    release = head.document("release")
    if not release:
        raise UnreachableError(
            f"{replica.head}: nothing is deployed there (no release.json); nothing was measured",
            remedy="Deploy first: deploy-dsv3 --inventory PATH.",
        )
    address = head.document("node").get("node_address") or observation.connect_address(replica.head, connection)
    keys = settings["endpoint_api_keys"]
    environment = describe(replica, seen)
    batch, known_from = running_batch_size(release, environment["gpus"]["name"])
    proxied = settings["endpoint_mode"] == "proxy"
    return Target(
        base_url=endpoint_url(settings, address),
        api_key=str(keys[0]) if keys else "",
        ca_file=settings["endpoint_tls_ca_path"],
        model=served_model(settings),
        replica=replica.name,
        head=replica.head,
        weights_path=release.get("model", {}).get("path", settings["model_weights_path"]),
        max_batch_size=batch,
        batch_size_from=known_from,
        max_connections=settings["endpoint_max_connections"] if proxied else 0,
        idle_timeout_s=settings["endpoint_idle_timeout_s"] if proxied else 0,
        environment=environment,
        image=str(head.container.get("Image", "")),
    )


def running_batch_size(release: Mapping[str, Any], gpu: str) -> tuple[int, str]:
    """The engine's largest batch, and where that is known from.

    Args:
        release: `release.json` of the head.
        gpu: name of its GPUs, as the driver has it.
    """
    argv: Sequence[str] = release.get("serve", {}).get("argv", ())
    for place, word in enumerate(argv):
        if word == "--max-batch-size" and place + 1 < len(argv):
            return int(argv[place + 1]), "the serving command"
        if word.startswith("--max-batch-size="):
            return int(word.partition("=")[2]), "the serving command"
    version = str(release.get("versions", {}).get("lmdeploy", ""))
    numbers = tuple(int(part) for part in re.findall(r"\d+", version)[:2])
    if not gpu or not numbers:
        return 0, ""
    table = _DEFAULT_BATCH if numbers >= (0, 10) else _DEFAULT_BATCH_BEFORE_0_10
    size = next((size for name, size in table.items() if name in gpu.lower()), _DEFAULT_BATCH_OF_OTHERS)
    return size, f"LMDeploy {version}'s default for {gpu}"


def describe(replica: Replica, seen: Mapping[str, Observation]) -> dict[str, Any]:
    """What runs behind the endpoint, for the results: no secret in it."""
    head = seen[replica.head]
    release, facts = head.document("release"), head.seen.get("facts", {})
    gpus = facts.get("gpus") or []
    inspect = head.container
    variables = dict(entry.partition("=")[::2] for entry in inspect.get("Config", {}).get("Env", ()) if "=" in entry)
    nccl = {name: value for name, value in sorted(variables.items()) if name.startswith(("NCCL_", "GLOO_SOCKET"))}
    argv = list(release.get("serve", {}).get("argv", ()))
    return {
        "replica": replica.name,
        "nodes": list(replica.hosts),
        "image": release.get("image", {}),
        "image_id": inspect.get("Image", ""),
        "versions": release.get("versions", {}),
        "model": release.get("model", {}),
        "serve_argv": argv,
        "layout": _layout(argv, len(replica.hosts)),
        "gpus": {
            "name": gpus[0]["name"] if gpus else "",
            "per_node": {host: len(seen[host].seen.get("facts", {}).get("gpus") or ()) for host in replica.hosts},
            "memory_mib": gpus[0].get("memory_total_mib") if gpus else None,
        },
        "driver": gpus[0].get("driver_version", "") if gpus else "",
        "nccl_transport": nccl_transport(nccl),
        "nccl_environment": nccl,
    }


def nccl_transport(variables: Mapping[str, str]) -> str:
    """How NCCL is told to reach the other nodes; as configured, not as measured."""
    interface = variables.get("NCCL_SOCKET_IFNAME", "").lstrip("=")
    if variables.get("NCCL_IB_DISABLE") == "1":
        return f"TCP sockets over {interface or 'any interface'} (RDMA is switched off)"
    hcas = variables.get("NCCL_IB_HCA", "").lstrip("=")
    if hcas:
        gid = variables.get("NCCL_IB_GID_INDEX")
        return f"RDMA over {hcas}" + (f", GID index {gid}" if gid else "")
    return "chosen by NCCL"


def needed_change(target: Target, rows: Sequence[Row]) -> dict[int, list[Row]]:
    """Rows that the running engine's batch size is wrong for, by the size that they call for.

    Empty where the engine's batch size is not known: then only the operator can tell.
    """
    wrong: dict[int, list[Row]] = {}
    for row in rows:
        if target.max_batch_size and row.max_batch_size and row.max_batch_size != target.max_batch_size:
            wrong.setdefault(row.max_batch_size, []).append(row)
    return wrong


def fitting_concurrency(target: Target, row: Row) -> tuple[int, str]:
    """How many requests of a row may be in flight, and why: (0, "") for all of them, as upstream.

    Upstream sends all requests at once. The endpoint's proxy takes a number of connections, and gives up a
    request that hears nothing for too long, as the last of ten thousand does for most of a row. Where either
    would turn waiting requests into failures, the row keeps the engine's batch full and a queue behind it,
    and leaves the rest for later: the throughput is the same, the time to first token is then without hours
    of queueing.
    """
    if not row.max_batch_size:
        return 0, ""
    reasons = []
    if target.max_connections and row.num_prompts > target.max_connections:
        reasons.append(f"the endpoint takes {target.max_connections} connections (endpoint_max_connections)")
    if target.idle_timeout_s and row.published and row.num_prompts > row.max_batch_size:
        longest = row.num_prompts / row.published.request_throughput
        if longest * _SLOWER_AT_MOST > target.idle_timeout_s:
            reasons.append(
                f"the endpoint gives up after {target.idle_timeout_s:.0f} s of silence (endpoint_idle_timeout_s) "
                f"and the last request would wait about {longest:.0f} s at the published speed"
            )
    if not reasons:
        return 0, ""
    most = int(row.max_batch_size * (1 + _QUEUE_SHARE))
    return most, "; ".join(reasons)


def _choose(deployment: Deployment, name: str) -> Replica:
    replicas = {replica.name: replica for replica in deployment.replicas}
    if not name and len(replicas) == 1:
        return next(iter(replicas.values()))
    if name not in replicas:
        message = f"there is no replica {name!r}" if name else f"the inventory has {len(replicas)} replicas"
        raise UsageError(message, remedy=f"Choose one: --replica {'|'.join(replicas)}.")
    return replicas[name]


def _layout(argv: Sequence[str], nodes: int) -> str:
    parts = [
        f"{name.upper()}{argv[place + 1]}"
        for name in ("dp", "tp", "ep")
        for place, word in enumerate(argv)
        if word == f"--{name}" and place + 1 < len(argv)
    ]
    return f"{' '.join(parts) or 'TP1'} on {nodes} node{'s' if nodes > 1 else ''}"
