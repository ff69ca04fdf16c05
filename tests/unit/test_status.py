"""The state of a deployment as it is told: whole, half-made, broken, and with a host that is away."""

import copy
import io
import json
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from converged_hosts import converged

from deploy_dsv3 import hostvars, observation, status
from deploy_dsv3.observation import Observation
from deploy_dsv3.status import StatusReport
from deploy_dsv3.topology import Deployment, Replica

RECORDED = Path(__file__).parent / "recorded" / "deployed.json"
HEAD, WORKER = "gpu-01", "gpu-02"
MODEL = "deepseek-ai/DeepSeek-V3"

Collect = Callable[..., StatusReport]


class Endpoint:
    """What clients would meet; a test may change the answers."""

    def __init__(self) -> None:
        self.answers: dict[str, tuple[int, Any]] = {
            "GET /health": (200, {"status": "healthy"}),
            "GET /v1/models": (200, {"data": [{"id": MODEL}]}),
            "POST /v1/completions": (200, {"choices": [{"text": "x"}]}),
        }
        self.authorizations: set[str | None] = set()


@pytest.fixture
def endpoint() -> Iterator[tuple[Endpoint, str]]:
    """An endpoint and its URL."""
    state = Endpoint()

    class Handler(BaseHTTPRequestHandler):
        def answer(self) -> None:
            self.rfile.read(int(self.headers.get("Content-Length", 0)))
            state.authorizations.add(self.headers.get("Authorization"))
            code, body = state.answers[f"{self.command} {self.path}"]
            self.send_response(code)
            self.end_headers()
            self.wfile.write(json.dumps(body).encode())

        do_GET = do_POST = answer

        def log_message(self, format: str, *args: Any) -> None:
            """Keeps the test's output quiet."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
    thread.start()
    yield state, f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()
    thread.join()


@pytest.fixture
def hosts() -> dict[str, Any]:
    """What was seen on the hosts of a sound deployment; a test may break it."""
    recorded: dict[str, Any] = json.loads(RECORDED.read_text())["hosts"]
    return copy.deepcopy(recorded)


@pytest.fixture
def collect(hosts: dict[str, Any], endpoint: tuple[Endpoint, str], monkeypatch: pytest.MonkeyPatch) -> Collect:
    """Collects the state of what `hosts` and `endpoint` hold by then."""

    def run(*, canary: bool = False, away: dict[str, str] | None = None, **settings: Any) -> StatusReport:
        seen = {
            host: Observation(host=host, error=error)
            if (error := (away or {}).get(host, ""))
            else Observation(host=host, seen=hosts[host])
            for host in hosts
        }
        monkeypatch.setattr(observation, "look", lambda *_, **__: seen)
        values = {**hostvars.role_defaults(), "endpoint_url": endpoint[1], **settings}
        return status.collect(
            Deployment(replicas=(Replica(name="dsv3", head=HEAD, workers=(WORKER,)),)),
            dict.fromkeys(hosts, values),
            {host: {} for host in hosts},
            canary=canary,
        )

    return run


def rendered(report: StatusReport) -> str:
    stream = io.StringIO()
    status.render(report, stream)
    return stream.getvalue()


def test_a_sound_deployment_is_whole_and_serves(collect: Collect) -> None:
    report = collect()
    [replica] = report.replicas
    assert replica.serving and replica.whole and report.exit_code == 0
    assert (replica.gpus_alive, replica.gpus_expected) == (16, 16)
    assert [(node.host, node.role, node.container, node.gpus, node.ray_gpus) for node in replica.nodes] == [
        (HEAD, "head", "running", 8, 8),
        (WORKER, "worker", "running", 8, 8),
    ]
    assert replica.engine.phase == "serving" and replica.engine.health == 200
    assert dict(replica.engine.phases)["loading:model"] > 0
    assert replica.release["versions"]["ray"] == "2.60.0"


def test_a_completion_is_asked_for_only_on_demand(collect: Collect, endpoint: tuple[Endpoint, str]) -> None:
    assert collect().replicas[0].endpoint.completion is None
    assert collect(canary=True).replicas[0].endpoint.completion == 200
    endpoint[0].answers["POST /v1/completions"] = (500, {})
    report = collect(canary=True)
    assert not report.replicas[0].serving and report.exit_code == 5


def test_the_endpoint_is_asked_with_a_key(collect: Collect, endpoint: tuple[Endpoint, str]) -> None:
    collect(endpoint_api_keys=["sk-one", "sk-two"])
    assert endpoint[0].authorizations == {"Bearer sk-one"}


def test_healthy_is_not_serving(collect: Collect, endpoint: tuple[Endpoint, str]) -> None:
    endpoint[0].answers["GET /v1/models"] = (200, {"data": [{"id": "another"}]})
    report = collect()
    assert not report.replicas[0].serving and report.exit_code == 5
    assert "NOT serving" in rendered(report)


def test_the_log_of_an_engine_that_is_not_well_is_explained(collect: Collect, hosts: dict[str, Any]) -> None:
    """The worker's container ended: the first cause in its log, and not the echo that stands above it."""
    hosts[WORKER]["container"]["inspect"]["State"].update(Status="exited", Running=False)
    hosts[WORKER]["log"] = {
        "lines": [
            [17, "2026-11-24T08:00:00Z ray| (RayWorkerWrapper pid=9) ray.exceptions.RayActorError: it died"],
            [40, "2026-11-24T08:00:01Z ray| NCCL WARN Call to ibv_reg_mr failed with error Cannot allocate memory"],
        ]
    }
    report = collect()
    cause = report.replicas[0].nodes[1].cause
    assert cause and (cause.signature.id, cause.line_number) == ("memlock", 40)
    assert report.replicas[0].nodes[0].cause is None, "the head is well"
    told = rendered(report)
    assert f"likely cause    {WORKER}: RDMA cannot pin memory" in told
    assert "line 40: 2026-11-24T08:00:01Z ray| NCCL WARN" in told
    assert "docs/runbooks/troubleshooting.md#memlock" in told
    found = report.as_dict()["replicas"][0]["nodes"][1]["cause"]
    assert (found["id"], found["page"]) == ("memlock", "docs/runbooks/troubleshooting.md#memlock")


