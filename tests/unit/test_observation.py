"""Looking at a host: what is read there, by which way, and what is said when it cannot be."""

import getpass
import io
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from configparser import ConfigParser
from contextlib import suppress
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from secrets import token_hex
from socketserver import ThreadingUnixStreamServer
from types import ModuleType
from typing import Any

import pytest
import yaml

from deploy_dsv3 import content, inventory, observation, observer, signatures
from deploy_dsv3.interruption import Terminated, terminable
from deploy_dsv3.runner import Passwords

SETTINGS = {
    "engine_container_name": "no-such-container",
    "nvidia_container_toolkit_cdi_spec_path": "/no/such/nvidia.yaml",
}
LOCAL = {"ansible_connection": "local"}


def look(connection: dict[str, Any], *, deep: bool = False) -> observation.Observation:
    return observation.look({"host": connection}, {"host": SETTINGS}, deep=deep)["host"]


def test_this_machine_can_be_looked_at() -> None:
    seen = look(LOCAL, deep=True)
    assert seen.reached and seen.seen["errors"] == {}
    assert seen.seen["facts"]["hostname"] == socket.gethostname()
    assert seen.container == {} and seen.document("node") == {}
    assert seen.seen["cdi_spec"] == ""


def test_a_shallow_look_leaves_out_what_takes_time() -> None:
    assert not {"leaks", "files", "commands", "inside"} & set(look(LOCAL).seen)


def test_facts_that_were_read_a_moment_ago_are_not_read_again() -> None:
    known = {"here": {"hostname": "as told before"}}
    connections = {"here": LOCAL, "there": LOCAL}
    seen = observation.look(connections, dict.fromkeys(connections, SETTINGS), deep=False, facts=known)
    assert seen["here"].seen["facts"] == known["here"] and seen["here"].seen["units"] is not None
    assert seen["there"].seen["facts"]["hostname"] == socket.gethostname()


def test_hosts_are_looked_at_together_and_one_that_is_away_takes_nothing_from_the_others() -> None:
    connections: dict[str, dict[str, Any]] = {
        "away": {"ansible_host": "127.0.0.1", "ansible_port": 1},
        "here": LOCAL,
        # Known only to Ansible, so it goes the other way.
        "away-too": {"ansible_host": "127.0.0.1", "ansible_port": 1, "ansible_become_password": "x"},
    }
    seen = observation.look(connections, dict.fromkeys(connections, SETTINGS), deep=False)
    assert list(seen) == list(connections)
    assert seen["here"].reached
    for name in ("away", "away-too"):
        assert not seen[name].reached and "Connection refused" in seen[name].error
        assert "Start sshd there, or set ansible_port." in seen[name].error


@pytest.fixture
def sshd(tmp_path: Path) -> Iterator[tuple[dict[str, Any], Path]]:
    """An SSH server of this user's own: how to connect to it, and its log."""
    program = shutil.which("sshd", path="/usr/sbin:/usr/local/sbin:/usr/bin")
    if not program:
        pytest.skip("there is no sshd (./dev test installs openssh-server)")
    if os.geteuid() == 0:
        Path("/run/sshd").mkdir(mode=0o755, exist_ok=True)
    for name in ("host", "id"):
        subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(tmp_path / name)], check=True)
    (tmp_path / "authorized").write_text((tmp_path / "id.pub").read_text())
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        port = unused.getsockname()[1]
    (tmp_path / "known").write_text(f"[127.0.0.1]:{port} {(tmp_path / 'host.pub').read_text()}")
    log = tmp_path / "log"
    options = ["UsePAM no", "StrictModes no", "PermitRootLogin yes", "PidFile none", "LogLevel VERBOSE"]
    options += [f"AuthorizedKeysFile {tmp_path}/authorized", f"HostKey {tmp_path}/host", "ListenAddress 127.0.0.1"]
    (tmp_path / "config").write_text("\n".join([*options, f"Port {port}"]) + "\n")
    server = subprocess.Popen([program, "-D", "-E", str(log), "-f", str(tmp_path / "config")])
    for _ in range(100):
        with suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=1):
            break
        time.sleep(0.05)
    common = f"-o UserKnownHostsFile={tmp_path}/known -o StrictHostKeyChecking=yes -o IdentitiesOnly=yes"
    yield (
        {
            "ansible_host": "127.0.0.1",
            "ansible_port": port,
            "ansible_user": getpass.getuser(),
            "ansible_ssh_private_key_file": str(tmp_path / "id"),
            "ansible_ssh_common_args": common,
        },
        log,
    )
    server.terminate()
    server.wait()


