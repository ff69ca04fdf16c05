"""What the roles would do on one host, and why. Pure: facts, settings and a derived plan in, actions out.

Each role that changes hosts is looked at in three ways: what somebody changed by hand since the last finished
deploy is put back where the role makes it (`drift`); what Python works out itself is compared with the host (files
of the launcher, environment, daemon.json, image); and what the role would be given is compared with what the last
finished deploy gave it (`wanted`).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from deploy_dsv3 import drift, driver, manifest, ports, wanted
from deploy_dsv3.derive import HostInput, NodePlan
from deploy_dsv3.drift import Drift
from deploy_dsv3.facts import Container, HostFacts
from deploy_dsv3.topology import Replica

Kind = Literal["created", "changed", "restarted", "rebooted", "downloaded", "removed", "checked"]

# Inputs that are compared with the host itself, so that a difference in them need not be told a second time.
_COMPARED_SETTINGS: Mapping[str, frozenset[str]] = {
    "docker_engine": frozenset(
        f"docker_engine_{name}"
        for name in (
            *("data_path", "insecure_registries", "live_restore", "no_proxy", "options", "proxy_url"),
            "registry_mirrors",
        )
    ),
    "engine_image": frozenset(
        ("docker_engine_registry_mirrors", *(f"engine_image_{name}" for name in ("archive_path", "digest", "name")))
    ),
}
_COMPARED_NODE = frozenset(
    ("devices", "environment", "kernel_modules", "node_file", "reboot", "reserved_ports", "serve_file")
)
# What a changed input of a role means, in words.
_SUBJECTS: Mapping[str, str] = {
    "nvidia_driver": "NVIDIA driver packages",
    "fabric_manager": "fabric manager package",
    "docker_engine": "Docker packages",
    "nvidia_container_toolkit": "container toolkit and CDI specification",
    "rdma": "RDMA packages and modules",
    "node_network": f"sysctl {ports.SYSCTL}",
    "engine_image": "engine image",
    "lmdeploy": "API keys of the engine",
    "endpoint": "configuration of the endpoint",
}
# The launcher reads these when it starts; the role restarts the container for them.
_READ_AT_START = ("launcher.py", "node.json", "secrets/ray_token")
# And this one whenever it is written anew: it restarts the server for it.
_WATCHED = "serve.json"
_ENGINE = "/etc/deploy-dsv3/engine"
_READ = tuple(f"{_ENGINE}/{name}" for name in (*_READ_AT_START, _WATCHED))
_DAEMON_JSON = "/etc/docker/daemon.json"
_ENDPOINT_UNIT = "/etc/systemd/system/dsv3-endpoint.service"
# Roles that say whose their files are; the others leave an owner as they find it.
_OWNERS = ("engine", "lmdeploy", "endpoint")
# Packages that have another name in the plan of a host without them.
_PACKAGES: Mapping[str, str] = {
    "package haproxy": "HAProxy",
    "package nvidia-container-toolkit": "NVIDIA container toolkit",
}
# What role engine does not set on the container, and what it changes without making it anew.
_LEFT_TO_DOCKER = ("cpus", "memory_bytes", "pid_mode", "user")
_CHANGED_IN_PLACE = ("container restart_policy",)
_SHOWN = 60


@dataclass(frozen=True, kw_only=True)
class Action:
    """One thing that a deploy would do on a host.

    Attributes:
        host: where.
        stage: in which stage.
        role: by which role.
        kind: what happens to the subject. ``checked`` is a role that is walked because nothing is known of its
            last run, and may find nothing to do.
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


