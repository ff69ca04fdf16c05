"""The launcher's decisions: configuration, command lines, what it concludes from what it sees."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

LAUNCHER = Path(__file__).parents[2] / "roles" / "engine" / "files" / "launcher.py"


def load_launcher() -> ModuleType:
    specification = importlib.util.spec_from_file_location("launcher", LAUNCHER)
    assert specification and specification.loader
    module = importlib.util.module_from_spec(specification)
    sys.modules["launcher"] = module  # dataclasses look their module up
    specification.loader.exec_module(module)
    return module


launcher = load_launcher()

NODE: dict[str, Any] = {
    "schema": 1,
    "replica": "dsv3",
    "role": "head",
    "node_address": "192.0.2.11",
    "head_address": "192.0.2.11",
    "ray": {
        "port": 6379,
        "node_manager_port": 6380,
        "object_manager_port": 6381,
        "runtime_env_agent_port": 6382,
        "dashboard_agent_grpc_port": 6383,
        "dashboard_agent_listen_port": 52365,
        "metrics_export_port": 6384,
        "dashboard_port": 8265,
        "min_worker_port": 10002,
        "max_worker_port": 10999,
        "client_server_port": 10001,
        "object_store_memory_bytes": 0,
        "num_gpus": 8,
    },
    "expected": {"nodes": 2, "gpus": 16},
    "timeouts": {
        "join_s": 600,
        "load_s": 3600,
        "unhealthy_s": 120,
        "canary_interval_s": 60,
        "canary_timeout_s": 60,
    },
}
SERVE: dict[str, Any] = {
    "schema": 1,
    "argv": ["lmdeploy", "serve", "api_server", "/data/models/DeepSeek-V3", "--tp", "16"],
    "server": {"address": "127.0.0.1", "port": 23333},
    "model_name": "deepseek-ai/DeepSeek-V3",
    "api_keys_file": "",
}
MISSING = object()


def changed(document: dict[str, Any], key: str, value: object) -> dict[str, Any]:
    """A copy with one dotted key set, or taken away."""
    copy: dict[str, Any] = json.loads(json.dumps(document))
    place = copy
    *sections, last = key.split(".")
    for section in sections:
        place = place[section]
    if value is MISSING:
        del place[last]
    else:
        place[last] = value
    return copy


def written(folder: Path, name: str, document: object) -> Path:
    path = folder / name
    path.write_text(document if isinstance(document, str) else json.dumps(document))
    return path


def node(folder: Path, **changes: object) -> Any:
    document = NODE
    for key, value in changes.items():
        document = changed(document, key.replace("__", "."), value)
    return launcher.load_node(written(folder, "node.json", document))


# -- configuration


def test_a_node_file_is_read(tmp_path: Path) -> None:
    read = node(tmp_path)
    assert (read.role, read.head, read.expected_gpus) == ("head", "192.0.2.11:6379", 16)
    assert read.ports.max_worker_port == 10999


@pytest.mark.parametrize(
    ("key", "value", "complaint"),
    [
        ("role", "driver", 'role: expected one of head, worker, found text "driver"'),
        ("replica", "", "replica: expected a text that is not empty"),
        ("node_address", MISSING, "node_address: missing"),
        ("ray.port", "6379", "ray.port: expected a whole number, 1 to 65535, found text"),
        ("ray.port", 65536, "ray.port: expected a whole number, 1 to 65535, found number 65536"),
        ("ray.num_gpus", True, "ray.num_gpus: expected a whole number, 0 or more, found a boolean true"),
        ("ray.min_worker_port", 11000, "ray.min_worker_port: 11000 is above ray.max_worker_port"),
        ("expected", [], "expected: expected an object, found a list"),
        ("timeouts.join_s", 0, "timeouts.join_s: expected seconds, more than 0, found number 0"),
        ("schema", 2, "schema: this launcher reads 1, found 2"),
    ],
)
def test_a_fault_in_a_node_file_names_file_and_key(tmp_path: Path, key: str, value: object, complaint: str) -> None:
    path = written(tmp_path, "node.json", changed(NODE, key, value))
    with pytest.raises(launcher.ConfigError) as caught:
        launcher.load_node(path)
    assert str(caught.value).startswith(f"{path}: {complaint}")


@pytest.mark.parametrize(("text", "complaint"), [("{", "not JSON: line 1"), ("[]", "the document: expected")])
def test_a_node_file_that_is_no_object_is_refused(tmp_path: Path, text: str, complaint: str) -> None:
    with pytest.raises(launcher.ConfigError, match=complaint):
        launcher.load_node(written(tmp_path, "node.json", text))


def test_a_missing_node_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(launcher.ConfigError, match=r"absent\.json: cannot be read"):
        launcher.load_node(tmp_path / "absent.json")


@pytest.mark.parametrize("option", ["--api-keys", "--api-keys=sk-x", "--api_keys", "--api-k"])
def test_keys_on_the_command_line_are_refused(tmp_path: Path, option: str) -> None:
    document = {**SERVE, "argv": [*SERVE["argv"], option, "sk-x"]}
    with pytest.raises(launcher.ConfigError, match="would show in the process list") as caught:
        launcher.load_serve(written(tmp_path, "serve.json", document))
    assert "sk-x" not in str(caught.value)


@pytest.mark.parametrize(
    ("content", "complaint"),
    [("\n\n", "no key in it"), ("sk-secret\n-sk-secret\n", "line 2: a key must not"), ("sk secret\n", "line 1")],
)
def test_a_fault_in_a_key_file_names_the_line_and_not_the_key(tmp_path: Path, content: str, complaint: str) -> None:
    keys = written(tmp_path, "api_keys", content)
    path = written(tmp_path, "serve.json", {**SERVE, "api_keys_file": str(keys)})
    with pytest.raises(launcher.ConfigError, match=complaint) as caught:
        launcher.load_serve(path)
    assert "secret" not in str(caught.value)


def test_new_keys_are_another_engine_though_the_file_is_the_same(tmp_path: Path) -> None:
    keys = written(tmp_path, "api_keys", "sk-one\n")
    path = written(tmp_path, "serve.json", {**SERVE, "api_keys_file": str(keys)})
    before = launcher.load_serve(path)
    keys.write_text("sk-two\n")
    after = launcher.load_serve(path)
    assert before.fingerprint != after.fingerprint
    assert before.digest == after.digest


# -- command lines


def test_a_head_pins_every_port_and_address(tmp_path: Path) -> None:
    argv = launcher.ray_start_argv(node(tmp_path), "/opt/py3/bin/ray", launcher.RayExtras(client=True))
    assert argv[:3] == ["/opt/py3/bin/ray", "start", "--head"]
    assert {"--node-ip-address=192.0.2.11", "--dashboard-host=127.0.0.1", "--block"} < set(argv)
    ports = {key: value for key, value in NODE["ray"].items() if key.endswith("port")}
    values = [option.partition("=")[2] for option in argv]
    assert {name for name, port in ports.items() if str(port) not in values} == set()


def test_a_ray_without_extras_gets_no_option_it_refuses(tmp_path: Path) -> None:
    argv = launcher.ray_start_argv(node(tmp_path), "ray", launcher.RayExtras())
    assert "--include-dashboard=false" in argv
    assert not [option for option in argv if option.startswith("--ray-client-server-port")]
    full = launcher.ray_start_argv(node(tmp_path), "ray", launcher.RayExtras(dashboard=True, client=True))
    assert "--include-dashboard=false" not in full


def test_a_worker_joins_the_head_and_asks_for_nothing_of_a_head(tmp_path: Path) -> None:
    worker = node(tmp_path, role="worker", node_address="192.0.2.12", ray__object_store_memory_bytes=10**9)
    argv = launcher.ray_start_argv(worker, "ray", launcher.RayExtras(dashboard=True, client=True))
    assert argv[:3] == ["ray", "start", "--address=192.0.2.11:6379"]
    assert {"--node-ip-address=192.0.2.12", "--object-store-memory=1000000000"} < set(argv)
    head_only = ("--head", "--port", "--include-dashboard", "--ray-client-server-port", "--dashboard-host")
    assert not [option for option in argv if option.partition("=")[0] in head_only]


def test_no_key_is_in_what_is_executed(tmp_path: Path) -> None:
    keys = written(tmp_path, "api_keys", "sk-very-secret\n")
    plain = launcher.load_serve(written(tmp_path, "serve.json", SERVE))
    assert launcher.engine_argv(plain, "python3") == SERVE["argv"]
    keyed = launcher.load_serve(written(tmp_path, "serve.json", {**SERVE, "api_keys_file": str(keys)}))
    argv = launcher.engine_argv(keyed, "/opt/py3/bin/python")
    assert argv[0] == "/opt/py3/bin/python"
    assert argv[-len(SERVE["argv"]) :] == SERVE["argv"]
    assert "sk-very-secret" not in " ".join(argv)


def test_the_interpreter_of_a_command_is_the_one_in_its_first_line(tmp_path: Path) -> None:
    script = tmp_path / "ray"
    python = tmp_path / "python3"
    python.write_text("")
    python.chmod(0o755)
    script.write_text(f"#!{python}\nimport ray\n")
    assert launcher.interpreter_of(str(script)) == str(python)
    script.write_text("#!/bin/sh\nexec something\n")
    assert launcher.interpreter_of(str(script)) == sys.executable


# -- the cluster


def ray_node(address: str, node_id: str, *, alive: bool = True, gpus: int = 8) -> Any:
    return launcher.RayNode(address=address, alive=alive, gpus=gpus, node_id=node_id)


def cluster(*nodes: Any) -> Any:
    return launcher.Cluster(seen_at=1.0, nodes=nodes)


HEAD, WORKER = ray_node("192.0.2.11", "a1"), ray_node("192.0.2.12", "b1")


def test_a_complete_cluster_lacks_nothing() -> None:
    dead = ray_node("192.0.2.12", "b0", alive=False)
    assert cluster(HEAD, WORKER, dead).lacks(2, 16) == ""


@pytest.mark.parametrize(
    ("nodes", "lack"),
    [
        ([HEAD], "1 of 2 nodes and 8 of 16 GPUs alive: 192.0.2.11 (8 GPUs)"),
        ([], "0 of 2 nodes and 0 of 16 GPUs alive: none"),
        ([HEAD, ray_node("192.0.2.12", "b1", gpus=7)], "2 of 2 nodes and 15 of 16 GPUs alive"),
        ([HEAD, WORKER, ray_node("192.0.2.13", "c1")], "3 of 2 nodes and 24 of 16 GPUs alive"),
        ([HEAD, WORKER, ray_node("192.0.2.12", "b2")], "192.0.2.12 listed twice"),
    ],
)
def test_what_keeps_a_cluster_from_being_the_expected_one_is_said(nodes: list[Any], lack: str) -> None:
    assert cluster(*nodes).lacks(2, 16).startswith(lack)


@pytest.mark.parametrize(
    ("after", "lost"),
    [
        ([HEAD, WORKER], ""),
        ([HEAD, WORKER, ray_node("192.0.2.13", "c1")], ""),
        ([HEAD, ray_node("192.0.2.12", "b1", alive=False)], "Ray lost 192.0.2.12"),
        ([HEAD, WORKER, ray_node("192.0.2.12", "b2")], "Ray lost 192.0.2.12"),
        ([HEAD, ray_node("192.0.2.12", "b2")], "Ray lost 192.0.2.12"),
    ],
)
def test_a_node_that_went_or_was_replaced_is_noticed(after: list[Any], lost: str) -> None:
    assert cluster(*after).lost_since(cluster(HEAD, WORKER)) == lost


def actor(job: str, state: str, started: int, pid: int = 7, name: str = "RayWorkerWrapper") -> dict[str, Any]:
    address = {"IPAddress": "192.0.2.12"}
    return {
        "ActorClassName": name,
        "JobID": job,
        "State": state,
        "StartTime": started,
        "Pid": pid,
        "Address": address,
    }


def test_only_the_ranks_of_the_newest_engine_count() -> None:
    seen = launcher.summarise_ranks(
        [
            actor("01000000", "DEAD", 1000),
            actor("02000000", "ALIVE", 5000),
            actor("02000000", "DEAD", 5500, pid=42),
            actor("02000000", "ALIVE", 6000, name="SomebodyElse"),
        ]
    )
    assert seen == {
        "ranks": 1,
        "ranks_since": 5.5,
        "dead_ranks": ["the rank with pid 42 on 192.0.2.12 died"],
    }
    assert launcher.summarise_ranks([])["ranks"] == 0


@pytest.mark.parametrize(
    ("looks", "reason"),
    [
        ([(0, True, ""), (60, True, "")], ""),
        ([(0, False, ""), (4, False, "")], ""),
        ([(0, False, ""), (6, False, "")], "no longer lists this node"),
        ([(0, False, ""), (4, True, ""), (6, False, "")], ""),
        ([(0, True, "refused"), (2, True, "refused")], ""),
        ([(0, True, "Connection refused"), (4, True, "Connection refused")], "is gone: Connection refused"),
        ([(0, True, "timed out"), (4, True, "timed out")], ""),
        ([(0, True, "timed out"), (21, True, "timed out")], "is gone: timed out"),
        ([(0, True, "timed out"), (10, True, ""), (21, True, "timed out")], ""),
    ],
)
def test_a_worker_leaves_a_head_that_is_gone_and_keeps_one_that_is_slow(
    looks: list[tuple[float, bool, str]], reason: str
) -> None:
    membership = launcher.Membership()
    said = [membership.lost(listed=listed, unreachable=why, now=100.0 + at) for at, listed, why in looks]
    assert said[:-1] == [""] * (len(looks) - 1)
    assert said[-1].startswith(reason)
    assert bool(said[-1]) == bool(reason)


# -- health

OK = launcher.Answer(status=200, body='{"status":"healthy"}')
LATE = launcher.Answer(error="no answer within 60 s", timed_out=True)
TOKEN = launcher.Answer(status=200, body='{"usage": {"completion_tokens": 1}}')


@pytest.mark.parametrize(
    ("answer", "before", "after", "health", "fault"),
    [
        (TOKEN, None, None, OK, ""),
        (launcher.Answer(status=200, body='{"usage": {"completion_tokens": 0}}'), None, None, OK, "has no token"),
        (launcher.Answer(status=200, body="{}"), None, None, OK, "is no completion"),
        (launcher.Answer(status=500, body="oops"), 1.0, 9.0, OK, "HTTP 500"),
        (launcher.Answer(error="ConnectionResetError: reset"), None, None, OK, "ConnectionResetError"),
        # A full queue in front of it is no fault; an engine that makes no token meanwhile is one.
        (LATE, 100.0, 900.0, OK, ""),
        (LATE, 100.0, 100.0, OK, "no token was generated meanwhile"),
        # Without metrics LMDeploy's own stall detection decides.
        (LATE, None, None, OK, ""),
        (LATE, None, None, launcher.Answer(status=503), "no answer within 60 s"),
    ],
)
def test_a_canary_is_judged(answer: Any, before: float | None, after: float | None, health: Any, fault: str) -> None:
    said = launcher.judge_canary(answer, before, after, health)
    assert fault in said
    assert bool(said) == bool(fault)


def test_generated_tokens_are_read_from_the_metrics() -> None:
    body = (
        "# TYPE lmdeploy:generation_tokens_total counter\n"
        'lmdeploy:generation_tokens_total{engine="0",model_name="m"} 1.5e+03\n'
        'lmdeploy:request_generation_tokens_count{engine="0",model_name="m"} 6.0\n'
    )
    assert launcher.generated_tokens(launcher.Answer(status=200, body=body)) == 1500
    assert launcher.generated_tokens(launcher.Answer(status=200, body="")) is None
    assert launcher.generated_tokens(launcher.Answer(status=404)) is None


def test_trouble_counts_from_its_beginning_until_it_is_over() -> None:
    vitals = launcher.Vitals()
    vitals.note_health(OK, 10.0)
    vitals.note_canary("", 11.0)
    assert vitals.unwell(50.0) == (0.0, "")
    vitals.note_canary("canary: HTTP 500", 60.0)
    vitals.note_canary("canary: no answer", 70.0)
    assert vitals.unwell(90.0) == (30.0, "canary: no answer")
    vitals.note_canary("", 95.0)
    assert vitals.unwell(99.0) == (0.0, "")


def test_an_engine_that_was_put_to_sleep_is_not_ill() -> None:
    vitals = launcher.Vitals()
    vitals.note_health(launcher.Answer(status=200, body='{"status":"sleeping"}'), 1.0)
    assert vitals.asleep
    assert vitals.unwell(500.0) == (0.0, "")


# -- causes


def cause(*lines: str) -> str:
    finder = launcher.CauseFinder()
    for line in lines:
        finder.feed(line)
    return str(finder.cause())


def test_the_first_exception_is_the_cause_and_not_what_followed_from_it() -> None:
    found = cause(
        "\x1b[36m(RayWorkerWrapper pid=9, ip=192.0.2.12)\x1b[0m Traceback (most recent call last):",
        '\x1b[36m(RayWorkerWrapper pid=9, ip=192.0.2.12)\x1b[0m   File "model.py", line 1, in load',
        "\x1b[36m(RayWorkerWrapper pid=9, ip=192.0.2.12)\x1b[0m torch.OutOfMemoryError: CUDA out of memory. "
        "Tried to allocate 2.00 GiB",
        "Traceback (most recent call last):",
        '  File "engine.py", line 2, in loop',
        "AttributeError: 'NoneType' object has no attribute 'x'",
        "lmdeploy - ERROR - engine.py:9 - Engine main loop failed",
    )
    assert found == "torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 2.00 GiB"


def test_the_cause_within_a_rank_is_named_with_its_node() -> None:
    found = cause(
        "Traceback (most recent call last):",
        '  File "executor.py", line 1, in load',
        "ray.exceptions.RayTaskError(OSError): ray::RayWorkerWrapper.build_model() (pid=16, ip=192.0.2.12, a=1)",
        '  File "ranks.py", line 2, in build_model',
        "OSError: /data/model-2.safetensors is missing",
    )
    assert found == "OSError: /data/model-2.safetensors is missing (on 192.0.2.12)"


@pytest.mark.parametrize(
    ("lines", "expected"),
    [
        (
            ["usage: lmdeploy", "lmdeploy serve api_server: error: unrecognized arguments: --tpp"],
            "lmdeploy serve api_server: error: unrecognized arguments: --tpp",
        ),
        (["lmdeploy - ERROR - no GPU", "bye"], "lmdeploy - ERROR - no GPU"),
        (["one", "two", "INFO:     127.0.0.1 - GET /health"], "two"),
        ([], ""),
    ],
)
def test_without_an_exception_the_best_line_is_the_cause(lines: list[str], expected: str) -> None:
    assert cause(*lines) == expected


def test_what_happened_long_ago_is_no_cause() -> None:
    now = [0.0]
    finder = launcher.CauseFinder(lambda: now[0])
    for line in ("Traceback (most recent call last):", "  File", "ValueError: a client sent nonsense"):
        finder.feed(line)
    now[0] = 3600.0
    assert finder.cause() == ""


@pytest.mark.parametrize(
    ("code", "words"), [(0, "exit status 0"), (2, "exit status 2"), (-15, "SIGTERM"), (-9, "out of memory")]
)
def test_the_end_of_a_process_is_described(code: int, words: str) -> None:
    assert words in launcher.describe_exit(code)


def test_delays_between_starts_grow_to_a_limit() -> None:
    assert [launcher.restart_delay(failures) for failures in (1, 2, 3, 4, 9, 1000)] == [0, 5, 10, 20, 300, 300]


# -- status


@pytest.fixture
def status(tmp_path: Path) -> Any:
    return launcher.Status(path=tmp_path / "status.json", role="head")


def test_the_status_file_tells_phase_nodes_and_durations(
    status: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    now = [100.0]
    monkeypatch.setattr(launcher.time, "monotonic", lambda: now[0])
    status.begin()
    now[0] += 12
    status.nodes = (HEAD, WORKER)
    status.enter("waiting-for-gpus", "1 of 2 nodes")
    now[0] += 30
    status.enter("waiting-for-serve", "all 16 GPUs alive")
    status.enter("waiting-for-gpus", "1 of 2 nodes")
    now[0] += 1
    status.enter("loading", "api_server starts")
    now[0] += 5
    status.close("loading:model")
    status.enter("serving", "m")
    now[0] += 1000
    status.enter("degraded", "canary: HTTP 500")
    data = json.loads(status.path.read_text())
    assert (data["schema"], data["role"], data["phase"], data["gpus_alive"]) == (1, "head", "degraded", 16)
    assert data["phases"] == [
        {"name": "starting", "seconds": 12.0},
        {"name": "waiting-for-gpus", "seconds": 31.0},
        {"name": "waiting-for-serve", "seconds": 0.0},
        {"name": "loading:model", "seconds": 5.0},
    ]
    assert data["nodes"][1] == {"address": "192.0.2.12", "alive": True, "gpus": 8, "node_id": "b1"}
    assert data["phase"] in launcher.PHASES
    assert "launcher| degraded: canary: HTTP 500" in capsys.readouterr().out


def test_the_status_file_is_left_alone_while_nothing_changes(status: Any) -> None:
    status.write()
    first = status.path.stat().st_mtime_ns
    status.write()
    assert status.path.stat().st_mtime_ns == first


def test_a_status_that_cannot_be_written_stops_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    launcher.Status(path=tmp_path / "absent" / "status.json", role="head").write()
    assert "cannot be written" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("role", "phase", "age", "well"),
    [
        ("worker", "ray-up", 1, True),
        ("worker", "waiting-for-head", 1, False),
        ("head", "serving", 1, True),
        ("head", "waiting-for-serve", 1, True),
        ("head", "ray-up", 1, False),
        ("head", "loading", 1, False),
        ("head", "degraded", 1, False),
        ("head", "serving", 120, False),
    ],
)
def test_health_is_judged_from_the_status(role: str, phase: str, age: float, well: bool) -> None:
    data = {
        "role": role,
        "phase": phase,
        "message": "because",
        "last_error": "CUDA out of memory",
        "updated": 1000.0,
    }
    found, line = launcher.read_health(data, 1000.0 + age)
    assert found == well
    assert "because" in line and "\n" not in line
    assert ("CUDA" in line) == (not well and age == 1)


def test_old_ray_sessions_are_removed(tmp_path: Path) -> None:
    for day in range(1, 7):
        (tmp_path / f"session_2026-11-0{day}_10-00-00_1_1" / "logs").mkdir(parents=True)
    (tmp_path / "session_latest").symlink_to(tmp_path / "session_2026-11-06_10-00-00_1_1")
    launcher.prune_sessions(tmp_path)
    assert sorted(path.name[:18] for path in tmp_path.iterdir()) == [
        "session_2026-11-04",
        "session_2026-11-05",
        "session_2026-11-06",
        "session_latest",
    ]


def test_answered_probes_are_not_logged(capsys: pytest.CaptureFixture[str]) -> None:
    launcher.log_engine('INFO:     127.0.0.1:1 - "GET /health HTTP/1.1" 200 OK')
    launcher.log_engine('INFO:     127.0.0.1:1 - "GET /health HTTP/1.1" 503 Service Unavailable')
    assert capsys.readouterr().out.count("\n") == 1


def test_the_health_command_says_when_there_is_no_status(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert launcher.main(["--state-dir", str(tmp_path), "health"]) == 1
    assert "status.json: cannot be read" in capsys.readouterr().err
