"""The main job: two bare hosts become one served and verified model; a second run finds nothing to do."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest
import sight
import yaml
from product import Product, Run

from deploy_dsv3.lab.fleet import Lab
from deploy_dsv3.lab.hosts import Host

REPOSITORY = Path(__file__).parents[2]
STAGES = ["preflight", "host", "image", "weights", "container", "ray", "engine", "first-token", "verify"]
HCAS = {
    "gpu-01": [f"mlx5_{number}" for number in range(8)],
    "gpu-02": [f"ibp{slot}s0" for slot in range(25, 82, 8)],
}


@pytest.fixture(scope="module", params=["", "--full"], ids=["what differs", "every task"])
def again(
    product: Product, lab: Lab, deployed: Run, request: pytest.FixtureRequest
) -> tuple[Run, list[tuple[str, str]]]:
    """A run after the first, and the containers before it."""
    before = [sight.started_at(host) for host in lab]
    option = request.param
    run = product("--inventory", lab.inventory, *filter(None, [option]), "--json", what=f"second run {option}".strip())
    return run, before


def test_every_stage_was_passed(deployed: Run) -> None:
    assert [stage["name"] for stage in deployed.document["stages"]] == STAGES
    assert deployed.document["failures"] == []


def test_the_report_has_the_endpoint_and_a_completion(deployed: Run, endpoint: str) -> None:
    (replica,) = deployed.document["replicas"]
    assert (replica["head"], replica["workers"]) == ("gpu-01", ["gpu-02"])
    assert (replica["endpoint"], replica["model"]) == (endpoint, sight.MODEL)
    assert replica["completion"]


def test_verification_is_green_on_both_hosts(deployed: Run) -> None:
    checks = deployed.document["verification"]["checks"]
    assert deployed.document["verification"]["passed"] is True
    for host in ("gpu-01", "gpu-02"):
        passed = [check for check in checks if check["host"] == host and check["outcome"] == "passed"]
        assert len(passed) > 20


@pytest.mark.usefixtures("deployed")
def test_a_client_gets_a_completion(endpoint: str) -> None:
    answer = sight.complete(endpoint)
    assert answer.status_code == 200
    assert answer.json()["model"] == sight.MODEL
    assert answer.json()["usage"]["completion_tokens"] == 4


@pytest.mark.usefixtures("deployed")
def test_only_the_clients_routes_are_open(lab: Lab, endpoint: str) -> None:
    """The engine itself is on loopback, and its administration is behind the endpoint's 404."""
    import httpx

    assert httpx.post(f"{endpoint}/sleep", trust_env=False).status_code == 404
    for port in (23333, 8265):
        with pytest.raises(httpx.ConnectError):
            httpx.get(f"http://{lab.hosts[0].address}:{port}/", trust_env=False)


@pytest.mark.usefixtures("deployed")
def test_every_host_sees_both_nodes_and_sixteen_gpus(lab: Lab) -> None:
    for host in lab:
        status = host.run(["docker", "exec", sight.CONTAINER, "ray", "status"]).stdout
        assert "/16.0 GPU" in status, host.name
        assert status.partition("Pending:")[0].count("node_") == 2, host.name


@pytest.mark.usefixtures("deployed")
def test_each_host_gets_its_own_rdma_devices(lab: Lab) -> None:
    """The HCAs of the two are named differently."""
    for host in lab:
        assert sight.infiniband(host), host.name
        assert sight.devices(host) == sight.infiniband(host)
        named = sight.environment(host)["NCCL_IB_HCA"].lstrip("=").split(",")
        assert [entry.split(":")[0] for entry in named] == HCAS[host.name]


@pytest.mark.usefixtures("deployed")
def test_the_same_image_by_digest_on_both(lab: Lab) -> None:
    found = [sight.container(host) for host in lab]
    assert len({one["Image"] for one in found}) == 1
    assert len({one["Config"]["Image"] for one in found}) == 1
    assert "@sha256:" in found[0]["Config"]["Image"]


