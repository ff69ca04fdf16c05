"""What is checked on one host before a deployment touches it. Pure: its facts and settings in, findings out.

Each check is a function that yields findings; all of them run, so that an operator sees everything at once.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

from . import ports
from .driver import check_driver
from .facts import Container, HostFacts, Listener, unread_sections
from .findings import Finding, Severity

GIB = 1024**3
MANAGED_LABEL = "io.deploy-dsv3.managed"
ROLE_LABEL = "io.deploy-dsv3.role"
ENDPOINT_UNIT = "dsv3-endpoint.service"
# The distributions the roles have package tables for; for the Red Hat family the major version counts.
SUPPORTED_OS = frozenset(
    {
        ("debian", "12"),
        ("debian", "13"),
        ("ubuntu", "22.04"),
        ("ubuntu", "24.04"),
        ("rhel", "9"),
        ("rocky", "9"),
        ("almalinux", "9"),
    }
)
# Oldest Python on a target that ansible-core 2.19 supports (porting guide of ansible-core 2.19).
MIN_PYTHON = (3, 8)
# Oldest Docker for each engine_gpu_mode: CDI names came with Docker 25 (its release notes), and nobody maintains what
# is older than 20.10.
MIN_DOCKER: Mapping[str, tuple[int, ...]] = {"cdi": (25,), "legacy": (20, 10)}
# Oldest Docker that takes its proxies from daemon.json (Docker 23 release notes).
PROXY_DOCKER = (23,)
# What the distributions carry, where that is older.
DISTRIBUTION_DOCKER = {("debian", "12"): "20.10"}
# Free space that a host which has the image already still needs for logs and records.
MIN_DISK_WITH_IMAGE_GIB = 1
OTHER_ENGINES = ("lmdeploy", "vllm", "sglang")
_DISTRIBUTED = ("nvidia_driver_source", "docker_engine_source", "nvidia_container_toolkit_source")


def check_host(host: str, facts: HostFacts, settings: Mapping[str, Any], *, is_head: bool) -> Iterator[Finding]:
    """Yield what is wrong with one host; `is_head` decides which ports it needs."""
    yield from unread_sections(host, facts)
    yield from _check_os(host, facts, settings)
    yield from _check_root(host, facts)
    yield from _check_memory(host, facts, settings)
    yield from _check_disks(host, facts, settings)
    yield from _check_gpus(host, facts, settings)
    yield from check_driver(host, facts, settings)
    yield from _check_docker(host, facts, settings)
    yield from _check_containers(host, facts, settings)
    yield from _check_ports(host, facts, settings, is_head=is_head)
    yield from _check_reach(host, facts)


def _numbers(version: str) -> tuple[int, ...]:
    """Major and minor number."""
    return tuple(int(part) for part in re.findall(r"\d+", version)[:2])


def _check_os(host: str, facts: HostFacts, settings: Mapping[str, Any]) -> Iterator[Finding]:
    system = facts.os
    version = system.version_id.split(".")[0] if system.family == "RedHat" else system.version_id
    prepared = all(settings[name] == "preinstalled" for name in _DISTRIBUTED)
    if (system.id, version) not in SUPPORTED_OS:
        supported = ", ".join(f"{name} {number}" for name, number in sorted(SUPPORTED_OS))
        yield Finding(
            code="os",
            host=host,
            severity="warning" if prepared else "error",
            message=f"{host}: operating system {system.id or 'unknown'} {system.version_id}; supported: {supported}",
            cause="no packages of driver, Docker and container toolkit are known for it",
            remedy="install a supported system, or install all three and set their sources to preinstalled",
        )
    if system.arch not in ("x86_64", ""):
        yield Finding(
            code="arch",
            host=host,
            severity="error",
            message=f"{host}: machine is {system.arch}, x86_64 is required",
            cause="the engine image and the package repositories are for x86_64",
            remedy="take the host out of the inventory",
        )
    if system.init != "systemd":
        # What others prepared runs without us; then nothing of ours is a unit, and reboots are the operator's business.
        alone = prepared and settings["endpoint_mode"] == "direct"
        yield Finding(
            code="init",
            host=host,
            severity="warning" if alone else "error",
            message=f"{host}: PID 1 is not systemd",
            cause="Docker, the driver's services and the endpoint run as systemd units",
            remedy="boot the host with systemd, or prepare driver, Docker and toolkit yourself (sources preinstalled) "
            "and set endpoint_mode to direct; Docker is then yours to start after a reboot",
        )
    python = _numbers(system.python)
    if python and python < MIN_PYTHON:
        yield Finding(
            code="python",
            host=host,
            severity="error",
            message=f"{host}: Python {system.python}, {MIN_PYTHON[0]}.{MIN_PYTHON[1]} or newer is required",
            cause="Ansible's modules do not run on older ones",
            remedy="install a newer python3 and name it in ansible_python_interpreter",
        )


def _check_root(host: str, facts: HostFacts) -> Iterator[Finding]:
    if facts.user.uid != 0:
        yield Finding(
            code="root",
            host=host,
            severity="error",
            message=f"{host}: commands run with user ID {facts.user.uid}, root is required",
            cause="become is off for this host, or the become user is not root",
            remedy="set ansible_become to true and ansible_become_user to root; the login user needs sudo",
        )


def _check_memory(host: str, facts: HostFacts, settings: Mapping[str, Any]) -> Iterator[Finding]:
    wanted = settings["preflight_min_memory_gib"]
    found = facts.memory.total_bytes / GIB
    if 0 < found < wanted:
        yield Finding(
            code="memory",
            host=host,
            severity="error",
            message=f"{host}: {found:.1f} GiB of memory, {wanted} GiB is required",
            cause="loading the weights needs memory for every rank and the page cache",
            remedy="use a larger host, or lower preflight_min_memory_gib if the model is smaller",
        )


def _check_disks(host: str, facts: HostFacts, settings: Mapping[str, Any]) -> Iterator[Finding]:
    disks = {disk.path: disk for disk in facts.disks}
    data_path = settings["docker_engine_data_path"]
    has_image = any(_runs_wanted_image(container, settings) for container in facts.docker.containers)
    wanted = MIN_DISK_WITH_IMAGE_GIB if has_image else settings["preflight_min_disk_gib"]
    if (disk := disks.get(data_path)) and disk.free_bytes / GIB < wanted:
        yield Finding(
            code="disk",
            host=host,
            severity="error",
            message=f"{host}: {disk.free_bytes / GIB:.1f} GiB free for {data_path} (on {disk.exists_path}), "
            f"{wanted} GiB is required",
            cause="the engine image is unpacked there",
            remedy="free space there, move docker_engine_data_path, or lower preflight_min_disk_gib",
        )
    model_path = settings["model_weights_path"]
    if (disk := disks.get(model_path)) and disk.exists_path != model_path:
        yield Finding(
            code="model-missing",
            host=host,
            severity="error",
            message=f"{host}: there is no {model_path}; the nearest folder that exists is {disk.exists_path}",
            cause="the weights were not copied to this host, or their file system is not mounted",
            remedy="bring the model there, or correct model_weights_path",
        )


def _runs_wanted_image(container: Container, settings: Mapping[str, Any]) -> bool:
    """Whether it is our container and its image is, as far as its name tells, the one that is wanted."""
    if not _is_ours(container):
        return False
    if digest := settings["engine_image_digest"]:
        return digest in container.image
    return _repository(container.image) == _repository(settings["engine_image_name"])


def _repository(image: str) -> str:
    """Return an image's name without tag and digest; a registry's port is no tag."""
    return re.sub(r"[:@][^/]*$", "", image)


def _is_ours(container: Container) -> bool:
    return container.labels.get(MANAGED_LABEL) == "true"


def _check_gpus(host: str, facts: HostFacts, settings: Mapping[str, Any]) -> Iterator[Finding]:
    smi, on_bus = facts.nvidia_smi, len(facts.pci_gpus)
    if not facts.gpu_count:
        yield Finding(
            code="gpu-none",
            host=host,
            severity="error",
            message=f"{host}: no GPU on the PCI bus and none listed by nvidia-smi, at least one is required",
            cause="no NVIDIA GPU, or it is not passed through to this machine",
            remedy="take the host out of the inventory, or look for the GPUs with lspci",
        )
    elif facts.gpus and on_bus and len(facts.gpus) != on_bus:
        yield Finding(
            code="gpu-missing",
            host=host,
            severity="error",
            message=f"{host}: nvidia-smi lists {len(facts.gpus)} GPUs, {on_bus} are on the PCI bus",
            cause="a GPU fell off the bus or its driver failed to start (look for Xid in the kernel log)",
            remedy="reboot the host; if it stays away, have the GPU replaced",
        )
    names = sorted({gpu.name for gpu in facts.gpus})
    if len(names) > 1:
        yield Finding(
            code="gpu-mixed",
            host=host,
            severity="error",
            message=f"{host}: GPUs of several models ({', '.join(names)})",
            cause="tensor parallelism runs at the pace, and within the memory, of the smallest",
            remedy="take the host out of the inventory, or give it GPUs of one model",
        )
    if smi.path and not facts.gpus and on_bus:
        prepared = settings["nvidia_driver_source"] == "preinstalled"
        yield Finding(
            code="nvidia-smi",
            host=host,
            severity="error" if prepared else "warning",
            message=f"{host}: nvidia-smi lists no GPU: {smi.error or 'no reason given'}",
            cause="the kernel module is not loaded, or is of another version than the user space",
            remedy="reboot the host, or repair the driver"
            if prepared
            else "nothing yet: the host stage installs the driver",
        )


def _check_docker(host: str, facts: HostFacts, settings: Mapping[str, Any]) -> Iterator[Finding]:
    docker = facts.docker
    if docker.daemon_json_error:
        yield Finding(
            code="daemon-json",
            host=host,
            severity="error",
            message=f"{host}: /etc/docker/daemon.json cannot be read: {docker.daemon_json_error}",
            cause="it was edited by hand; Docker would not start with it",
            remedy="correct the file: deploy-dsv3 merges into it and never overwrites it",
        )
    if settings["docker_engine_source"] == "preinstalled" and not docker.running:
        yield Finding(
            code="docker-down",
            host=host,
            severity="error",
            message=f"{host}: Docker does not answer, and docker_engine_source is preinstalled"
            + (f" ({docker.error})" if docker.error else ""),
            cause="Docker is not installed or not running",
            remedy="start Docker, or set docker_engine_source to distribution or repository",
        )
    source = settings["docker_engine_source"]
    if source == "distribution" and facts.os.family == "RedHat":
        yield Finding(
            code="docker-source",
            host=host,
            severity="error",
            message=f"{host}: {facts.os.id} {facts.os.version_id} itself carries no Docker",
            cause="docker_engine_source is distribution",
            remedy="set docker_engine_source to repository for this host",
        )
    packaged = DISTRIBUTION_DOCKER.get((facts.os.id, facts.os.version_id), "")
    version = docker.version or (packaged if source == "distribution" else "")
    mode = settings["engine_gpu_mode"]
    least = MIN_DOCKER[mode]
    if version and source != "repository" and _numbers(version) < least:
        yield Finding(
            code="docker-old",
            host=host,
            severity="error",
            message=f"{host}: Docker {version}"
            + ("" if docker.version else f" is what {facts.os.id} {facts.os.version_id} carries")
            + f", {'.'.join(map(str, least))} or newer is required",
            cause="older ones cannot hand over GPUs by their CDI name"
            if mode == "cdi"
            else "older ones are not maintained",
            remedy="set docker_engine_source to repository: Docker's own packages are new enough"
            + ("; or engine_gpu_mode to legacy, as `docker run --gpus` does" if mode == "cdi" else ""),
        )
    proxied = source == "distribution" and settings["docker_engine_proxy_url"]
    if proxied and version and _numbers(version) < PROXY_DOCKER:
        yield Finding(
            code="docker-proxy",
            host=host,
            severity="error",
            message=f"{host}: docker_engine_proxy_url is set, and Docker {version} knows no proxies in daemon.json",
            cause="that came with Docker 23; an older one does not start with them",
            remedy="set docker_engine_source to repository, or pull through docker_engine_registry_mirrors",
        )
    options = (docker.daemon_json or {}).get("exec-opts") or []
    if mode == "legacy" and source == "preinstalled" and "native.cgroupdriver=cgroupfs" not in options:
        yield Finding(
            code="docker-cgroups",
            host=host,
            severity="warning",
            message=f"{host}: engine_gpu_mode is legacy, and nothing keeps the container's GPUs over a "
            "`systemctl daemon-reload`",
            cause="where systemd manages cgroups for Docker it takes away what NVIDIA's runtime hook allowed",
            remedy='put "exec-opts": ["native.cgroupdriver=cgroupfs"] into /etc/docker/daemon.json and restart Docker, '
            "or have `nvidia-ctk system create-dev-char-symlinks` run at every boot",
        )
    wanted = settings["docker_engine_data_path"]
    if docker.root_dir and docker.root_dir != wanted and docker.containers:
        yield Finding(
            code="docker-data",
            host=host,
            severity="warning",
            message=f"{host}: Docker keeps its data in {docker.root_dir}, docker_engine_data_path is {wanted}",
            cause="Docker was set up before",
            remedy=f"set docker_engine_data_path to {docker.root_dir}; "
            f"its {len(docker.containers)} containers are lost from view otherwise",
        )


def _check_containers(host: str, facts: HostFacts, settings: Mapping[str, Any]) -> Iterator[Finding]:
    name = settings["engine_container_name"]
    for container in facts.docker.containers:
        if _is_ours(container):
            # A benchmark beside the engine is ours too, and no engine.
            engine = container.labels.get(ROLE_LABEL, "") in ("", "head", "worker")
            if engine and container.name != name and container.state == "running":
                yield Finding(
                    code="container-left",
                    host=host,
                    severity="error",
                    message=f"{host}: container {container.name!r} of an earlier deployment runs, "
                    f"engine_container_name is {name!r}",
                    cause="the name was changed while the engine was deployed",
                    remedy=f"set engine_container_name to {container.name}, or destroy the earlier deployment first",
                )
        elif container.name == name:
            yield Finding(
                code="container-foreign",
                host=host,
                severity="error",
                message=f"{host}: there is a container {name!r} ({container.image}, {container.state}) "
                "that deploy-dsv3 did not create",
                cause="someone started an engine by hand",
                remedy=f"remove it (docker rm -f {name}), or choose another engine_container_name",
            )
        elif container.state == "running" and any(word in container.image.lower() for word in OTHER_ENGINES):
            yield Finding(
                code="engine-foreign",
                host=host,
                severity="error",
                message=f"{host}: another engine runs: container {container.name!r} of image {container.image}",
                cause="it holds memory of the GPUs",
                remedy=f"stop it (docker stop {container.name}), or take the host out of the inventory",
            )


def _check_ports(host: str, facts: HostFacts, settings: Mapping[str, Any], *, is_head: bool) -> Iterator[Finding]:
    by_port = {settings[name]: name for name in ports.names(settings, is_head=is_head)}
    own = {container.id for container in facts.docker.containers if _is_ours(container)}
    first, last = settings["ray_cluster_min_worker_port"], settings["ray_cluster_max_worker_port"]
    taken: dict[int, Listener] = {}
    for listener in facts.listening:
        if not _is_own_listener(listener, own):
            taken.setdefault(listener.port, listener)
    for port, listener in taken.items():
        if port in by_port:
            yield _port_taken(host, listener, by_port[port], facts, "error")
        elif first <= port <= last:
            setting = "ray_cluster_min_worker_port … ray_cluster_max_worker_port"
            yield _port_taken(host, listener, setting, facts, "warning")


def _is_own_listener(listener: Listener, own_containers: set[str]) -> bool:
    return listener.container_id in own_containers or listener.unit == ENDPOINT_UNIT


def _port_taken(host: str, listener: Listener, setting: str, facts: HostFacts, severity: Severity) -> Finding:
    names = {container.id: container.name for container in facts.docker.containers}
    owner = f"{listener.process} (pid {listener.pid})" if listener.pid else "a process that could not be seen"
    if container := names.get(listener.container_id):
        owner += f" in container {container!r}"
    elif listener.unit:
        owner += f" of {listener.unit}"
    return Finding(
        code="port-taken",
        host=host,
        severity=severity,
        message=f"{host}: port {listener.port} ({setting}) is in use by {owner} on {listener.address}",
        cause="another service listens there",
        remedy=f"stop that service, or choose another port in {setting}",
    )


def _check_reach(host: str, facts: HostFacts) -> Iterator[Finding]:
    for reach in facts.reach:
        if not reach.reachable:
            yield Finding(
                code="unreachable-peer",
                host=host,
                severity="error",
                message=f"{host}: cannot reach {reach.host} at {reach.address}, TCP port {reach.port}: {reach.error}",
                cause="a firewall drops it, or the two node addresses are in separate networks",
                remedy="open the network between the hosts, or set node_network_interface or node_network_address",
            )
