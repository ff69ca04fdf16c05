#!/usr/bin/env python3
"""Start the engine's server once more by hand, beside the deployed one: same image, same command, no launcher.

    by_hand.py start CONTAINER NAME PORT [KEY]    prints what it ran; the new container is called NAME
    by_hand.py stop NAME

It is what LMDeploy's guide has one type: `ray start --head`, then `lmdeploy serve api_server`, with the arguments,
devices, mounts and environment of the deployed one. Left out is what deploy-dsv3 adds: the launcher with its probes,
Docker's health check. Different is what two of them cannot share: ports, and with KEY the API key.
"""

from __future__ import annotations

import json
import shlex
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

FILES = Path("/etc/deploy-dsv3/engine")
#: Ports that one server takes, from the one it serves on: two by hand must be so far apart.
PORTS = 500
#: What belongs to the deployed Ray cluster, and the one rendezvous of a host.
NOT_SHARED = ("RAY_ADDRESS", "RAY_AUTH_MODE", "RAY_AUTH_TOKEN_PATH", "LMDEPLOY_DIST_MASTER_PORT")


def run_argv(
    deployed: Mapping[str, Any], node: Mapping[str, Any], serve: Sequence[str], *, name: str, port: int, key: str
) -> list[str]:
    """The `docker run` command.

    Args:
        deployed: `docker inspect` of the deployed container.
        node: the launcher's node.json.
        serve: the serving command of its serve.json.
        name: what the new container is called.
        port: where it serves; Ray and its workers take the PORTS - 1 after that.
        key: API key; "" for none.
    """
    host = deployed["HostConfig"]
    argv = ["docker", "run", "--detach", "--init", "--name", name, "--network", "host", "--ipc", host["IpcMode"]]
    for request in host["DeviceRequests"] or ():
        if request["Driver"] == "cdi":
            argv += [word for device in request["DeviceIDs"] for word in ("--device", device)]
        else:
            # The option is a line of CSV: several devices are one field only within quotes.
            argv += ["--gpus", f'"device={",".join(request["DeviceIDs"])}"' if request["DeviceIDs"] else "all"]
    for device in host["Devices"] or ():
        argv += ["--device", f"{device['PathOnHost']}:{device['PathInContainer']}"]
    for capability in host["CapAdd"] or ():
        argv += ["--cap-add", capability.removeprefix("CAP_")]
    for limit in host["Ulimits"] or ():
        argv += ["--ulimit", f"{limit['Name']}={limit['Soft']}:{limit['Hard']}"]
    for bind in host["Binds"] or ():
        argv += ["--volume", bind]
    environment = dict(entry.split("=", 1) for entry in deployed["Config"]["Env"])
    for variable in NOT_SHARED:
        environment.pop(variable, None)
    address, ray = node["node_address"], node["ray"]
    environment |= {
        "RAY_ADDRESS": f"{address}:{port + 1}",
        "RAY_AUTH_MODE": "disabled",
        "LMDEPLOY_DIST_MASTER_PORT": str(port + 2),
    }
    argv += [word for entry in environment.items() for word in ("--env", "=".join(entry))]
    return [*argv, "--entrypoint", "bash", deployed["Image"], "-c", _script(address, ray, serve, port=port, key=key)]


def _script(address: str, ray: Mapping[str, Any], serve: Sequence[str], *, port: int, key: str) -> str:
    start = [
        *("ray", "start", "--head", f"--node-ip-address={address}", f"--port={port + 1}"),
        *(f"--num-gpus={ray['num_gpus']}", "--include-dashboard=false", "--disable-usage-stats"),
        *(f"--dashboard-agent-listen-port={port + 3}", f"--min-worker-port={port + 5}"),
        f"--max-worker-port={port + PORTS - 1}",
    ]
    if ray["object_store_memory_bytes"]:
        start.append(f"--object-store-memory={ray['object_store_memory_bytes']}")
    argv = list(serve)
    argv[argv.index("--server-port") + 1] = str(port)
    if key:
        argv += ["--api-keys", key]
    # A Ray without its client refuses the option, one with it would take the deployed one's port.
    client = f'if python3 -c "import grpc" 2>/dev/null; then client=--ray-client-server-port={port + 4}; fi'
    return f"{client}\n{shlex.join(start)} ${{client:-}} && exec {shlex.join(argv)}\n"


def main() -> int:
    action, *rest = sys.argv[1:]
    if action == "stop":
        return subprocess.run(["docker", "rm", "--force", "--volumes", rest[0]], check=False).returncode
    container, name, port, *key = rest
    deployed = json.loads(subprocess.check_output(["docker", "inspect", container]))[0]
    node = json.loads((FILES / "node.json").read_text(encoding="utf-8"))
    serve = json.loads((FILES / "serve.json").read_text(encoding="utf-8"))["argv"]
    argv = run_argv(deployed, node, serve, name=name, port=int(port), key=key[0] if key else "")
    subprocess.run(["docker", "rm", "--force", name], check=False, capture_output=True)
    print(json.dumps(argv))
    return subprocess.run(argv, check=False).returncode


if __name__ == "__main__":
    sys.exit(main())