def test_while_connections_are_shared_each_host_is_logged_in_to_once(sshd: tuple[dict[str, Any], Path]) -> None:
    connection, log = sshd

    def ask() -> None:
        seen = observation.ask({"a": connection}, {"a": "echo '{\"home\": 1}'"})["a"]
        assert seen.seen == {"home": 1}, seen.error

    def logins() -> int:
        return log.read_text().count("Accepted publickey")

    ask()
    ask()
    assert logins() == 2
    with observation.shared_connections():
        folder = Path(os.environ["DEPLOY_DSV3_CONNECTIONS"])
        ask()
        ask()
        assert logins() == 3 and len(list(folder.iterdir())) == 1
    assert not folder.exists() and "DEPLOY_DSV3_CONNECTIONS" not in os.environ
    deadline = time.monotonic() + 10
    while "Disconnected from user" not in log.read_text().rpartition("Accepted publickey")[2]:
        assert time.monotonic() < deadline, "the connection is still there"
        time.sleep(0.05)


@pytest.mark.parametrize("version", [(8, 4), (0, 0)])
def test_an_ssh_that_would_not_let_go_shares_nothing(monkeypatch: pytest.MonkeyPatch, version: tuple[int, int]) -> None:
    monkeypatch.setattr(observation, "_ssh_version", lambda: version)
    with observation.shared_connections():
        assert "DEPLOY_DSV3_CONNECTIONS" not in os.environ


def test_whoever_is_stopped_does_not_wait_for_a_host_that_hangs() -> None:
    threading.Timer(1.5, os.kill, (os.getpid(), signal.SIGTERM)).start()
    began = time.monotonic()
    with terminable(), pytest.raises(Terminated):
        observation.ask({"a": LOCAL, "b": LOCAL}, dict.fromkeys("ab", "sleep 61"))
    assert time.monotonic() - began < 20
    assert not any(line == "sleep\0" + "61\0" for line in _command_lines())


def _command_lines() -> Iterator[str]:
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with suppress(OSError):
            yield path.read_text(errors="replace")


def test_ansible_carries_the_command_where_a_password_is_needed() -> None:
    # Braces in a password are no template.
    seen = look({**LOCAL, "ansible_become_password": "pass{{word}}", "ansible_become_method": "ansible.builtin.sudo"})
    if os.geteuid() == 0:
        assert seen.reached, seen.error
    else:
        assert "assword" in seen.error


@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        ({}, False),
        (LOCAL, False),
        ({"ansible_connection": "ansible.builtin.ssh", "ansible_become_method": "sudo"}, False),
        ({"ansible_become_user": "root", "ansible_become": True}, False),
        ({"ansible_become_password": ""}, False),
        ({"ansible_password": "x"}, True),
        ({"ansible_ssh_pass": "x"}, True),
        ({"ansible_become_pass": "x"}, True),
        ({"ansible_become_method": "doas"}, True),
        ({"ansible_become_user": "admin"}, True),
        ({"ansible_connection": "community.docker.docker"}, True),
    ],
)
def test_only_ansible_knows_some_ways_to_a_host(variables: dict[str, Any], expected: bool) -> None:
    assert observation._needs_ansible(variables) is expected


def test_the_command_survives_ansible_and_every_shell() -> None:
    line = observation.command(SETTINGS, deep=True)
    assert not {"{{", "{%", "{#", "\n"} & {line[i : i + n] for n in (1, 2) for i in range(len(line))}
    done = subprocess.run(["dash", "-c", line], capture_output=True, text=True, check=True)
    assert json.loads(done.stdout)["schema"] == 1


