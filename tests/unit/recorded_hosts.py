"""Recorded hosts for the tests of what is derived and judged, and ways to break them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from deploy_dsv3.derive import HostInput
from deploy_dsv3.facts import HcaPort, HostFacts, load_facts
from deploy_dsv3.hostvars import role_defaults
from deploy_dsv3.topology import Replica

RECORDED = Path(__file__).parent / "recorded"
NAMES = sorted(path.stem for path in RECORDED.glob("*.json") if path.stem != "deployed")


def document(name: str) -> dict[str, Any]:
    """The JSON of a recorded host."""
    return json.loads((RECORDED / f"{name}.json").read_text(encoding="utf-8"))


def recorded(name: str, **changes: Any) -> HostFacts:
    """The facts of a recorded host, with top-level sections replaced by `changes` (as JSON)."""
    return load_facts({**document(name), **changes})


def changed_port(facts: HostFacts, device: str, **changes: Any) -> HostFacts:
    """The same host with fields of one HCA's ports changed."""

    def change(port: HcaPort) -> HcaPort:
        return port.model_copy(update=changes) if port.device == device else port

    ports = tuple(change(port) for port in facts.infiniband.ports)
    return facts.model_copy(update={"infiniband": facts.infiniband.model_copy(update={"ports": ports})})


def host_input(host: str, facts: HostFacts | None, connect_address: str = "", **settings: Any) -> HostInput:
    """A host with the roles' default settings, some of them changed."""
    address = connect_address or (facts.connection.server_address if facts else "")
    return HostInput(host=host, facts=facts, settings={**role_defaults(), **settings}, connect_address=address)


def replica_of(*inputs: HostInput) -> tuple[Replica, dict[str, HostInput]]:
    """A replica of these hosts, the first of them the head."""
    names = [known.host for known in inputs]
    return Replica(name="dsv3", head=names[0], workers=tuple(names[1:])), {known.host: known for known in inputs}
