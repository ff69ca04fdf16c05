"""What a deploy would do, replica by replica: actions, drift, downtime, capacity, command.

Pure: facts and settings of all hosts in, plan out. What is to be done on one host is worked out in `comparison`.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from deploy_dsv3 import capacity, fit, preflight
from deploy_dsv3.capacity import Capacity
from deploy_dsv3.comparison import Action, View, actions
from deploy_dsv3.derive import HostInput, derive
from deploy_dsv3.drift import Drift
from deploy_dsv3.errors import EXIT_PLAN_CHANGES
from deploy_dsv3.findings import Finding
from deploy_dsv3.rdma import gpudirect
from deploy_dsv3.topology import Deployment, Replica

SCHEMA = 1


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
    gpudirect: str = ""
    reserved_ports: str = ""
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
    model: str
    endpoint: str
    lock: Mapping[str, Any] | None
    last_run: Mapping[str, Any] | None

    @property
    def actions(self) -> tuple[Action, ...]:
        """The actions of all hosts."""
        return tuple(action for host in self.hosts for action in host.actions)

    @property
    def differs(self) -> bool:
        """Whether anything is to be done, or was changed by hand, on one of the hosts."""
        return any(host.actions or host.drift for host in self.hosts)

    @property
    def calm(self) -> bool:
        """Whether no run is under way, and the last one ended well."""
        return not self.lock and (self.last_run or {}).get("exit_code", 0) == 0


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
    def converged(self) -> bool:
        """Whether a deploy may stop at this: nothing to do, no run under way, and the last one ended well."""
        return self.nothing_to_do and all(replica.calm for replica in self.replicas)

    @property
    def selectable(self) -> bool:
        """Whether running only the roles that have something to do is enough: every host's last deploy is on record
        and the last run ended well.
        """
        return not (self.unreachable or self.errors) and all(
            replica.calm and all(host.recorded for host in replica.hosts) for replica in self.replicas
        )

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
            name: View(known=hosts[name], facts=facts, node=nodes[name], replica=replica)
            for name in replica.hosts
            if (facts := hosts[name].facts) is not None and name in nodes
        }
        replicas.append(_replica(replica, views, fit.work_out(replica, hosts)))
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


def _replica(replica: Replica, views: Mapping[str, View], fits: fit.Answer) -> ReplicaPlan:
    hosts = [
        HostPlan(
            host=name,
            role=view.node.role,
            actions=tuple(actions(view)),
            drift=tuple(view.drift),
            recorded=view.manifest is not None,
            address=view.node.address,
            interface=view.node.interface,
            link_layer=view.node.link_layer,
            gpudirect=gpudirect(view.facts),
            reserved_ports=view.node.reserved_ports,
            environment=view.node.environment,
        )
        for name, view in views.items()
    ]
    head = views.get(replica.head)
    runs = head.facts.deployment.runs if head else ()
    return ReplicaPlan(
        name=replica.name,
        hosts=tuple(hosts),
        downtime=_downtime(head, [action for host in hosts for action in host.actions]),
        capacity=fits.capacity,
        capacity_unknown=fits.unknown,
        command=tuple(head.node.serve_file["argv"]) if head else (),
        model=head.node.served_model if head else "",
        endpoint=head.node.endpoint if head else "",
        lock=head.facts.deployment.lock if head else None,
        last_run=runs[-1] if runs else None,
    )


def _downtime(head: View | None, actions: Iterable[Action]) -> Downtime:
    stops = [action for action in actions if action.stops]
    if head is None or not stops:
        return Downtime(kind="none")
    status = head.facts.deployment.status or {}
    phases = status.get("phases") or ()
    seconds = sum(float(phase["seconds"]) for phase in phases) if phases else None
    running = head.container is not None and head.container.state == "running"
    return Downtime(kind="restart" if running and status.get("phase") == "serving" else "start", seconds=seconds)


def _replica_as_dict(replica: ReplicaPlan) -> dict[str, Any]:
    return {
        "name": replica.name,
        "endpoint": replica.endpoint,
        "model": replica.model,
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
                "gpudirect": host.gpudirect,
                "reserved_ports": host.reserved_ports,
                "environment": dict(host.environment),
                "actions": [asdict(action) for action in host.actions],
                "drift": [one.as_dict() for one in host.drift],
            }
            for host in replica.hosts
        ],
    }