def test_the_inventory_for_ansible_is_private_and_holds_no_templates(tmp_path: Path) -> None:
    path = tmp_path / "inventory.yml"
    observation._write_inventory(path, {"a": {"ansible_password": "{{ x }}", "ansible_user": "ops"}})
    assert path.stat().st_mode & 0o777 == 0o600
    assert "!unsafe '{{ x }}'" in path.read_text()
    assert "ansible_user: ops" in path.read_text()


def test_host_keys_are_checked_unless_the_operator_says_otherwise(monkeypatch: pytest.MonkeyPatch) -> None:
    def options(text: str) -> str:
        config = ConfigParser()
        config.read_file(io.StringIO(text))
        return observation._with_ssh_options(config).get("ssh_connection", "ssh_args")

    monkeypatch.delenv("ANSIBLE_SSH_ARGS", raising=False)
    monkeypatch.delenv("ANSIBLE_HOST_KEY_CHECKING", raising=False)
    assert "StrictHostKeyChecking" not in options("")
    assert "BatchMode=yes" in options("")
    assert options("[ssh_connection]\nssh_args = -J jump -o ControlPath=/tmp/%h\n").startswith(
        "-J jump -o ControlPath=/tmp/%h"
    )
    assert "StrictHostKeyChecking=no" in options("[defaults]\nhost_key_checking = False\n")
    monkeypatch.setenv("ANSIBLE_HOST_KEY_CHECKING", "True")
    assert "StrictHostKeyChecking" not in options("[defaults]\nhost_key_checking = False\n")


def test_connections_come_from_the_inventory_and_the_operator(tmp_path: Path) -> None:
    (tmp_path / "hosts.ini").write_text(
        "[dsv3_head]\na ansible_host=192.0.2.1 other=1\n[all:vars]\nansible_user={{ login }}\nlogin=ops\n"
        "ansible_port={{ ansible_facts.port }}\n"
    )
    loaded = inventory.load([tmp_path / "hosts.ini"])
    assert observation.connections(loaded, ["a"]) == {"a": {"ansible_host": "192.0.2.1", "ansible_user": "ops"}}
    typed = observation.connections(loaded, ["a"], Passwords(become="secret"))
    assert typed["a"]["ansible_become_password"] == "secret"
    (tmp_path / "password").write_text("from a file\n")
    read = observation.connections(loaded, ["a"], Passwords(become_file=str(tmp_path / "password")))
    assert read["a"]["ansible_become_password"] == "from a file"


@pytest.mark.parametrize(
    ("connection", "expected"),
    [({}, ""), ({"ansible_host": "192.0.2.1"}, "192.0.2.1"), ({"ansible_host": "gpu.example"}, "")],
)
def test_a_connect_address_is_an_address(connection: dict[str, Any], expected: str) -> None:
    assert observation.connect_address("gpu-1", connection) == expected


# ---- the observer, which runs on the host ----------------------------------------------


@pytest.fixture
def probe() -> ModuleType:
    module = ModuleType("dsv3_probe")
    exec((content.playbooks() / "library" / "dsv3_probe.py").read_text(), module.__dict__)
    return module


@pytest.fixture
def docker(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, Any]]:
    """A Docker engine's API with one container, on a socket of the test's own; answers may be changed."""
    answers: dict[str, Any] = {
        "/containers/json?all=1": [{"Names": ["/lmdeploy"]}],
        "/containers/lmdeploy/json": {"Id": "c0", "Image": "sha256:1", "State": {"Running": True}},
        "/images/sha256:1/json": {"Id": "sha256:1", "RepoDigests": ["x@sha256:2"], "RootFS": {}},
    }

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            body = json.dumps(answers.get(self.path, {})).encode()
            self.send_response(200 if self.path in answers else 404)
            self.end_headers()
            self.wfile.write(body)

        def address_string(self) -> str:
            return "unix"

        def log_message(self, format: str, *args: Any) -> None:
            """Keeps the test's output quiet."""

    path = str(tmp_path / "docker.sock")
    server = ThreadingUnixStreamServer(path, Handler)
    monkeypatch.setattr(observer, "DOCKER_SOCKET", path)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
    thread.start()
    yield answers
    server.shutdown()
    server.server_close()
    thread.join()


