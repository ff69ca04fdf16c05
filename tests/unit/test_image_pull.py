"""The pull module against a daemon that speaks the Docker API's recorded stream over a Unix socket."""

from __future__ import annotations

import base64
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from socketserver import ThreadingMixIn, UnixStreamServer

import modules
import pytest

DIGEST = "sha256:" + "a" * 64
# Lines of `POST /images/create` as Docker 26.1 sends them.
GOOD = [
    {"status": "Pulling from openmmlab/lmdeploy", "id": DIGEST},
    {"status": "Pulling fs layer", "progressDetail": {}, "id": "l1"},
    {"status": "Pulling fs layer", "progressDetail": {}, "id": "l2"},
    {"status": "Downloading", "progressDetail": {"current": 500_000_000, "total": 1_000_000_000}, "id": "l1"},
    {"status": "Already exists", "progressDetail": {}, "id": "l2"},
    {"status": "Download complete", "progressDetail": {}, "id": "l1"},
    {"status": "Extracting", "progressDetail": {"current": 1, "total": 1_000_000_000}, "id": "l1"},
    {"status": "Pull complete", "progressDetail": {}, "id": "l1"},
    {"status": f"Digest: {DIGEST}"},
]
BROKEN = [*GOOD[:4], {"errorDetail": {"message": "no space left on device"}, "error": "no space left on device"}]


class _Daemon(ThreadingMixIn, UnixStreamServer):
    daemon_threads = True
    lines: list[dict]
    asked: list[str]
    credentials: list[str]


class _Handler(BaseHTTPRequestHandler):
    server: _Daemon

    def do_POST(self) -> None:
        self.server.asked.append(self.path)
        self.server.credentials.append(self.headers.get("X-Registry-Auth", ""))
        self.send_response(200)
        self.end_headers()
        for line in self.server.lines:
            self.wfile.write(json.dumps(line).encode() + b"\r\n")

    def address_string(self) -> str:
        return "socket"

    def log_message(self, *_: object) -> None: ...


@pytest.fixture
def daemon(tmp_path: Path) -> Iterator[_Daemon]:
    server = _Daemon(str(tmp_path / "docker.sock"), _Handler)
    server.asked, server.credentials = [], []
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield server
    server.shutdown()
    server.server_close()


def pull(tmp_path: Path, capsys: pytest.CaptureFixture[str], **more: str) -> dict:
    args = {"socket": str(tmp_path / "docker.sock"), "progress_path": str(tmp_path / "p" / "pull.json"), **more}
    return modules.run("dsv3_image_pull", capsys, args)


def test_pull_by_digest(tmp_path: Path, capsys: pytest.CaptureFixture[str], daemon: _Daemon) -> None:
    daemon.lines = GOOD
    result = pull(tmp_path, capsys, name=f"openmmlab/lmdeploy@{DIGEST}")
    assert result["changed"]
    assert daemon.asked == [f"/images/create?fromImage=openmmlab/lmdeploy&tag={DIGEST}"]
    assert result["progress"] == "2 of 2 layers unpacked, 1.0 of 1.0 GB downloaded"
    seen = pull(tmp_path, capsys, state="progress")
    assert (seen["finished"], seen["error"]) == (True, "")


def test_credentials_go_in_a_header_that_the_daemon_can_read(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], daemon: _Daemon
) -> None:
    daemon.lines = GOOD
    password = "p~~~???>>>"  # has + and / in the ordinary alphabet of base64
    result = pull(tmp_path, capsys, name=f"registry.example.com/x@{DIGEST}", username="ops", password=password)
    (header,) = daemon.credentials
    assert json.loads(base64.urlsafe_b64decode(header)) == {"username": "ops", "password": password}
    assert not set("+/") & set(header)
    assert password not in json.dumps(result["progress"]) + (tmp_path / "p" / "pull.json").read_text()


def test_a_failed_pull_says_why_in_both_places(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], daemon: _Daemon
) -> None:
    daemon.lines = BROKEN
    result = pull(tmp_path, capsys, name=f"openmmlab/lmdeploy@{DIGEST}")
    assert result["failed"]
    assert result["msg"] == "no space left on device"
    assert pull(tmp_path, capsys, state="progress")["error"] == "no space left on device"


def test_a_stream_that_ends_early_is_no_success(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], daemon: _Daemon
) -> None:
    daemon.lines = GOOD[:4]
    assert pull(tmp_path, capsys, name=f"openmmlab/lmdeploy@{DIGEST}")["msg"] == "the daemon broke off the pull"


def test_progress_before_the_pull_began(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert pull(tmp_path, capsys, state="progress")["finished"] is False


def test_no_daemon(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert pull(tmp_path, capsys, name=f"x@{DIGEST}")["failed"]


def test_half_way_words() -> None:
    layers = modules.load("dsv3_image_pull").Layers()
    for event in GOOD[:5]:
        layers.take(event)
    assert layers.words() == "1 of 2 layers unpacked, 0.5 of 1.0 GB downloaded"
