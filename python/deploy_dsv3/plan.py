"""What a deploy would do, host by host, and why. Pure: facts, settings and derived plans in, plan out.

Each role that changes hosts is looked at in three ways: what Python works out itself is compared with the host
(files of the launcher, environment, daemon.json, image); what was given to the role is compared with what the
last finished deploy gave it (`wanted`); and what somebody changed by hand since then (`drift`) is put back where a
role makes it.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from deploy_dsv3 import capacity, drift, preflight, wanted
from deploy_dsv3.capacity import Capacity
from deploy_dsv3.derive import HostInput, NodePlan, derive
from deploy_dsv3.drift import Drift
from deploy_dsv3.errors import EXIT_PLAN_CHANGES, ConfigErrors
from deploy_dsv3.facts import Container, HostFacts
from deploy_dsv3.findings import Finding
from deploy_dsv3.topology import Deployment, Replica

SCHEMA = 1

Kind = Literal["created", "changed", "restarted", "rebooted", "downloaded", "removed", "checked"]

# Inputs that are compared with the host itself, so that a difference in them need not be told a second time.
_COMPARED_SETTINGS: Mapping[str, frozenset[str]] = {
    "docker_engine": frozenset(
        f"docker_engine_{name}"
        for name in ("data_path", "insecure_registries", "live_restore", "options", "registry_mirrors")
    ),
    "engine_image": frozenset(wanted.named_by("engine_image").settings),
}
_COMPARED_NODE = frozenset({"devices", "environment", "node_file", "serve_file"})
# What a changed input of a role means, in words.
_SUBJECTS: Mapping[str, str] = {
    "nvidia_driver": "NVIDIA driver packages",
    "fabric_manager": "fabric manager package",
    "docker_engine": "Docker packages",
    "nvidia_container_toolkit": "container toolkit and CDI specification",
    "engine_image": "engine image",
    "lmdeploy": "API keys of the engine",
    "endpoint": "configuration of the endpoint",
}
# The launcher reads these when it starts; the role restarts the container for them.
_READ_AT_START = ("launcher.py", "node.json", "secrets/ray_token")
_ENGINE = "/etc/deploy-dsv3/engine"
_CDI_TOOL = "nvidia-container-toolkit"
_SHOWN = 60


@dataclass(frozen=True, kw_only=True)
class Action:
    """One thing that a deploy would do on a host.

    Attributes:
        host: where.
        stage: in which stage.
        role: by which role.
        kind: what happens to the subject. ``checked`` is a role that is walked because nothing is known of its
            last run, and may find nothing to do; ``rebooted`` is for the operator to do.
        subject: what it happens to.
        why: what was found, and what is wanted.
        bytes: bytes to download; None where that is not known or does not apply.
        stops: whether clients wait meanwhile.
    """

    host: str
    stage: str
    role: str
    kind: Kind
    subject: str
    why: str
    bytes: int | None = None
    stops: bool = False


@dataclass(frozen=True, kw_only=True)
class HostPlan:
    """One host: what is to be done, what was changed by hand, what was derived for it."""

    host: str
    role: str
    actions: tuple[Action, ...]
    drift: tuple[Drift, ...]
    recorded: bool
    address: str = ""
    interface: str = ""
    link_layer: str = ""
    environment: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Downtime:
    """How long clients wait: ``none``, ``start`` (nothing is served yet) or ``restart`` of the engine.

    `seconds` is what the last start took, None where none is known.
    """

    kind: Literal["none", "start", "restart"]
    seconds: float | None = None


@dataclass(frozen=True, kw_only=True)
class ReplicaPlan:
    """One replica. `capacity` is None where `capacity_unknown` says why."""

    name: str
    hosts: tuple[HostPlan, ...]
    downtime: Downtime
    capacity: Capacity | None
    capacity_unknown: str
    command: tuple[str, ...]
    endpoint: str
    lock: Mapping[str, Any] | None
    last_run: Mapping[str, Any] | None

    @property
    def actions(self) -> tuple[Action, ...]:
        """The actions of all hosts."""
        return tuple(action for host in self.hosts for action in host.actions)


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Everything that a deploy would do now.

    Attributes:
        replicas: the plan of each.
        findings: what preflight would say of the hosts.
        unreachable: why hosts could not be looked at.
        warnings: of inventory and settings.
        states: each host as it is, see `drift.state_of`.
        wants: for each host, a hash of everything that it is to be.
    """

    replicas: tuple[ReplicaPlan, ...]
    findings: tuple[Finding, ...]
    unreachable: Mapping[str, str] = field(default_factory=dict)
    warnings: tuple[str, ...] = ()
    states: Mapping[str, Mapping[str, Any]] = field(default_factory=dict, repr=False)
    wants: Mapping[str, str] = field(default_factory=dict, repr=False)

    @property
    def actions(self) -> tuple[Action, ...]:
        """The actions of all hosts."""
        return tuple(action for replica in self.replicas for action in replica.actions)

    @property
    def drift(self) -> tuple[Drift, ...]:
        """What was changed by hand on all hosts."""
        return tuple(one for replica in self.replicas for host in replica.hosts for one in host.drift)

    @property
    def errors(self) -> tuple[Finding, ...]:
        """What preflight would refuse."""
        return tuple(finding for finding in self.findings if finding.severity == "error")

    @property
    def nothing_to_do(self) -> bool:
        """Whether every host was seen and is as the last finished deploy left it and the settings want it."""
        return not (self.unreachable or self.errors or self.actions or self.drift)

    @property
    def exit_code(self) -> int:
        """6 unreachable, 3 preflight would refuse, 10 something to do, 0 nothing."""
        if self.unreachable:
            return 6
        if self.errors:
            return 3
        return 0 if self.nothing_to_do else EXIT_PLAN_CHANGES

    @property
    def fingerprint(self) -> str:
        """A hash of what the plan was made from."""
        whole = json.dumps({"states": self.states, "wants": self.wants}, sort_keys=True)
        return f"sha256:{hashlib.sha256(whole.encode()).hexdigest()}"

    def as_dict(self) -> dict[str, Any]:
        """The plan for ``--json``."""
        return {
            "schema": SCHEMA,
            "verb": "plan",
            "exit_code": self.exit_code,
            "fingerprint": self.fingerprint,
            "nothing_to_do": self.nothing_to_do,
            "replicas": [_replica_as_dict(replica) for replica in self.replicas],
            "findings": [finding.to_json() for finding in self.findings],
            "unreachable": dict(self.unreachable),
            "warnings": list(self.warnings),
        }


