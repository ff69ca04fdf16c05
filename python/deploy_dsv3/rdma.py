"""Which HCA ports each host of a replica uses, and NCCL's settings for them. Pure: facts in, choices out.

The rule, for each host:

1. `rdma_hcas`, if set; every port named must be there and ACTIVE.
2. Else the ACTIVE ports. The link layer and rate with the most bandwidth in sum are the *rails*. A port
   outside of that group is left out when it is plainly not a rail: of another link layer, a bond, the
   interface of the node address or of the default route (management), or an HCA of another model (storage).
   What remains is a rail that is slower than the others; it is used, and named in a warning.

A replica uses RDMA on all of its hosts or on none: an InfiniBand or RoCE queue pair has no counterpart on a
host that uses sockets. InfiniBand and RoCE are not mixed for the same reason.
"""

from __future__ import annotations

import ipaddress
import re
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from .facts import Gid, HcaPort, HostFacts
from .findings import Finding, Severity
from .network import Socket, default_interfaces

LinkLayer = Literal["InfiniBand", "Ethernet", "none"]
GpuDirect = Literal["nvidia-peermem", "dma-buf", "none"]
ROCE_V2 = "RoCE v2"
# The kernel since which RDMA drivers take memory of other devices as a dma-buf.
_DMABUF_SINCE = (5, 12)


@dataclass(frozen=True, kw_only=True)
class RdmaView:
    """One host as the RDMA rules see it, with the operator's `rdma_*` settings."""

    host: str
    facts: HostFacts
    socket: Socket | None = None
    devices: tuple[str, ...] = ()
    hcas: tuple[str, ...] = ()
    gid_index: int = -1
    required: bool = False


@dataclass(frozen=True, kw_only=True)
class Rdma:
    """What a host uses of RDMA. `gid_index` -1 is NCCL's own choice; `enabled` is that of the replica."""

    devices: tuple[str, ...] = ()
    hcas: tuple[str, ...] = ()
    gid_index: int = -1
    link_layer: LinkLayer = "none"
    enabled: bool = False


def choose_rdma(views: Sequence[RdmaView]) -> tuple[dict[str, Rdma], list[Finding]]:
    """Return the choice of each host of one replica, and what is wrong."""
    findings: list[Finding] = []
    rails: dict[str, list[HcaPort]] = {}
    for view in views:
        rails[view.host], found = _named_ports(view) if view.hcas else _rails(view)
        findings += found + _check_devices(view)
    several = len(views) > 1
    if several:
        findings += _compare(views, rails)
    enabled = all(rails[view.host] for view in views)
    if several and not enabled:
        findings += [_disabled(view, rails) for view in views]
    choices = {}
    for view in views:
        ports = rails[view.host]
        choice = Rdma(
            devices=_devices(view),
            hcas=tuple(port_name(port) for port in ports),
            link_layer=_link_layer(ports),
            gid_index=view.gid_index,
            enabled=enabled,
        )
        if enabled and choice.link_layer == "Ethernet" and view.gid_index < 0:
            peers = [port for host, found in rails.items() if host != view.host for port in found]
            index, gid_findings = choose_gid_index(view, ports, peers)
            choice = replace(choice, gid_index=index)
            findings += gid_findings
        choices[view.host] = choice
    return choices, findings


def rdma_environment(rdma: Rdma) -> dict[str, str]:
    """Return NCCL's variables: the exact HCA ports ("=" makes the list exact), or sockets only."""
    if not rdma.enabled:
        return {"NCCL_IB_DISABLE": "1"}
    environment = {"NCCL_IB_HCA": "=" + ",".join(rdma.hcas)}
    if rdma.gid_index >= 0:
        environment["NCCL_IB_GID_INDEX"] = str(rdma.gid_index)
    return environment