class View:
    """One host: its facts and settings, what is derived for it, and what the last finished deploy recorded there.

    Args:
        known: facts and settings.
        facts: the facts, which `known` has.
        node: the derived plan of the host.
        replica: the replica that it belongs to.
    """

    def __init__(self, *, known: HostInput, facts: HostFacts, node: NodePlan, replica: Replica) -> None:
        self.host = known.host
        self.settings = known.settings
        self.facts = facts
        self.node = node
        self.is_head = known.host == replica.head
        self.state = drift.state_of(facts, node.container_name)
        self.manifest = manifest.load(facts)
        self._node = node.to_json()
        self.drift = drift.find(self.host, self.manifest.state, self.state) if self.manifest else []

    @property
    def container(self) -> Container | None:
        """The engine's container, whoever made it."""
        named = [one for one in self.facts.docker.containers if one.name == self.node.container_name]
        return named[0] if named else None

    @property
    def want(self) -> str:
        """A hash of everything that the roles would be given."""
        roles = [role for role in wanted.ROLES if self.applies(role)]
        whole = {role: self.inputs(role) for role in roles}
        return hashlib.sha256(json.dumps(whole, sort_keys=True).encode()).hexdigest()

    def applies(self, role: str) -> bool:
        return wanted.applies(role, self.settings, self.facts, is_head=self.is_head)

    def given(self, role: str) -> Mapping[str, Any] | None:
        """What the last finished deploy gave a role; None if it did not run."""
        return self.manifest.inputs.get(role) if self.manifest else None

    def inputs(self, role: str) -> dict[str, Any]:
        """What a role would be given now."""
        salt = self.manifest.salt if self.manifest else ""
        return wanted.inputs(role, self.settings, self._node, salt=salt)

    def has_file(self, path: str) -> bool:
        return f"file {path}" in self.state

    def has_package(self, name: str) -> bool:
        return f"package {name}" in self.state

    def action(self, role: str, kind: Kind, subject: str, why: str, **more: Any) -> Action:
        return Action(host=self.host, stage=wanted.ROLES[role], role=role, kind=kind, subject=subject, why=why, **more)


def actions(view: View) -> Iterator[Action]:
    """What is to be done on a host, each subject once; the most exact reason is the one that is told."""
    for role in wanted.ROLES:
        given = view.given(role)
        if not view.applies(role):
            if role == "endpoint" and view.is_head and view.facts.deployment.endpoint:
                yield view.action(role, "removed", "the endpoint", "endpoint_mode is direct: clients reach the engine")
            continue
        found: dict[str, Action] = {}
        for action in (*_put_back(view, role), *_compared(view, role), *_given_anew(view, role, given)):
            same = found.get(action.subject)
            found[action.subject] = _joined(same, action) if same else action
        # That a role is walked goes without saying where it has something to do.
        todo = [action for action in found.values() if action.kind != "checked"] or list(found.values())
        yield from todo
        yield from _restarts(view, role, todo)


def _joined(first: Action, second: Action) -> Action:
    """One action for two reasons; what somebody changed by hand explains what differs otherwise."""
    if "changed by hand" in first.why and "changed by hand" not in second.why:
        return replace(first, stops=first.stops or second.stops)
    more = second.why.removeprefix("changed by hand: ")
    return replace(first, why=f"{first.why}; {more}", stops=first.stops or second.stops)


def _put_back(view: View, role: str) -> Iterator[Action]:
    """What was changed by hand and the role makes again."""
    for one in view.drift:
        if one.role == role and _makes_again(view, one):
            subject = _subject_of(view, one.key)
            # A file of the same content is older than the container that reads it, whatever its rights.
            in_place = one.key in _CHANGED_IN_PLACE or one.same_content
            yield view.action(
                role,
                "changed" if one.found else "created",
                subject,
                f"changed by hand: {one}",
                stops=not in_place and subject in (_container(view), *_READ),
            )


def _makes_again(view: View, one: Drift) -> bool:
    """Whether the role that makes a thing notices that it was changed. It leaves alone what it did not make."""
    match one.kind:
        case "daemon.json":
            key = one.key.removeprefix("daemon.json ")
            merged = wanted.daemon_json(view.settings, view.facts)
            return merged.get(key) != (view.facts.docker.daemon_json or {}).get(key)
        case "package":
            # A package of any version is present; only the fabric manager's version is the driver's.
            return not one.found or one.role == "fabric_manager"
        case "file" if one.same_content:
            return not one.same_mode or one.role in _OWNERS
        case "file":
            # Role engine_image starts from its record, and role engine takes the head's token as it is.
            kept = one.key.endswith("/image.json") or (view.is_head and one.key.endswith("/ray_token"))
            return bool(one.recorded) and not (kept and one.found)
        case "container":
            field = one.key.split(" ")[1]
            # Of labels and log options the role looks for its own only.
            return field not in _LEFT_TO_DOCKER and (bool(one.recorded) or field not in ("labels", "log"))
        case "unit":
            return bool(one.recorded)
        case "sysctl":
            # What others reserve besides stays reserved.
            return view.node.reserved_ports not in ("", one.found)
    return True