def make(
    deployment: Deployment,
    hosts: Mapping[str, HostInput],
    *,
    unreachable: Mapping[str, str] | None = None,
    warnings: Sequence[str] = (),
) -> Plan:
    """Work out the plan of a deployment.

    Args:
        deployment: the replicas to plan.
        hosts: what is known of each of their hosts.
        unreachable: why hosts have no facts.
        warnings: what to tell with it.
    """
    replicas = []
    states: dict[str, Mapping[str, Any]] = {}
    wants: dict[str, str] = {}
    for replica in deployment.replicas:
        nodes, _ = derive(replica, hosts)
        views = {
            name: _View(known=hosts[name], facts=facts, node=nodes[name], replica=replica)
            for name in replica.hosts
            if (facts := hosts[name].facts) is not None and name in nodes
        }
        replicas.append(_replica(replica, views))
        states |= {name: view.state for name, view in views.items()}
        wants |= {name: view.want for name, view in views.items()}
    findings = preflight.check(deployment.replicas, hosts)
    return Plan(
        replicas=tuple(replicas),
        findings=tuple(finding for host in deployment.hosts for finding in findings[host]),
        unreachable=dict(unreachable or {}),
        warnings=tuple(warnings),
        states=states,
        wants=wants,
    )


class _View:
    """One host with what is derived and recorded of it."""

    def __init__(self, *, known: HostInput, facts: HostFacts, node: NodePlan, replica: Replica) -> None:
        self.host = known.host
        self.settings = known.settings
        self.facts = facts
        self.node = node
        self.is_head = known.host == replica.head
        self.state = drift.state_of(facts, node.container_name)
        recorded = drift.recorded_state(facts)
        self.recorded = recorded is not None
        self.drift = drift.find(self.host, recorded, self.state) if recorded is not None else []
        manifest = facts.deployment.manifest or {}
        self._inputs: Mapping[str, Any] = manifest.get("inputs") or {} if self.recorded else {}
        self.salt = str(manifest.get("salt", ""))

    @property
    def container(self) -> Container | None:
        """The engine's container, whoever made it."""
        named = [one for one in self.facts.docker.containers if one.name == self.node.container_name]
        return named[0] if named else None

    @property
    def want(self) -> str:
        """A hash of everything that the roles would be given."""
        roles = [role for role in wanted.ROLES if self.applies(role)]
        whole = {role: wanted.inputs(role, self.settings, self.node, salt=self.salt) for role in roles}
        return hashlib.sha256(json.dumps(whole, sort_keys=True).encode()).hexdigest()

    def applies(self, role: str) -> bool:
        return wanted.applies(role, self.settings, self.facts, is_head=self.is_head)

    def given(self, role: str) -> Mapping[str, Any] | None:
        """What the last finished deploy gave a role; None if it did not run."""
        given = self._inputs.get(role)
        return given if isinstance(given, dict) else None

    def has_file(self, path: str) -> bool:
        return f"file {path}" in self.state

    def has_package(self, name: str) -> bool:
        return f"package {name}" in self.state

    def action(self, role: str, kind: Kind, subject: str, why: str, **more: Any) -> Action:
        return Action(host=self.host, stage=wanted.ROLES[role], role=role, kind=kind, subject=subject, why=why, **more)


