"""HCA ports, devices and GID indices of recorded hosts, and what is said of broken ones."""

from __future__ import annotations

from typing import Any

import pytest
from recorded_hosts import changed_port, recorded

from deploy_dsv3.facts import HostFacts
from deploy_dsv3.findings import Finding
from deploy_dsv3.network import Socket
from deploy_dsv3.rdma import Rdma, RdmaView, choose_rdma, gpudirect, rdma_environment

IB_1 = tuple(f"mlx5_{n}:1" for n in range(8))
IB_2 = tuple(f"ibp{n}s0:1" for n in (24, 42, 58, 93, 154, 171, 186, 219))


def view(host: str, facts: HostFacts, **settings: Any) -> RdmaView:
    """A host whose node address is the one that SSH came in on."""
    interface = next(
        interface.name
        for interface in facts.network.interfaces
        for entry in interface.addresses
        if entry.address in (facts.connection.server_address, "192.0.2.41")
    )
    address = facts.connection.server_address
    return RdmaView(host=host, facts=facts, socket=Socket(address=address, interface=interface), **settings)


def pair(first: HostFacts, second: HostFacts, **settings: Any) -> tuple[Rdma, Rdma, list[Finding]]:
    """The choices of two hosts of a replica, and all findings; `settings` are the second host's."""
    choices, findings = choose_rdma([view("a", first), view("b", second, **settings)])
    return choices["a"], choices["b"], findings


def codes(findings: list[Finding], severity: str = "error") -> list[tuple[str, str]]:
    """(code, host) of the findings of a severity."""
    return [(finding.code, finding.host) for finding in findings if finding.severity == severity]


def test_infiniband_rails_without_the_storage_hca() -> None:
    first, second, findings = pair(recorded("h800-ib-1"), recorded("h800-ib-2"))
    assert findings == []
    assert (first.hcas, second.hcas) == (IB_1, IB_2)
    assert first.link_layer == second.link_layer == "InfiniBand"
    assert rdma_environment(second) == {"NCCL_IB_HCA": "=" + ",".join(IB_2)}


def test_every_entry_is_a_device() -> None:
    first, _, _ = pair(recorded("h800-ib-1"), recorded("h800-ib-2"))
    assert len(first.devices) == 26
    assert {"/dev/infiniband/uverbs0", "/dev/infiniband/uverbs8", "/dev/infiniband/rdma_cm"} < set(first.devices)


def test_roce_rails_without_the_management_bond_and_the_index_of_the_shared_subnet() -> None:
    first, second, findings = pair(recorded("h20-roce-1"), recorded("h20-roce-2"))
    assert findings == []
    assert first.hcas == second.hcas == tuple(f"mlx5_{n}:1" for n in range(8))
    assert first.link_layer == "Ethernet"
    # The second host's addresses were added in the other order.
    assert (first.gid_index, second.gid_index) == (3, 5)
    assert rdma_environment(second)["NCCL_IB_GID_INDEX"] == "5"


def test_a_lone_roce_host_takes_the_first_ipv4_entry() -> None:
    choices, findings = choose_rdma([view("a", recorded("h20-roce-2"))])
    assert choices["a"].gid_index == 3 and findings == []


def test_differing_indices_leave_the_choice_to_nccl() -> None:
    facts = recorded("h20-roce-1")
    gids = next(port for port in facts.infiniband.ports if port.device == "mlx5_5").gids
    swapped = {3: 5, 5: 3, 2: 4, 4: 2}
    moved = tuple(gid.model_copy(update={"index": swapped.get(gid.index, gid.index)}) for gid in gids)
    choice, _, findings = pair(changed_port(facts, "mlx5_5", gids=moved), recorded("h20-roce-2"))
    assert choice.gid_index == -1
    assert "NCCL_IB_GID_INDEX" not in rdma_environment(choice)
    assert codes(findings) == [] and codes(findings, "warning") == [("rdma-gid-mixed", "a")]
    assert "mlx5_5:1 5" in findings[0].message and "mlx5_4:1 3" in findings[0].message


