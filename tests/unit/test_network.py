"""The node address and socket interface of recorded hosts, and what is refused."""

from __future__ import annotations

from ipaddress import ip_address
from typing import Any

import pytest
from recorded_hosts import recorded

from deploy_dsv3.facts import HostFacts, load_facts
from deploy_dsv3.network import (
    HostView,
    Socket,
    choose_sockets,
    find_route,
    host_port,
    socket_environment,
)


def nic(name: str, *addresses: str, kind: str = "physical", state: str = "up") -> dict[str, Any]:
    """An interface with addresses in CIDR notation."""
    entries = []
    for text in addresses:
        address, _, prefix = text.partition("/")
        family = "inet6" if ":" in address else "inet"
        entries.append({"address": address, "prefix": int(prefix), "family": family})
    return {"name": name, "kind": kind, "operstate": state, "addresses": entries}


def made(*interfaces: dict[str, Any], routes: tuple[tuple[str, str], ...] = ()) -> HostFacts:
    """A host with these interfaces and (destination, interface) routes."""
    network = {
        "interfaces": [nic("lo", "127.0.0.1/8", "::1/128", kind="loopback"), *interfaces],
        "routes": [{"destination": destination, "interface": name} for destination, name in routes],
    }
    return load_facts({"schema": 1, "network": network})


def choose(*views: HostView) -> dict[str, Socket]:
    """The sockets of hosts with which nothing is wrong."""
    sockets, findings = choose_sockets(views)
    assert findings == []
    return sockets


def refused(*views: HostView) -> tuple[dict[str, Socket], dict[str, str]]:
    """The sockets, and the messages of the errors by code."""
    sockets, findings = choose_sockets(views)
    assert all(finding.severity == "error" and finding.remedy for finding in findings)
    return sockets, {finding.code: finding.message for finding in findings}


@pytest.mark.parametrize(
    ("name", "connect", "address", "interface"),
    [
        ("h800-ib-1", "192.0.2.11", "192.0.2.11", "eno1"),
        ("h20-roce-1", "192.0.2.21", "192.0.2.21", "bond0"),
        ("l20-pcie", "192.0.2.31", "192.0.2.31", "enp65s0f0"),
        # Behind NAT: the address that Ansible uses is not on the host, the default route decides.
        ("cloud-vm", "198.51.100.77", "192.0.2.41", "enp1s0"),
        ("cloud-vm", "", "192.0.2.41", "enp1s0"),
        # Docker's, libvirt's and the VPN's addresses are not taken, even if Ansible came in there.
        ("cloud-vm", "203.0.113.1", "192.0.2.41", "enp1s0"),
        ("cloud-vm", "127.0.0.1", "192.0.2.41", "enp1s0"),
        ("cloud-vm", "2001:db8:0:1::41", "2001:db8:0:1::41", "enp1s0"),
    ],
)
def test_single_recorded_hosts(name: str, connect: str, address: str, interface: str) -> None:
    view = HostView(host="a", facts=recorded(name), connect_address=connect)
    assert choose(view) == {"a": Socket(address=address, interface=interface)}


def test_two_recorded_hosts_meet_on_the_management_network() -> None:
    views = [HostView(host=name, facts=recorded(name)) for name in ("h800-ib-1", "h800-ib-2")]
    assert {host: socket.interface for host, socket in choose(*views).items()} == {
        "h800-ib-1": "eno1",
        "h800-ib-2": "eno1",
    }


def test_the_others_follow_the_host_whose_address_is_known() -> None:
    both = ("eth0", "198.51.100.{}/24"), ("eth1", "192.0.2.{}/24")
    hosts = [made(*(nic(name, cidr.format(n)) for name, cidr in both), routes=(("0.0.0.0/0", "eth0"),)) for n in (1, 2)]
    sockets = choose(
        HostView(host="a", facts=hosts[0], connect_address="192.0.2.1"), HostView(host="b", facts=hosts[1])
    )
    assert sockets["b"] == Socket(address="192.0.2.2", interface="eth1")


def test_the_shared_subnet_wins_over_the_default_route() -> None:
    first = made(nic("eth0", "198.51.100.1/25"), nic("eth1", "192.0.2.1/24"), routes=(("0.0.0.0/0", "eth0"),))
    second = made(nic("eth0", "198.51.100.129/25"), nic("eth1", "192.0.2.2/24"), routes=(("0.0.0.0/0", "eth0"),))
    sockets = choose(HostView(host="a", facts=first), HostView(host="b", facts=second))
    assert {socket.address for socket in sockets.values()} == {"192.0.2.1", "192.0.2.2"}


def test_routed_networks_take_the_interface_of_the_route() -> None:
    far = made(
        nic("eth0", "198.51.100.1/24"),
        nic("eth1", "203.0.113.1/24"),
        routes=(("0.0.0.0/0", "eth0"), ("192.0.2.0/24", "eth1")),
    )
    near = made(nic("eth0", "192.0.2.1/24"))
    sockets = choose(HostView(host="a", facts=near, connect_address="192.0.2.1"), HostView(host="b", facts=far))
    assert sockets["b"] == Socket(address="203.0.113.1", interface="eth1")