def _replica(replica: Replica, views: Mapping[str, _View]) -> ReplicaPlan:
    hosts = [
        HostPlan(
            host=name,
            role=view.node.role,
            actions=tuple(_actions(view)),
            drift=tuple(view.drift),
            recorded=view.recorded,
            address=view.node.address,
            interface=view.node.interface,
            link_layer=view.node.link_layer,
            environment=view.node.environment,
        )
        for name, view in views.items()
    ]
    head = views.get(replica.head)
    fits, unknown = _capacity(head, [view.facts for view in views.values()])
    runs = head.facts.deployment.runs if head else ()
    return ReplicaPlan(
        name=replica.name,
        hosts=tuple(hosts),
        downtime=_downtime(head, [action for host in hosts for action in host.actions]),
        capacity=fits,
        capacity_unknown=unknown,
        command=tuple(head.node.serve_file["argv"]) if head else (),
        endpoint=head.node.endpoint if head else "",
        lock=head.facts.deployment.lock if head else None,
        last_run=runs[-1] if runs else None,
    )


def _actions(view: _View) -> Iterator[Action]:
    """What is to be done on a host, each subject once; the most exact reason is the one that is told."""
    for role in wanted.ROLES:
        given = view.given(role)
        if not view.applies(role):
            if given is not None and role == "endpoint":
                yield view.action(role, "removed", "the endpoint", "it is not wanted on this host any more")
            continue
        found: dict[str, Action] = {}
        for action in (*_put_back(view, role), *_compared(view, role), *_given_anew(view, role, given)):
            found.setdefault(action.subject, action)
        actions = list(found.values())
        yield from actions
        yield from _restarts(view, role, actions)


def _put_back(view: _View, role: str) -> Iterator[Action]:
    """What was changed by hand and the role makes again."""
    for one in view.drift:
        if one.role == role and _makes_again(view, one):
            subject, path = _subject_of(view, one.key)
            yield view.action(
                role,
                "changed" if one.found else "created",
                subject,
                f"changed by hand: {one}",
                stops=one.kind in ("container", "image") or path in _READ_AT_START,
            )


def _makes_again(view: _View, one: Drift) -> bool:
    """Whether the role that makes a thing notices that it was changed. It leaves alone what it did not make."""
    if one.kind == "daemon.json":
        key = one.key.removeprefix("daemon.json ")
        merged = wanted.daemon_json(view.settings, view.facts)
        return merged.get(key) != (view.facts.docker.daemon_json or {}).get(key)
    if one.kind == "package":
        # A package of any version is present; only the fabric manager's version is the driver's.
        return not one.found or one.role == "fabric_manager"
    if one.kind == "file":
        # Role engine_image starts from its record, and role engine takes the head's token as it is.
        kept = one.key.endswith("/image.json") or (view.is_head and one.key.endswith("/ray_token"))
        return bool(one.recorded) and not (kept and one.found)
    if one.kind == "unit":
        return bool(one.recorded)
    return True


def _subject_of(view: _View, key: str) -> tuple[str, str]:
    """What an action on a key of the state is said to change, and the file's name below the engine's folder."""
    if key.startswith("container "):
        return f"container {view.node.container_name}", ""
    if key.startswith("daemon.json"):
        return "/etc/docker/daemon.json", ""
    if key.startswith("file "):
        path = key.removeprefix("file ")
        return path, path.removeprefix(f"{_ENGINE}/")
    return key, ""