@pytest.mark.parametrize(("required", "severity"), [(False, "warning"), (True, "error")])
def test_a_roce_port_without_a_v2_entry_is_named(required: bool, severity: str) -> None:
    facts = changed_port(recorded("h20-roce-2"), "mlx5_3", gids=())
    _, choice, findings = pair(recorded("h20-roce-1"), facts, required=required)
    assert choice.gid_index == -1
    assert codes(findings, severity) == [("rdma-gid-none", "b")]
    assert "mlx5_3:1" in findings[0].message and "ens13np0" in findings[0].cause


def test_the_operators_index_wins() -> None:
    _, second, findings = pair(recorded("h20-roce-1"), recorded("h20-roce-2"), gid_index=7)
    assert second.gid_index == 7 and findings == []


def test_a_bond_is_used_where_it_is_all_there_is() -> None:
    facts = recorded("h20-roce-1")
    bond = tuple(port for port in facts.infiniband.ports if port.device == "mlx5_bond_0")
    only = facts.model_copy(update={"infiniband": facts.infiniband.model_copy(update={"ports": bond})})
    choices, _ = choose_rdma([view("a", only)])
    assert choices["a"].hcas == ("mlx5_bond_0:1",) and choices["a"].gid_index == 3


def test_a_port_that_is_down_on_one_host_is_refused_by_name() -> None:
    _, second, findings = pair(recorded("h800-ib-1"), recorded("h800-ib-port-down"))
    assert "mlx5_4:1" not in second.hcas and len(second.hcas) == 7
    assert codes(findings) == [("rdma-port-down", "b")]
    message = findings[0].message
    assert "b" in message and "mlx5_4:1 is DOWN (Disabled)" in message and "7 ACTIVE rails" in message


def test_naming_the_ports_is_the_choice_to_go_on_without_one() -> None:
    names = tuple(name for name in IB_1 if name != "mlx5_4:1")
    _, second, findings = pair(recorded("h800-ib-1"), recorded("h800-ib-port-down"), hcas=names)
    assert second.hcas == names and codes(findings) == []


def test_a_port_that_is_down_everywhere_is_a_warning() -> None:
    facts = recorded("h800-ib-port-down")
    first, _, findings = pair(facts, facts)
    assert len(first.hcas) == 7
    assert codes(findings) == [] and codes(findings, "warning") == [
        ("rdma-port-down", "a"),
        ("rdma-port-down", "b"),
    ]


def test_init_means_no_subnet_manager() -> None:
    facts = changed_port(recorded("h800-ib-2"), "ibp24s0", state="INIT", phys_state="LinkUp")
    _, _, findings = pair(recorded("h800-ib-1"), facts)
    assert codes(findings) == [("rdma-port-down", "b")]
    assert "subnet manager" in findings[0].cause


def test_a_slow_rail_is_kept_and_named() -> None:
    facts = changed_port(recorded("h800-ib-2"), "ibp93s0", rate_gbps=200.0)
    _, second, findings = pair(recorded("h800-ib-1"), facts)
    assert second.hcas == IB_2
    assert codes(findings) == [] and codes(findings, "warning") == [("rdma-rate", "b")]
    assert "ibp93s0:1 runs at 200 Gb/s, the other rails at 400 Gb/s" in findings[0].message


def test_slower_rails_of_one_host_are_named() -> None:
    facts = recorded("h800-ib-2")
    for port in facts.infiniband.ports:
        if port.link_layer == "InfiniBand":
            facts = changed_port(facts, port.device, rate_gbps=200.0)
    _, _, findings = pair(recorded("h800-ib-1"), facts)
    assert codes(findings, "warning") == [("rdma-rate", "b")]
    assert "200 Gb/s" in findings[0].message and "400 Gb/s" in findings[0].message


def test_infiniband_and_roce_are_not_mixed() -> None:
    _, _, findings = pair(recorded("h800-ib-1"), recorded("h20-roce-1"))
    assert codes(findings) == [("rdma-link-layer-mixed", "a"), ("rdma-link-layer-mixed", "b")]


