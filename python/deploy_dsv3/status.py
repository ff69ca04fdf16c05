"""How a deployment is doing right now: its nodes, the engine, what clients get. Nothing is changed.

Everything told is read in this run: each host in one SSH round trip, the endpoint through the address that
clients use. A host that cannot be reached and a deployment that is only half there are said to be so.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from typing import Any, TextIO

import httpx

from deploy_dsv3 import drift, engine_log, manifest, observation
from deploy_dsv3.derive import endpoint_url
from deploy_dsv3.drift import Drift
from deploy_dsv3.facts import FactsError, HostFacts, load_facts
from deploy_dsv3.observation import Observation
from deploy_dsv3.rdma import gpudirect
from deploy_dsv3.serving import served_model
from deploy_dsv3.signatures import Match
from deploy_dsv3.topology import Deployment, Replica

SCHEMA = 1
#: Longest time to wait for a short answer of the endpoint [seconds].
ENDPOINT_TIMEOUT_S = 20


@dataclass(frozen=True, kw_only=True)
class NodeStatus:
    """One host. `container` is Docker's word for its state, ``absent`` where there is none.

    `gpus` are those that the driver lists; `ray_alive` and `ray_gpus` are how the head's cluster counts this
    node, None where that is not known. `drift` is what somebody changed by hand since the last finished deploy.
    `gpudirect` is how HCAs reach the GPUs' memory: ``dma-buf``, ``nvidia-peermem`` or ``none``.
    `cause` is what the engine's log says of one that is not well. `error` says why the host could not be looked at.
    """

    host: str
    role: str
    address: str = ""
    container: str = ""
    health: str = ""
    started_at: str = ""
    restarts: int = 0
    gpus: int = 0
    gpus_expected: int | None = None
    gpudirect: str = ""
    ray_alive: bool | None = None
    ray_gpus: int | None = None
    phase: str = ""
    image_id: str = ""
    drift: tuple[Drift, ...] = ()
    cause: Match | None = None
    error: str = ""


@dataclass(frozen=True, kw_only=True)
class EngineStatus:
    """The engine, as its launcher on the head and its own /health tell it.

    `phase` is the launcher's (``serving``, ``loading``, ...; "" where it says nothing), `since` in seconds
    since the epoch, `phases` the seconds of each phase of the last start. `health` is /health on the head:
    the HTTP status, 0 for no answer, None where nothing is to serve yet.
    """

    phase: str = ""
    since: float | None = None
    message: str = ""
    health: int | None = None
    restarts: int | None = None
    phases: tuple[tuple[str, float], ...] = ()
    last_error: str = ""


@dataclass(frozen=True, kw_only=True)
class EndpointStatus:
    """What clients get at `url`: HTTP status of /health and /v1/models (0: no answer), and of a completion.

    `completion` is None where none was asked for.
    """

    url: str = ""
    health: int = 0
    models: tuple[str, ...] = ()
    models_status: int = 0
    completion: int | None = None
    completion_seconds: float | None = None
    error: str = ""


@dataclass(frozen=True, kw_only=True)
class ReplicaStatus:
    """One replica; `gpus_expected` and `gpus_alive` are None while nothing is deployed on its head."""

    name: str
    nodes: tuple[NodeStatus, ...]
    engine: EngineStatus
    endpoint: EndpointStatus
    model: str
    release: Mapping[str, Any]
    gpus_expected: int | None
    gpus_alive: int | None

    @property
    def serving(self) -> bool:
        """Whether the endpoint names the model, and a completion came back if one was asked for."""
        answered = self.endpoint.completion in (None, 200)
        return self.endpoint.health == 200 and self.model in self.endpoint.models and answered

    @property
    def whole(self) -> bool:
        """Whether every host was reached, runs the one image, and Ray has all GPUs."""
        images = {node.image_id for node in self.nodes}
        return (
            all(node.container == "running" for node in self.nodes)
            and len(images) == 1
            and self.gpus_expected is not None
            and self.gpus_alive == self.gpus_expected
        )


@dataclass(frozen=True, kw_only=True)
class StatusReport:
    """The state of a deployment at `time` (seconds since the epoch)."""

    time: float
    replicas: tuple[ReplicaStatus, ...]
    seconds: float = 0.0

    @property
    def unreachable(self) -> tuple[str, ...]:
        """Hosts that could not be looked at."""
        return tuple(node.host for replica in self.replicas for node in replica.nodes if node.error)

    @property
    def exit_code(self) -> int:
        """0 when every replica is whole and serves, 6 when a host could not be reached, 5 otherwise."""
        if self.unreachable:
            return 6
        return 0 if all(replica.whole and replica.serving for replica in self.replicas) else 5

    def as_dict(self) -> dict[str, Any]:
        """The report for ``--json``."""
        return {
            "schema": SCHEMA,
            "verb": "status",
            "exit_code": self.exit_code,
            "time": self.time,
            "seconds": round(self.seconds, 2),
            "unreachable": list(self.unreachable),
            "replicas": [_replica_as_dict(replica) for replica in self.replicas],
        }


def collect(
    deployment: Deployment,
    settings: Mapping[str, Mapping[str, Any]],
    connections: Mapping[str, Mapping[str, Any]],
    *,
    canary: bool = False,
) -> StatusReport:
    """Look at every replica of a deployment.

    Args:
        deployment: what the inventory describes.
        settings: each host's settings by name, defaults included.
        connections: each host's variables for connecting, see `observation.connections`.
        canary: also ask each endpoint for a completion of one token.
    """
    started = time.time()
    wanted = {host: connections[host] for host in deployment.hosts}
    seen = observation.look(wanted, settings, deep=False)
    with ThreadPoolExecutor(max_workers=max(1, len(deployment.replicas))) as pool:
        replicas = tuple(
            pool.map(
                lambda replica: _replica(replica, seen, settings, connections, canary=canary),
                deployment.replicas,
            )
        )
    return StatusReport(time=started, replicas=replicas, seconds=time.time() - started)


def _replica(
    replica: Replica,
    seen: Mapping[str, Observation],
    settings: Mapping[str, Mapping[str, Any]],
    connections: Mapping[str, Mapping[str, Any]],
    *,
    canary: bool,
) -> ReplicaStatus:
    head = seen[replica.head]
    address = (
        head.document("node").get("node_address")
        or settings[replica.head]["node_network_address"]
        or observation.connect_address(replica.head, connections[replica.head])
    )
    status = head.document("status")
    nodes = tuple(_node(replica, seen[host], status, settings[host]["engine_container_name"]) for host in replica.hosts)
    model = served_model(settings[replica.head])
    expected = head.document("node").get("expected", {}).get("gpus")
    return ReplicaStatus(
        name=replica.name,
        nodes=nodes,
        engine=_engine(head, status),
        endpoint=_endpoint(settings[replica.head], address, model, canary=canary),
        model=model,
        release=head.document("release"),
        gpus_expected=expected,
        gpus_alive=status.get("gpus_alive") if head.container else None,
    )


def _node(replica: Replica, seen: Observation, head_status: Mapping[str, Any], container: str) -> NodeStatus:
    role = "head" if seen.host == replica.head else "worker"
    if not seen.reached:
        return NodeStatus(host=seen.host, role=role, error=seen.error)
    node = seen.document("node")
    address = node.get("node_address", "")
    state = seen.container.get("State", {})
    in_ray = next((one for one in head_status.get("nodes") or () if one.get("address") == address), None)
    known = bool(address and head_status.get("nodes"))
    facts = _facts(seen)
    return NodeStatus(
        host=seen.host,
        role=role,
        address=address,
        container=state.get("Status", "absent"),
        health=state.get("Health", {}).get("Status", ""),
        started_at=state.get("StartedAt", ""),
        restarts=seen.container.get("RestartCount", 0),
        gpus=len(seen.seen.get("facts", {}).get("gpus", ())),
        gpus_expected=node.get("ray", {}).get("num_gpus"),
        gpudirect=gpudirect(facts) if facts else "",
        ray_alive=bool(in_ray and in_ray.get("alive")) if known else None,
        ray_gpus=int(in_ray.get("gpus", 0)) if in_ray else None,
        phase=seen.document("status").get("phase", ""),
        image_id=seen.container.get("Image", ""),
        drift=tuple(_drift(seen.host, facts, container)) if facts else (),
        cause=engine_log.explain(seen),
    )


def _facts(seen: Observation) -> HostFacts | None:
    try:
        return load_facts(seen.seen.get("facts", {}))
    except FactsError:
        return None


def _drift(host: str, facts: HostFacts, container: str) -> list[Drift]:
    """What somebody changed by hand on a host; nothing where no finished deploy is on record."""
    record = manifest.load(facts)
    return drift.find(host, record.state, drift.state_of(facts, container)) if record else []


def _engine(head: Observation, status: Mapping[str, Any]) -> EngineStatus:
    if not head.container:
        # What the launcher last wrote says nothing of a container that is gone.
        return EngineStatus(message="there is no engine container on the head" if head.reached else "")
    running = head.container["State"]["Running"]
    health = head.seen.get("health")
    return EngineStatus(
        phase=status.get("phase", "") if running else "stopped",
        since=status.get("since"),
        message=status.get("message", ""),
        health=health["status"] if health else None,
        restarts=(status.get("engine") or {}).get("restarts"),
        phases=tuple((phase["name"], float(phase["seconds"])) for phase in status.get("phases") or ()),
        last_error=status.get("last_error", ""),
    )


def client(settings: Mapping[str, Any], url: str, *, timeout_s: float = ENDPOINT_TIMEOUT_S) -> httpx.Client:
    """An HTTP client that reaches the endpoint as the operator's clients do, with the first API key."""
    keys = settings["endpoint_api_keys"]
    return httpx.Client(
        base_url=url,
        headers={"Authorization": f"Bearer {keys[0]}"} if keys else {},
        timeout=timeout_s,
        verify=settings["endpoint_tls_ca_path"] or True,
        # A proxy for the internet must not come between this machine and its own servers.
        trust_env=False,
    )


