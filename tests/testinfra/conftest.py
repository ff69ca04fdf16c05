"""Connects the suites to a deployment (``--expectations``) and records what they find (``--records``).

`deploy-dsv3 verify` writes the one and reads the other. A check is called what its docstring says.
"""

from __future__ import annotations

import json
from collections.abc import Generator
from pathlib import Path
from typing import Any

import pytest
from fleet import Fleet, Node, look

from deploy_dsv3.derive import NodePlan
from deploy_dsv3.facts import HostFacts
from deploy_dsv3.verification import Expectations

EXPECTATIONS = pytest.StashKey[Expectations]()


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("deploy-dsv3")
    group.addoption("--expectations", type=Path, required=True, help="file that `deploy-dsv3 verify` writes")
    group.addoption("--records", type=Path, help="where to write the outcome of each check, as JSON lines")


def pytest_configure(config: pytest.Config) -> None:
    config.stash[EXPECTATIONS] = Expectations.read(config.option.expectations)
    if config.option.records:
        config.pluginmanager.register(Recorder(config.option.records))


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    deployment = metafunc.config.stash[EXPECTATIONS].deployment
    if "any_node" in metafunc.fixturenames:
        hosts = deployment.hosts
        if "head" in metafunc.fixturenames or metafunc.module.__name__ == "test_service":
            hosts = tuple(replica.head for replica in deployment.replicas)
        metafunc.parametrize("any_node", hosts, indirect=True, scope="session")


@pytest.fixture(scope="session")
def fleet(pytestconfig: pytest.Config) -> Fleet:
    """All hosts, looked at once."""
    return look(pytestconfig.stash[EXPECTATIONS])


@pytest.fixture(scope="session")
def any_node(request: pytest.FixtureRequest, fleet: Fleet) -> Node:
    """A host, also one that could not be looked at."""
    return fleet.nodes[request.param]


@pytest.fixture(scope="session")
def node(any_node: Node) -> Node:
    """A host that could be looked at."""
    if not any_node.observation.reached:
        pytest.skip("the host could not be looked at")
    return any_node


@pytest.fixture(scope="session")
def head(node: Node) -> Node:
    """The head of a replica."""
    return node


@pytest.fixture(scope="session")
def facts(node: Node) -> HostFacts:
    """What the probe read on the host."""
    if node.facts is None:
        pytest.skip("the probe could not run on the host")
    return node.facts


@pytest.fixture(scope="session")
def plan(node: Node) -> NodePlan:
    """What the host should be."""
    if node.plan is None:
        pytest.skip("what this host should be cannot be derived")
    return node.plan


@pytest.fixture(scope="session")
def engine(node: Node) -> Node:
    """A host that has an engine container."""
    if not node.container:
        pytest.skip("the host has no engine container")
    return node


@pytest.fixture(scope="session")
def running(engine: Node) -> Node:
    """A host whose engine container runs."""
    if not engine.container["State"]["Running"]:
        pytest.skip("the engine container does not run")
    return engine


class Recorder:
    """Writes one JSON object a check, and a last one that says how many there were."""

    def __init__(self, path: Path) -> None:
        self._file = path.open("x", encoding="utf-8")
        self._count = 0

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_makereport(
        self, item: pytest.Function, call: pytest.CallInfo[None]
    ) -> Generator[None, pytest.TestReport, pytest.TestReport]:
        report = yield
        # Each check ends in its call, or in the setup that did not let it come to that.
        if report.when == "call" or (report.when == "setup" and not report.passed):
            self._write(
                {
                    "host": item.callspec.params["any_node"],
                    "suite": item.module.__name__.removeprefix("test_"),
                    "check": item.obj.__doc__.split("\n")[0].rstrip("."),
                    "outcome": _outcome(report),
                    "seconds": round(report.duration, 4),
                    "message": _message(call),
                    "details": dict(report.user_properties),
                }
            )
            self._count += 1
        elif report.when == "teardown" and report.failed:
            raise RuntimeError(f"{item.nodeid}: {report.longreprtext}")
        return report

    def pytest_sessionfinish(self) -> None:
        self._write({"finished": self._count})
        self._file.close()

    def _write(self, record: dict[str, Any]) -> None:
        self._file.write(json.dumps(record) + "\n")


def _outcome(report: pytest.TestReport) -> str:
    if report.skipped:
        return "skipped"
    if report.passed:
        return "passed"
    return "failed" if report.when == "call" else "error"


def _message(call: pytest.CallInfo[None]) -> str:
    if call.excinfo is None:
        return ""
    if call.excinfo.errisinstance(AssertionError):
        # pytest puts the comparison below the check's own words, which say it better.
        return str(call.excinfo.value).split("\nassert ")[0]
    return str(call.excinfo.value) if call.excinfo.errisinstance(pytest.skip.Exception) else call.excinfo.exconly()