def test_one_host_without_an_hca_takes_the_replica_to_sockets_loudly() -> None:
    first, second, findings = pair(recorded("h800-ib-1"), recorded("l20-pcie"))
    assert rdma_environment(first) == rdma_environment(second) == {"NCCL_IB_DISABLE": "1"}
    assert len(first.devices) == 26 and second.devices == ()
    assert codes(findings) == [] and codes(findings, "warning") == [("rdma-none", "a"), ("rdma-none", "b")]
    assert "because b has none" in findings[0].message
    assert "NCCL_IB_DISABLE=1" in findings[1].message


def test_rdma_required_makes_that_an_error() -> None:
    _, _, findings = pair(recorded("l20-pcie"), recorded("l20-pcie"), required=True)
    assert codes(findings) == [("rdma-none", "b")]


def test_a_lone_host_needs_no_hca() -> None:
    choices, findings = choose_rdma([view("a", recorded("l20-pcie"))])
    assert rdma_environment(choices["a"]) == {"NCCL_IB_DISABLE": "1"} and findings == []


def test_active_ports_without_device_files_cannot_be_used() -> None:
    facts = recorded("h800-ib-2")
    without = facts.model_copy(update={"infiniband": facts.infiniband.model_copy(update={"devices": ()})})
    _, second, findings = pair(recorded("h800-ib-1"), without)
    assert not second.enabled
    assert ("rdma-devices-none", "b") in codes(findings, "warning")


@pytest.mark.parametrize(
    ("settings", "code", "said"),
    [
        ({"hcas": ("mlx5_42:1",)}, "rdma-hca-unusable", "mlx5_42:1, which is not there"),
        ({"hcas": ("mlx5_4",)}, "rdma-hca-unusable", "mlx5_4, which is DOWN (Disabled)"),
        ({"hcas": ("mlx5_0:2",)}, "rdma-hca-unusable", "mlx5_0:2"),
        ({"devices": ("/dev/infiniband/uverbs77",)}, "rdma-device-missing", "uverbs77"),
    ],
)
def test_overrides_that_do_not_fit_are_refused(settings: dict[str, Any], code: str, said: str) -> None:
    _, _, findings = pair(recorded("h800-ib-port-down"), recorded("h800-ib-port-down"), **settings)
    messages = [finding.message for finding in findings if (finding.code, finding.severity) == (code, "error")]
    assert messages and said in messages[0] and messages[0].startswith("b:")


def test_devices_can_be_named() -> None:
    wanted = ("/dev/infiniband/uverbs0", "uverbs1", "/dev/gdrdrv")
    _, second, findings = pair(recorded("h800-ib-1"), recorded("h800-ib-2"), devices=wanted)
    assert second.devices == ("/dev/infiniband/uverbs0", "/dev/infiniband/uverbs1", "/dev/gdrdrv")
    assert findings == []


@pytest.mark.parametrize(
    ("driver", "kernel", "modules", "way"),
    [
        ("open", "6.12.48+deb13-amd64", (), "dma-buf"),
        ("open", "5.14.0-503.40.1.el9_5.x86_64", ("nvidia_peermem",), "dma-buf"),  # NCCL prefers it
        ("open", "5.10.0-30-amd64", ("nvidia_peermem",), "nvidia-peermem"),
        ("proprietary", "6.8.0-79-generic", ("nvidia_peermem",), "nvidia-peermem"),
        ("proprietary", "6.8.0-79-generic", (), "none"),
    ],
)
def test_how_hcas_reach_the_gpus(driver: str, kernel: str, modules: tuple[str, ...], way: str) -> None:
    facts = recorded("h800-ib-1")
    facts = facts.model_copy(
        update={
            "driver": facts.driver.model_copy(update={"flavour": driver}),
            "os": facts.os.model_copy(update={"kernel": kernel}),
            "infiniband": facts.infiniband.model_copy(update={"modules": modules}),
        }
    )
    assert gpudirect(facts) == way


def test_without_an_hca_there_is_no_way_to_the_gpus() -> None:
    assert gpudirect(recorded("l20-pcie")) == "none"
