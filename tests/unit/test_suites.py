"""The verification suites against a recorded deployment: silent on the sound one, and each fault is found."""

import copy
import hashlib
import importlib.util
import inspect
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from deploy_dsv3 import content, derive, hostvars, observation, ports
from deploy_dsv3.derive import HostInput
from deploy_dsv3.facts import load_facts
from deploy_dsv3.observation import Observation
from deploy_dsv3.topology import Deployment, Replica
from deploy_dsv3.verification import Expectations

RECORDED = Path(__file__).parent / "recorded" / "deployed.json"
SUITES = ("host", "container", "ray", "network", "secrets", "endpoint")
HEAD, WORKER = "gpu-01", "gpu-02"
SETTINGS = {
    **hostvars.role_defaults(),
    "docker_engine_registry_mirrors": ["http://198.18.0.3:5000"],
    "docker_engine_insecure_registries": ["198.18.0.3:5000"],
    "ray_cluster_object_store_memory_bytes": 268435456,
    "engine_ulimits": ["stack:67108864:67108864"],
}
CONNECTIONS = {HEAD: {"ansible_host": "198.18.0.11"}, WORKER: {"ansible_host": "198.18.0.12"}}
REPLICA = Replica(name="dsv3", head=HEAD, workers=(WORKER,))

NCCL = "NCCL_SOCKET_IFNAME="
TOKEN = "/etc/deploy-dsv3/engine/secrets/ray_token"
LAUNCHER = "/etc/deploy-dsv3/engine/launcher.py"

Hosts = dict[str, dict[str, Any]]
Failures = set[tuple[str, str]]


@pytest.fixture(scope="module")
def suites() -> Iterator[dict[str, ModuleType]]:
    """The product's suites as modules, and `fleet`."""
    folder = content.testinfra()
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(folder))
        modules = {}
        for name in ("fleet", *(f"test_{suite}" for suite in SUITES)):
            spec = importlib.util.spec_from_file_location(name, folder / f"{name}.py")
            assert spec and spec.loader
            modules[name] = importlib.util.module_from_spec(spec)
            patch.setitem(__import__("sys").modules, name, modules[name])
            spec.loader.exec_module(modules[name])
        yield modules


class Deployed:
    """A recorded deployment that a test may break, and the settings it is compared with."""

    def __init__(self) -> None:
        recorded: dict[str, Any] = json.loads(RECORDED.read_text())
        self.hosts: Hosts = recorded["hosts"]
        self.settings = {host: copy.deepcopy(SETTINGS) for host in self.hosts}
        self.unreachable: set[str] = set()
        self._redeploy()

    def _redeploy(self) -> None:
        """Put in place what this version would deploy there; the recording is of an earlier one."""
        for host in self.hosts.values():
            host["facts"]["fabric"] = {"state": "Completed", "status": "Success"}
            host["facts"]["state"] = {"packages": {"nvidia-fabricmanager": "580.105.08-1"}, "sysctls": {}}
            limits = "Limit                     Soft Limit           Hard Limit           Units\n"
            limits += "Max locked memory         unlimited            unlimited            bytes\n"
            host["inside"]["limits"] = {"rc": 0, "out": limits, "err": ""}
        inputs = {
            host: HostInput(
                host=host,
                facts=load_facts(self.facts(host)),
                settings=self.settings[host],
                connect_address=CONNECTIONS[host]["ansible_host"],
            )
            for host in self.hosts
        }
        for host, plan in derive.derive(REPLICA, inputs)[0].items():
            self.hosts[host]["documents"]["node"] = dict(plan.node_file)
            self.hosts[host]["documents"]["serve"] = dict(plan.serve_file) if host == HEAD else None
            self.facts(host)["state"]["sysctls"][ports.SYSCTL] = plan.reserved_ports
            config = self.inspect(host)["Config"]
            kept = [entry for entry in config["Env"] if entry.split("=")[0] not in plan.environment]
            config["Env"] = kept + [f"{name}={value}" for name, value in plan.environment.items()]
            source = content.roles() / "engine" / "files" / "launcher.py"
            self.hosts[host]["files"][LAUNCHER]["sha256"] = hashlib.sha256(source.read_bytes()).hexdigest()

    def set(self, **settings: Any) -> None:
        for host in self.settings.values():
            host.update(settings)

    def inspect(self, host: str) -> Any:
        return self.hosts[host]["container"]["inspect"]

    def document(self, host: str, name: str) -> Any:
        return self.hosts[host]["documents"][name]

    def facts(self, host: str) -> Any:
        return self.hosts[host]["facts"]

    def open_port(self, host: str, address: str, port: int, *, ours: bool = True, unit: str = "") -> None:
        container = self.inspect(host)["Id"] if ours else ""
        listener = {"address": address, "port": port, "process": "x", "pid": 1, "unit": unit}
        self.facts(host)["listening"].append({**listener, "container_id": container})

    def close_port(self, host: str, port: int) -> None:
        facts = self.facts(host)
        facts["listening"] = [one for one in facts["listening"] if one["port"] != port]

    def observations(self) -> dict[str, Observation]:
        return {
            host: Observation(host=host, error="no route to host")
            if host in self.unreachable
            else Observation(host=host, seen=seen)
            for host, seen in self.hosts.items()
        }


