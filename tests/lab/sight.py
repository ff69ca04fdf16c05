"""What can be seen of a host and of a service, and waiting until it is as it should be."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import host_state
import httpx
import pytest

from deploy_dsv3.lab.hosts import Host

CONTAINER = "lmdeploy"
MODEL = "deepseek-ai/DeepSeek-V3"

#: Section to name to what was seen, as `host_state` prints it.
State = Mapping[str, Mapping[str, str]]


# ---------------------------------------------------------------------- a host


def state(host: Host) -> State:
    """Everything on a host that a deployment could change."""
    source = Path(host_state.__file__).read_bytes()
    seen: State = json.loads(host.run(["python3", "-"], stdin=source).stdout)
    return seen


def changes(before: State, after: State) -> dict[str, tuple[str, str]]:
    """``section: name`` to what it was and what it is now; an empty text for what is not there."""
    return {
        f"{section}: {name}": (was.get(name, ""), now.get(name, ""))
        for section in before
        for was, now in [(before[section], after[section])]
        for name in sorted({*was, *now})
        if was.get(name) != now.get(name)
    }


def traces(before: State, after: State) -> dict[str, tuple[str, str]]:
    """`changes` without what packages bring that stay: dependencies, their files, what they listen to on loopback."""
    return {
        name: change
        for name, change in changes(before, after).items()
        if name.startswith(("containers: ", "images: "))
        or (name.startswith("ports: ") and not name.startswith("ports: 127."))
        or "dsv3" in name
        or name == "packages: haproxy"
    }


def container(host: Host, name: str = CONTAINER) -> dict[str, Any]:
    """``docker inspect`` of a container on a host."""
    found: list[dict[str, Any]] = json.loads(host.run(["docker", "inspect", name]).stdout)
    return found[0]


def environment(host: Host) -> dict[str, str]:
    """The environment of the engine's container."""
    return dict(entry.split("=", 1) for entry in container(host)["Config"]["Env"])


def devices(host: Host) -> list[str]:
    """Device files handed to the engine's container one by one."""
    return sorted(device["PathOnHost"] for device in container(host)["HostConfig"]["Devices"] or [])


def infiniband(host: Host) -> list[str]:
    """Device files of the RDMA stack that a host has."""
    return sorted(host.run(["find", "/dev/infiniband", "-type", "c"], check=False).stdout.split())


def started_at(host: Host) -> tuple[str, str]:
    """Which container of the engine runs, and since when."""
    seen = container(host)
    return seen["Id"], seen["State"]["StartedAt"]


def is_healthy(host: Host) -> bool:
    """Whether Docker calls the engine's container healthy."""
    return bool(container(host)["State"]["Health"]["Status"] == "healthy")


def launcher_status(host: Host) -> dict[str, Any]:
    """status.json of a host's launcher; empty while there is none."""
    text = host.run(["cat", "/var/lib/deploy-dsv3/state/status.json"], check=False).stdout
    seen: dict[str, Any] = json.loads(text) if text else {}
    return seen


def engine_process(host: Host) -> int:
    """Number, on the host, of the main process of the engine's container."""
    return int(container(host)["State"]["Pid"])


@contextmanager
def listener(host: Host, port: int) -> Iterator[None]:
    """Somebody else's program that listens on a port of a host."""
    unit = f"somebody-else-{port}"
    host.run(["systemd-run", f"--unit={unit}", "python3", "-m", "http.server", str(port)])
    try:
        eventually(lambda: f":{port} " in host.run(["ss", "-Hltn"]).stdout, f"a listener on {port}", within_s=20)
        yield
    finally:
        host.run(["systemctl", "stop", unit])


# ---------------------------------------------------------------------- a service


def complete(url: str, *, key: str = "", timeout_s: float = 60) -> httpx.Response:
    """Ask an endpoint for a completion as a client does.

    Raises:
        httpx.HTTPError: no answer.
    """
    return httpx.post(
        f"{url}/v1/completions",
        json={"model": MODEL, "prompt": "The capital of France is", "max_tokens": 4, "temperature": 0},
        headers={"Authorization": f"Bearer {key}"} if key else {},
        timeout=timeout_s,
        trust_env=False,
    )


def serves(url: str, *, key: str = "") -> bool:
    """Whether a completion comes back."""
    try:
        answer = complete(url, key=key, timeout_s=20)
    except httpx.HTTPError:
        return False
    return answer.status_code == 200 and answer.json()["usage"]["completion_tokens"] > 0


def eventually(
    holds: Callable[[], object],
    what: str,
    *,
    within_s: float,
    seen: Callable[[], object] = lambda: "",
) -> float:
    """Wait until something holds.

    Args:
        seen: tells, if it never does, what there was instead.

    Returns:
        Seconds it took.
    """
    started = time.monotonic()
    while not holds():
        if time.monotonic() - started > within_s:
            pytest.fail(f"{what}: not within {within_s:.0f} s; seen last: {seen()}", pytrace=False)
        time.sleep(0.5)
    return time.monotonic() - started