@pytest.mark.parametrize(
    "name",
    ["docker0", "br-5f1d0a7be0c2", "veth1", "virbr0", "cni0", "tun0", "wg0", "tailscale0", "podman1", "ifb0"],
)
def test_interfaces_of_container_engines_and_vpns_are_not_taken(name: str) -> None:
    sockets, messages = refused(HostView(host="a", facts=made(nic(name, "192.0.2.1/24", kind="virtual"))))
    assert sockets == {}
    assert "192.0.2.1" in messages["address-none"]


def test_the_veth_of_a_container_host_is_taken_by_its_ordinary_name() -> None:
    view = HostView(host="a", facts=made(nic("eth0", "192.0.2.1/24", kind="virtual")))
    assert choose(view)["a"].interface == "eth0"


@pytest.mark.parametrize(
    "interface",
    [
        nic("eth0", "169.254.10.1/16"),
        nic("eth0", "fe80::1/64"),
        nic("eth0", "192.0.2.1/24", state="down"),
        nic("eth0"),
    ],
)
def test_hosts_without_a_usable_address_are_refused(interface: dict[str, Any]) -> None:
    sockets, messages = refused(HostView(host="gpu7", facts=made(interface)))
    assert sockets == {}
    assert "gpu7" in messages["address-none"]


def test_no_route_to_the_others_is_refused() -> None:
    alone = made(nic("eth0", "198.51.100.1/24"))
    sockets, messages = refused(
        HostView(host="a", facts=made(nic("eth0", "192.0.2.1/24")), connect_address="192.0.2.1"),
        HostView(host="b", facts=alone),
    )
    assert set(sockets) == {"a"}
    assert "b" in messages["address-none"] and "198.51.100.1 (eth0)" in messages["address-none"]


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ({"address": "198.51.100.11"}, Socket(address="198.51.100.11", interface="ens7np0")),
        ({"interface": "ens7np0"}, Socket(address="198.51.100.11", interface="ens7np0")),
        (
            {"interface": "eno1", "address": "192.0.2.11"},
            Socket(address="192.0.2.11", interface="eno1"),
        ),
    ],
)
def test_the_operator_decides(override: dict[str, str], expected: Socket) -> None:
    view = HostView(host="a", facts=recorded("h800-ib-1"), connect_address="192.0.2.11", **override)
    assert choose(view)["a"] == expected


def test_a_bridge_can_be_named() -> None:
    assert choose(HostView(host="a", facts=recorded("cloud-vm"), interface="wg0"))["a"].address == "198.51.100.200"


@pytest.mark.parametrize(
    ("override", "code", "said"),
    [
        ({"address": "192.0.2.99"}, "address-missing", "192.0.2.99"),
        ({"address": "127.0.0.1"}, "address-unusable", "127.0.0.1"),
        ({"address": "fe80::1"}, "address-unusable", "fe80::1"),
        ({"interface": "eth9"}, "interface-missing", "eth9"),
        ({"interface": "ib0"}, "address-missing", "ib0"),
        ({"interface": "lo"}, "address-missing", "lo"),
        ({"interface": "eno1", "address": "198.51.100.11"}, "address-missing", "198.51.100.11"),
        ({"address": "gpu-01.example.com"}, "address-missing", "gpu-01.example.com"),
    ],
)
def test_overrides_that_do_not_fit_are_refused(override: dict[str, str], code: str, said: str) -> None:
    sockets, messages = refused(HostView(host="gpu1", facts=recorded("h800-ib-1"), **override))
    assert sockets == {}
    assert "gpu1" in messages[code] and said in messages[code]


def test_one_address_on_two_hosts_is_refused() -> None:
    facts = recorded("h800-ib-1")
    _, messages = refused(
        HostView(host="a", facts=facts, connect_address="192.0.2.11"),
        HostView(host="b", facts=facts, connect_address="192.0.2.11"),
    )
    assert "a" in messages["address-duplicate"] and "b" in messages["address-duplicate"]


def test_ipv4_and_ipv6_are_not_mixed() -> None:
    _, findings = choose_sockets(
        [
            HostView(host="a", facts=recorded("h800-ib-1"), connect_address="192.0.2.11"),
            HostView(host="b", facts=recorded("cloud-vm"), connect_address="2001:db8:0:1::41"),
        ]
    )
    assert [(finding.code, finding.host) for finding in findings] == [
        ("address-family-mixed", "a"),
        ("address-family-mixed", "b"),
    ]


@pytest.mark.parametrize(
    ("address", "interface"),
    [
        ("203.0.113.40", "br-5f1d0a7be0c2"),  # the longer of two prefixes
        ("203.0.113.5", "docker0"),
        ("198.51.100.9", "enp1s0"),
    ],
)
def test_routes_as_the_kernel_takes_them(address: str, interface: str) -> None:
    route = find_route(recorded("cloud-vm").network.routes, ip_address(address))
    assert route is not None and route.interface == interface


def test_no_route_of_the_other_address_family() -> None:
    assert find_route(recorded("cloud-vm").network.routes, ip_address("2001:db8::1")) is None


def test_what_the_engine_is_told() -> None:
    assert socket_environment(Socket(address="192.0.2.11", interface="eno1")) == {
        "NCCL_SOCKET_IFNAME": "=eno1",
        "GLOO_SOCKET_IFNAME": "eno1",
    }
    assert host_port("192.0.2.1", 6379) == "192.0.2.1:6379"
    assert host_port("2001:db8::1", 6379) == "[2001:db8::1]:6379"