def _endpoint(settings: Mapping[str, Any], address: str, model: str, *, canary: bool) -> EndpointStatus:
    if not address and not settings["endpoint_url"]:
        return EndpointStatus(error="nothing is deployed on the head, so the endpoint has no address yet")
    url = endpoint_url(settings, address)
    facts: dict[str, Any] = {"url": url}
    try:
        with client(settings, url) as http:
            facts["health"] = http.get("/health").status_code
            models = http.get("/v1/models")
            facts["models_status"] = models.status_code
            if models.status_code == 200:
                facts["models"] = tuple(entry["id"] for entry in models.json()["data"])
            if canary:
                started = time.monotonic()
                request = {"model": model, "prompt": "1", "max_tokens": 1, "temperature": 0}
                facts["completion"] = http.post("/v1/completions", json=request).status_code
                facts["completion_seconds"] = round(time.monotonic() - started, 3)
    except (httpx.HTTPError, ValueError, LookupError, TypeError, OSError) as error:
        return EndpointStatus(**facts, error=f"{url}: {error}" if str(error) else f"{url}: {error!r}")
    return EndpointStatus(**facts)


def _replica_as_dict(replica: ReplicaStatus) -> dict[str, Any]:
    return {
        "name": replica.name,
        "serving": replica.serving,
        "whole": replica.whole,
        "model": replica.model,
        "gpus_expected": replica.gpus_expected,
        "gpus_alive": replica.gpus_alive,
        "nodes": [{**asdict(node), "cause": node.cause.as_dict() if node.cause else None} for node in replica.nodes],
        "engine": {
            **asdict(replica.engine),
            "phases": [{"name": name, "seconds": seconds} for name, seconds in replica.engine.phases],
        },
        "endpoint": {**asdict(replica.endpoint), "models": list(replica.endpoint.models)},
        "release": dict(replica.release),
    }


