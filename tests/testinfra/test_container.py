"""The engine's container: what it was made from, what it may do, what it was told."""

import hashlib

import pytest
from fleet import Fleet, Node

from deploy_dsv3 import content, engine_log
from deploy_dsv3.derive import CACHE, NodePlan

ENGINE = "/etc/deploy-dsv3/engine"
STATE = "/var/lib/deploy-dsv3/state"


def test_running(node: Node) -> None:
    """The engine container runs."""
    name = node.settings["engine_container_name"]
    assert node.container, f"there is no container {name!r}"
    state = node.container["State"]
    assert state["Running"], f"{name} is {state['Status']} (exit {state['ExitCode']}) {state['Error']}".strip()


def test_healthy(running: Node) -> None:
    """The engine container is healthy."""
    health = running.container["State"].get("Health", {})
    last = health.get("Log") or [{}]
    found, says = health.get("Status", "without a health check"), last[-1].get("Output", "").strip()
    assert found == "healthy", f"Docker calls the container {found}: {says}"


def test_log(engine: Node) -> None:
    """The engine's log names no failure that is known."""
    match = engine_log.explain(engine.observation)
    assert match is None, str(match)


def test_image(engine: Node) -> None:
    """The container runs the image of the release."""
    recorded = engine.release.get("image", {})
    assert recorded, "/etc/deploy-dsv3/release.json names no image"
    assert engine.container["Image"] == recorded["id"], (
        f"the container runs {engine.container['Image']}, the release is {recorded['id']}: deploy again"
    )
    if recorded["digest"]:
        digests = [digest.rpartition("@")[2] for digest in engine.seen["container"]["image"]["RepoDigests"]]
        assert recorded["digest"] in digests, f"the image has the digests {digests}, not {recorded['digest']}"


def test_image_wanted(engine: Node) -> None:
    """The release is the image that the inventory asks for."""
    recorded = engine.release.get("image", {})
    name, digest = engine.settings["engine_image_name"], engine.settings["engine_image_digest"]
    assert recorded.get("name") == name, f"deployed is {recorded.get('name')}, the inventory says {name}"
    assert digest in ("", recorded.get("digest")), f"deployed is {recorded.get('digest')}, not {digest}"


def test_same_image(engine: Node, fleet: Fleet) -> None:
    """Every host of the replica runs the same image."""
    images = {other.name: other.container["Image"] for other in fleet.of(engine.replica) if other.container}
    assert set(images.values()) == {engine.container["Image"]}, f"images: {images}"


def test_same_versions(engine: Node, fleet: Fleet) -> None:
    """Every host of the replica has the same Ray and LMDeploy."""
    versions = {other.name: other.release.get("versions") for other in fleet.of(engine.replica)}
    assert versions[engine.name], "/etc/deploy-dsv3/release.json names no versions"
    assert all(found == versions[engine.name] for found in versions.values()), f"versions: {versions}"


def test_launcher(node: Node) -> None:
    """The launcher is the one of this deploy-dsv3."""
    source = content.roles() / "engine" / "files" / "launcher.py"
    found = node.seen["files"].get(f"{ENGINE}/launcher.py", {}).get("sha256", "")
    assert found == hashlib.sha256(source.read_bytes()).hexdigest(), (
        f"{ENGINE}/launcher.py is {'of another version: deploy again' if found else 'missing'}"
    )


def test_node_file(node: Node, plan: NodePlan) -> None:
    """The launcher is told what the inventory says."""
    found = node.observation.document("node")
    assert found, f"there is no {ENGINE}/node.json"
    differing = sorted(key for key in plan.node_file if found.get(key) != plan.node_file[key])
    assert not differing, "; ".join(
        f"{key} is {found.get(key)}, it should be {plan.node_file[key]}" for key in differing
    )


def test_serve_file(node: Node, plan: NodePlan) -> None:
    """The serving command is the one that the inventory's settings make, on the head only."""
    found = node.observation.document("serve")
    wanted = plan.serve_file if node.role == "head" else {}
    assert found or not wanted, f"there is no {ENGINE}/serve.json"
    assert found == wanted, f"serve.json has {found}, it should have {dict(wanted)}"


def test_devices(engine: Node, plan: NodePlan) -> None:
    """Every file of /dev/infiniband is a device of the container."""
    devices = {device["PathOnHost"] for device in engine.container["HostConfig"]["Devices"] or ()}
    wanted = {*plan.devices, *(device.split(":")[0] for device in engine.settings["engine_devices"])}
    assert devices == wanted, f"missing: {sorted(wanted - devices)}, not there any more: {sorted(devices - wanted)}"


def test_gpu_request(engine: Node) -> None:
    """The container asks for its GPUs, by CDI or in the old way."""
    requests = engine.container["HostConfig"]["DeviceRequests"] or []
    wanted = engine.settings["engine_gpu_devices"]
    if engine.settings["engine_gpu_mode"] == "cdi":
        asked = [name for request in requests if request["Driver"] == "cdi" for name in request["DeviceIDs"]]
    else:
        wanted = [name.rpartition("=")[2] for name in wanted]
        asked = [
            name
            for request in requests
            if request["Driver"] == "nvidia"
            for name in (["all"] if request["Count"] == -1 else request["DeviceIDs"])
        ]
    assert asked == wanted, f"the container asks for {asked or requests}"


def test_gpus_inside(running: Node, plan: NodePlan) -> None:
    """The container sees every GPU."""
    answer = running.seen["inside"]["gpus"]
    assert answer["rc"] == 0, f"nvidia-smi -L in the container: {answer['err'] or answer['out']}"
    count = sum(line.startswith("GPU ") for line in answer["out"].splitlines())
    assert count == plan.gpus, f"the container sees {count} GPUs, the host has {plan.gpus}"


