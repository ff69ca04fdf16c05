"""The endpoint's configuration, rendered as Ansible renders it and run by a real HAProxy."""

import contextlib
import json
import os
import shutil
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml
from ansible.parsing.dataloader import DataLoader
from ansible.template import Templar, trust_as_template

ROLE = Path(__file__).parents[2] / "roles" / "endpoint"
UNAUTHORIZED = {
    "message": "Unauthorized.",
    "type": "authentication_error",
    "code": 401,
    "param": None,
    "object": "error",
}


def haproxy() -> str:
    """Path of HAProxy; `./dev` installs it, and without it nothing here would be proven."""
    found = shutil.which("haproxy", path=f"{os.environ['PATH']}:/usr/sbin:/usr/local/sbin")
    assert found, "haproxy is missing: apt-get install haproxy"
    return found


def render(folder: Path, template: str = "etc/deploy-dsv3/endpoint/haproxy.cfg.j2", **settings: Any) -> str:
    """The text of one of the role's templates, from its defaults, `settings` and the test's folder."""
    variables: dict[str, Any] = {
        "ansible_managed": "Managed by a test",
        "dsv3_node": {"address": "127.0.0.1", "replica": "dsv3"},
        "lmdeploy_server_port": 23333,
        **yaml.safe_load((ROLE / "defaults/main.yml").read_text()),
        **yaml.safe_load((ROLE / "vars/main.yml").read_text()),
        "__endpoint_folder": str(folder),
        **settings,
    }
    trusted = {name: trust_as_template(value) if isinstance(value, str) else value for name, value in variables.items()}
    templar = Templar(loader=DataLoader(), variables=trusted)
    templar.environment.trim_blocks = True
    text = (ROLE / "templates" / template).read_text()
    return str(templar.template(trust_as_template(text)))


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port: int = listener.getsockname()[1]
        return port


@dataclass(kw_only=True)
class Engine:
    """What stands behind the proxy: it notes what reaches it and can hold an answer back."""

    port: int
    healthy: bool = True
    requests: list[tuple[str, dict[str, str]]] = field(default_factory=list)
    first_chunk_read: threading.Event = field(default_factory=threading.Event)
    client_left: threading.Event = field(default_factory=threading.Event)

    def paths(self) -> list[str]:
        return [path for path, _ in self.requests if path != "/health"]


def handler(engine: Engine) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def answer(self, status: int, body: dict[str, Any]) -> None:
            content = json.dumps(body).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        def chunk(self, text: str) -> None:
            self.wfile.write(f"{len(text):x}\r\n{text}\r\n".encode())

        def do_GET(self) -> None:
            engine.requests.append((self.path, dict(self.headers)))
            if self.path == "/health":
                status = "healthy" if engine.healthy else "unhealthy"
                self.answer(200 if engine.healthy else 503, {"status": status, "message": "said the engine"})
            else:
                self.answer(200, {"path": self.path})

        do_OPTIONS = do_GET

        def do_POST(self) -> None:
            engine.requests.append((self.path, dict(self.headers)))
            request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            if request.get("stream"):
                self.send_response(200)
                self.send_header("Content-Type", "text/event-stream")
                self.send_header("Transfer-Encoding", "chunked")
                self.end_headers()
                self.chunk("data: first\n\n")
                assert engine.first_chunk_read.wait(10), "the client never saw the first chunk"
                self.chunk("data: [DONE]\n\n")
                self.chunk("")
            elif request.get("slow"):
                self.connection.settimeout(10)
                with contextlib.suppress(ConnectionResetError):
                    assert self.connection.recv(1) == b""
                engine.client_left.set()
            else:
                self.answer(200, {"path": self.path})

        def log_message(self, format: str, *args: Any) -> None:
            """Keeps the test's output quiet."""

    return Handler


@pytest.fixture
def engine() -> Iterator[Engine]:
    engine = Engine(port=0)
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler(engine))
    engine.port = server.server_port
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
    thread.start()
    yield engine
    server.shutdown()
    server.server_close()
    thread.join()


