"""The plan of the lab's simulated vendor packages."""

from __future__ import annotations

import pytest

from deploy_dsv3.lab import packages
from deploy_dsv3.lab.errors import LabUsageError

KERNEL = "6.12.1-lab"


@pytest.fixture(scope="module")
def plan() -> list[packages.Package]:
    return packages.plan(KERNEL)


@pytest.mark.parametrize(
    ("name", "version"),
    [
        ("nvidia-open", "580.105.08-1"),
        ("cuda-drivers", "580.105.08-1"),
        ("nvidia-driver-cuda", "580.95.05-1"),
        ("nvidia-kernel-open-dkms", "580.95.05-1"),
        ("nvidia-kernel-dkms", "535.261.03-1"),
        ("nvidia-persistenced", "580.105.08-1"),
        ("nvidia-fabricmanager-580", "580.105.08-1"),
        ("nvidia-fabricmanager-570", "570.195.03-1"),
        ("nvidia-fabricmanager", "590.48.01-1"),
        ("nvidia-driver-pinning-580", "1-1"),
        ("nvidia-driver-pinning-580.95.05", "1-1"),
        ("nvidia-container-toolkit", "1.19.1-1"),
        ("nvidia-container-toolkit-base", "1.20.1-1"),
        ("libnvidia-container-tools", "1.20.1-1"),
        ("libnvidia-container1", "1.19.1-1"),
        (f"linux-headers-{KERNEL}", "1.0-1"),
    ],
)
def test_vendors_names_and_versions_are_there(plan: list[packages.Package], name: str, version: str) -> None:
    assert (name, version) in {(package.name, package.version) for package in plan}


def test_no_package_is_planned_twice(plan: list[packages.Package]) -> None:
    assert len({package.deb for package in plan}) == len(plan)


def test_every_dependency_is_in_the_plan(plan: list[packages.Package]) -> None:
    there = {(package.name, package.version) for package in plan}
    names = {package.name for package in plan}
    for package in plan:
        for alternative in [part for group in package.depends for part in group.split(" | ")]:
            name, _, bound = alternative.partition(" ")
            assert name in names, f"{package.deb} depends on {alternative}"
            if bound.startswith("(="):
                assert (name, bound.strip("(=) ")) in there, f"{package.deb} depends on {alternative}"


def test_payload_carries_the_version_of_its_package(plan: list[packages.Package]) -> None:
    for package in plan:
        for path, text in package.tree().items():
            assert "@DRIVER@" not in text and "@VERSION@" not in text and "@CUDA@" not in text, path
    smi = next(p for p in plan if p.name == "nvidia-driver-cuda" and p.version == "570.195.03-1")
    assert 'VERSION = "570.195.03"' in smi.tree()["/usr/bin/nvidia-smi"]
    assert 'CUDA = "12.8"' in smi.tree()["/usr/bin/nvidia-smi"]


def test_every_package_says_that_it_is_simulated(plan: list[packages.Package]) -> None:
    assert all("simulated" in package.control() for package in plan)


def test_pin_of_a_branch_keeps_the_next_branch_out(plan: list[packages.Package]) -> None:
    pin = next(package for package in plan if package.name == "nvidia-driver-pinning-580")
    (text,) = pin.tree().values()
    assert "Pin: version 580.*" in text
    assert "nvidia-driver-cuda" in text and "nvidia-fabricmanager" in text


@pytest.mark.parametrize(
    ("branch", "names"),
    [("570", ["nvidia-fabricmanager-570"]), ("590", ["nvidia-fabricmanager"])],
)
def test_branch_leaves_the_names_of_nvswitch_packages_at_590(branch: str, names: list[str]) -> None:
    assert packages.nvswitch_names("nvidia-fabricmanager", branch) == names


def test_closure_brings_dependencies_first_and_the_wanted_alternative(plan: list[packages.Package]) -> None:
    found = packages.closure(plan, {"nvidia-driver-cuda": "535.261.03", "nvidia-kernel-dkms": "535.261.03"})
    names = [package.name for package in found]
    assert "nvidia-kernel-open-dkms" not in names
    assert names.index(f"linux-headers-{KERNEL}") < names.index("dkms") < names.index("nvidia-kernel-dkms")
    assert names.index("nvidia-kernel-dkms") < names.index("nvidia-driver-cuda")
    assert {p.version for p in found if p.name.startswith(("nvidia-", "libcuda"))} == {"535.261.03-1"}


def test_closure_of_a_version_that_is_not_there_says_which_are(plan: list[packages.Package]) -> None:
    with pytest.raises(LabUsageError) as refusal:
        packages.closure(plan, {"nvidia-driver-cuda": "1.2.3"})
    assert "nvidia-driver-cuda 1.2.3" in refusal.value.message
    assert "580.105.08" in refusal.value.remedy
