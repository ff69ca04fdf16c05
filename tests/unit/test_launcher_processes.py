"""The launcher as a process, with small programs in the places of Ray and LMDeploy.

What is proven here is what only processes show: who is started and stopped, in which order, what is done when one
dies, and where API keys can be seen. With real Ray the same is proven in the lab.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from test_launcher import LAUNCHER, NODE

RAY = """
    import json, os, signal, socket, sys, time
    from pathlib import Path

    def note(text):
        with open(os.environ["EVENTS"], "a") as file:
            file.write(text + "\\n")

    if sys.argv[1] == "health-check":
        sys.exit(0)
    def stop(*_):
        note("ray stopped")
        sys.exit(0)
    signal.signal(signal.SIGTERM, stop)
    options = dict(word[2:].partition("=")[::2] for word in sys.argv[2:])
    note("ray started")
    gcs = socket.create_server(("127.0.0.1", int(options["port"]))) if "head" in options else None
    time.sleep(600)
"""
STATE = """
    import json, os
    from pathlib import Path

    class GlobalState:
        def _initialize_global_state(self, options):
            pass

        def node_table(self):
            return [
                {"NodeManagerAddress": address, "Alive": True, "Resources": {"GPU": 8.0}, "NodeID": node}
                for address, node in json.loads(Path(os.environ["CLUSTER"]).read_text())
            ]

        def actor_table(self, actor):
            return {}
"""
OPTIONS = """
    class GcsClientOptions:
        @staticmethod
        def create(address, cluster_id, **options):
            return None
"""
LMDEPLOY = """
    import json, multiprocessing, os, signal, sys, time
    from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
    from pathlib import Path

    def note(text):
        with open(os.environ["EVENTS"], "a") as file:
            file.write(text + "\\n")

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            self.answer(200, '{"status":"healthy"}')

        def do_POST(self):
            self.rfile.read(int(self.headers["Content-Length"]))
            keys = sys.argv[sys.argv.index("--api-keys") + 1 :] if "--api-keys" in sys.argv else []
            if keys and self.headers["Authorization"] != f"Bearer {keys[0]}":
                return self.answer(401, "{}")
            self.answer(200, '{"usage":{"completion_tokens":1}}')

        def answer(self, status, body):
            self.send_response(status)
            self.end_headers()
            self.wfile.write(body.encode())

        def log_message(self, *_):
            pass

    def child(queue):
        queue.put(sys.argv)
        time.sleep(600)

    def stop(*_):
        note("engine stopped")
        os._exit(0)

    def run():
        if Path(os.environ["BROKEN"]).exists():
            raise RuntimeError("no kernel image is available")
        context = multiprocessing.get_context("spawn")
        queue = context.Queue()
        context.Process(target=child, args=(queue,), daemon=True).start()
        note("engine started " + json.dumps({"argv": sys.argv, "child": queue.get()}))
        signal.signal(signal.SIGTERM, stop)
        port = int(sys.argv[sys.argv.index("--server-port") + 1])
        ThreadingHTTPServer(("127.0.0.1", port), Handler).serve_forever()
