"""What runs on a host, read in one pass: the other half of `deploy_dsv3.observation`, which sends it there.

It changes nothing. Python 3.9 and its standard library are enough. The facts of the host come from the probe,
whose source comes along; what is added here is what only a deployed host has: the engine's container, the
deployment's files, the cluster as Ray shows it from this host, and whether a secret shows where it must not.

A section that cannot be read is left out and says why in ``errors``.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import stat
import subprocess
import sys
import time
import types
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

CONFIG = "/etc/deploy-dsv3"
STATE = "/var/lib/deploy-dsv3/state"
DOCKER_SOCKET = "/var/run/docker.sock"
UNITS = ("docker.service", "dsv3-endpoint.service")
COMMANDS = ("nvidia-smi", "nvidia-ctk", "dockerd")
# Drivers handed into virtual machines live in the last one.
SEARCH_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin:/usr/local/nvidia/bin"
COMMAND_TIMEOUT_S = 45
HEALTH_TIMEOUT_S = 15
# The end of a log is where a leak of the running engine would be; all of it can be gigabytes.
LOG_LINES = 5000
MAX_SPEC_BYTES = 1 << 20
# Phases of the launcher in which there is nothing to explain.
WELL = ("serving", "ray-up", "waiting-for-serve")
# The first cause comes early; after so many lines that mean something only echoes follow.
MAX_TELLING_LINES = 200
MAX_LINE = 500


def run(argv: list[str], timeout_s: float = COMMAND_TIMEOUT_S) -> dict[str, Any]:
    """Outcome of a command: ``{"rc", "out", "err"}``; rc -1 where it could not run, or not in time."""
    environment = {**os.environ, "PATH": SEARCH_PATH, "LC_ALL": "C"}
    try:
        done = subprocess.run(argv, capture_output=True, timeout=timeout_s, env=environment, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        return {"rc": -1, "out": "", "err": str(error)}
    return {
        "rc": done.returncode,
        "out": done.stdout.decode(errors="replace"),
        "err": done.stderr.decode(errors="replace")[-2000:],
    }


def run_together(commands: Mapping[str, list[str]]) -> dict[str, dict[str, Any]]:
    """Outcomes by name of commands that run at the same time; as `run`."""
    running = {}
    outcomes = {}
    for name, argv in commands.items():
        try:
            running[name] = subprocess.Popen(argv, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        except OSError as error:
            outcomes[name] = {"rc": -1, "out": "", "err": str(error)}
    deadline = time.monotonic() + COMMAND_TIMEOUT_S
    for name, process in running.items():
        try:
            out, err = process.communicate(timeout=max(0.1, deadline - time.monotonic()))
            outcome = {"rc": process.returncode, "out": out.decode(errors="replace")}
            outcomes[name] = {**outcome, "err": err.decode(errors="replace")[-2000:]}
        except subprocess.TimeoutExpired:
            process.kill()
            process.communicate()
            outcomes[name] = {"rc": -1, "out": "", "err": f"no answer within {COMMAND_TIMEOUT_S} s"}
    return outcomes


def container(probe: types.ModuleType, name: str) -> dict[str, Any]:
    """The engine's container and image as Docker shows them: ``{"inspect", "image"}``, None where absent."""
    known = probe.docker_get(DOCKER_SOCKET, "/containers/json?all=1")
    if not any(f"/{name}" in (entry.get("Names") or ()) for entry in known):
        return {"inspect": None, "image": None}
    inspect = probe.docker_get(DOCKER_SOCKET, f"/containers/{name}/json")
    image = probe.docker_get(DOCKER_SOCKET, f"/images/{inspect['Image']}/json")
    return {
        "inspect": inspect,
        "image": {key: image.get(key) for key in ("Id", "RepoDigests", "RepoTags", "Size")},
    }


def inside(name: str, config: str) -> dict[str, dict[str, Any]]:
    """What the container says of itself: its GPUs, the nodes that Ray shows it, and ``ray status``."""
    execute = ["docker", "exec", name]
    return run_together(
        {
            "gpus": [*execute, "nvidia-smi", "-L"],
            "limits": [*execute, "cat", "/proc/self/limits"],
            "nodes": [*execute, "python3", f"{config}/engine/launcher.py", "nodes"],
            "ray_status": [*execute, "ray", "status"],
        }
    )


def units() -> dict[str, dict[str, str]]:
    """State of the services that belong to a deployment: ``{"docker.service": {"active", "enabled"}}``."""
    shown = run(["systemctl", "show", "--property=Id,ActiveState,UnitFileState", *UNITS])
    found = {}
    for block in shown["out"].split("\n\n"):
        values = dict(line.split("=", 1) for line in block.splitlines() if "=" in line)
        if values.get("Id"):
            found[values["Id"]] = {
                "active": values.get("ActiveState", ""),
                "enabled": values.get("UnitFileState", ""),
            }
    return found


