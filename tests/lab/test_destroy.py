"""Teardown removes what deploy created, and nothing else."""

from __future__ import annotations

import pytest
import sight
from product import Product, Run

from deploy_dsv3.lab.fleet import Lab

pytestmark = pytest.mark.usefixtures("deployed")

#: Drivers, container toolkit and Docker stay; so do their repositories and configuration.
KEPT = (
    "/etc/apt/",
    "/etc/cdi",
    "/etc/docker",
    "/etc/systemd/system/",  # units of those packages, switched on
    "/usr/share/keyrings",
)


@pytest.fixture(scope="module")
def destroyed(product: Product, lab: Lab, deployed: Run) -> Run:
    """The teardown."""
    return product("destroy", "--inventory", lab.inventory, "--yes", "--json", what="destroy")


def test_nothing_of_ours_is_left(destroyed: Run, lab: Lab, bare: dict[str, sight.State]) -> None:
    assert destroyed.document["failures"] == []
    for host in lab:
        now = sight.state(host)
        assert now["containers"] == now["images"] == {}, host.name
        assert "dsv3-endpoint.service" not in now["services"]
        assert set(now["ports"]) == set(bare[host.name]["ports"]), host.name
        named = [path for path in now["files"] if "dsv3" in path and path not in bare[host.name]["files"]]
        assert [path for path in named if not path.startswith(KEPT)] == [], host.name


def test_what_was_there_before_still_is(destroyed: Run, lab: Lab, bare: dict[str, sight.State]) -> None:
    """Only packages that stay, and their own files, tell the hosts from bare ones."""
    for host in lab:
        was, now = bare[host.name], sight.state(host)
        packaged = set(host.run(["sh", "-c", "cat /var/lib/dpkg/info/*.list"]).stdout.splitlines())
        different = sight.changes(was, now)
        assert not {name for name in different if name.startswith("packages: haproxy")}
        files = [name.removeprefix("files: ") for name in different if name.startswith("files: ")]
        strange = [path for path in files if path not in packaged and not path.startswith(KEPT)]
        assert strange == [], host.name


def test_the_weights_stay(destroyed: Run, lab: Lab, bare: dict[str, sight.State]) -> None:
    for host in lab:
        weights = {path: text for path, text in sight.state(host)["files"].items() if path.startswith("/data")}
        assert weights == {path: text for path, text in bare[host.name]["files"].items() if path.startswith("/data")}


def test_a_second_teardown_changes_nothing(destroyed: Run, product: Product, lab: Lab) -> None:
    run = product("destroy", "--inventory", lab.inventory, "--yes", "--json", what="second destroy")
    assert [stats["changed"] for stats in run.document["hosts"].values()] == [0, 0]