def _given_anew(view: _View, role: str, given: Mapping[str, Any] | None) -> Iterator[Action]:
    """What differs in what the role is given from what the last finished deploy gave it."""
    if given is None:
        yield view.action(role, "checked", f"role {role}", "no finished deploy is on record on this host")
        return
    now = wanted.inputs(role, view.settings, view.node, salt=view.salt)
    stops = role in ("engine", "lmdeploy")
    subject = f"container {view.node.container_name}" if role == "engine" else _SUBJECTS[role]
    for name in _changed_keys(given.get("settings"), now["settings"]):
        if name not in _COMPARED_SETTINGS.get(role, ()):
            why = f"{name}: {_change(given.get('settings'), now['settings'], name)}"
            yield view.action(role, "changed", subject, why, stops=stops)
    for name in _changed_keys(given.get("node"), now["node"]):
        if name not in _COMPARED_NODE:
            why = f"{name}: {_change(given.get('node'), now['node'], name)}"
            yield view.action(role, "changed", subject, why, stops=stops)
    if given.get("digest") != now["digest"]:
        yield view.action(role, "checked", f"role {role}", "the role is of another version than the one that ran last")


def _compared(view: _View, role: str) -> Iterator[Action]:
    compare = _COMPARISONS.get(role)
    return compare(view) if compare else iter(())


def _nvidia_driver(view: _View) -> Iterator[Action]:
    facts, settings = view.facts, view.settings
    if facts.gpus:
        return
    error = facts.nvidia_smi.error
    if "mismatch" in error:
        yield view.action(
            "nvidia_driver", "rebooted", "the host", f"nvidia-smi: {error}. No role reboots: reboot it yourself"
        )
        return
    modules = settings["nvidia_driver_kernel_modules"]
    subject = (
        f"NVIDIA driver {settings['nvidia_driver_branch']} ({settings['nvidia_driver_source']}, {modules} modules)"
    )
    yield view.action(
        "nvidia_driver", "created", subject, f"nvidia-smi: {error}" if error else "there is no nvidia-smi"
    )


def _fabric_manager(view: _View) -> Iterator[Action]:
    if "unit nvidia-fabricmanager.service active" not in view.state:
        why = f"the host has {len(view.facts.pci_nvswitches)} NVSwitches and no fabric manager"
        yield view.action("fabric_manager", "created", "fabric manager of the driver's version", why)


def _docker_engine(view: _View) -> Iterator[Action]:
    docker = view.facts.docker
    if not docker.installed:
        source = view.settings["docker_engine_source"]
        yield view.action("docker_engine", "created", f"Docker ({source})", "there is no dockerd")
    found = docker.daemon_json or {}
    merged = wanted.daemon_json(view.settings, view.facts)
    changed = _changed_keys(found, merged)
    if changed:
        why = "; ".join(f"{key}: {_change(found, merged, key)}" for key in changed)
        kind: Kind = "created" if docker.daemon_json is None else "changed"
        yield view.action("docker_engine", kind, "/etc/docker/daemon.json", why)


def _nvidia_container_toolkit(view: _View) -> Iterator[Action]:
    role = "nvidia_container_toolkit"
    if not view.has_package(_CDI_TOOL):
        yield view.action(role, "created", "NVIDIA container toolkit", "the package is not installed")
    path = view.settings["nvidia_container_toolkit_cdi_spec_path"]
    if path not in view.facts.cdi.specs:
        yield view.action(role, "created", path, "nothing names the GPUs to Docker yet")


def _engine_image(view: _View) -> Iterator[Action]:
    facts, settings = view.facts, view.settings
    name = settings["engine_image_name"]
    names = {known for image in facts.docker.images for known in image.names}
    if settings["engine_image_archive_path"]:
        if name not in names:
            why = f"{name} is loaded from {settings['engine_image_archive_path']}"
            yield view.action("engine_image", "created", "engine image", why)
        return
    digest = wanted.image_digest(settings, facts)
    if digest and any(known.endswith(f"@{digest}") for known in names):
        return
    registry = facts.registry
    why = "the host does not have it"
    if registry and registry.error:
        why += f"; its size is not known: {registry.error}"
    size = registry.bytes if registry and registry.bytes else None
    yield view.action("engine_image", "downloaded", f"{name} {digest}".strip(), why, bytes=size)


