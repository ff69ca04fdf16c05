"""Hardware profiles of the lab and the hardware.json made of them."""

from __future__ import annotations

from pathlib import Path

import pytest

from deploy_dsv3.lab import hardware
from deploy_dsv3.lab.errors import LabUsageError


def described(name: str, *, gpus: int | None = None, number: int = 1) -> dict:
    return hardware.describe(hardware.load(name).with_gpus(gpus), host=f"gpu-{number:02d}", number=number)


def states(machine: dict) -> dict[str, str]:
    return {hca["name"]: hca["ports"][0]["state"] for hca in machine["hcas"]}


@pytest.mark.parametrize("name", hardware.names())
def test_every_profile_of_the_lab_is_valid_and_described(name: str) -> None:
    machine = described(name)
    assert len(machine["gpus"]) == 8
    slots = [unit["pci_slot"] for kind in ("gpus", "nvswitches", "hcas") for unit in machine[kind]]
    assert len(set(slots)) == len(slots), "two devices in one PCI slot"


def test_default_profile_is_the_server_of_the_guide() -> None:
    machine = described(hardware.DEFAULT_PROFILE)
    assert {gpu["name"] for gpu in machine["gpus"]} == {"NVIDIA H800"}
    assert list(states(machine)) == [f"mlx5_{index}" for index in range(8)]
    assert set(states(machine).values()) == {"4: ACTIVE"}
    assert {hca["ports"][0]["link_layer"] for hca in machine["hcas"]} == {"InfiniBand"}
    assert {hca["ports"][0]["rate"] for hca in machine["hcas"]} == {"400 Gb/sec (4X NDR)"}
    assert machine["nvswitches"]


def test_identifiers_differ_between_hosts_and_stay_between_runs() -> None:
    first, again, other = described("h800-ib"), described("h800-ib"), described("h800-ib", number=2)
    assert first == again
    assert not {gpu["uuid"] for gpu in first["gpus"]} & {gpu["uuid"] for gpu in other["gpus"]}
    assert not {hca["guid"] for hca in first["hcas"]} & {hca["guid"] for hca in other["hcas"]}


def test_number_of_gpus_can_be_another() -> None:
    assert [gpu["index"] for gpu in described("h800-ib", gpus=2)["gpus"]] == [0, 1]
    assert all(gpu["present"] for gpu in described("gpu-missing", gpus=4)["gpus"])


def test_profile_without_hcas_has_none_and_no_switch() -> None:
    machine = described("pcie-no-rdma")
    assert machine["hcas"] == [] and machine["nvswitches"] == []


def test_roce_port_carries_the_mapped_address_of_its_interface_at_the_index_of_the_profile() -> None:
    port = described("h20-roce", number=2)["hcas"][3]["ports"][0]
    assert port["interface"] == {"name": "ens59f1np1", "address": "198.19.203.12/24"}
    by_index = {gid["index"]: gid for gid in port["gids"]}
    assert by_index[3] == {
        "index": 3,
        "gid": "0000:0000:0000:0000:0000:ffff:c613:cb0c",  # 198.19.203.12
        "type": "RoCE v2",
        "ndev": "ens59f1np1",
    }
    assert by_index[2]["type"] == "IB/RoCE v1"
    assert by_index[5]["type"] == ""


@pytest.mark.parametrize(
    ("profile", "broken", "found"),
    [
        ("port-down", "mlx5_3", ("1: DOWN", "3: Disabled", "10 Gb/sec (4X SDR)")),
        ("port-slow", "mlx5_5", ("4: ACTIVE", "5: LinkUp", "200 Gb/sec (2X NDR)")),
    ],
)
def test_broken_port_is_the_only_difference(profile: str, broken: str, found: tuple[str, ...]) -> None:
    healthy, machine = described("h800-ib"), described(profile)
    for good, hca in zip(healthy["hcas"], machine["hcas"], strict=True):
        if hca["name"] == broken:
            port = hca["ports"][0]
            assert (port["state"], port["phys_state"], port["rate"]) == found
        else:
            assert hca == good


def test_missing_gpu_keeps_the_others_in_their_slots() -> None:
    machine = described("gpu-missing")
    assert [gpu["index"] for gpu in machine["gpus"] if not gpu["present"]] == [6]
    assert [gpu["pci_slot"] for gpu in machine["gpus"]] == [gpu["pci_slot"] for gpu in described("h800-ib")["gpus"]]


def test_profile_of_ones_own_extends_one_of_the_lab(tmp_path: Path) -> None:
    path = tmp_path / "mine.yml"
    path.write_text("extends: h800-ib\ndescription: mine\ngpus: {memory_mib: 1000}\nhcas: {names: [mlx5_bond_0]}\n")
    machine = described(str(path))
    assert machine["gpus"][0]["memory_mib"] == 1000
    assert machine["gpus"][0]["name"] == "NVIDIA H800"
    assert list(states(machine)) == ["mlx5_bond_0"]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("extends: h800-ib\ngpu: 4\n", "gpu"),
        ("extends: h800-ib\ngpus: {count: 99}\n", "gpus.count"),
        ("extends: h800-ib\nmissing_gpus: [8]\n", "there are 8 GPUs"),
        ("extends: h800-ib\nhcas: {faults: {mlx5_9: {state: DOWN}}}\n", "mlx5_9"),
        ("extends: h800-ib\nhcas: {link_layer: Ethernet}\n", "interfaces"),
        ("extends: nowhere\n", "nowhere"),
        ("- a list\n", "not a mapping"),
        ("a: [", "mine.yml"),
    ],
)
def test_wrong_profile_is_refused_with_what_is_wrong(tmp_path: Path, text: str, said: str) -> None:
    path = tmp_path / "mine.yml"
    path.write_text(text)
    with pytest.raises(LabUsageError) as refusal:
        hardware.load(str(path))
    assert said in refusal.value.message
    assert refusal.value.remedy


def test_profile_that_extends_itself_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "mine.yml"
    path.write_text(f"extends: {path}\n")
    with pytest.raises(LabUsageError, match="extends itself"):
        hardware.load(str(path))


def test_unknown_profile_names_those_that_exist() -> None:
    with pytest.raises(LabUsageError) as refusal:
        hardware.load("h900")
    assert "h800-ib" in refusal.value.remedy