def test_what_docker_and_the_launcher_say_counts_as_well(collect: Collect, hosts: dict[str, Any]) -> None:
    state = hosts[HEAD]["container"]["inspect"]["State"]
    state.update(Status="created", Running=False, Error="CDI device injection failed: unresolvable CDI devices x")
    hosts[HEAD]["log"] = {"lines": []}
    hosts[WORKER]["log"] = {"lines": []}
    hosts[WORKER]["documents"]["status"].update(phase="degraded", last_error="api_server ended: CUDA out of memory")
    nodes = collect().replicas[0].nodes
    assert [node.cause.signature.id if node.cause else "" for node in nodes] == [
        "no-gpu-in-container",
        "gpu-out-of-memory",
    ]
    assert nodes[0].cause and nodes[0].cause.where == ""


@pytest.mark.parametrize("body", [[], {"data": [{}]}, "text"])
def test_an_endpoint_that_answers_nonsense_is_said_to(
    collect: Collect, endpoint: tuple[Endpoint, str], body: Any
) -> None:
    endpoint[0].answers["GET /v1/models"] = (200, body)
    replica = collect().replicas[0]
    assert not replica.serving and endpoint[1] in replica.endpoint.error


def test_an_endpoint_that_is_down_is_said_to_be(collect: Collect) -> None:
    report = collect(endpoint_url="http://127.0.0.1:1")
    assert "refused" in report.replicas[0].endpoint.error and report.exit_code == 5
    assert "/health no answer" in rendered(report)


