"""The hosts as they are and as they should be: what the suites compare."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from deploy_dsv3 import derive, observation
from deploy_dsv3.derive import HostInput, NodePlan
from deploy_dsv3.facts import HostFacts, load_facts
from deploy_dsv3.findings import Finding
from deploy_dsv3.observation import Observation
from deploy_dsv3.topology import Replica
from deploy_dsv3.verification import Expectations


@dataclass(frozen=True, kw_only=True)
class Node:
    """One host. `facts` and `plan` are None where it, or the head of its replica, could not be looked at."""

    name: str
    replica: Replica
    settings: Mapping[str, Any] = field(repr=False)
    observation: Observation
    facts: HostFacts | None = field(repr=False)
    plan: NodePlan | None
    findings: tuple[Finding, ...]

    @property
    def role(self) -> str:
        """``head`` or ``worker``."""
        return "head" if self.name == self.replica.head else "worker"

    @property
    def seen(self) -> Mapping[str, Any]:
        """What the observer read on the host."""
        return self.observation.seen

    @property
    def container(self) -> Mapping[str, Any]:
        """``docker inspect`` of the engine's container."""
        return self.observation.container

    @property
    def environment(self) -> dict[str, str]:
        """Environment of the engine's container."""
        return dict(entry.split("=", 1) for entry in self.container["Config"]["Env"])

    @property
    def release(self) -> Mapping[str, Any]:
        """The release that the deployment recorded on this host."""
        return self.observation.document("release")


@dataclass(frozen=True, kw_only=True)
class Fleet:
    """Every host of the deployment by name."""

    nodes: Mapping[str, Node]

    def of(self, replica: Replica) -> list[Node]:
        """The hosts of a replica that could be looked at, the head first."""
        return [self.nodes[host] for host in replica.hosts if self.nodes[host].observation.reached]


def look(expectations: Expectations) -> Fleet:
    """Look at all hosts and derive from what they are what each should be, as a deployment would now."""
    seen = observation.look(expectations.connections, expectations.settings, deep=True, facts=expectations.facts)
    nodes = {}
    for replica in expectations.deployment.replicas:
        inputs = {
            host: HostInput(
                host=host,
                facts=_facts(seen[host]),
                settings=expectations.settings[host],
                connect_address=observation.connect_address(host, expectations.connections[host]),
            )
            for host in replica.hosts
        }
        plans, findings = derive.derive(replica, inputs)
        for host in replica.hosts:
            nodes[host] = Node(
                name=host,
                replica=replica,
                settings=expectations.settings[host],
                observation=seen[host],
                facts=inputs[host].facts,
                plan=plans.get(host),
                findings=tuple(finding for finding in findings if finding.host == host),
            )
    return Fleet(nodes=nodes)


def _facts(seen: Observation) -> HostFacts | None:
    document = seen.seen.get("facts")
    return load_facts(document) if document else None
