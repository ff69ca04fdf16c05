"""The kernel's list of reserved ports, and which ports a host needs."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from recorded_hosts import host_input, recorded, replica_of

from deploy_dsv3 import ports
from deploy_dsv3.derive import derive
from deploy_dsv3.facts import HostFacts, State


@given(st.sets(st.integers(1, 65535), max_size=60))
def test_a_list_reads_as_it_was_written(found: set[int]) -> None:
    assert ports.parse(ports.to_text(found)) == found


@pytest.mark.parametrize(
    ("found", "text"),
    [
        ([], ""),
        ([8000], "8000"),
        ([6380, 6379, 8000, 6381], "6379-6381,8000"),
        ([1, 3, 2, 5], "1-3,5"),
    ],
)
def test_neighbours_are_joined_as_the_kernel_does(found: list[int], text: str) -> None:
    assert ports.to_text(found) == text


def reserved(found: str, **settings: object) -> tuple[set[int], set[int]]:
    """What a head and a worker reserve where `found` is reserved already."""

    def facts(name: str) -> HostFacts:
        return recorded(name).model_copy(update={"state": State(sysctls={ports.SYSCTL: found})})

    replica, hosts = replica_of(*(host_input(name, facts(name), **settings) for name in ("h800-ib-1", "h800-ib-2")))
    plans, _ = derive(replica, hosts)
    head, worker = (ports.parse(plans[name].reserved_ports) for name in replica.hosts)
    return head, worker


def test_a_head_reserves_what_it_alone_listens_on() -> None:
    head, worker = reserved("")
    assert {6379, 8000, 23333} <= head - worker
    assert {6380, 10002, 10999} <= head & worker


def test_what_others_reserved_stays_reserved() -> None:
    head, worker = reserved("3306,50000-50009")
    assert {3306, *range(50000, 50010)} <= head & worker


def test_ports_follow_the_settings() -> None:
    head, _ = reserved("", endpoint_port=8443, ray_cluster_max_worker_port=10800)
    assert 8443 in head and 8000 not in head and 10900 not in head
    assert reserved("", endpoint_mode="direct")[0].isdisjoint({8000})


def test_none_are_reserved_where_that_is_not_wanted() -> None:
    assert reserved("3306", node_network_reserve_ports=False) == (set(), set())
