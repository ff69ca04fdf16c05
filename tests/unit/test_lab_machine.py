"""What the lab reads of its machine, and where it puts things."""

from __future__ import annotations

import pytest

from deploy_dsv3.lab import bringup, machine, network
from deploy_dsv3.lab.errors import LabError, LabUsageError

TARGETS = [
    "http://mirror.example/debian/ bookworm main",
    "http://mirror.example/debian/ bookworm-updates main",
    "http://mirror.example/debian-security/ bookworm-security main",
]


def test_mirror_is_the_one_of_the_machine_with_the_options_it_needs() -> None:
    dump = [
        'Acquire::http::Proxy "http://proxy.example:3128";',
        'Acquire::Check-Date "false";',
        'Acquire::GzipIndexes "true";',
        'APT::Architecture "amd64";',
    ]
    found = machine.parse_apt(TARGETS, dump)
    assert found.archive == "http://mirror.example/debian/"
    assert found.security == "http://mirror.example/debian-security/"
    assert found.options == {
        "Acquire::http::Proxy": "http://proxy.example:3128",
        "Acquire::Check-Date": "false",
    }
    assert found.sources("trixie").splitlines() == [
        "deb http://mirror.example/debian/ trixie main",
        "deb http://mirror.example/debian/ trixie-updates main",
        "deb http://mirror.example/debian-security/ trixie-security main",
    ]
    assert 'Acquire::Check-Date "false";' in found.configuration()


def test_explicit_mirror_wins_and_takes_no_security_archive_of_another() -> None:
    found = machine.parse_apt(TARGETS, [], "https://other.example/debian")
    assert (found.archive, found.security) == ("https://other.example/debian/", "")


@pytest.mark.parametrize(
    "targets",
    [
        [],
        ["http://mirror.example/ubuntu/ noble main"],
        ["file:/srv/debian/ trixie main"],
        ["http://mirror.example/debian/ trixie contrib"],
    ],
)
def test_no_mirror_of_debian_is_told_apart(targets: list[str]) -> None:
    assert machine.parse_apt(targets, []).archive == ""


def test_capabilities_are_those_of_the_bounding_set() -> None:
    everything = f"CapBnd:\t{(1 << 38) - 1:016x}\n"
    assert machine.capabilities(everything) == list(machine.CAPABILITIES)
    without = f"CapBnd:\t{((1 << 38) - 1) & ~(1 << 24):016x}\n"
    assert set(machine.CAPABILITIES) - set(machine.capabilities(without)) == {"SYS_RESOURCE"}
    assert machine.capabilities("CapBnd:\t0000000000000001\n") == ["CHOWN"]


@pytest.mark.parametrize(
    ("mounts", "found"),
    [
        ("cgroup2 /sys/fs/cgroup cgroup2 rw 0 0\n", "/sys/fs/cgroup"),
        (
            "cgroup /sys/fs/cgroup/cpu cgroup rw 0 0\ncgroup2 /sys/fs/cgroup/unified cgroup2 rw 0 0\n",
            "/sys/fs/cgroup/unified",
        ),
        ("none /mnt/cgroup2 cgroup2 rw 0 0\n", "/mnt/cgroup2"),
    ],
)
def test_cgroup2_tree_is_found_alone_or_beside_v1(mounts: str, found: str) -> None:
    assert str(machine.cgroup2_mount(mounts)) == found


def test_machine_without_cgroup2_gets_a_remedy() -> None:
    with pytest.raises(LabError) as refusal:
        machine.cgroup2_mount("cgroup /sys/fs/cgroup/cpu cgroup rw 0 0\n")
    assert "mount -t cgroup2" in refusal.value.remedy


def test_no_more_hosts_than_the_machine_carries() -> None:
    bringup.refuse_too_many(14, memory_gib=24, inotify_instances=128)
    with pytest.raises(LabUsageError) as refusal:
        bringup.refuse_too_many(24, memory_gib=24, inotify_instances=128)
    assert "24 hosts need about 216 inotify instances" in refusal.value.message
    assert "sysctl -w fs.inotify.max_user_instances=432" in refusal.value.remedy
    with pytest.raises(LabUsageError, match="28 GiB"):
        bringup.refuse_too_many(40, memory_gib=24, inotify_instances=8192)


def test_inotify_instances_are_those_of_this_machine() -> None:
    assert machine.inotify_instances() > 0


def test_subnet_is_the_same_for_a_name_and_avoids_what_is_taken() -> None:
    first = network.choose_subnet("lab", [])
    assert first == network.choose_subnet("lab", ["192.0.2.0/24"])
    assert first != network.choose_subnet("lab", [first])
    assert network.choose_subnet("other", []) != first
    assert network.choose_subnet("lab", ["198.18.0.0/17"]) == "198.18.128.0/24"


def test_no_free_subnet_is_an_error() -> None:
    with pytest.raises(LabError, match="free"):
        network.choose_subnet("lab", ["198.18.0.0/15"])


def test_addresses_of_hosts_and_services_never_meet() -> None:
    subnet = "198.18.7.0/24"
    addresses = [network.packages_address(subnet), network.registry_address(subnet)]
    addresses += [network.host_address(subnet, number) for number in range(1, network.MAX_HOSTS + 1)]
    assert len(set(addresses)) == len(addresses)
    assert addresses[2] == "198.18.7.11"
    assert "198.18.7.1" not in addresses, "the gateway's"
