"""Which address and interface each host of a replica uses toward the others. Pure: facts in, choices out.

The rule, for each host of a replica:

1. `node_network_address` or `node_network_interface`, if set.
2. The address Ansible connects to, if it is on the host.
3. An address in a subnet of the hosts already decided; else the interface of the route toward them.
4. With nothing decided yet: the subnet that most hosts share; among equals the one of the default route.

Loopback and link-local addresses are never used. Bridges and tunnels of container engines, hypervisors and
VPNs (docker0, br-…, virbr0, veth…, cni0, tun0, …) are used only if an operator names them.
"""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from .facts import HostFacts, Interface, Route
from .findings import Finding

IPAddress = ipaddress.IPv4Address | ipaddress.IPv6Address
IPNetwork = ipaddress.IPv4Network | ipaddress.IPv6Network

# Interfaces that container engines, hypervisors and VPNs make; a host's own NICs have other names.
_LOCAL_ONLY = re.compile(
    r"(docker|br-|virbr|vnet|veth|vmnet|cni|flannel|cali|cilium|lxc|lxdbr|kube-|nodelocaldns|podman|nerdctl"
    r"|tun|tap|wg|tailscale|zt|dummy|ifb|vxlan|geneve)"
)
# Among otherwise equal interfaces: wires before software, IPoIB last (it is the data fabric).
_KIND_RANK = {"physical": 0, "bond": 0, "vlan": 0, "bridge": 1, "virtual": 2, "infiniband": 3, "loopback": 4}


@dataclass(frozen=True, kw_only=True)
class HostView:
    """One host as the network rules see it.

    `connect_address` is the IP address that Ansible connects to, empty when it is not known; `interface` and
    `address` are the operator's `node_network_interface` and `node_network_address`.
    """

    host: str
    facts: HostFacts
    connect_address: str = ""
    interface: str = ""
    address: str = ""


@dataclass(frozen=True, kw_only=True)
class Socket:
    """The address and interface a host uses for Ray, the rendezvous and NCCL's and Gloo's sockets."""

    address: str
    interface: str


@dataclass(frozen=True, kw_only=True)
class _Candidate:
    address: IPAddress
    network: IPNetwork
    interface: Interface
    default_route: bool

    @property
    def rank(self) -> tuple[bool, int, int, str]:
        """Sort key among equals: the default route's interface, then by kind, IPv4 before IPv6."""
        kind = _KIND_RANK[self.interface.kind]
        return (not self.default_route, kind, self.address.version, self.interface.name)

    def socket(self) -> Socket:
        return Socket(address=str(self.address), interface=self.interface.name)


def host_port(address: str, port: int) -> str:
    """Return "address:port", IPv6 in brackets."""
    return f"[{address}]:{port}" if ":" in address else f"{address}:{port}"


def as_ip(text: str) -> IPAddress | None:
    """Return the address that `text` is, None when it is a name or empty."""
    try:
        return ipaddress.ip_address(text)
    except ValueError:
        return None


def default_interfaces(facts: HostFacts) -> set[str]:
    """Return the interfaces of the default routes."""
    return {route.interface for route in facts.network.routes if route.destination in ("0.0.0.0/0", "::/0")}


def choose_sockets(views: Sequence[HostView]) -> tuple[dict[str, Socket], list[Finding]]:
    """Return the socket choice of each host of one replica, and what is wrong.

    A host without a usable address is missing from the result and has an error among the findings.
    """
    candidates = {view.host: _candidates(view.facts) for view in views}
    chosen: dict[str, _Candidate] = {}
    findings: list[Finding] = []
    open_views = []
    for view in views:
        if view.interface or view.address:
            override = _override(view)
            if isinstance(override, Finding):
                findings.append(override)
            else:
                chosen[view.host] = override
            continue
        connect = as_ip(view.connect_address)
        direct = [c for c in candidates[view.host] if c.address == connect]
        if direct:
            chosen[view.host] = direct[0]
        else:
            open_views.append(view)
    for view in open_views:
        best = _best(view, candidates, chosen)
        if best is None:
            findings.append(_no_address(view))
        else:
            chosen[view.host] = best
    findings += _conflicts(chosen)
    return {host: candidate.socket() for host, candidate in chosen.items()}, findings


def socket_environment(socket: Socket) -> dict[str, str]:
    """Return the variables that pin NCCL's and Gloo's sockets to the interface.

    NCCL reads a list of prefixes, "=" makes it exact; Gloo knows exact names only.
    """
    return {"NCCL_SOCKET_IFNAME": f"={socket.interface}", "GLOO_SOCKET_IFNAME": socket.interface}


def _usable(address: IPAddress) -> bool:
    return not (address.is_loopback or address.is_link_local or address.is_multicast or address.is_unspecified)


def _addresses(interface: Interface) -> Iterable[tuple[IPAddress, IPNetwork]]:
    for entry in interface.addresses:
        address = ipaddress.ip_address(entry.address)
        if _usable(address):
            yield address, ipaddress.ip_network(f"{entry.address}/{entry.prefix}", strict=False)