def _engine(view: _View) -> Iterator[Action]:
    found = view.facts.deployment.node_file
    node_file = json.loads(json.dumps(view.node.node_file))
    if found != node_file:
        yield _file_action(view, "engine", f"{_ENGINE}/node.json", found, node_file)
    launcher = view.state.get(f"file {_ENGINE}/launcher.py", "")
    if not launcher.endswith(wanted.launcher_sha256()):
        kind: Kind = "changed" if launcher else "created"
        why = "this version brings another one" if launcher else "it is not there"
        yield view.action("engine", kind, f"{_ENGINE}/launcher.py", why, stops=True)
    container = view.container
    if container is None:
        why = f"there is no container {view.node.container_name}"
        yield view.action("engine", "created", f"container {view.node.container_name}", why, stops=True)
        return
    reasons = list(_container_reasons(view, container))
    if reasons:
        subject = f"container {view.node.container_name}"
        yield view.action("engine", "changed", subject, "; ".join(reasons), stops=True)


def _container_reasons(view: _View, container: Container) -> Iterator[str]:
    """What in a container differs from what was derived for it."""
    config = container.config
    if config is None:
        yield "it was made by somebody else"
        return
    for name in _changed_keys(config.environment, view.node.environment):
        if name in view.node.environment:
            yield f"{name}: {_change(config.environment, view.node.environment, name)}"
    missing = [device for device in view.node.devices if device not in config.devices]
    if missing:
        yield f"without {', '.join(missing)}"
    digest = "" if view.settings["engine_image_archive_path"] else wanted.image_digest(view.settings, view.facts)
    if digest and "@" in config.image and not config.image.endswith(f"@{digest}"):
        yield f"image: {_short(config.image)} → {_short(digest)}"


def _lmdeploy(view: _View) -> Iterator[Action]:
    if not view.is_head:
        return
    found = view.facts.deployment.serve_file
    serve_file = json.loads(json.dumps(view.node.serve_file))
    if found != serve_file:
        yield _file_action(view, "lmdeploy", f"{_ENGINE}/serve.json", found, serve_file)


def _endpoint(view: _View) -> Iterator[Action]:
    if not view.has_package("haproxy"):
        yield view.action("endpoint", "created", "HAProxy", "the package is not installed")
    if not view.facts.deployment.endpoint:
        yield view.action("endpoint", "created", "configuration of the endpoint", "there is none")
    if not view.has_file("/etc/systemd/system/dsv3-endpoint.service"):
        yield view.action("endpoint", "created", "dsv3-endpoint.service", "there is no such service")


_COMPARISONS: Mapping[str, Callable[[_View], Iterator[Action]]] = {
    "nvidia_driver": _nvidia_driver,
    "fabric_manager": _fabric_manager,
    "docker_engine": _docker_engine,
    "nvidia_container_toolkit": _nvidia_container_toolkit,
    "engine_image": _engine_image,
    "engine": _engine,
    "lmdeploy": _lmdeploy,
    "endpoint": _endpoint,
}


def _file_action(view: _View, role: str, path: str, found: Mapping[str, Any] | None, new: Mapping[str, Any]) -> Action:
    if found is None:
        return view.action(role, "created", path, "it is not there", stops=True)
    changes = [
        f"{key}: {_change(found, new, key)}"
        for key in _changed_keys(_flat(found), _flat(new))
        for found, new in [(_flat(found), _flat(new))]
    ]
    return view.action(role, "changed", path, "; ".join(changes), stops=True)


def _restarts(view: _View, role: str, actions: Sequence[Action]) -> Iterator[Action]:
    """The restarts that follow from what a role changes."""
    subjects = {action.subject: action for action in actions if action.kind in ("created", "changed")}
    container = f"container {view.node.container_name}"
    if role == "docker_engine" and "/etc/docker/daemon.json" in subjects and view.facts.docker.installed:
        live = (view.facts.docker.daemon_json or {}).get("live-restore") is True
        effect = "containers go on" if live else "running containers stop: docker_engine_allow_restart is needed"
        yield view.action(role, "restarted", "Docker", f"daemon.json changes; {effect}", stops=not live)
    if role == "engine" and container not in subjects:
        files = [name for name in _READ_AT_START if f"{_ENGINE}/{name}" in subjects]
        if files and view.container is not None:
            yield view.action(role, "restarted", container, f"it reads {', '.join(files)} at its start", stops=True)
    if role == "lmdeploy" and view.facts.deployment.serve_file and f"{_ENGINE}/serve.json" in subjects:
        yield view.action(role, "restarted", "lmdeploy serve", "the launcher starts the new command", stops=True)
    if (
        role == "endpoint"
        and "/etc/systemd/system/dsv3-endpoint.service" in subjects
        and view.facts.deployment.endpoint
    ):
        yield view.action(role, "restarted", "dsv3-endpoint.service", "its unit changes")