def _subject_of(view: View, key: str) -> str:
    """What an action on a key of the state is said to change."""
    if key.startswith("container "):
        return _container(view)
    if key.startswith("daemon.json"):
        return _DAEMON_JSON
    return _PACKAGES.get(key, key).removeprefix("file ")


def _given_anew(view: View, role: str, given: Mapping[str, Any] | None) -> Iterator[Action]:
    """What differs in what the role is given from what the last finished deploy gave it."""
    if given is None:
        yield view.action(role, "checked", f"role {role}", "no finished deploy is on record on this host")
        return
    now = view.inputs(role)
    stops = role in ("engine", "lmdeploy")
    subject = _container(view) if role == "engine" else _SUBJECTS[role]
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


def _compared(view: View, role: str) -> Iterator[Action]:
    compare = _COMPARISONS.get(role)
    return compare(view) if compare else iter(())


def _nvidia_driver(view: View) -> Iterator[Action]:
    facts, settings = view.facts, view.settings
    branch = settings["nvidia_driver_branch"]
    subject = f"NVIDIA driver {branch} ({settings['nvidia_driver_source']}, {view.node.kernel_modules} modules)"
    version = facts.driver.installed_version or facts.driver.loaded_version
    error = facts.nvidia_smi.error
    if version and not driver.is_of_branch(version, branch):
        why = f"driver {version} is installed, {branch} is wanted"
        yield view.action("nvidia_driver", "changed", _SUBJECTS["nvidia_driver"], why)
    elif not (facts.gpus or version):
        why = f"nvidia-smi: {error}" if error else "there is no nvidia-smi"
        yield view.action("nvidia_driver", "created", subject, why)
    if view.node.reboot:
        why = "; ".join(view.node.reboot)
        if not settings["nvidia_driver_allow_reboot"]:
            why += ": nvidia_driver_allow_reboot is needed"
        yield view.action("nvidia_driver", "rebooted", "the host", why, stops=True)


def _fabric_manager(view: View) -> Iterator[Action]:
    facts = view.facts
    found, subject = facts.fabric_manager_version, "fabric manager of the driver's version"
    if "unit nvidia-fabricmanager.service active" not in view.state:
        why = f"the host has {len(facts.pci_nvswitches)} NVSwitches and no fabric manager"
        yield view.action("fabric_manager", "created", subject, why)
    elif found and facts.driver.loaded_version not in ("", found):
        why = f"the fabric manager is {found}, the driver {facts.driver.loaded_version}"
        yield view.action("fabric_manager", "changed", subject, why)


def _docker_engine(view: View) -> Iterator[Action]:
    docker = view.facts.docker
    if not docker.installed:
        source = view.settings["docker_engine_source"]
        yield view.action("docker_engine", "created", f"Docker ({source})", "there is no dockerd")
    found, merged = _flat(docker.daemon_json or {}), _flat(wanted.daemon_json(view.settings, view.facts))
    changed = _changed_keys(found, merged)
    if changed:
        why = "; ".join(f"{key}: {_change(found, merged, key)}" for key in changed)
        kind: Kind = "created" if docker.daemon_json is None else "changed"
        yield view.action("docker_engine", kind, _DAEMON_JSON, why)


def _nvidia_container_toolkit(view: View) -> Iterator[Action]:
    role = "nvidia_container_toolkit"
    if not view.has_package("nvidia-container-toolkit"):
        yield view.action(role, "created", "NVIDIA container toolkit", "the package is not installed")
    path = view.settings["nvidia_container_toolkit_cdi_spec_path"]
    if path not in view.facts.cdi.specs:
        yield view.action(role, "created", path, "nothing names the GPUs to Docker yet")