def gpudirect(facts: HostFacts) -> GpuDirect:
    """Return how HCAs reach the GPUs' memory without a copy through the host's.

    A dma-buf needs the open kernel modules and a kernel that knows it; NCCL prefers it. The module nvidia-peermem
    is the older way, and needs the peer-memory interface that only MLNX_OFED and DOCA-OFED bring.
    """
    if not facts.infiniband.ports or not facts.driver.loaded_version:
        return "none"
    kernel = tuple(int(number) for number in re.findall(r"\d+", facts.os.kernel)[:2])
    if facts.driver.flavour == "open" and kernel >= _DMABUF_SINCE:
        return "dma-buf"
    return "nvidia-peermem" if "nvidia_peermem" in facts.infiniband.modules else "none"


def port_name(port: HcaPort) -> str:
    """Return a port as NCCL_IB_HCA names it."""
    return f"{port.device}:{port.port}"


def choose_gid_index(view: RdmaView, ports: Sequence[HcaPort], peers: Sequence[HcaPort]) -> tuple[int, list[Finding]]:
    """Return the GID index that fits all RoCE ports of a host, -1 when they need different ones.

    NCCL takes one index for all HCAs of a process; since 2.21 its own choice (-1) looks for a RoCE v2 entry
    on each.
    """
    indices: dict[str, int] = {}
    findings = []
    peer_addresses = [address for port in peers for gid in port.gids if (address := _mapped(gid))]
    for port in ports:
        entries = [gid for gid in port.gids if gid.type.lower() == ROCE_V2.lower()]
        if entries:
            networks = _networks(view.facts, port)
            indices[port_name(port)] = min(
                entries, key=lambda gid: (_gid_rank(gid, networks, peer_addresses), gid.index)
            ).index
            continue
        findings.append(
            Finding(
                code="rdma-gid-none",
                host=view.host,
                severity="error" if view.required else "warning",
                message=f"{view.host}: {port_name(port)} has no RoCE v2 GID",
                cause=f"its interface ({', '.join(port.netdevs) or 'none'}) has no IP address, or RoCE v2 is off",
                remedy="give the interface an address in the fabric's subnet, or leave the port out by rdma_hcas",
            )
        )
    values = set(indices.values())
    if len(values) == 1 and not findings:
        return values.pop(), findings
    if len(values) > 1:
        listed = ", ".join(f"{name} {index}" for name, index in indices.items())
        findings.append(
            Finding(
                code="rdma-gid-mixed",
                host=view.host,
                severity="warning",
                message=f"{view.host}: the RoCE v2 entry has different GID indices ({listed})",
                cause="addresses were added in different order; NCCL_IB_GID_INDEX is one number for all HCAs",
                remedy="nothing with NCCL 2.21 and newer, which looks for the entry itself; else set rdma_gid_index",
            )
        )
    return -1, findings


def _mapped(gid: Gid) -> ipaddress.IPv4Address | None:
    return ipaddress.IPv6Address(gid.gid).ipv4_mapped


def _gid_rank(gid: Gid, networks: Sequence[ipaddress.IPv4Network], peers: Sequence[ipaddress.IPv4Address]) -> int:
    """Return 0 for the entry of a subnet shared with the peers, up to 3 for a link-local one."""
    mapped = _mapped(gid)
    if mapped is None:
        return 3 if ipaddress.IPv6Address(gid.gid).is_link_local else 2
    shared = any(mapped in network and any(peer in network for peer in peers) for network in networks)
    return 0 if shared else 1


def _networks(facts: HostFacts, port: HcaPort) -> list[ipaddress.IPv4Network]:
    names = set(port.netdevs) | {gid.ndev for gid in port.gids}
    return [
        ipaddress.IPv4Network(f"{entry.address}/{entry.prefix}", strict=False)
        for interface in facts.network.interfaces
        if interface.name in names
        for entry in interface.addresses
        if entry.family == "inet"
    ]


def _devices(view: RdmaView) -> tuple[str, ...]:
    names = view.devices or view.facts.infiniband.devices
    return tuple(name if name.startswith("/") else f"/dev/infiniband/{name}" for name in names)


