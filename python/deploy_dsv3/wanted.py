"""What the roles are given, and what follows from it: the wanted half of a plan. Pure but for reading the roles.

A role does the same again as long as its own files, the settings and the derived values that those files name,
and the host itself are the same. So what a finished deploy gave each role is recorded on the host (role
`deployment_record`), and a later plan compares: nothing of what a role renders is rendered a second time here.
What Python itself works out (the launcher's files, the environment) is compared with the host directly.
"""

from __future__ import annotations

import hashlib
import hmac
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from deploy_dsv3 import content, settings
from deploy_dsv3.facts import HostFacts

#: Roles that change a host, in the order they run, with their stage. The others only look.
ROLES: Mapping[str, str] = {
    "nvidia_driver": "host",
    "fabric_manager": "host",
    "docker_engine": "host",
    "nvidia_container_toolkit": "host",
    "rdma": "host",
    "node_network": "host",
    "engine_image": "image",
    "engine": "container",
    "lmdeploy": "engine",
    "endpoint": "engine",
}

#: Tasks that change nothing, or belong to teardown.
_ONLY_LOOKING = frozenset({"verify.yml", "health.yml", "preflight.yml", "absent.yml"})
#: Settings that steer a run and leave no trace on a host, those that one role hands to another, and the name in
#: release.json, which is compared with the file itself.
_NO_INPUT = re.compile(
    r".*_(no_log|secure_logging|allow_restart|allow_reboot|reboot_batch|reboot_timeout_s)"
    r"|package_repository_.*"
    r"|engine_image_(refresh|pull_timeout_s|registry_username|registry_password)"
    r"|lmdeploy_release_name"
)
_NODE_KEY = re.compile(r"\bdsv3_node\.([a-z_]+)")
_INCLUDED_ROLE = re.compile(r"include_role:\s+name: ([a-z_]+)")
_WORD = re.compile(r"\b[a-z][a-z0-9_]+\b")


@dataclass(frozen=True, kw_only=True)
class Names:
    """What a role's files name: settings, keys of the node's plan; `digest` is over the files themselves."""

    settings: tuple[str, ...]
    node: tuple[str, ...]
    digest: str


def applies(role: str, settings: Mapping[str, Any], facts: HostFacts, *, is_head: bool) -> bool:
    """Whether a role changes this kind of host at all."""
    if settings.get(f"{role}_source") == "preinstalled":
        return False
    if role == "fabric_manager":
        return bool(facts.pci_nvswitches)
    if role == "node_network":
        return bool(settings["node_network_reserve_ports"])
    if role == "rdma":
        return facts.infiniband.has_hca
    if role == "endpoint":
        return is_head and settings["endpoint_mode"] == "proxy"
    return True


def inputs(role: str, values: Mapping[str, Any], node: Mapping[str, Any], *, salt: str) -> dict[str, Any]:
    """What a role is given on a host: ``{"digest", "settings": {name: value}, "node": {key: value}}``.

    Of a secret there is only a keyed hash: the record must not tell it, only whether it changed.

    Args:
        role: one of `ROLES`.
        values: the host's settings by name.
        node: what was derived for it, `NodePlan.to_json`.
        salt: key of the hashes.
    """
    names = named_by(role)
    # The engine is given keys only where clients reach it directly.
    given = () if role == "lmdeploy" and not _engine_has_keys(node) else names.settings
    return {
        "digest": names.digest,
        "settings": {name: _recorded(name, values[name], salt) for name in given},
        "node": {key: _plain(node[key]) for key in names.node},
    }


@cache
def named_by(role: str) -> Names:
    """The settings and derived values that the files of a role name; those are all that it can depend on."""
    catalogue = settings.catalogue()
    words: set[str] = set()
    node: set[str] = set()
    digest = hashlib.sha256()
    handed_in = _handed_in(role)
    for path in _files(role):
        text = path.read_text(encoding="utf-8")
        digest.update(f"{path.relative_to(content.roles())}\0{text}\0".encode())
        words.update(_WORD.findall(text))
        node.update(_NODE_KEY.findall(text))
    # What the playbook hands in counts by the settings that it is made of.
    words.difference_update(handed_in)
    words.update(word for text in handed_in.values() for word in _WORD.findall(text))
    known = [name for name in catalogue if name in words and not _NO_INPUT.fullmatch(name)]
    return Names(settings=tuple(sorted(known)), node=tuple(sorted(node)), digest=digest.hexdigest())