Start = Callable[..., httpx.Client]


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    """Starts HAProxy with the rendered configuration; gives a client for it."""
    running: list[subprocess.Popen[bytes]] = []
    clients: list[httpx.Client] = []

    def start_proxy(*, engine_port: int, scheme: str = "http", **settings: Any) -> httpx.Client:
        port = free_port()
        keys = settings.get("endpoint_api_keys", [])
        (tmp_path / "api_keys").write_text(
            render(tmp_path, "etc/deploy-dsv3/endpoint/api_keys.j2", endpoint_api_keys=keys)
        )
        # Whoever runs the test may not be allowed as many open files as the default asks for.
        settings = {"endpoint_max_connections": 256, **settings}
        text = render(tmp_path, endpoint_port=port, lmdeploy_server_port=engine_port, **settings)
        # The test runs it as whoever runs the test.
        lines = [line for line in text.splitlines() if line.split()[:1] not in (["user"], ["group"], ["chroot"])]
        config = tmp_path / "haproxy.cfg"
        config.write_text("\n".join(lines) + "\n")
        running.append(subprocess.Popen([haproxy(), "-db", "-f", str(config)], stdout=subprocess.DEVNULL))
        deadline = time.monotonic() + 10
        while True:
            try:
                socket.create_connection(("127.0.0.1", port), timeout=1).close()
                break
            except OSError:
                assert running[-1].poll() is None and time.monotonic() < deadline, "HAProxy does not listen"
                time.sleep(0.02)
        client = httpx.Client(base_url=f"{scheme}://127.0.0.1:{port}", timeout=10, verify=False)
        clients.append(client)
        return client

    yield start_proxy
    for client in clients:
        client.close()
    for process in running:
        process.terminate()
        process.wait(10)


VARIANTS: dict[str, dict[str, Any]] = {
    "defaults": {},
    "keys": {"endpoint_api_keys": ["sk-one", "sk-two"]},
    "no monitor": {"endpoint_metrics_allow": []},
    "monitors": {"endpoint_metrics_allow": ["192.0.2.0/24", "2001:db8::/32"]},
    "IPv6": {"endpoint_address": "::1"},
    "every address": {"endpoint_address": "0.0.0.0"},
}


@pytest.mark.parametrize("settings", VARIANTS.values(), ids=VARIANTS.keys())
def test_haproxy_accepts_the_configuration(tmp_path: Path, settings: dict[str, Any]) -> None:
    (tmp_path / "api_keys").write_text("sk-one\nsk-two\n")
    config = tmp_path / "haproxy.cfg"
    config.write_text(render(tmp_path, **settings))
    checked = subprocess.run([haproxy(), "-c", "-f", str(config)], capture_output=True, text=True)
    assert checked.returncode == 0, checked.stderr
    assert "WARNING" not in checked.stderr, checked.stderr


def test_keys_stay_out_of_the_configuration(tmp_path: Path) -> None:
    assert "sk-secret" not in render(tmp_path, endpoint_api_keys=["sk-secret"])


def test_inference_routes_reach_the_engine(engine: Engine, start: Start) -> None:
    client = start(engine_port=engine.port)
    assert client.get("/v1/models").json() == {"path": "/v1/models"}
    for route in ("/v1/chat/completions", "/v1/completions", "/v1/responses", "/v1/messages"):
        assert client.post(route, json={}).json() == {"path": route}


@pytest.mark.parametrize(
    "path",
    [
        "/", "/docs", "/sleep", "/terminate", "/update_weights", "/distserve/engine_info", "/generate",
        "/v1/encode", "/v1/models/../../sleep", "//sleep", "/v1/models/", "/V1/models", "/v1%2Fmodels",
        "/health/x",
    ],
)  # fmt: skip
def test_every_other_route_is_404(engine: Engine, start: Start, path: str) -> None:
    client = start(engine_port=engine.port)
    request = client.build_request("GET", "/")
    request.url = request.url.copy_with(raw_path=path.encode())
    answer = client.send(request)
    assert answer.status_code == 404
    assert answer.json()["type"] == "not_found_error" and answer.json()["object"] == "error"
    assert engine.paths() == []


def test_an_operator_can_name_another_route(engine: Engine, start: Start) -> None:
    client = start(engine_port=engine.port, endpoint_routes=["/generate"])
    assert client.post("/generate", json={}).status_code == 200
    assert client.get("/v1/models").status_code == 404


def test_a_key_is_asked_for(engine: Engine, start: Start) -> None:
    client = start(engine_port=engine.port, endpoint_api_keys=["sk-one", "sk-two"])
    refused = ["", "Bearer", "Bearer sk-three", "sk-one", "Basic sk-one", "Bearer SK-ONE"]
    refused += ["Bearer sk-one sk-two", "Bearer sk-on", "Bearer sk-one,", "Token Bearer sk-one"]
    for authorization in refused:
        answer = client.get("/v1/models", headers={"Authorization": authorization})
        assert (answer.status_code, answer.json()) == (401, UNAUTHORIZED), authorization
    assert client.get("/v1/models").text == json.dumps(UNAUTHORIZED, separators=(",", ":"))
    assert engine.paths() == []
    for authorization in ("Bearer sk-one", "bearer sk-two"):
        assert client.get("/v1/models", headers={"Authorization": authorization}).status_code == 200