def render(report: StatusReport, stream: TextIO) -> None:
    """Write the report for people: a headline and a table for each replica."""
    from rich.console import Console

    # A file or a pipe has no width of its own.
    console = Console(file=stream, highlight=False, soft_wrap=True, width=None if stream.isatty() else 200)
    for replica in report.replicas:
        _render_replica(console, replica, report.time)


def _render_replica(console: Any, replica: ReplicaStatus, now: float) -> None:
    from rich.table import Table
    from rich.text import Text

    good = replica.serving and replica.whole
    word = "serving" if good else "serving, but not whole" if replica.serving else "NOT serving"
    console.print(Text.assemble((f"{replica.name}: {word}", "bold green" if good else "bold red")))
    for name, value in _headlines(replica, now):
        console.print(Text.assemble((f"  {name:<9} ", "dim"), value))
    table = Table(box=None, pad_edge=True, header_style="dim")
    for column in ("host", "role", "address", "container", "since", "GPUs", "in Ray", "GPUDirect"):
        table.add_column(column, no_wrap=True)
    for node in replica.nodes:
        if node.error:
            table.add_row(node.host, node.role, "", Text("not reached", style="red"), "", "", "", "")
            continue
        fine = node.container == "running" and node.health in ("", "healthy", "starting")
        state = f"{node.container} ({node.health})" if node.health else node.container
        table.add_row(
            node.host,
            node.role,
            node.address,
            Text(state, style="green" if fine else "red"),
            node.started_at.split(".")[0].replace("T", " ") if node.container == "running" else "",
            f"{node.gpus}/{'?' if node.gpus_expected is None else node.gpus_expected}",
            {None: "?", True: f"{node.ray_gpus} GPUs", False: "no"}[node.ray_alive],
            node.gpudirect,
        )
    console.print(table, soft_wrap=False)
    # Below the table, because ssh's words would push everything else out of it.
    for node in replica.nodes:
        if node.error:
            console.print(Text(f"  {node.host} was not reached: {node.error}", style="red"))
        if node.cause:
            _render_cause(console, node.host, node.cause)
        for one in node.drift:
            console.print(Text.assemble(("  changed by hand ", "magenta"), f"{node.host}: {one}"))
    console.print()