def test_environment(engine: Node, plan: NodePlan) -> None:
    """NCCL, Gloo and Ray get the environment that fits this host."""
    found = engine.environment
    differing = {name: found.get(name) for name, value in plan.environment.items() if found.get(name) != value}
    wanted = {name: plan.environment[name] for name in differing}
    assert not differing, f"the container has {differing}, it should have {wanted}: deploy again"


def test_no_proxy_variables(engine: Node) -> None:
    """No proxy stands between the nodes."""
    found = [name for name in engine.environment if name.lower().endswith("_proxy")]
    assert not found, f"the container's environment has {', '.join(found)}"


def test_ulimits(engine: Node) -> None:
    """The container has the limits that RDMA and Ray need."""
    found = {limit["Name"]: (limit["Soft"], limit["Hard"]) for limit in engine.container["HostConfig"]["Ulimits"] or ()}
    wanted = {}
    for limit in engine.settings["engine_ulimits"]:
        name, soft, *hard = limit.split(":")
        wanted[name] = (int(soft), int(hard[0] if hard else soft))
    assert found == wanted, f"the container has {found}, the settings say {wanted}"


def test_memlock_inside(running: Node, plan: NodePlan) -> None:
    """Programs in the container may pin as much memory as RDMA needs."""
    answer = running.seen["inside"]["limits"]
    assert answer["rc"] == 0, f"/proc/self/limits in the container: {answer['err'] or answer['out']}"
    (line,) = [line for line in answer["out"].splitlines() if line.startswith("Max locked memory")]
    soft = line.removeprefix("Max locked memory").split()[0]
    asked = [limit.split(":")[1] for limit in running.settings["engine_ulimits"] if limit.startswith("memlock:")]
    if not asked:
        pytest.skip(f"engine_ulimits asks for no memlock; it is {soft}")
    wanted = "unlimited" if asked[0] == "-1" else asked[0]
    assert soft == wanted, f"locked memory is limited to {soft} bytes inside, engine_ulimits says {wanted}"


def test_privileges(engine: Node) -> None:
    """The container has the capabilities it needs and no others."""
    host = engine.container["HostConfig"]
    assert host["Privileged"] == engine.settings["engine_privileged"], f"privileged is {host['Privileged']}"
    found = {name.removeprefix("CAP_") for name in host["CapAdd"] or ()}
    wanted = {name.removeprefix("CAP_") for name in engine.settings["engine_capabilities"]}
    assert found == wanted, f"the container has the added capabilities {sorted(found)}, not {sorted(wanted)}"


def test_namespaces(engine: Node) -> None:
    """The container shares network and memory with the host."""
    host = engine.container["HostConfig"]
    assert host["NetworkMode"] == "host", f"network mode {host['NetworkMode']}"
    assert host["IpcMode"] == engine.settings["engine_ipc_mode"], f"IPC mode {host['IpcMode']}"


def test_mounts(engine: Node) -> None:
    """Model and configuration are mounted read-only, at their own paths."""
    found = {mount["Destination"]: mount for mount in engine.container["Mounts"]}
    problems = []
    for path, writable in ((engine.settings["model_weights_path"], False), (ENGINE, False), (STATE, True)):
        mount = found.get(path)
        if not mount:
            problems.append(f"nothing is mounted at {path}")
        elif (mount["Source"], mount["RW"]) != (path, writable):
            problems.append(f"{mount['Source']} is at {path}, {'writable' if mount['RW'] else 'read-only'}")
    assert not problems, "\n".join(problems)


def test_cache(engine: Node) -> None:
    """What the engine compiles is kept on the host, apart for each image."""
    if not engine.settings["engine_cache_path"]:
        pytest.skip("engine_cache_path is empty: it is kept in the container")
    image = engine.container["Image"].removeprefix("sha256:")[:12]
    wanted = f"{engine.settings['engine_cache_path']}/{image}-"
    found = [mount for mount in engine.container["Mounts"] if mount["Destination"] == CACHE]
    assert found, f"nothing is mounted at {CACHE}"
    assert found[0]["Source"].startswith(wanted), f"{found[0]['Source']} is mounted at {CACHE}, not {wanted}…"
    assert found[0]["RW"], f"{found[0]['Source']} is read-only"


def test_restart(engine: Node) -> None:
    """The container comes back after a crash or a reboot."""
    host = engine.container["HostConfig"]
    policy = host["RestartPolicy"]["Name"]
    assert policy == engine.settings["engine_restart_policy"], f"restart policy {policy}"
    assert host["Init"], "no init process reaps the children of Ray"


def test_log_rotation(engine: Node) -> None:
    """The container's log is rotated."""
    log = engine.container["HostConfig"]["LogConfig"]
    wanted = {
        "max-size": engine.settings["engine_log_max_size"],
        "max-file": str(engine.settings["engine_log_max_files"]),
    }
    assert log["Type"] == "json-file" and log["Config"] == wanted, f"{log['Type']} with {log['Config']}"


def test_labels(engine: Node) -> None:
    """The container says whose it is."""
    found = engine.container["Config"]["Labels"]
    wanted = {
        "io.deploy-dsv3.managed": "true",
        "io.deploy-dsv3.replica": engine.replica.name,
        "io.deploy-dsv3.role": engine.role,
    }
    differing = {name: found.get(name) for name in wanted if found.get(name) != wanted[name]}
    assert not differing, f"labels are {differing}"