def commands() -> dict[str, dict[str, str]]:
    """The commands a node needs and whose they are: ``{"dockerd": {"path", "package"}}``; "" for none."""
    paths = {name: shutil.which(name, path=SEARCH_PATH) or "" for name in COMMANDS}
    owners = owners_of(path for path in paths.values() if path)
    return {name: {"path": path, "package": owners.get(path, "")} for name, path in paths.items()}


def owners_of(paths: Iterable[str]) -> dict[str, str]:
    """The package that each of these files belongs to; those that belong to none are left out."""
    if not shutil.which("dpkg-query"):
        asked = {path: run(["rpm", "-qf", "--queryformat", "%{NAME}", path]) for path in paths}
        return {path: answer["out"] for path, answer in asked.items() if answer["rc"] == 0}
    # A package may own the name before /bin and /usr/bin became one, or the target of a link.
    names = {path: [path, os.path.realpath(path), path.replace("/usr/", "/", 1)] for path in paths}
    told = run(["dpkg-query", "--search", *sorted({name for known in names.values() for name in known})])["out"]
    packages = {
        name: package.split(":")[0] for package, _, name in (line.partition(": ") for line in told.splitlines())
    }
    found = {path: [packages[name] for name in known if name in packages] for path, known in names.items()}
    return {path: owners[0] for path, owners in found.items() if owners}


def files(folders: Iterable[str]) -> dict[str, dict[str, Any]]:
    """Every file below the folders: ``{path: {"mode": "0600", "uid", "gid", "kind", "sha256"}}``."""
    found = {}
    for top in map(Path, folders):
        for path in [top, *top.rglob("*")] if top.exists() else []:
            status = path.lstat()
            kind = {stat.S_IFDIR: "folder", stat.S_IFLNK: "link"}.get(stat.S_IFMT(status.st_mode), "file")
            found[str(path)] = {
                "mode": f"{stat.S_IMODE(status.st_mode):04o}",
                "uid": status.st_uid,
                "gid": status.st_gid,
                "kind": kind,
                "sha256": hashlib.sha256(path.read_bytes()).hexdigest() if kind == "file" else "",
            }
    return found


def documents(config: str, state: str) -> dict[str, Any]:
    """The JSON files of a deployment by name: None for one that is absent, an ``error`` for a broken one."""
    paths = {
        "node": f"{config}/engine/node.json",
        "serve": f"{config}/engine/serve.json",
        "release": f"{config}/release.json",
        "status": f"{state}/status.json",
    }
    found: dict[str, Any] = {}
    for name, path in paths.items():
        try:
            found[name] = json.loads(Path(path).read_text(encoding="utf-8"))
        except FileNotFoundError:
            found[name] = None
        except ValueError as error:
            found[name] = {"error": f"{path}: {error}"}
    return found


def health(serve: Mapping[str, Any] | None) -> dict[str, Any] | None:
    """The engine's own answer to /health on this host: ``{"status", "body"}``, status 0 for no answer.

    None on a host that serves nothing.
    """
    if not serve or "server" not in serve:
        return None
    # Slow to import, and most hosts serve nothing.
    import urllib.error
    import urllib.request

    url = "http://{address}:{port}/health".format(**serve["server"])
    # Proxy variables of the host must not come between a host and itself.
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with opener.open(url, timeout=HEALTH_TIMEOUT_S) as answer:
            return {"status": answer.status, "body": answer.read(4096).decode(errors="replace")}
    except urllib.error.HTTPError as error:
        return {"status": error.code, "body": error.read(4096).decode(errors="replace")}
    except OSError as error:
        return {"status": 0, "body": str(error)}


def secrets(config: str) -> dict[str, bytes]:
    """The secrets that this host keeps, by a name that is safe to print."""
    found = {}
    for path in [*Path(config, "engine/secrets").glob("*"), Path(config, "endpoint/api_keys")]:
        if path.is_file():
            for number, line in enumerate(path.read_bytes().split(), 1):
                found[f"{path.name}, line {number}"] = line
    return found