def _rdma(view: View) -> Iterator[Action]:
    found = view.facts.infiniband
    if not found.ofed and not view.has_package("rdma-core"):
        yield view.action("rdma", "created", _SUBJECTS["rdma"], "rdma-core is not installed, and no OFED is there")


def _node_network(view: View) -> Iterator[Action]:
    found, wish = view.state.get(f"sysctl {ports.SYSCTL}", ""), view.node.reserved_ports
    if wish and found != wish:
        why = f"{_short(found)} → {_short(wish)}" if found else f"{_short(wish)}: none is reserved yet"
        yield view.action("node_network", "changed" if found else "created", _SUBJECTS["node_network"], why)


def _engine_image(view: View) -> Iterator[Action]:
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
    why = f"the host does not have {_short(digest, 19)}" if digest else "the host does not have it"
    if registry and registry.error:
        why += f"; its size is not known: {registry.error}"
    size = registry.bytes if registry and registry.bytes else None
    yield view.action("engine_image", "downloaded", f"image {name}", why, bytes=size)


def _engine(view: View) -> Iterator[Action]:
    found = view.facts.deployment.node_file
    node_file = _as_json(view.node.node_file)
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
        yield view.action("engine", "created", _container(view), why, stops=True)
        return
    reasons = list(_container_reasons(view, container))
    if reasons:
        yield view.action("engine", "changed", _container(view), "; ".join(reasons), stops=True)


def _container_reasons(view: View, container: Container) -> Iterator[str]:
    """What in a container differs from what was derived for it."""
    config = container.config
    if config is None:
        yield "it was made by somebody else"
        return
    given = (view.given("engine") or {}).get("node", {}).get("environment") or {}
    for name, value in view.node.environment.items():
        if config.environment.get(name) not in (value, _hash(value)):
            yield f"{name}: {_change(config.environment, view.node.environment, name)}"
    for name in given:
        if name in config.environment and name not in view.node.environment:
            yield f"{name}: not wanted any more"
    missing = [device for device in view.node.devices if device not in config.devices]
    if missing:
        yield f"without {', '.join(missing)}"
    digest = "" if view.settings["engine_image_archive_path"] else wanted.image_digest(view.settings, view.facts)
    if digest and "@" in config.image and not config.image.endswith(f"@{digest}"):
        yield f"image: {_short(config.image)} → {_short(digest)}"


def _lmdeploy(view: View) -> Iterator[Action]:
    serve_file = _as_json(view.node.serve_file)
    if view.is_head and view.facts.deployment.serve_file != serve_file:
        found = view.facts.deployment.serve_file
        yield _file_action(view, "lmdeploy", f"{_ENGINE}/serve.json", found, serve_file)
    release = view.facts.deployment.release or {}
    said = {"argv": release.get("serve", {}).get("argv"), "model": release.get("model")}
    model = {"name": view.node.served_model, "path": view.node.model_path}
    before, name = str(release.get("name") or ""), view.settings["lmdeploy_release_name"]
    if before != name or said != {"argv": serve_file["argv"], "model": model}:
        kind: Kind = "changed" if release else "created"
        why = "it names what the host is to run"
        if release and before != name:
            why += f": release {before or 'without a name'} → {name or 'without a name'}"
        yield view.action("lmdeploy", kind, "/etc/deploy-dsv3/release.json", why)


def _endpoint(view: View) -> Iterator[Action]:
    if not view.has_package("haproxy"):
        yield view.action("endpoint", "created", "HAProxy", "the package is not installed")
    if not view.facts.deployment.endpoint:
        yield view.action("endpoint", "created", "configuration of the endpoint", "there is none")
    state = view.facts.state
    unit = state.units.get("dsv3-endpoint.service") if state else None
    if unit and unit.reload_due:
        why = "its files are newer than what it runs with"
        yield view.action("endpoint", "restarted", "dsv3-endpoint.service", why)
    if not view.has_file(_ENDPOINT_UNIT):
        yield view.action("endpoint", "created", _ENDPOINT_UNIT, "there is no such service")