def _render_cause(console: Any, host: str, cause: Match) -> None:
    from rich.text import Text

    console.print(Text.assemble(("  likely cause    ", "bold red"), f"{host}: {cause.signature.cause}"))
    for label, value in (
        ("its log", ": ".join(filter(None, (cause.where, cause.line.strip())))),
        ("remedy", cause.signature.remedy),
        ("see", cause.signature.page),
    ):
        console.print(Text(f"      {label:<8} {value}"))


def _headlines(replica: ReplicaStatus, now: float) -> Iterable[tuple[str, str]]:
    engine, endpoint = replica.engine, replica.endpoint
    since = f" for {_duration(now - engine.since)}" if engine.since else ""
    yield "engine", f"{engine.phase or 'unknown'}{since}" + (f": {engine.message}" if engine.message else "")
    if engine.last_error and engine.phase != "serving":
        yield "error", engine.last_error
    if engine.phases:
        yield "start", ", ".join(f"{name} {_duration(seconds)}" for name, seconds in engine.phases)
    yield "model", replica.model
    answers = f"/health {endpoint.health or 'no answer'}, /v1/models {endpoint.models_status or 'no answer'}"
    if endpoint.completion is not None:
        answers += f", completion {endpoint.completion} in {endpoint.completion_seconds} s"
    yield "endpoint", f"{endpoint.url} ({answers})" if endpoint.url else endpoint.error
    if endpoint.url and endpoint.error:
        yield "", endpoint.error
    alive = "?" if replica.gpus_alive is None else replica.gpus_alive
    expected = "?" if replica.gpus_expected is None else replica.gpus_expected
    yield "GPUs", f"{alive} of {expected} in Ray"
    if replica.release:
        image = replica.release.get("image") or {}
        versions = replica.release.get("versions") or {}
        known = ", ".join(f"{name} {versions[name]}" for name in ("lmdeploy", "ray") if versions.get(name))
        named = f"{replica.release['name']}:" if replica.release.get("name") else ""
        yield "release", " ".join(filter(None, (named, image.get("name", ""), image.get("digest", ""), known)))


def _duration(seconds: float) -> str:
    from deploy_dsv3.progress import duration

    return duration(seconds)