Check = Callable[[Deployed], Failures]


@pytest.fixture
def check(suites: dict[str, ModuleType], monkeypatch: pytest.MonkeyPatch) -> Check:
    """Runs every check on every host it concerns; gives those that fail as ``(host, name)``."""

    def run(deployed: Deployed) -> Failures:
        monkeypatch.setattr(observation, "look", lambda *_, **__: deployed.observations())
        expectations = Expectations(
            deployment=Deployment(replicas=(REPLICA,)),
            settings=deployed.settings,
            connections=CONNECTIONS,
        )
        fleet = suites["fleet"].look(expectations)
        return {
            (host, f"{suite}.{name.removeprefix('test_')}")
            for suite in SUITES
            for name, function in vars(suites[f"test_{suite}"]).items()
            if name.startswith("test_")
            for host in deployed.hosts
            if fails(function, fleet, fleet.nodes[host])
        }

    return run


def fails(function: Callable[..., None], fleet: Any, node: Any) -> bool:
    """Whether a check fails; what pytest would skip for want of a fixture does not."""
    wanted = inspect.signature(function).parameters
    reached, container = node.observation.reached, node.container
    if ("head" in wanted and node.role != "head") or ("any_node" not in wanted and not reached):
        return False
    if ("plan" in wanted and node.plan is None) or ({"engine", "running"} & set(wanted) and not container):
        return False
    if "running" in wanted and not container["State"]["Running"]:
        return False
    available = {
        "fleet": fleet,
        "facts": node.facts,
        "plan": node.plan,
        "record_property": lambda _name, _value: None,
    }
    try:
        function(**{name: available.get(name, node) for name in wanted})
    except pytest.skip.Exception:
        return False
    except AssertionError as error:
        assert str(error).split("\nassert ")[0], f"{function.__name__} fails without a word"
        return True
    return False


def test_a_sound_deployment_passes(check: Check) -> None:
    assert check(Deployed()) == set()


def gpu_gone(d: Deployed) -> None:
    d.facts(WORKER)["gpus"].pop()
    d.facts(WORKER)["pci_gpus"].pop()
    d.hosts[WORKER]["inside"]["gpus"]["out"] = "GPU 0: x\n" * 7


def worker_left(d: Deployed) -> None:
    for host in (HEAD, WORKER):
        nodes = json.loads(d.hosts[host]["inside"]["nodes"]["out"])
        for node in nodes:
            node["alive"] = node["address"] == "198.18.0.11"
        d.hosts[host]["inside"]["nodes"]["out"] = json.dumps(nodes)
        status = d.hosts[host]["inside"]["ray_status"]
        lines = status["out"].splitlines(keepends=True)
        first = next(index for index, line in enumerate(lines) if line.startswith(" 1 node_"))
        status["out"] = "".join(lines[:first] + lines[first + 1 :]).replace("/16.0 GPU", "/8.0 GPU")


def other_image(d: Deployed) -> None:
    d.inspect(WORKER)["Image"] = "sha256:0"


def endpoint_everywhere(d: Deployed) -> None:
    d.close_port(HEAD, 8000)
    d.open_port(HEAD, "0.0.0.0", 8000, ours=False, unit="dsv3-endpoint.service")


def endpoint_taken(d: Deployed) -> None:
    d.close_port(HEAD, 8000)
    d.open_port(HEAD, "198.18.0.11", 8000, ours=False, unit="nginx.service")


def memory_limited(d: Deployed) -> None:
    """Docker was asked for the limit, and the processes do not have it."""
    d.set(engine_ulimits=["memlock:-1:-1"])
    for host in d.hosts:
        d.inspect(host)["HostConfig"]["Ulimits"] = [{"Name": "memlock", "Soft": -1, "Hard": -1}]
    limits = d.hosts[WORKER]["inside"]["limits"]
    limits["out"] = limits["out"].replace("unlimited", "8388608")