def test_the_engine_may_lock_the_memory_that_was_asked_for(deployed: Run, lab: Lab) -> None:
    """Of its first process, and of one that is started later; what the host's own processes may is something else."""
    site = yaml.safe_load((lab.inventory / "group_vars" / "all.yml").read_text())
    asked = [limit for limit in site.get("engine_ulimits", ["memlock:-1:-1"]) if limit.startswith("memlock:")]
    wanted = ["unlimited" if limit == "-1" else limit for limit in asked[0].split(":")[1:]]
    inside = ("docker", "exec", sight.CONTAINER, "cat")
    for host in lab:
        assert _memlock(host, *inside, "/proc/1/limits") == _memlock(host, *inside, "/proc/self/limits") == wanted
        assert wanted == ["unlimited", "unlimited"] or _memlock(host, "cat", "/proc/self/limits") != wanted
    title = "Programs in the container may pin as much memory as RDMA needs"
    checks = [check for check in deployed.document["verification"]["checks"] if check["check"] == title]
    assert [(check["host"], check["outcome"]) for check in checks] == [("gpu-01", "passed"), ("gpu-02", "passed")]


def _memlock(host: Host, *command: str) -> list[str]:
    """Soft and hard limit in bytes."""
    (line,) = [line for line in host.run(command).stdout.splitlines() if line.startswith("Max locked memory")]
    return line.removeprefix("Max locked memory").split()[:2]


def test_another_run_changes_nothing(again: tuple[Run, list[tuple[str, str]]], lab: Lab) -> None:
    run, before = again
    assert {host: stats["changed"] for host, stats in run.document["hosts"].items()} == {
        "gpu-01": 0,
        "gpu-02": 0,
    }
    assert [sight.started_at(host) for host in lab] == before, "no container was restarted"
    assert run.document["verification"]["passed"] is True


@pytest.mark.usefixtures("deployed")
def test_verify_writes_junit(product: Product, lab: Lab, tmp_path: Path) -> None:
    file = tmp_path / "verification.xml"
    run = product("verify", "--inventory", lab.inventory, "--junit", file, what="verify")
    assert "all passed" in run.out
    suites = ElementTree.parse(file).getroot().findall("testsuite")
    assert [suite.get("name") for suite in suites] == ["gpu-01", "gpu-02"]
    assert all(int(suite.get("tests", "0")) > 20 for suite in suites)
    assert all(suite.get("failures") == suite.get("errors") == "0" for suite in suites)


@pytest.mark.usefixtures("deployed")
def test_status_while_it_serves(product: Product, lab: Lab, endpoint: str) -> None:
    run = product("status", "--inventory", lab.inventory, "--canary", "--json", what="status")
    (replica,) = run.document["replicas"]
    assert (replica["serving"], replica["whole"]) == (True, True)
    assert (replica["gpus_expected"], replica["gpus_alive"]) == (16, 16)
    assert [node["ray_gpus"] for node in replica["nodes"]] == [8, 8]
    assert replica["engine"]["phase"] == "serving"
    assert (replica["endpoint"]["url"], replica["endpoint"]["completion"]) == (endpoint, 200)
    assert replica["release"]["image"]["digest"].startswith("sha256:")
    text = product("status", "--inventory", lab.inventory).out
    assert "dsv3: serving" in text
    assert "16 of 16 in Ray" in text


@pytest.mark.usefixtures("deployed")
def test_a_playbook_runs_under_plain_ansible(lab: Lab) -> None:
    """In a checkout its ansible.cfg is all that is needed."""
    done = subprocess.run(
        [Path(sys.executable).parent / "ansible-playbook", "-i", lab.inventory, "playbooks/preflight.yml"],
        cwd=REPOSITORY,
        env={name: value for name, value in os.environ.items() if not name.startswith("ANSIBLE_")},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    recap = done.stdout.partition("PLAY RECAP")[2]
    assert recap.count("changed=0") == recap.count("failed=0") == 2