_COMPARISONS: Mapping[str, Callable[[View], Iterator[Action]]] = {
    "nvidia_driver": _nvidia_driver,
    "fabric_manager": _fabric_manager,
    "docker_engine": _docker_engine,
    "nvidia_container_toolkit": _nvidia_container_toolkit,
    "rdma": _rdma,
    "node_network": _node_network,
    "engine_image": _engine_image,
    "engine": _engine,
    "lmdeploy": _lmdeploy,
    "endpoint": _endpoint,
}


def _file_action(view: View, role: str, path: str, found: Mapping[str, Any] | None, new: Mapping[str, Any]) -> Action:
    if found is None:
        return view.action(role, "created", path, "it is not there", stops=True)
    before, after = _flat(found), _flat(new)
    changes = [f"{key}: {_change(before, after, key)}" for key in _changed_keys(before, after)]
    return view.action(role, "changed", path, "; ".join(changes), stops=True)


def _restarts(view: View, role: str, actions: Sequence[Action]) -> Iterator[Action]:
    """The restarts that follow from what a role changes."""
    subjects = {action.subject: action for action in actions if action.kind in ("created", "changed")}
    container = _container(view)
    if role == "docker_engine" and _DAEMON_JSON in subjects and view.facts.docker.installed:
        live = (view.facts.docker.daemon_json or {}).get("live-restore") is True
        effect = "containers go on" if live else "running containers stop: docker_engine_allow_restart is needed"
        yield view.action(role, "restarted", "Docker", f"daemon.json changes; {effect}", stops=not live)
    if role == "engine" and container not in subjects:
        # Those whose rights alone change are not read again.
        files = [name for name in _READ_AT_START if (one := subjects.get(f"{_ENGINE}/{name}")) and one.stops]
        if files and view.container is not None:
            yield view.action(role, "restarted", container, f"it reads {', '.join(files)} at its start", stops=True)
    command = subjects.get(f"{_ENGINE}/{_WATCHED}")
    if role == "lmdeploy" and view.facts.deployment.serve_file and command and command.stops:
        yield view.action(role, "restarted", "lmdeploy serve", "the launcher starts the new command", stops=True)
    if role == "endpoint" and _ENDPOINT_UNIT in subjects and view.facts.deployment.endpoint:
        yield view.action(role, "restarted", "dsv3-endpoint.service", "its unit changes")


def _changed_keys(before: Mapping[str, Any] | None, after: Mapping[str, Any]) -> list[str]:
    known = before or {}
    return sorted(key for key in known.keys() | after.keys() if known.get(key) != after.get(key))


def _change(before: Mapping[str, Any] | None, after: Mapping[str, Any], key: str) -> str:
    """``old → new``; of secrets and of mappings, which may hold some, only that they changed."""
    old, new = (before or {}).get(key), after.get(key)
    if any(isinstance(value, dict) or str(value).startswith(("hmac:", "sha256:")) for value in (old, new)):
        return "another value"
    if isinstance(old, list) and isinstance(new, list):
        return drift.difference_of_lists(old, new)
    return f"{_short(drift.text(old)) or 'unset'} → {_short(drift.text(new)) or 'unset'}"


def _hash(value: str) -> str:
    """The value as the probe tells it where it may be a secret."""
    return f"sha256:{hashlib.sha256(value.encode()).hexdigest()}"


def _container(view: View) -> str:
    return f"container {view.node.container_name}"


def _as_json(document: Mapping[str, Any]) -> dict[str, Any]:
    """A document as it comes back from its file."""
    plain: dict[str, Any] = json.loads(json.dumps(document))
    return plain


def _flat(document: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """A JSON object with the keys of nested ones joined by dots."""
    flat: dict[str, Any] = {}
    for key, value in document.items():
        if isinstance(value, dict):
            flat |= _flat(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def _short(text: str, most: int = _SHOWN) -> str:
    return text if len(text) <= most else f"{text[: most - 1]}…"