def of(host: str, *names: str) -> Failures:
    return {(host, name) for name in names}


def both(*names: str) -> Failures:
    return of(HEAD, *names) | of(WORKER, *names)


def without(environment: list[str], prefix: str) -> list[str]:
    return [entry for entry in environment if not entry.startswith(prefix)]


# What is broken, how, and exactly what says so.
FAULTS: dict[str, tuple[Callable[[Deployed], Any], Failures]] = {
    "host away": (
        lambda d: d.unreachable.add(WORKER),
        of(WORKER, "host.reached"),
    ),
    "section unreadable": (
        lambda d: d.hosts[WORKER]["errors"].update(leaks="PermissionError: x"),
        of(WORKER, "host.readable"),
    ),
    "no driver": (
        lambda d: d.hosts[WORKER]["commands"]["nvidia-smi"].update(path="", package=""),
        of(WORKER, "host.installed"),
    ),
    "driver from nowhere": (
        lambda d: d.hosts[WORKER]["commands"]["nvidia-smi"].update(package=""),
        of(WORKER, "host.installed"),
    ),
    "GPU gone": (
        gpu_gone,
        # What a deployment would make of seven GPUs differs from what was deployed.
        of(WORKER, "host.gpus")
        | both("ray.nodes", "ray.ray_status", "container.node_file")
        | of(HEAD, "container.serve_file"),
    ),
    "nvidia-smi fails": (
        lambda d: d.facts(WORKER)["nvidia_smi"].update(rc=9, error="driver not loaded"),
        of(WORKER, "host.gpus"),
    ),
    "driver updated without a reboot": (
        lambda d: d.facts(WORKER)["driver"].update(loaded_version="1.2"),
        of(WORKER, "host.driver_version", "host.fabric"),
    ),
    "fabric not formed": (
        lambda d: d.facts(WORKER)["fabric"].update(state="In Progress", status="N/A"),
        of(WORKER, "host.fabric"),
    ),
    "fabric manager updated without the driver": (
        lambda d: d.facts(WORKER)["state"]["packages"].update({"nvidia-fabricmanager": "580.126.09-1"}),
        of(WORKER, "host.fabric"),
    ),
    "another driver": (
        lambda d: [gpu.update(driver_version="1.2") for gpu in d.facts(WORKER)["gpus"]],
        both("host.driver_version"),
    ),
    "Docker not started at boot": (
        lambda d: d.hosts[WORKER]["units"]["docker.service"].update(enabled="disabled"),
        of(WORKER, "host.docker"),
    ),
    "daemon.json edited": (
        lambda d: d.facts(WORKER)["docker"]["daemon_json"].update({"live-restore": False}),
        of(WORKER, "host.daemon_json"),
    ),
    "daemon.json gone": (
        lambda d: d.facts(WORKER)["docker"].update(daemon_json=None),
        of(WORKER, "host.daemon_json"),
    ),
    "CDI specification gone": (
        lambda d: d.hosts[WORKER].update(cdi_spec=""),
        of(WORKER, "host.cdi"),
    ),
    "CDI specification stale": (
        lambda d: d.hosts[WORKER].update(
            cdi_spec=d.hosts[WORKER]["cdi_spec"].replace('"7"', '"9"').replace("'7'", "'9'")
        ),
        of(WORKER, "host.cdi"),
    ),
    "container gone": (
        lambda d: d.hosts[WORKER]["container"].update(inspect=None),
        of(WORKER, "container.running"),
    ),
    "container stopped": (
        lambda d: d.inspect(WORKER)["State"].update(Running=False, Status="exited"),
        of(WORKER, "container.running"),
    ),
    "container unhealthy": (
        lambda d: d.inspect(WORKER)["State"]["Health"].update(Status="unhealthy"),
        of(WORKER, "container.healthy"),
    ),
    "another image": (
        other_image,
        of(WORKER, "container.image", "container.cache") | both("container.same_image"),
    ),
    "image of another digest": (
        lambda d: d.hosts[HEAD]["container"]["image"].update(RepoDigests=["x@sha256:0"]),
        of(HEAD, "container.image"),
    ),
    "inventory names another image": (
        lambda d: d.set(engine_image_name="openmmlab/lmdeploy:v1"),
        both("container.image_wanted"),
    ),
    "inventory names another digest": (
        lambda d: d.set(engine_image_digest="sha256:0"),
        both("container.image_wanted"),
    ),
    "an engine out of memory": (
        lambda d: d.hosts[WORKER].update(log={"lines": [[9, "torch.OutOfMemoryError: CUDA out of memory."]]}),
        of(WORKER, "container.log"),
    ),
    "another Ray": (
        lambda d: d.document(WORKER, "release")["versions"].update(ray="2.59.0"),
        both("container.same_versions"),
    ),
    "launcher edited": (
        lambda d: d.hosts[WORKER]["files"][LAUNCHER].update(sha256="0"),
        of(WORKER, "container.launcher"),
    ),
    "node.json gone": (
        lambda d: d.hosts[WORKER]["documents"].update(node=None),
        of(WORKER, "container.node_file"),
    ),
    "settings changed since": (
        lambda d: d.set(lmdeploy_session_len=4096),
        of(HEAD, "container.serve_file"),
    ),
    "a Ray port changed since": (
        lambda d: d.set(ray_cluster_node_manager_port=7000),
        both("container.node_file", "network.known_ports", "network.reserved_ports"),
    ),
    "serving command on a worker": (
        lambda d: d.hosts[WORKER]["documents"].update(serve=d.document(HEAD, "serve")),
        of(WORKER, "container.serve_file"),
    ),
    "device missing": (
        lambda d: d.inspect(WORKER)["HostConfig"]["Devices"].pop(),
        of(WORKER, "container.devices"),
    ),
    "GPUs by --gpus": (
        lambda d: d.inspect(WORKER)["HostConfig"].update(
            DeviceRequests=[{"Driver": "", "Count": -1, "DeviceIDs": None, "Capabilities": [["gpu"]]}]
        ),
        of(WORKER, "container.gpu_request"),
    ),
    "container asks for too few GPUs in the old way": (
        lambda d: (
            d.settings[WORKER].update(engine_gpu_mode="legacy"),
            d.inspect(WORKER)["HostConfig"].update(
                DeviceRequests=[{"Driver": "nvidia", "Count": 0, "DeviceIDs": ["0"], "Capabilities": [["gpu"]]}]
            ),
        ),
        of(WORKER, "container.gpu_request"),
    ),
    "container blind": (
        lambda d: d.hosts[WORKER]["inside"]["gpus"].update(rc=255, out="Failed to initialize NVML"),
        of(WORKER, "container.gpus_inside"),
    ),
    "environment lacks an interface": (
        lambda d: d.inspect(WORKER)["Config"].update(Env=without(d.inspect(WORKER)["Config"]["Env"], NCCL)),
        of(WORKER, "container.environment"),
    ),
    "proxy in the environment": (
        lambda d: d.inspect(WORKER)["Config"]["Env"].append("https_proxy=http://192.0.2.1"),
        of(WORKER, "container.no_proxy_variables"),
    ),
    "limits missing": (
        lambda d: d.inspect(WORKER)["HostConfig"].update(Ulimits=None),
        of(WORKER, "container.ulimits"),
    ),
    "privileged": (
        lambda d: d.inspect(WORKER)["HostConfig"].update(Privileged=True),
        of(WORKER, "container.privileges"),
    ),
    "one capability more": (
        lambda d: d.inspect(WORKER)["HostConfig"].update(CapAdd=["CAP_IPC_LOCK", "CAP_SYS_ADMIN"]),
        of(WORKER, "container.privileges"),
    ),
    "own network": (
        lambda d: d.inspect(WORKER)["HostConfig"].update(NetworkMode="bridge"),
        of(WORKER, "container.namespaces"),
    ),
    "model writable": (
        lambda d: [mount.update(RW=True) for mount in d.inspect(WORKER)["Mounts"]],
        of(WORKER, "container.mounts"),
    ),
    "model elsewhere": (
        lambda d: d.set(model_weights_path="/data/other"),
        both("container.mounts") | of(HEAD, "container.serve_file"),
    ),
    "what it compiles is lost with it": (
        lambda d: d.inspect(WORKER)["Mounts"].pop(),
        of(WORKER, "container.cache"),
    ),
    "no restart": (
        lambda d: d.inspect(WORKER)["HostConfig"].update(RestartPolicy={"Name": "no"}),
        of(WORKER, "container.restart"),
    ),
    "log grows for ever": (
        lambda d: d.inspect(WORKER)["HostConfig"]["LogConfig"].update(Config={}),
        of(WORKER, "container.log_rotation"),
    ),
    "foreign container": (
        lambda d: d.inspect(WORKER)["Config"].update(Labels={}),
        of(WORKER, "container.labels"),
    ),
    "worker left the cluster": (worker_left, both("ray.nodes", "ray.ray_status")),
    "ray status fails": (
        lambda d: d.hosts[WORKER]["inside"]["ray_status"].update(rc=1, err="no cluster"),
        of(WORKER, "ray.ray_status"),
    ),
    "still loading": (
        lambda d: d.document(HEAD, "status").update(phase="loading"),
        of(HEAD, "ray.phase"),
    ),
    "Ray open to everybody": (
        lambda d: d.inspect(WORKER)["Config"]["Env"].append("RAY_AUTH_MODE=disabled"),
        of(WORKER, "ray.authentication"),
    ),
    "another token": (
        lambda d: d.hosts[WORKER]["files"][TOKEN].update(sha256="0"),
        both("ray.authentication"),
    ),
    "engine open to the network": (
        lambda d: d.open_port(HEAD, "0.0.0.0", 23333),
        of(HEAD, "network.engine_port"),
    ),
    "endpoint on every address": (
        endpoint_everywhere,
        of(HEAD, "network.endpoint_port"),
    ),
    "another program on the endpoint's port": (
        endpoint_taken,
        of(HEAD, "network.endpoint_port"),
    ),
    "dashboard open": (
        lambda d: d.open_port(HEAD, "0.0.0.0", 8265),
        of(HEAD, "network.dashboard"),
    ),
    "client server open without a token": (
        lambda d: (
            d.open_port(HEAD, "::ffff:192.0.2.11", 10001),
            d.inspect(HEAD)["Config"]["Env"].append("RAY_AUTH_MODE=disabled"),
        ),
        of(HEAD, "network.dashboard", "ray.authentication"),
    ),
    "a second Ray head": (
        lambda d: d.open_port(WORKER, "0.0.0.0", 6379),
        of(WORKER, "network.ray_port"),
    ),
    "a port that no setting names": (
        lambda d: d.open_port(WORKER, "::", 9999),
        of(WORKER, "network.known_ports"),
    ),
    "raylet gone": (
        lambda d: d.close_port(WORKER, 6380),
        of(WORKER, "network.known_ports"),
    ),
    "token readable": (
        lambda d: d.hosts[WORKER]["files"][TOKEN].update(mode="0644"),
        of(WORKER, "secrets.permissions"),
    ),
    "launcher writable by others": (
        lambda d: d.hosts[WORKER]["files"][LAUNCHER].update(mode="0777"),
        of(WORKER, "secrets.writable"),
    ),
    "token in a log": (
        lambda d: d.hosts[WORKER]["leaks"].append({"secret": "ray_token, line 1", "place": "docker logs"}),
        of(WORKER, "secrets.leaks"),
    ),
    "endpoint stopped": (
        lambda d: d.hosts[HEAD]["units"]["dsv3-endpoint.service"].update(active="failed"),
        of(HEAD, "endpoint.unit"),
    ),
    "engine unhealthy": (
        lambda d: d.hosts[HEAD]["health"].update(status=503, body="{}"),
        of(HEAD, "endpoint.engine_health"),
    ),
    "HCA port down": (
        lambda d: [port.update(state="DOWN") for port in d.facts(WORKER)["infiniband"]["ports"][:1]],
        of(WORKER, "host.hcas", "host.fits", "container.environment"),
    ),
    "ib_uverbs not loaded": (
        lambda d: d.facts(WORKER)["infiniband"].update(devices=[]),
        of(WORKER, "host.hca_ports", "container.devices") | both("container.environment"),
    ),
    "ports free for anybody": (
        lambda d: d.facts(WORKER)["state"]["sysctls"].update({ports.SYSCTL: "8000"}),
        of(WORKER, "network.reserved_ports"),
    ),
    "memory that cannot be pinned": (
        memory_limited,
        of(WORKER, "container.memlock_inside"),
    ),
    "tensor parallelism of another size": (
        lambda d: d.set(lmdeploy_tp=8),
        both("host.fits") | of(HEAD, "container.serve_file"),
    ),
}


@pytest.mark.parametrize(("damage", "expected"), FAULTS.values(), ids=FAULTS.keys())
def test_a_fault_is_found_and_nothing_else_is_blamed(
    check: Check, damage: Callable[[Deployed], Any], expected: Failures
) -> None:
    deployed = Deployed()
    damage(deployed)
    assert check(deployed) == expected


def test_every_check_has_a_fault_that_it_finds(suites: dict[str, ModuleType]) -> None:
    found = {name for _, failures in FAULTS.values() for _, name in failures}
    checks = {
        f"{suite}.{name.removeprefix('test_')}"
        for suite in SUITES
        for name in vars(suites[f"test_{suite}"])
        if name.startswith("test_")
    }
    assert checks - found == set()