def _candidates(facts: HostFacts) -> list[_Candidate]:
    defaults = default_interfaces(facts)
    found = [
        _Candidate(address=address, network=network, interface=interface, default_route=interface.name in defaults)
        for interface in facts.network.interfaces
        if interface.kind != "loopback" and interface.operstate != "down" and not _LOCAL_ONLY.match(interface.name)
        for address, network in _addresses(interface)
    ]
    return sorted(found, key=lambda candidate: candidate.rank)


def _override(view: HostView) -> _Candidate | Finding:
    """Return what the operator named, or why it cannot be used."""
    key = "node_network_address" if view.address else "node_network_interface"
    value = view.address or view.interface

    def refuse(code: str, found: str, remedy: str) -> Finding:
        return Finding(
            code=code,
            host=view.host,
            severity="error",
            message=f"{view.host}: {key} is {value!r}, {found}",
            cause="the setting does not fit this host",
            remedy=remedy,
        )

    wanted = as_ip(view.address)
    if wanted is not None and not _usable(wanted):
        return refuse(
            "address-unusable",
            "which other hosts cannot reach",
            "name an address of the host's network: neither loopback nor link-local",
        )
    present = [
        _Candidate(address=address, network=network, interface=interface, default_route=False)
        for interface in view.facts.network.interfaces
        for address, network in _addresses(interface)
    ]
    named = view.interface
    if named and named not in {interface.name for interface in view.facts.network.interfaces}:
        names = ", ".join(i.name for i in view.facts.network.interfaces if i.kind != "loopback")
        return refuse("interface-missing", f"and the host has no interface {named}", f"name one of: {names or 'none'}")
    fitting = [
        c for c in present if (not view.address or c.address == wanted) and (not named or c.interface.name == named)
    ]
    if fitting:
        return min(fitting, key=lambda candidate: candidate.address.version)
    where = f"on {named}" if named else "on the host"
    return refuse(
        "address-missing",
        f"and there is no such usable address {where}",
        f"the host has {_list_addresses(view.facts)}",
    )


def _best(
    view: HostView, candidates: Mapping[str, Sequence[_Candidate]], chosen: Mapping[str, _Candidate]
) -> _Candidate | None:
    own = candidates[view.host]
    if not own:
        return None
    peers = [candidate.address for host, candidate in chosen.items() if host != view.host]
    if peers:
        near = {c.address: sum(peer in c.network for peer in peers) for c in own}
        best = max(own, key=lambda c: near[c.address])  # the first of equals: `own` is sorted by rank
        return best if near[best.address] else _routed(view.facts, own, peers)
    others = [found for host, found in candidates.items() if host != view.host]
    shared = {c.address: sum(any(o.network == c.network for o in found) for found in others) for c in own}
    return max(own, key=lambda c: shared[c.address])


def _routed(facts: HostFacts, own: Sequence[_Candidate], peers: Sequence[IPAddress]) -> _Candidate | None:
    """Return the address on the interface through which the first reachable peer is routed."""
    for peer in peers:
        route = find_route(facts.network.routes, peer)
        if route is None:
            continue
        there = [c for c in own if c.interface.name == route.interface and c.address.version == peer.version]
        preferred = [c for c in there if str(c.address) == route.source]
        if there:
            return (preferred or there)[0]
    return None


def find_route(routes: Iterable[Route], address: IPAddress) -> Route | None:
    """Return the route that the kernel takes to `address`: the longest prefix, then the lowest metric."""
    matching = []
    for route in routes:
        network = ipaddress.ip_network(route.destination, strict=False)
        if network.version == address.version and address in network:
            matching.append((-network.prefixlen, route.metric, route))
    return min(matching, key=lambda entry: entry[:2])[2] if matching else None


def _conflicts(chosen: Mapping[str, _Candidate]) -> list[Finding]:
    findings = []
    owners: dict[IPAddress, str] = {}
    for host, candidate in chosen.items():
        first = owners.setdefault(candidate.address, host)
        if first != host:
            findings.append(
                Finding(
                    code="address-duplicate",
                    host=host,
                    severity="error",
                    message=f"{host}: node address {candidate.address} is also that of {first}",
                    cause="one machine is listed under two names, or two machines have one address",
                    remedy="list each machine once; set node_network_address where hosts share an address",
                )
            )
    versions = {candidate.address.version for candidate in chosen.values()}
    if len(versions) > 1:
        listed = ", ".join(f"{host} {candidate.address}" for host, candidate in chosen.items())
        findings += [
            Finding(
                code="address-family-mixed",
                host=host,
                severity="error",
                message=f"{host}: IPv4 and IPv6 node addresses are mixed in one replica ({listed})",
                cause="Ray and NCCL need one address family",
                remedy="set node_network_address on the hosts that should use the other family",
            )
            for host in chosen
        ]
    return findings


def _list_addresses(facts: HostFacts) -> str:
    listed = [
        f"{address} ({interface.name})"
        for interface in facts.network.interfaces
        for address, _ in _addresses(interface)
    ]
    return ", ".join(listed) or "no usable address"


def _no_address(view: HostView) -> Finding:
    return Finding(
        code="address-none",
        host=view.host,
        severity="error",
        message=f"{view.host}: no address toward the other hosts of the replica; it has {_list_addresses(view.facts)}",
        cause="only loopback, link-local or virtual interfaces are up, or no route leads to the other hosts",
        remedy="configure the host's network, or set node_network_address for this host",
    )