def _downtime(head: _View | None, actions: Iterable[Action]) -> Downtime:
    stops = [action for action in actions if action.stops]
    if head is None or not stops:
        return Downtime(kind="none")
    status = head.facts.deployment.status or {}
    phases = status.get("phases") or ()
    seconds = sum(float(phase["seconds"]) for phase in phases) if phases else None
    running = head.container is not None and head.container.state == "running"
    return Downtime(kind="restart" if running and status.get("phase") == "serving" else "start", seconds=seconds)


def _capacity(head: _View | None, hosts: Sequence[HostFacts]) -> tuple[Capacity | None, str]:
    """Whether the model fits; None and why where that cannot be told yet."""
    if head is None:
        return None, "the head was not seen"
    gpus = [gpu for facts in hosts for gpu in facts.gpus]
    if len(gpus) != head.node.expected.gpus:
        return None, f"the driver lists {len(gpus)} of {head.node.expected.gpus} GPUs, so their memory is not known"
    settings = head.settings
    try:
        name = settings["model_weights_name"]
        if head.facts.model:
            path = f"{settings['model_weights_path']}/config.json on {head.host}"
            model = capacity.model_from(head.facts.model, name=name, source=path)
        else:
            model = capacity.load_model(name)
        return (
            capacity.estimate(
                model,
                capacity.Serving(
                    gpus=head.node.expected.gpus,
                    gpu_memory_mib=min(gpu.memory_total_mib for gpu in gpus),
                    gpu_name=gpus[0].name,
                    layout=capacity.Layout(tp=head.node.tp),
                    cache_max_entry_count=settings["lmdeploy_cache_max_entry_count"],
                    session_len=settings["lmdeploy_session_len"],
                    max_batch_size=settings["lmdeploy_max_batch_size"],
                    max_prefill_token_num=settings["lmdeploy_max_prefill_token_num"],
                ),
            ),
            "",
        )
    except ConfigErrors as errors:
        return None, "; ".join(error.message for error in errors)


def _changed_keys(before: Mapping[str, Any] | None, after: Mapping[str, Any]) -> list[str]:
    known = before or {}
    return sorted(key for key in known.keys() | after.keys() if known.get(key) != after.get(key))


def _change(before: Mapping[str, Any] | None, after: Mapping[str, Any], key: str) -> str:
    """``old → new``; of secrets and of mappings, which may hold some, only that they changed."""
    old, new = (before or {}).get(key), after.get(key)
    if any(isinstance(value, dict) or str(value).startswith(("hmac:", "sha256:")) for value in (old, new)):
        return "another value"
    return f"{_short(drift.text(old)) or 'unset'} → {_short(drift.text(new)) or 'unset'}"


def _flat(document: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """A JSON object with the keys of nested ones joined by dots."""
    flat: dict[str, Any] = {}
    for key, value in document.items():
        if isinstance(value, dict):
            flat |= _flat(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def _short(text: str) -> str:
    return text if len(text) <= _SHOWN else f"{text[: _SHOWN - 1]}…"


def _replica_as_dict(replica: ReplicaPlan) -> dict[str, Any]:
    return {
        "name": replica.name,
        "endpoint": replica.endpoint,
        "command": list(replica.command),
        "downtime": asdict(replica.downtime),
        "capacity": capacity.to_dict(replica.capacity) if replica.capacity else None,
        "capacity_unknown": replica.capacity_unknown,
        "lock": replica.lock,
        "last_run": replica.last_run,
        "hosts": [
            {
                "host": host.host,
                "role": host.role,
                "recorded": host.recorded,
                "address": host.address,
                "interface": host.interface,
                "link_layer": host.link_layer,
                "environment": dict(host.environment),
                "actions": [asdict(action) for action in host.actions],
                "drift": [one.as_dict() for one in host.drift],
            }
            for host in replica.hosts
        ],
    }