def test_a_host_that_is_away_is_exit_6_and_the_rest_is_still_told(collect: Collect) -> None:
    report = collect(away={WORKER: "No route to host"})
    assert report.unreachable == (WORKER,) and report.exit_code == 6
    [replica] = report.replicas
    assert replica.serving and not replica.whole
    text = rendered(report)
    assert "not reached: No route to host" in text and "serving, but not whole" in text


def test_without_its_head_a_replica_has_no_engine_to_tell_of(collect: Collect) -> None:
    [replica] = collect(away={HEAD: "No route to host"}, endpoint_url="").replicas
    assert replica.engine.phase == "" and replica.gpus_alive is None
    assert "no address" in replica.endpoint.error


def test_before_a_deployment_nothing_is_guessed(collect: Collect, hosts: dict[str, Any]) -> None:
    for seen in hosts.values():
        seen["container"] = {"inspect": None, "image": None}
        seen["documents"] = dict.fromkeys(seen["documents"])
        seen["health"] = None
    report = collect(endpoint_url="")
    [replica] = report.replicas
    assert (replica.gpus_expected, replica.gpus_alive) == (None, None)
    assert {node.container for node in replica.nodes} == {"absent"}
    assert report.exit_code == 5 and "no engine container" in rendered(report)


def test_a_container_that_is_gone_takes_its_status_file_with_it(collect: Collect, hosts: dict[str, Any]) -> None:
    hosts[HEAD]["container"]["inspect"] = None
    [replica] = collect().replicas
    assert replica.engine.phase == "" and replica.gpus_alive is None and not replica.whole


def test_a_stopped_container_is_stopped_whatever_its_file_says(collect: Collect, hosts: dict[str, Any]) -> None:
    hosts[HEAD]["container"]["inspect"]["State"].update(Running=False, Status="exited")
    assert collect().replicas[0].engine.phase == "stopped"


def test_a_lost_node_is_named(collect: Collect, hosts: dict[str, Any]) -> None:
    told = hosts[HEAD]["documents"]["status"]
    told.update(phase="degraded", gpus_alive=8, message="Ray lost 198.18.0.12", last_error="worker died")
    told["nodes"] = [node for node in told["nodes"] if node["address"] == "198.18.0.11"]
    report = collect()
    [replica] = report.replicas
    assert not replica.whole and replica.nodes[1].ray_alive is False
    text = rendered(report)
    assert "8 of 16 in Ray" in text and "Ray lost 198.18.0.12" in text and "worker died" in text


def test_two_images_are_not_whole(collect: Collect, hosts: dict[str, Any]) -> None:
    hosts[WORKER]["container"]["inspect"]["Image"] = "sha256:0"
    assert not collect().replicas[0].whole


def test_json_is_complete_and_plain(collect: Collect) -> None:
    document = json.loads(json.dumps(collect(canary=True).as_dict()))
    [replica] = document["replicas"]
    assert replica["serving"] and replica["whole"]
    assert {"name": "loading:model", "seconds": replica["engine"]["phases"][-1]["seconds"]} in replica["engine"][
        "phases"
    ]
    assert replica["endpoint"]["models"] == [MODEL]
    assert [node["host"] for node in replica["nodes"]] == [HEAD, WORKER]


def test_what_somebody_changed_by_hand_is_told_by_host_and_key(hosts: dict[str, Any], collect: Collect) -> None:
    for host, document in converged().items():
        hosts[host]["facts"] = document
    assert [node.drift for node in collect().replicas[0].nodes] == [(), ()]
    hosts[WORKER]["facts"]["state"]["sysctls"]["vm.swappiness"] = "1"
    report = collect()
    (one,) = report.as_dict()["replicas"][0]["nodes"][1]["drift"]
    assert (one["host"], one["key"], one["recorded"], one["found"]) == (WORKER, "sysctl vm.swappiness", "60", "1")
    stream = io.StringIO()
    status.render(report, stream)
    assert "changed by hand gpu-02: sysctl vm.swappiness was 60, is 1" in stream.getvalue()
