"""Reads every host's facts in one pass: one round trip each, all at the same time, and nothing is changed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from deploy_dsv3 import observation
from deploy_dsv3.derive import HostInput
from deploy_dsv3.facts import FactsError, load_facts
from deploy_dsv3.network import as_ip


@dataclass(frozen=True, kw_only=True)
class Fleet:
    """What was read.

    Attributes:
        hosts: every host that was asked for; its facts are None where it could not be reached.
        unreachable: why, by host.
        documents: the facts of each host that was reached, as the probe told them.
    """

    hosts: Mapping[str, HostInput]
    unreachable: Mapping[str, str] = field(default_factory=dict)
    documents: Mapping[str, Mapping[str, Any]] = field(default_factory=dict, repr=False)


def probe(settings: Mapping[str, Mapping[str, Any]], connections: Mapping[str, Mapping[str, Any]]) -> Fleet:
    """Read the facts of every host of `connections`.

    Args:
        settings: each host's settings by name, defaults included.
        connections: each host's variables for connecting, see `observation.connections`.
    """
    source = observation.module("dsv3_probe")
    seen = observation.ask(
        connections, {host: observation.carried(source, "probe", arguments(settings[host])) for host in connections}
    )
    hosts: dict[str, HostInput] = {}
    unreachable: dict[str, str] = {}
    for host, answer in seen.items():
        facts = None
        error = answer.error
        if not error:
            try:
                facts = load_facts(answer.seen)
            except FactsError as problem:
                error = str(problem)
        if error:
            unreachable[host] = error
        address = (facts.connection.server_address if facts else "") or observation.connect_address(
            host, connections[host]
        )
        hosts[host] = HostInput(
            host=host,
            facts=facts,
            settings=settings[host],
            connect_address=address if as_ip(address) else "",
        )
    documents = {host: seen[host].seen for host, known in hosts.items() if known.facts}
    return Fleet(hosts=hosts, unreachable=unreachable, documents=documents)


def arguments(settings: Mapping[str, Any]) -> dict[str, Any]:
    """The probe's options for a host: its disks, its model, and the image that it is to run."""
    wanted: dict[str, Any] = {
        "paths": [settings["docker_engine_data_path"], settings["model_weights_path"]],
        "model": settings["model_weights_path"],
    }
    if not settings["engine_image_archive_path"]:
        name = settings["engine_image_name"]
        wanted["image"] = {
            "name": name,
            "digest": settings["engine_image_digest"] or name.partition("@")[2],
            "mirrors": settings["docker_engine_registry_mirrors"],
            "insecure": settings["docker_engine_insecure_registries"],
            "ask": settings["engine_image_refresh"],
        }
    return wanted