def _check_devices(view: RdmaView) -> list[Finding]:
    """Return an error for each device of `rdma_devices` that the host lacks."""
    present = {f"/dev/infiniband/{name}" for name in view.facts.infiniband.devices}
    missing = [name for name in _devices(view) if name.startswith("/dev/infiniband/") and name not in present]
    if not missing:
        return []
    return [
        Finding(
            code="rdma-device-missing",
            host=view.host,
            severity="error",
            message=f"{view.host}: rdma_devices names {', '.join(missing)}; "
            f"the host has {', '.join(sorted(present)) or 'none'}",
            cause="the list was made for another host, or a driver is not loaded",
            remedy="correct rdma_devices for this host, or leave it empty to pass every entry",
        )
    ]


def _link_layer(ports: Iterable[HcaPort]) -> LinkLayer:
    layers = {port.link_layer for port in ports}
    if not layers:
        return "none"
    return "InfiniBand" if "InfiniBand" in layers else "Ethernet"


def _named_ports(view: RdmaView) -> tuple[list[HcaPort], list[Finding]]:
    """Return the ports of `rdma_hcas` that can be used, and an error for each that cannot."""
    ports, findings = [], []
    for name in view.hcas:
        device, _, number = name.partition(":")
        named = [
            port for port in view.facts.infiniband.ports if port.device == device and number in ("", str(port.port))
        ]
        ports += [port for port in named if port.state == "ACTIVE"]
        inactive = [port for port in named if port.state != "ACTIVE"]
        if named and not inactive:
            continue
        known = ", ".join(map(_describe, view.facts.infiniband.ports)) or "no HCA"
        findings.append(
            Finding(
                code="rdma-hca-unusable",
                host=view.host,
                severity="error",
                message=f"{view.host}: rdma_hcas names {name}, which is "
                + (f"{inactive[0].state} ({inactive[0].phys_state})" if inactive else "not there")
                + f"; the host has {known}",
                cause="the list was made for another host, or the link is down",
                remedy="correct rdma_hcas for this host, or repair the link",
            )
        )
    return ports, findings


def _describe(port: HcaPort) -> str:
    return f"{port_name(port)} {port.state} {port.rate_gbps:g} Gb/s"


def _is_bond(port: HcaPort, facts: HostFacts) -> bool:
    kinds = {interface.name: interface.kind for interface in facts.network.interfaces}
    return "bond" in port.device or any(kinds.get(name) == "bond" for name in port.netdevs)


def _rails(view: RdmaView) -> tuple[list[HcaPort], list[Finding]]:
    """Return the compute rails of a host in the order of their names, and what is wrong with them."""
    active = [port for port in view.facts.infiniband.ports if port.state == "ACTIVE"]
    if active and not view.facts.infiniband.devices:
        names = ", ".join(map(port_name, active))
        return [], [
            Finding(
                code="rdma-devices-none",
                host=view.host,
                severity="error" if view.required else "warning",
                message=f"{view.host}: {names} are ACTIVE, but /dev/infiniband is empty",
                cause="the kernel module ib_uverbs is not loaded",
                remedy="install rdma-core and load ib_uverbs",
            )
        ]
    groups: dict[tuple[str, float], list[HcaPort]] = defaultdict(list)
    for port in active:
        groups[port.link_layer, port.rate_gbps].append(port)
    if not groups:
        return [], []
    (layer, rate), best = max(groups.items(), key=lambda item: (item[0][1] * len(item[1]), item[0][1]))
    models = {port.model for port in best}
    management = default_interfaces(view.facts) | ({view.socket.interface} if view.socket else set())

    def is_rail(port: HcaPort) -> bool:
        return (
            port.link_layer == layer
            and port.model in models
            and not _is_bond(port, view.facts)
            and not management.intersection(port.netdevs)
        )

    rails = [port for port in active if port in best or is_rail(port)]
    findings = [
        Finding(
            code="rdma-rate",
            host=view.host,
            severity="warning",
            message=f"{view.host}: {port_name(port)} runs at {port.rate_gbps:g} Gb/s, the other rails at {rate:g} Gb/s",
            cause="a cable, transceiver or switch port that negotiated another rate",
            remedy="repair the link, or leave the port out by rdma_hcas",
        )
        for port in rails
        if port.rate_gbps != rate
    ]
    return rails, findings


