"""Which Docker engine carries the lab."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from deploy_dsv3.lab import machine, outer_engine
from deploy_dsv3.lab.docker_cli import DockerCli
from deploy_dsv3.lab.errors import LabError
from deploy_dsv3.lab.outer_engine import PrivateEngine, RunningEngine
from deploy_dsv3.lab.paths import LabPaths

SOCKET = "unix:///var/run/docker.sock"


def info(**changes: Any) -> dict[str, Any]:
    return {
        "ServerVersion": "28.0.0",
        "OSType": "linux",
        "KernelVersion": machine.kernel_release(),
        "SecurityOptions": ["name=seccomp,profile=builtin"],
        "DriverStatus": [["Backing Filesystem", "extfs"]],
    } | changes


@pytest.fixture
def paths(tmp_path: Path) -> LabPaths:
    return LabPaths(state=tmp_path / "state", cache=tmp_path / "cache", inventory=str(tmp_path / "{name}"))


@pytest.mark.parametrize(
    ("host", "answer", "reason"),
    [
        (SOCKET, None, "no engine answers"),
        ("tcp://192.0.2.7:2375", info(), "another machine"),
        (SOCKET, info(KernelVersion="5.15.0-desktop"), "another kernel"),
        (SOCKET, info(OSType="windows"), "another kernel"),
        (SOCKET, info(SecurityOptions=["name=rootless"]), "without root"),
        (SOCKET, info(SecurityOptions=["name=userns"]), "without root"),
        (SOCKET, info(DriverStatus=[["Backing Filesystem", "overlayfs"]]), "overlayfs"),
    ],
)
def test_engine_that_cannot_carry_hosts_is_refused_with_the_reason(
    host: str, answer: dict[str, Any] | None, reason: str
) -> None:
    assert reason in outer_engine.refuse(host, answer)


def test_ordinary_engine_is_not_refused() -> None:
    assert outer_engine.refuse(SOCKET, info()) == ""
    assert outer_engine.refuse(SOCKET, info(SecurityOptions=None, DriverStatus=None)) == ""


def answering(monkeypatch: pytest.MonkeyPatch, answer: dict[str, Any] | None) -> None:
    monkeypatch.setenv("DOCKER_HOST", SOCKET)
    monkeypatch.setattr(DockerCli, "info", lambda self: answer)


def test_running_engine_is_used_where_it_can(monkeypatch: pytest.MonkeyPatch, paths: LabPaths) -> None:
    answering(monkeypatch, info())
    assert outer_engine.choose(paths) == RunningEngine(host=SOCKET)
    assert outer_engine.choose(paths, "private") == PrivateEngine(paths=paths)


def test_private_engine_is_started_where_none_can(monkeypatch: pytest.MonkeyPatch, paths: LabPaths) -> None:
    answering(monkeypatch, info(SecurityOptions=["name=rootless"]))
    assert outer_engine.choose(paths) == PrivateEngine(paths=paths)
    with pytest.raises(LabError, match="without root"):
        outer_engine.choose(paths, "running")


@pytest.mark.parametrize("kind", ["running", "private"])
def test_labs_stay_on_the_engine_they_were_made_on(monkeypatch: pytest.MonkeyPatch, paths: LabPaths, kind: str) -> None:
    engine = RunningEngine(host="unix:///first.sock") if kind == "running" else PrivateEngine(paths=paths)
    outer_engine.remember(paths, engine)
    answering(monkeypatch, info())
    assert outer_engine.choose(paths) == engine


def test_private_engine_keeps_to_its_own_folders(paths: LabPaths) -> None:
    command = PrivateEngine(paths=paths).command()
    assert f"--data-root={paths.cache}/docker" in command
    assert f"--pidfile={paths.runtime}/docker.pid" in command
    assert "--bridge=none" in command
    assert len(str(PrivateEngine(paths=paths).socket)) < 100, "longer than a socket's path may be"


def test_pid_of_another_program_is_not_taken_for_the_engine(
    monkeypatch: pytest.MonkeyPatch, paths: LabPaths, tmp_path: Path
) -> None:
    monkeypatch.setattr(LabPaths, "runtime", property(lambda self: tmp_path))
    engine = PrivateEngine(paths=paths)
    assert engine.pid() is None
    (tmp_path / "docker.pid").write_text("1\n")
    assert engine.pid() is None