@cache
def launcher_sha256() -> str:
    """Hash of the launcher that this version installs."""
    return hashlib.sha256((content.roles() / "engine/files/launcher.py").read_bytes()).hexdigest()


def daemon_json(values: Mapping[str, Any], facts: HostFacts) -> dict[str, Any]:
    """Content of Docker's daemon.json after role `docker_engine`: its own variables, by Ansible's own templates."""
    own = {name: values[name] for name in named_by("docker_engine").settings}
    merged: dict[str, Any] = json.loads(_merged_daemon_json(json.dumps([own, facts.docker.daemon_json])))
    return merged


@cache
def _merged_daemon_json(given: str) -> str:
    """The same from JSON to JSON: most hosts of a fleet are alike, and a template takes 10 ms."""
    from ansible.parsing.dataloader import DataLoader
    from ansible.template import Templar

    values, found = json.loads(given)
    loader = DataLoader()
    path = content.roles() / "docker_engine/vars/main.yml"
    variables = loader.load_from_file(str(path), trusted_as_template=True)
    known = {**values, "dsv3_facts": {"docker": {"daemon_json": found}}, **variables}
    return json.dumps(Templar(loader=loader, variables=known).template(variables["__docker_engine_merged"]))


def image_digest(values: Mapping[str, Any], facts: HostFacts) -> str:
    """Digest that a host is to run as far as it is known before a registry is asked; "" where it is not.

    The rule is role engine_image's (tasks/resolve.yml): the setting, or what the same name was at the last deploy.
    """
    fixed = str(values["engine_image_digest"] or values["engine_image_name"].partition("@")[2])
    if fixed:
        return fixed
    recorded = facts.deployment.image or {}
    if values["engine_image_refresh"] or recorded.get("name") != values["engine_image_name"]:
        return facts.registry.digest if facts.registry else ""
    return str(recorded.get("digest") or (facts.registry.digest if facts.registry else ""))


def _engine_has_keys(node: Mapping[str, Any]) -> bool:
    return node["role"] == "head" and bool(node["serve_file"]["api_keys_file"])


def _recorded(name: str, value: Any, salt: str) -> Any:
    if settings.catalogue()[name].secret and value not in ("", [], {}):
        return "hmac:" + hmac.new(salt.encode(), json.dumps(value).encode(), "sha256").hexdigest()
    return _plain(value)


def _plain(value: Any) -> Any:
    """The value as it comes back from a JSON file."""
    return json.loads(json.dumps(value))


def _files(role: str) -> Iterator[Path]:
    """The files that decide what a role does, those of roles it includes as well."""
    root = content.roles() / role
    texts = []
    for folder in ("tasks", "handlers", "vars", "templates"):
        for path in sorted((root / folder).rglob("*")):
            if path.is_file() and path.name not in _ONLY_LOOKING:
                texts.append(path.read_text(encoding="utf-8"))
                yield path
    for other in sorted({name for text in texts for name in _INCLUDED_ROLE.findall(text)} - {role}):
        yield from _files(other)


@cache
def _handed_in(role: str) -> Mapping[str, str]:
    """The variables that the playbooks hand to a role, as the text of their templates."""
    found: dict[str, str] = {}
    for entry in _role_entries():
        if entry["role"] == role:
            found.update({name: str(text) for name, text in entry.get("vars", {}).items()})
    return found


@cache
def _role_entries() -> Sequence[Mapping[str, Any]]:
    """Where the plays name a role: ``{"role": …, "vars": {name: template}, …}``."""
    plays = [play for path in sorted(content.playbooks().glob("*.yml")) for play in content.read_yaml(path) or ()]
    return [entry for play in plays for entry in play.get("roles", ()) if isinstance(entry, dict)]