"""


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def until(condition: Callable[[], Any], what: str, timeout_s: float = 30) -> Any:
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        if value := condition():
            return value
        time.sleep(0.05)
    raise AssertionError(f"{what} did not happen within {timeout_s:g} s")


class Host:
    """A folder that looks to the launcher like its container."""

    def __init__(self, folder: Path, role: str, nodes: int) -> None:
        self.folder, self.gcs_port = folder, free_port()
        self.events, self.cluster, self.broken = folder / "events", folder / "cluster.json", folder / "broken"
        self.log = folder / "log"
        self._program("ray", "ray", RAY.replace("\n    ", "\n"))
        self._module("ray/__init__.py", "")
        self._module("ray/_private/__init__.py", "")
        self._module("ray/_private/state.py", STATE)
        self._module("ray/_raylet.py", OPTIONS)
        self._module("lmdeploy/__init__.py", LMDEPLOY)
        self._module("lmdeploy-1.dist-info/METADATA", "Name: lmdeploy\nVersion: 1\n")
        self._module("lmdeploy-1.dist-info/entry_points.txt", "[console_scripts]\nlmdeploy = lmdeploy:run\n")
        self._program("lmdeploy", "lmdeploy", "from lmdeploy import run\nif __name__ == '__main__':\n    run()\n")
        self.set_nodes("127.0.0.1", *["192.0.2.12"] * (nodes - 1))
        node = json.loads(json.dumps(NODE)) | {"role": role, "node_address": "127.0.0.1"}
        node["head_address"] = "127.0.0.1"
        node["ray"]["port"] = self.gcs_port
        node["expected"] = {"nodes": nodes, "gpus": 8 * nodes}
        (folder / "etc").mkdir()
        (folder / "state").mkdir()
        (folder / "etc" / "node.json").write_text(json.dumps(node))
        self.process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        environment = {
            **os.environ,
            "PATH": f"{self.folder / 'bin'}:{os.environ['PATH']}",
            "PYTHONPATH": str(self.folder / "lib"),
            "EVENTS": str(self.events),
            "CLUSTER": str(self.cluster),
            "BROKEN": str(self.broken),
        }
        places = ["--config-dir", str(self.folder / "etc"), "--state-dir", str(self.folder / "state")]
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(
                [sys.executable, str(LAUNCHER), *places, "run"], env=environment, stdout=log, stderr=log
            )

    def serve(self, model_name: str = "m", keys_file: str = "") -> None:
        port = free_port()
        document = {
            "schema": 1,
            "argv": ["lmdeploy", "serve", "api_server", "/m", "--server-port", str(port)],
            "server": {"address": "127.0.0.1", "port": port},
            "model_name": model_name,
            "api_keys_file": keys_file,
        }
        (self.folder / "etc" / "serve.json").write_text(json.dumps(document))

    def status(self) -> dict[str, Any]:
        path = self.folder / "state" / "status.json"
        read: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {"phase": "", "message": ""}
        return read

    def reaches(self, phase: str, message: str = "", timeout_s: float = 30) -> dict[str, Any]:
        def reached() -> dict[str, Any] | None:
            status = self.status()
            return status if status["phase"] == phase and message in status["message"] else None

        try:
            found: dict[str, Any] = until(reached, f"{phase} {message}", timeout_s)
        except AssertionError as error:
            raise AssertionError(f"{error}; log:\n{self.log.read_text()}") from None
        return found

    def happened(self) -> list[str]:
        return self.events.read_text().splitlines() if self.events.exists() else []

    def set_nodes(self, *addresses: str) -> None:
        temporary = self.cluster.with_suffix(".tmp")
        temporary.write_text(json.dumps([[address, f"id-{address}"] for address in addresses]))
        temporary.replace(self.cluster)

    def end(self, number: int = signal.SIGTERM) -> int:
        assert self.process
        self.process.send_signal(number)
        return self.process.wait(20)

    def _module(self, name: str, text: str) -> None:
        path = self.folder / "lib" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(textwrap.dedent(text))

    def _program(self, name: str, _module: str, text: str) -> None:
        path = self.folder / "bin" / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(f"#!{sys.executable}\n{text}")
        path.chmod(0o755)


@pytest.fixture
def make_host(tmp_path: Path) -> Iterator[Callable[..., Host]]:
    made: list[Host] = []

    def make(role: str = "head", nodes: int = 1) -> Host:
        made.append(Host(tmp_path, role, nodes))
        return made[-1]

    yield make
    for host in made:
        if host.process and host.process.poll() is None:
            host.end()


def test_a_head_serves_and_ends_in_order(make_host: Callable[..., Host]) -> None:
    host = make_host()
    host.start()
    host.reaches("waiting-for-serve")
    host.serve()
    status = host.reaches("serving", "m on 127.0.0.1")
    assert status["gpus_alive"] == 8
    assert status["engine"]["pid"] and status["engine"]["healthy_at"] >= status["engine"]["started_at"]
    names = [phase["name"] for phase in status["phases"]]
    assert names == [
        "starting",
        "waiting-for-serve",
        "loading:model",
        "loading:health",
        "loading:first-token",
    ]
    began = time.monotonic()
    assert host.end() == 0
    assert time.monotonic() - began < 8
    assert [event.split(" {")[0] for event in host.happened()] == [
        "ray started",
        "engine started",
        "engine stopped",
        "ray stopped",
    ]
    assert host.status()["phase"] == "stopping"


def test_an_engine_that_dies_is_started_again(make_host: Callable[..., Host]) -> None:
    host = make_host()
    host.serve()
    host.start()
    first = host.reaches("serving")["engine"]
    os.kill(first["pid"], signal.SIGKILL)
    until(lambda: host.status()["engine"]["restarts"] == 1, "a restart")
    status = host.reaches("serving")
    assert status["engine"]["pid"] != first["pid"]
    assert "SIGKILL" in status["last_error"]
    assert host.happened().count("ray started") == 1


def test_an_engine_that_cannot_start_is_tried_again_and_its_cause_told(make_host: Callable[..., Host]) -> None:
    host = make_host()
    host.broken.touch()
    host.serve()
    host.start()
    status = host.reaches("degraded", "failed 2 time(s) in a row; next start in 5 s")
    assert status["last_error"].endswith("(exit status 1): RuntimeError: no kernel image is available")
    host.broken.unlink()
    assert host.reaches("serving")["engine"]["restarts"] == 2


def test_a_lost_worker_stops_the_engine_until_it_is_back(make_host: Callable[..., Host]) -> None:
    host = make_host(nodes=2)
    host.serve()
    host.start()
    host.reaches("serving")
    host.set_nodes("127.0.0.1")
    status = host.reaches("waiting-for-gpus", "1 of 2 nodes and 8 of 16 GPUs alive: 127.0.0.1 (8 GPUs)")
    assert status["last_error"] == "Ray lost 192.0.2.12"
    assert host.happened()[-1] == "engine stopped"
    host.set_nodes("127.0.0.1", "192.0.2.12", "192.0.2.12")
    host.reaches("waiting-for-gpus", "192.0.2.12 listed twice")
    host.set_nodes("127.0.0.1", "192.0.2.12")
    host.reaches("serving")


def test_a_new_serving_command_restarts_only_the_engine(make_host: Callable[..., Host]) -> None:
    host = make_host()
    host.serve("old")
    host.start()
    host.reaches("serving", "old")
    (host.folder / "etc" / "serve.json").write_text("{")
    until(lambda: "not JSON" in host.status()["last_error"], "the complaint about the file")
    assert host.status()["phase"] == "serving"
    host.serve("new")
    status = host.reaches("serving", "new")
    assert status["engine"]["restarts"] == 0
    assert host.happened().count("ray started") == 1


def test_no_key_can_be_seen_from_outside(make_host: Callable[..., Host]) -> None:
    host = make_host()
    keys = host.folder / "etc" / "api_keys"
    keys.write_text("sk-very-secret\nsk-also-secret\n")
    host.serve(keys_file=str(keys))
    host.start()
    host.reaches("serving")
    started = json.loads(host.happened()[-1].removeprefix("engine started "))
    assert started["argv"][-3:] == ["--api-keys", "sk-very-secret", "sk-also-secret"]
    assert started["child"] == started["argv"]
    shown = host.log.read_text() + json.dumps(host.status())
    for process in Path("/proc").glob("[0-9]*"):
        try:
            shown += (process / "cmdline").read_text() + (process / "environ").read_text(errors="replace")
        except OSError:
            continue
    assert str(keys) in shown
    assert "sk-very" not in shown and "sk-also" not in shown


def test_a_worker_waits_for_its_head_joins_and_ends_with_it(make_host: Callable[..., Host]) -> None:
    host = make_host("worker")
    host.start()
    host.reaches("waiting-for-head", "Connection refused")
    with socket.create_server(("127.0.0.1", host.gcs_port)):
        host.reaches("ray-up", "joined")
        host.set_nodes()
        assert host.process
        assert host.process.wait(20) == 1
    assert "no longer lists this node" in host.status()["last_error"]
    assert host.happened() == ["ray started", "ray stopped"]


def test_a_worker_ends_when_its_ray_does(make_host: Callable[..., Host]) -> None:
    host = make_host("worker")
    with socket.create_server(("127.0.0.1", host.gcs_port)):
        host.start()
        host.reaches("ray-up", "joined")
        assert host.process
        children = Path(f"/proc/{host.process.pid}/task/{host.process.pid}/children").read_text().split()
        ray = next(pid for pid in children if "start" in Path(f"/proc/{pid}/cmdline").read_text().split("\0"))
        os.kill(int(ray), signal.SIGKILL)
        assert host.process.wait(20) == 1
    assert "ray ended (SIGKILL" in host.status()["last_error"]