def leaks(config: str, name: str, inspect: Mapping[str, Any] | None) -> list[dict[str, str]]:
    """Where a secret of this host shows to others: ``[{"secret", "place"}]``, never the secret itself."""
    kept = secrets(config)
    if not kept:
        return []
    places: dict[str, bytes] = {}
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            places[f"arguments of process {path.parent.name}"] = path.read_bytes()
        except OSError:
            continue  # the process has ended meanwhile
    if inspect:
        places[f"docker inspect {name}"] = json.dumps(inspect).encode()
        logs = run(["docker", "logs", "--tail", str(LOG_LINES), name])
        places[f"docker logs {name}"] = (logs["out"] + logs["err"]).encode()
    if shutil.which("journalctl"):
        journal = run(["journalctl", "--unit=dsv3-endpoint.service", f"--lines={LOG_LINES}", "--output=cat"])
        places["journal of dsv3-endpoint.service"] = journal["out"].encode()
    for path in [
        *Path(config).glob("*.json"),
        *Path(config, "engine").glob("*"),
        *Path(config, "endpoint").glob("*"),
    ]:
        if path.is_file() and path.name != "api_keys":
            places[str(path)] = path.read_bytes()
    return [
        {"secret": secret, "place": place}
        for secret, value in kept.items()
        for place, content in places.items()
        if value in content
    ]


def engine_log(
    name: str, inspect: Mapping[str, Any] | None, status: Mapping[str, Any] | None, phrases: Iterable[str]
) -> dict[str, Any] | None:
    """Lines of the engine's log since its container was started in which one of the phrases stands.

    None for an engine that is well: what it wrote before is over.

    Args:
        name: the container.
        inspect: what Docker shows of it.
        status: what its launcher last wrote.
        phrases: in lower case.
    """
    if not inspect:
        return None
    state = inspect["State"]
    health = (state.get("Health") or {}).get("Status")
    if state["Running"] and health != "unhealthy" and (status or {}).get("phase") in WELL:
        return None
    logs = run(["docker", "logs", "--since", state["StartedAt"], "--tail", str(20 * LOG_LINES), name])
    wanted = tuple(phrases)
    lines = [
        [number, line[:MAX_LINE]]
        for number, line in enumerate((logs["out"] + logs["err"]).splitlines(), 1)
        if any(phrase in line.lower() for phrase in wanted)
    ]
    return {"lines": lines[:MAX_TELLING_LINES]}


def local_ports() -> list[int]:
    """First and last port that the kernel hands out where a program names none, as NCCL and Gloo do."""
    return [int(port) for port in Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split()]


def cdi_spec(path: str) -> str:
    """Text of the specification that names the GPUs for containers; "" where there is none."""
    try:
        with Path(path).open(encoding="utf-8") as file:
            return file.read(MAX_SPEC_BYTES)
    except FileNotFoundError:
        return ""


def observe(request: Mapping[str, Any]) -> dict[str, Any]:
    """Everything about this host that status and verification look at.

    Args:
        request: ``container`` (its name), ``probe`` (source of the probe), ``cdi_spec_path``, and ``deep``:
            whether to read also what takes seconds (the cluster as seen from inside the container, packages,
            leaks). ``facts`` false leaves out what the probe reads, for who has just read it. ``config`` and
            ``state`` are the deployment's folders where they are not the usual ones.
    """
    config, state = request.get("config", CONFIG), request.get("state", STATE)
    probe = types.ModuleType("dsv3_probe")
    exec(request["probe"], probe.__dict__)
    seen: dict[str, Any] = {"schema": 1, "errors": {}}

    def read(section: str, reader: Callable[[], Any]) -> None:
        try:
            seen[section] = reader()
        except Exception as error:  # one unreadable section must not hide the others
            seen["errors"][section] = f"{type(error).__name__}: {error}"

    # The second line is what drift is told by.
    shallow = ["os", "gpus", "driver", "docker", "deployment"]
    shallow += ["cdi", "infiniband", "state"]
    only = [] if request["deep"] else shallow
    if request.get("facts", True):
        read("facts", lambda: probe.probe({"only": only}))
        docker_runs = bool(seen.get("facts", {}).get("docker", {}).get("running"))
    else:
        docker_runs = Path(DOCKER_SOCKET).exists()
    if docker_runs:
        read("container", lambda: container(probe, request["container"]))
    else:
        seen["container"] = {"inspect": None, "image": None}
    read("documents", lambda: documents(config, state))
    inspect = seen.get("container", {}).get("inspect")
    status = seen.get("documents", {}).get("status")
    read("log", lambda: engine_log(request["container"], inspect, status, request.get("phrases", ())))
    read("health", lambda: health(seen.get("documents", {}).get("serve")))
    read("units", units)
    read("local_ports", local_ports)
    if request["deep"]:
        if inspect and inspect["State"]["Running"]:
            read("inside", lambda: inside(request["container"], config))
        read("commands", commands)
        read("files", lambda: files([config, state]))
        read("leaks", lambda: leaks(config, request["container"], inspect))
        read("cdi_spec", lambda: cdi_spec(request["cdi_spec_path"]))
    return seen


if __name__ == "__main__":
    print(json.dumps(observe(json.load(sys.stdin))))