def test_container_and_image_are_as_docker_tells_them(probe: ModuleType, docker: dict[str, Any]) -> None:
    seen = observer.container(probe, "lmdeploy")
    assert seen["inspect"]["Id"] == "c0"
    assert seen["image"]["RepoDigests"] == ["x@sha256:2"] and "RootFS" not in seen["image"]
    assert observer.container(probe, "other") == {"inspect": None, "image": None}


def test_files_are_told_with_owner_mode_and_content(tmp_path: Path) -> None:
    (tmp_path / "secrets").mkdir(mode=0o700)
    (tmp_path / "secrets" / "token").write_text("x")
    (tmp_path / "secrets" / "token").chmod(0o600)
    (tmp_path / "link").symlink_to("/nowhere")
    found = observer.files([str(tmp_path), "/no/such/folder"])
    assert found[f"{tmp_path}/secrets"]["mode"] == "0700" and found[f"{tmp_path}/secrets"]["kind"] == "folder"
    token = found[f"{tmp_path}/secrets/token"]
    assert (token["mode"], token["uid"], token["kind"]) == ("0600", os.geteuid(), "file")
    assert token["sha256"] == "2d711642b726b04401627ca9fbac32f5c8530fb1903cc4db02258717921a4881"
    assert found[f"{tmp_path}/link"]["kind"] == "link"


def test_documents_are_told_apart_when_missing_and_when_broken(tmp_path: Path) -> None:
    (tmp_path / "engine").mkdir()
    (tmp_path / "engine" / "node.json").write_text('{"role": "head"}')
    (tmp_path / "release.json").write_text("{")
    found = observer.documents(str(tmp_path), str(tmp_path))
    assert found["node"] == {"role": "head"} and found["serve"] is None
    assert str(tmp_path / "release.json") in found["release"]["error"]


def test_a_secret_in_arguments_logs_or_files_is_found_and_not_repeated(tmp_path: Path) -> None:
    secret = token_hex(16)  # this machine's other processes are looked at too
    (tmp_path / "engine" / "secrets").mkdir(parents=True)
    (tmp_path / "engine" / "secrets" / "ray_token").write_text(secret + "\n")
    (tmp_path / "engine" / "node.json").write_text(json.dumps({"token": secret}))
    inspect = {"Config": {"Env": [f"RAY_AUTH_TOKEN={secret}"]}}
    sleeper = subprocess.Popen([sys.executable, "-c", "input()", secret], stdin=subprocess.PIPE)
    while not Path(f"/proc/{sleeper.pid}/cmdline").read_bytes():
        time.sleep(0.01)  # the kernel closes the pipe that Popen waits for before it has set the arguments
    try:
        leaks = observer.leaks(str(tmp_path), "no-such-container", inspect)
    finally:
        sleeper.kill()
        sleeper.wait()
    assert {leak["place"] for leak in leaks} == {
        f"arguments of process {sleeper.pid}",
        "docker inspect no-such-container",
        f"{tmp_path}/engine/node.json",
    }
    assert {leak["secret"] for leak in leaks} == {"ray_token, line 1"}
    assert secret not in json.dumps(leaks)


RUNNING = {"State": {"Running": True, "StartedAt": "2026-01-01T00:00:00Z", "Health": {"Status": "healthy"}}}
LOG = "starting\nCUDA Out Of Memory.\nquiet\nRayActorError: died\n" + "x" * 2000 + " out of memory\n"


