"""A lab of its own for the session, and the product on it. The order of the files is a story: see README.md."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import sight
from product import Product, Run, Times, installed
from rich.console import Console

from deploy_dsv3.lab import bringup
from deploy_dsv3.lab.fleet import Lab
from deploy_dsv3.lab.paths import default_paths
from deploy_dsv3.lab.progress import Steps

#: A deploy costs minutes, so few are made and what can be shown on each is shown on it.
ORDER = (
    "test_bare_hosts",
    "test_main_job",
    "test_wheel",
    "test_benchmark",
    "test_plan",
    "test_trouble",
    "test_recovery",
    "test_drift",
    "test_destroy",
    "test_registry",
    "test_fleet",
    "test_hosts",
)
NAME = "e2e"
#: Two servers of one kind whose HCAs are named differently.
PAIR = ("h800-ib", "h800-ib-slots")

_TIMES = pytest.StashKey[Times]()


def pytest_configure(config: pytest.Config) -> None:
    config.stash[_TIMES] = Times()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    here = Path(__file__).parent
    ours = [item for item in items if item.path.parent == here]
    for item in ours:
        item.add_marker(pytest.mark.lab)
    ours.sort(key=lambda item: ORDER.index(item.path.stem))
    others = [item for item in items if item.path.parent != here]
    items[:] = [*others, *ours]


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    rows = config.stash[_TIMES].rows
    if rows:
        terminalreporter.section("what took how long")
        for what, seconds in rows:
            terminalreporter.write_line(f"{seconds:7.1f} s  {what}")


@pytest.fixture(scope="session")
def times(pytestconfig: pytest.Config) -> Times:
    """Durations for the summary."""
    return pytestconfig.stash[_TIMES]


@pytest.fixture(scope="session")
def product(times: Times, tmp_path_factory: pytest.TempPathFactory) -> Product:
    """The command of this environment."""
    return Product(program=installed(), folder=tmp_path_factory.mktemp("operator"), times=times)


@pytest.fixture(scope="session")
def lab(times: Times, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Lab]:
    """Two bare hosts, gone in the end. With DSV3_KEEP_LAB they stay, and the next session goes on with them."""
    wish = bringup.Wish(
        name=NAME, hosts=2, gpus=8, profiles=PAIR, inventory=tmp_path_factory.mktemp("inventory") / NAME
    )
    kept = bool(os.environ.get("DSV3_KEEP_LAB"))
    if not kept:
        _down()  # a session that was killed leaves its lab
    yield up(wish, times)
    if not kept:
        _down()


def _down() -> None:
    with Steps(Console(stderr=True)) as steps:
        bringup.down(default_paths(), NAME, steps)


def up(wish: bringup.Wish, times: Times) -> Lab:
    """Have a lab as wished."""
    started = time.monotonic()
    with Steps(Console(stderr=True)) as steps:
        found = bringup.up(wish, default_paths(), steps)
    times.note(f"lab up, {wish.hosts} hosts", time.monotonic() - started)
    return found


@pytest.fixture(scope="session")
def bare(lab: Lab) -> dict[str, sight.State]:
    """What the hosts looked like before anything was done to them."""
    return {host.name: sight.state(host) for host in lab}


@pytest.fixture(scope="session")
def endpoint(lab: Lab) -> str:
    """Where clients reach the two hosts' replica."""
    return f"http://{lab.hosts[0].address}:8000"


@pytest.fixture(scope="session")
def deployed(product: Product, lab: Lab, bare: dict[str, sight.State]) -> Run:
    """The first deploy on the two bare hosts."""
    run = product("--inventory", lab.inventory, "--json", what="first deploy, two bare hosts")
    for stage in run.document["stages"]:
        product.times.note(f"    {stage['name']}", stage["seconds"])
    return run