def test_the_key_goes_no_further_than_the_proxy(engine: Engine, start: Start) -> None:
    client = start(engine_port=engine.port, endpoint_api_keys=["sk-one"])
    client.get("/v1/models", headers={"Authorization": "Bearer sk-one"})
    [headers] = [headers for path, headers in engine.requests if path == "/v1/models"]
    assert "authorization" not in {name.lower() for name in headers}


def test_health_and_preflight_requests_need_no_key(engine: Engine, start: Start) -> None:
    client = start(engine_port=engine.port, endpoint_api_keys=["sk-one"])
    assert client.get("/health").json() == {"status": "healthy", "message": "said the engine"}
    assert client.options("/v1/chat/completions").status_code == 200


def test_metrics_are_for_the_monitor_only(engine: Engine, start: Start) -> None:
    assert start(engine_port=engine.port).get("/metrics").status_code == 200
    client = start(engine_port=engine.port, endpoint_metrics_allow=["192.0.2.0/24"])
    assert client.get("/metrics").status_code == 404
    assert start(engine_port=engine.port, endpoint_metrics_allow=[]).get("/metrics").status_code == 404


def test_a_token_arrives_before_the_answer_is_complete(engine: Engine, start: Start) -> None:
    client = start(engine_port=engine.port)
    with client.stream("POST", "/v1/chat/completions", json={"stream": True}) as answer:
        lines = answer.iter_lines()
        assert next(lines) == "data: first"
        engine.first_chunk_read.set()
        assert [line for line in lines if line] == ["data: [DONE]"]


def test_a_client_that_leaves_ends_its_generation(engine: Engine, start: Start) -> None:
    client = start(engine_port=engine.port)
    with pytest.raises(httpx.ReadTimeout):
        client.post("/v1/completions", json={"slow": True}, timeout=0.3)
    assert engine.client_left.wait(5), "the engine goes on generating for nobody"


def test_requests_wait_for_an_engine_that_is_slow_to_take_them(start: Start) -> None:
    """A burst: the engine's queue of connections is full, and for seconds it takes none out."""
    engine = Engine(port=0)
    with ThreadingHTTPServer(("127.0.0.1", 0), handler(engine), bind_and_activate=False) as server:
        server.request_queue_size = 1
        server.server_bind()
        server.server_activate()
        client = start(engine_port=server.server_port)
        with ThreadPoolExecutor(8) as clients:
            answers = [clients.submit(client.post, "/v1/completions", json={}, timeout=40) for _ in range(8)]
            time.sleep(6.5)
            assert not any(answer.done() for answer in answers)
            serving = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
            serving.start()
            assert [answer.result().status_code for answer in answers] == [200] * 8
        server.shutdown()
        serving.join()


def test_an_unhealthy_engine_speaks_for_itself_and_gets_no_requests(engine: Engine, start: Start) -> None:
    engine.healthy = False
    client = start(engine_port=engine.port)
    deadline = time.monotonic() + 15
    while client.get("/v1/models").status_code != 503:
        assert time.monotonic() < deadline, "requests still go to an unhealthy engine"
        time.sleep(0.1)
    answer = client.get("/health")
    assert (answer.status_code, answer.json()["message"]) == (503, "said the engine")
    engine.healthy = True
    while client.get("/v1/models").status_code != 200:
        assert time.monotonic() < deadline, "a recovered engine gets no requests"
        time.sleep(0.1)


def test_an_engine_that_does_not_listen_is_503_in_its_own_shape(start: Start) -> None:
    client = start(engine_port=free_port())
    for path in ("/v1/models", "/health"):
        answer = client.get(path)
        assert answer.status_code == 503
        assert answer.headers["Content-Type"] == "application/json"
        assert answer.headers["Retry-After"] == "30"
        assert set(answer.json()) == set(UNAUTHORIZED)


@pytest.mark.parametrize("key_apart", [True, False], ids=["key apart", "key with the certificate"])
def test_tls(engine: Engine, start: Start, tmp_path: Path, key_apart: bool) -> None:
    certificate, key = tmp_path / "tls.crt", tmp_path / "tls.crt.key"
    subject = ["-subj", "/CN=dsv3.example", "-keyout", key, "-out", certificate]
    curve = ["-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1"]
    subprocess.run(["openssl", "req", "-x509", "-nodes", *curve, *subject], check=True, capture_output=True)
    if not key_apart:
        certificate.write_text(certificate.read_text() + key.read_text())
        key.unlink()
    client = start(engine_port=engine.port, scheme="https", endpoint_tls_certificate_path="/etc/ssl/dsv3.pem")
    assert client.get("/v1/models").json() == {"path": "/v1/models"}