def _inactive_rails(view: RdmaView, rails: Sequence[HcaPort]) -> list[HcaPort]:
    """Return the ports that would be rails if they were ACTIVE: of the rails' link layer and model."""
    kinds = {(port.link_layer, port.model) for port in rails}
    return [
        port
        for port in view.facts.infiniband.ports
        if port.state != "ACTIVE" and (not rails or (port.link_layer, port.model) in kinds)
    ]


def _compare(views: Sequence[RdmaView], rails: Mapping[str, Sequence[HcaPort]]) -> list[Finding]:
    """Return what differs between the hosts of a replica, and every rail that is not ACTIVE."""
    findings: list[Finding] = []
    layers = {view.host: _link_layer(rails[view.host]) for view in views if rails[view.host]}
    if len(set(layers.values())) > 1:
        listed = ", ".join(f"{host} {layer}" for host, layer in layers.items())
        findings += [
            Finding(
                code="rdma-link-layer-mixed",
                host=host,
                severity="error",
                message=f"{host}: InfiniBand and RoCE are mixed in one replica ({listed})",
                cause="queue pairs cannot cross from one fabric to the other",
                remedy="name ports of one fabric in rdma_hcas on every host, or put the hosts into different replicas",
            )
            for host in layers
        ]
    most = max(len(ports) for ports in rails.values())
    rates = {host: ports[0].rate_gbps for host, ports in rails.items() if ports}
    top = max(rates.values(), default=0.0)
    for view in views:
        if view.hcas:
            continue  # the operator named the ports: whatever else is down is left out by choice
        ports = rails[view.host]
        fewer = bool(ports) and len(ports) < most
        down = _inactive_rails(view, ports)
        if down:
            findings += [_port_down(view, port, "error" if fewer else "warning", len(ports), most) for port in down]
        elif fewer:
            findings.append(
                Finding(
                    code="rdma-rails-differ",
                    host=view.host,
                    severity="warning",
                    message=f"{view.host}: {len(ports)} ACTIVE rails, another host of the replica has {most}",
                    cause="the hosts are not alike, or an HCA is missing",
                    remedy="look for the missing HCA, or name the same number of ports on each host in rdma_hcas",
                )
            )
        if ports and rates[view.host] < top:
            findings.append(
                Finding(
                    code="rdma-rate",
                    host=view.host,
                    severity="warning",
                    message=f"{view.host}: rails run at {rates[view.host]:g} Gb/s, "
                    f"those of another host of the replica at {top:g} Gb/s",
                    cause="different HCAs, cables or switch ports",
                    remedy="make the rates equal: the slowest rail sets the pace of the whole replica",
                )
            )
    return findings


def _port_down(view: RdmaView, port: HcaPort, severity: Severity, found: int, most: int) -> Finding:
    waiting = port.state == "INIT"
    return Finding(
        code="rdma-port-down",
        host=view.host,
        severity=severity,
        message=f"{view.host}: {port_name(port)} is {port.state} ({port.phys_state or 'no physical state'})"
        + (f": {found} ACTIVE rails, another host has {most}" if severity == "error" else ""),
        cause="no subnet manager answers" if waiting else "cable, transceiver or switch port, or an unused port",
        remedy=("start a subnet manager on the fabric" if waiting else "repair the link")
        + ", or name the ports to use in rdma_hcas to go on without it",
    )


def _disabled(view: RdmaView, rails: Mapping[str, Sequence[HcaPort]]) -> Finding:
    without = [host for host, ports in rails.items() if not ports]
    has_none = view.host in without
    return Finding(
        code="rdma-none",
        host=view.host,
        severity="error" if view.required else "warning",
        message=f"{view.host}: "
        + (
            "no usable RDMA port: the whole replica falls back to TCP sockets (NCCL_IB_DISABLE=1)"
            if has_none
            else f"RDMA is not used because {', '.join(without)} has none (NCCL_IB_DISABLE=1)"
        ),
        cause="no HCA, no driver, no ACTIVE link or no device file on the host named",
        remedy="repair RDMA there; over sockets tensor parallelism across hosts is many times slower",
    )
