"""Teardown removes what deploy created, and nothing else."""

from __future__ import annotations

import pytest
import sight
from product import Product, Run

from deploy_dsv3.lab.fleet import Lab

pytestmark = pytest.mark.usefixtures("deployed")

#: Drivers, container toolkit, Docker and RDMA stay, with their repositories and settings.
KEPT = (
    "files: /etc/apt/keyrings/deploy-dsv3-",
    "files: /etc/apt/sources.list.d/deploy-dsv3-",
    "files: /etc/modprobe.d/deploy-dsv3-",
    "files: /etc/modules-load.d/deploy-dsv3-",
    "files: /etc/systemd/system/nvidia-persistenced.service.d/deploy-dsv3.",
)
#: What the installation of any package writes anew.
BOOKKEEPING = (
    "/etc/group",
    "/etc/gshadow",
    "/etc/ld.so.cache",
    "/etc/passwd",
    "/etc/shadow",
    "/etc/subgid",
    "/etc/subuid",
    "/var/lib/apt/",
    "/var/lib/dpkg/",
)


@pytest.fixture(scope="module")
def destroyed(product: Product, lab: Lab, deployed: Run) -> Run:
    """The teardown, while the head makes the load of a benchmark that nobody follows."""
    row = ("--profile", "custom", "--num-prompts", "1000", "--request-rate", "1")
    product("benchmark", "--inventory", lab.inventory, *row, "--from", "head", "--detach")
    return product("destroy", "--inventory", lab.inventory, "--yes", "--json", what="destroy")


def test_nothing_of_ours_is_left(destroyed: Run, lab: Lab, bare: dict[str, sight.State]) -> None:
    assert destroyed.document["failures"] == []
    for host in lab:
        left = sight.traces(bare[host.name], sight.state(host))
        assert {name for name in left if not name.startswith(KEPT)} == set(), host.name


def test_what_was_there_before_still_is(destroyed: Run, lab: Lab, bare: dict[str, sight.State]) -> None:
    for host in lab:
        was, now = bare[host.name], sight.state(host)
        assert {name: now["packages"].get(name) for name in was["packages"]} == was["packages"], host.name
        assert set(was["services"]) <= set(now["services"]), host.name
        different = {path for path, text in was["files"].items() if now["files"].get(path) != text}
        assert {path for path in different if not path.startswith(BOOKKEEPING)} == set(), host.name


def test_the_weights_stay(destroyed: Run, lab: Lab, bare: dict[str, sight.State]) -> None:
    for host in lab:
        weights = {path: text for path, text in sight.state(host)["files"].items() if path.startswith("/data")}
        assert weights == {path: text for path, text in bare[host.name]["files"].items() if path.startswith("/data")}


def test_a_second_teardown_changes_nothing(destroyed: Run, product: Product, lab: Lab) -> None:
    run = product("destroy", "--inventory", lab.inventory, "--yes", "--json", what="second destroy")
    assert [stats["changed"] for stats in run.document["hosts"].values()] == [0, 0]