@pytest.mark.parametrize(
    ("inspect", "phase", "read"),
    [
        (None, "", False),
        (RUNNING, "serving", False),
        (RUNNING, "ray-up", False),
        (RUNNING, "degraded", True),
        (RUNNING, "", True),
        ({"State": {**RUNNING["State"], "Health": {"Status": "unhealthy"}}}, "serving", True),
        ({"State": {**RUNNING["State"], "Running": False}}, "serving", True),
    ],
)
def test_the_log_is_read_where_the_engine_is_not_well(
    monkeypatch: pytest.MonkeyPatch, inspect: dict[str, Any] | None, phase: str, read: bool
) -> None:
    asked: list[list[str]] = []

    def run(argv: list[str]) -> dict[str, Any]:
        asked.append(argv)
        return {"rc": 0, "out": LOG, "err": ""}

    monkeypatch.setattr(observer, "run", run)
    found = observer.engine_log("lmdeploy", inspect, {"phase": phase}, ["out of memory", "rayactorerror"])
    if not read:
        assert found is None and asked == []
        return
    assert found and [number for number, _ in found["lines"]] == [2, 4, 5]
    assert found["lines"][0][1] == "CUDA Out Of Memory." and len(found["lines"][2][1]) == observer.MAX_LINE
    assert asked[0][:4] == ["docker", "logs", "--since", "2026-01-01T00:00:00Z"]


def test_the_host_looks_for_every_phrase_of_the_catalogue() -> None:
    """What the host sends is enough to recognise every line that the catalogue knows."""
    wanted = signatures.searched_for()
    for signature in signatures.SIGNATURES:
        for phrase in signature.phrases:
            line = phrase.replace("…", "between")
            assert any(part in line.lower() for part in wanted)
            match = signatures.first_cause([line])
            assert match is not None


def test_a_kept_secret_is_no_leak(tmp_path: Path) -> None:
    (tmp_path / "endpoint").mkdir()
    (tmp_path / "endpoint" / "api_keys").write_text("sk-one-0123456789\nsk-two-0123456789\n")
    assert observer.leaks(str(tmp_path), "no-such-container", None) == []


@pytest.mark.skipif(not shutil.which("dpkg-query"), reason="asks Debian's package manager")
def test_a_file_belongs_to_the_package_that_brought_it(tmp_path: Path) -> None:
    """Also by the name that it had before /bin and /usr/bin became one, and by a link to it."""
    link, nobodys = tmp_path / "link", tmp_path / "file"
    link.symlink_to("/usr/bin/env")
    nobodys.touch()
    paths = ["/usr/bin/env", "/usr/bin/cat", str(link), str(nobodys)]
    assert observer.owners_of(paths) == dict.fromkeys(paths[:3], "coreutils")


def test_commands_that_run_together_have_one_deadline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(observer, "COMMAND_TIMEOUT_S", 0.5)
    done = observer.run_together({"fast": ["echo", "hi"], "slow": ["sleep", "60"], "none": ["no-such-command"]})
    assert done["fast"] == {"rc": 0, "out": "hi\n", "err": ""}
    assert done["slow"]["rc"] == -1 and "no answer" in done["slow"]["err"]
    assert done["none"]["rc"] == -1 and "no-such-command" in done["none"]["err"]


def test_health_is_asked_for_where_something_is_served() -> None:
    assert observer.health(None) is None
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        server = {"address": "127.0.0.1", "port": unused.getsockname()[1]}
        answer = observer.health({"server": server})
    assert answer is not None and answer["status"] == 0 and "refused" in answer["body"]


def test_the_observer_needs_no_newer_python_than_the_oldest_host() -> None:
    # Red Hat's 9 has Python 3.9, whose grammar this is checked against.
    import ast

    ast.parse(Path(observer.__file__).read_text(), feature_version=(3, 9))


def test_yaml_of_a_cdi_specification_comes_as_it_is(tmp_path: Path) -> None:
    path = tmp_path / "nvidia.yaml"
    path.write_text(yaml.safe_dump({"kind": "nvidia.com/gpu", "devices": []}))
    assert yaml.safe_load(observer.cdi_spec(str(path)))["kind"] == "nvidia.com/gpu"
