"""Whether hosts can become a deployment. Pure: facts and settings of all hosts in, findings by host out.

Each check is a function that yields findings; all of them run, so that an operator sees everything at once.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import combinations
from typing import Any

from .derive import HostInput, derive
from .facts import Container, HostFacts, Listener, unread_sections
from .findings import Finding, Severity
from .topology import Replica

GIB = 1024**3
MANAGED_LABEL = "io.deploy-dsv3.managed"
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
# Oldest driver branch for an image's CUDA (NVIDIA's CUDA release notes, table of minimum drivers).
MIN_DRIVER = {"cu12": 525, "cu12.8": 570, "cu13": 580}
# Free space that a host which has the image already still needs for logs and records.
MIN_DISK_WITH_IMAGE_GIB = 1
OTHER_ENGINES = ("lmdeploy", "vllm", "sglang")
_DISTRIBUTED = ("nvidia_driver_source", "docker_engine_source", "nvidia_container_toolkit_source")
_PORTS_EVERYWHERE = (
    "ray_cluster_node_manager_port",
    "ray_cluster_object_manager_port",
    "ray_cluster_runtime_env_agent_port",
    "ray_cluster_dashboard_agent_grpc_port",
    "ray_cluster_dashboard_agent_listen_port",
    "ray_cluster_metrics_export_port",
)
_PORTS_ON_HEAD = (
    "ray_cluster_port",
    "ray_cluster_dashboard_port",
    "ray_cluster_client_server_port",
    "lmdeploy_server_port",
    "lmdeploy_dist_port",
)


def check(replicas: Sequence[Replica], hosts: Mapping[str, HostInput]) -> dict[str, list[Finding]]:
    """Return the findings of every host of the replicas, errors first.

    `hosts` has an entry for every host; one that was not looked at (facts None) has no findings of its own.
    """
    findings: list[Finding] = []
    for replica in replicas:
        _, derived = derive(replica, hosts)
        findings += derived
        members = [(hosts[name], facts) for name in replica.hosts if (facts := hosts[name].facts) is not None]
        for known, facts in members:
            findings += _check_host(known, facts, is_head=known.host == replica.head)
        findings += _check_gpus_equal(members)
        findings += _check_drivers_equal(members)
    everyone = {
        name: facts
        for replica in replicas
        for name in replica.hosts
        if (facts := hosts[name].facts) is not None
    }
    limits = {name: float(hosts[name].settings["preflight_max_clock_skew_s"]) for name in everyone}
    findings += _check_clocks(everyone, limits)
    findings += _check_machines(everyone)
    by_host: dict[str, list[Finding]] = {name: [] for replica in replicas for name in replica.hosts}
    for finding in findings:
        by_host[finding.host].append(finding)
    return {
        name: sorted(found, key=lambda f: (f.severity != "error", f.code)) for name, found in by_host.items()
    }


def _check_host(known: HostInput, facts: HostFacts, *, is_head: bool) -> Iterator[Finding]:
    host, settings = known.host, known.settings
    yield from unread_sections(host, facts)
    yield from _check_os(host, facts, settings)
    yield from _check_root(host, facts)
    yield from _check_memory(host, facts, settings)
    yield from _check_disks(host, facts, settings)
    yield from _check_gpus(host, facts, settings)
    yield from _check_driver(host, facts, settings)
    yield from _check_docker(host, facts, settings)
    yield from _check_containers(host, facts, settings)
    yield from _check_ports(host, facts, settings, is_head=is_head)
    yield from _check_reach(host, facts)


def _check_os(host: str, facts: HostFacts, settings: Mapping[str, Any]) -> Iterator[Finding]:
    system = facts.os
    version = system.version_id.split(".")[0] if system.family == "RedHat" else system.version_id
    if (system.id, version) not in SUPPORTED_OS:
        prepared = all(settings[name] == "preinstalled" for name in _DISTRIBUTED)
        supported = ", ".join(f"{name} {number}" for name, number in sorted(SUPPORTED_OS))
        yield Finding(
            code="os",
            host=host,
            severity="warning" if prepared else "error",
            message=f"{host}: operating system {system.id or 'unknown'} {system.version_id}; supported: "
            f"{supported}",
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
        yield Finding(
            code="init",
            host=host,
            severity="error",
            message=f"{host}: PID 1 is not systemd",
            cause="Docker, the driver's services and the endpoint run as systemd units",
            remedy="boot the host with systemd",
        )
    python = tuple(int(part) for part in re.findall(r"\d+", system.python)[:2])
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
    wanted = settings["engine_image_digest"] or settings["engine_image_name"].rpartition(":")[0]
    return _is_ours(container) and (wanted or settings["engine_image_name"]) in container.image


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


def _check_driver(host: str, facts: HostFacts, settings: Mapping[str, Any]) -> Iterator[Finding]:
    prepared = settings["nvidia_driver_source"] == "preinstalled"
    version = facts.driver.loaded_version
    if facts.driver.nouveau_loaded:
        yield Finding(
            code="nouveau",
            host=host,
            severity="error" if prepared else "warning",
            message=f"{host}: the kernel module nouveau is loaded and holds the GPUs",
            cause="the distribution loads it where no other driver is installed",
            remedy="blacklist nouveau and reboot"
            if prepared
            else "nothing yet: the host stage blacklists it, and needs a reboot (nvidia_driver_allow_reboot)",
        )
    if facts.os.secure_boot and not version and settings["nvidia_driver_source"] == "vendor":
        yield Finding(
            code="secure-boot",
            host=host,
            severity="error",
            message=f"{host}: Secure Boot is on, and the vendor's driver is built on the host",
            cause="its modules are not signed, and enrolling a key needs the console at boot",
            remedy="switch Secure Boot off, or use signed modules: nvidia_driver_source=distribution on "
            "Ubuntu",
        )
    if not prepared:
        return
    if not version and facts.gpu_count:
        yield Finding(
            code="driver-none",
            host=host,
            severity="error",
            message=f"{host}: no NVIDIA driver is loaded, and nvidia_driver_source is preinstalled",
            cause="the driver is not installed, or its module is not loaded",
            remedy="install the driver, or set nvidia_driver_source to vendor or distribution",
        )
    required = min_driver(settings["engine_image_name"])
    if version and required and int(version.split(".")[0]) < required:
        yield Finding(
            code="driver-old",
            host=host,
            severity="error",
            message=f"{host}: driver {version}, {settings['engine_image_name']} needs branch {required} or "
            "newer",
            cause="the CUDA in the image does not run on an older driver",
            remedy=f"install driver branch {required} or newer, or choose an image of an older CUDA",
        )


def min_driver(image: str) -> int:
    """Return the oldest driver branch for an image whose tag names its CUDA (…-cu12.8), else 0."""
    match = re.search(r"-(cu\d+)(\.\d+)?", image.rpartition(":")[2])
    if not match:
        return 0
    exact = match.group(1) + (match.group(2) or "")
    return MIN_DRIVER.get(exact, MIN_DRIVER.get(match.group(1), 0))


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
    wanted = settings["docker_engine_data_path"]
    if docker.root_dir and docker.root_dir != wanted and docker.containers:
        yield Finding(
            code="docker-data",
            host=host,
            severity="warning",
            message=f"{host}: Docker keeps its data in {docker.root_dir}, docker_engine_data_path is "
            f"{wanted}",
            cause="Docker was set up before",
            remedy=f"set docker_engine_data_path to {docker.root_dir}; "
            f"its {len(docker.containers)} containers are lost from view otherwise",
        )


def _check_containers(host: str, facts: HostFacts, settings: Mapping[str, Any]) -> Iterator[Finding]:
    name = settings["engine_container_name"]
    for container in facts.docker.containers:
        if _is_ours(container):
            if container.name != name and container.state == "running":
                yield Finding(
                    code="container-left",
                    host=host,
                    severity="error",
                    message=f"{host}: container {container.name!r} of an earlier deployment runs, "
                    f"engine_container_name is {name!r}",
                    cause="the name was changed while the engine was deployed",
                    remedy=f"set engine_container_name to {container.name}, or destroy the earlier "
                    "deployment first",
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
                message=f"{host}: another engine runs: container {container.name!r} of image "
                f"{container.image}",
                cause="it holds memory of the GPUs",
                remedy=f"stop it (docker stop {container.name}), or take the host out of the inventory",
            )


def _check_ports(
    host: str, facts: HostFacts, settings: Mapping[str, Any], *, is_head: bool
) -> Iterator[Finding]:
    names = [*_PORTS_EVERYWHERE]
    if is_head:
        names += _PORTS_ON_HEAD
        if settings["endpoint_mode"] == "proxy":
            names.append("endpoint_port")
    by_port = {settings[name]: name for name in names}
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
                message=f"{host}: cannot reach {reach.host} at {reach.address}, TCP port {reach.port}: "
                f"{reach.error}",
                cause="a firewall drops it, or the two node addresses are in separate networks",
                remedy="open the network between the hosts, or set node_network_interface or "
                "node_network_address",
            )


def _usual(values: Iterable[Any]) -> Any:
    """Return the most frequent value, the greatest of equals."""
    counts = Counter(values)
    return max(counts, key=lambda value: (counts[value], value))


def _check_gpus_equal(members: Sequence[tuple[HostInput, HostFacts]]) -> Iterator[Finding]:
    """Compare count, model and memory of the GPUs over the hosts of a replica, and within each host."""
    counts = {known.host: facts.gpu_count for known, facts in members if facts.gpu_count}
    models = {known.host: _gpu_models(facts) for known, facts in members if facts.gpu_count}
    memories = {
        known.host: tuple(sorted({gpu.memory_total_mib for gpu in facts.gpus}))
        for known, facts in members
        if facts.gpus
    }
    yield from _unequal("gpu-count", counts, "{value} GPUs", "a GPU is missing, or the hosts are not alike")
    # A host with its driver tells product names, one without only PCI device IDs: compare like with like.
    for named in (True, False):
        alike = {host: value for host, (is_name, value) in models.items() if is_name is named}
        yield from _unequal("gpu-model", alike, "GPUs {value}", "the hosts are not alike")
    listed = {host: ", ".join(f"{size} MiB" for size in value) for host, value in memories.items()}
    usual = _usual(memories.values()) if memories else ()
    # Drivers differ by less than 2 % in what they reserve.
    far = {
        host: text
        for host, text in listed.items()
        if max(memories[host]) > 1.02 * min(usual) or min(memories[host]) < 0.98 * max(usual)
    }
    for host, text in far.items():
        yield _unequal_finding(
            "gpu-memory", host, f"GPU memory {text}", _others(listed, host), "mixed models"
        )


def _gpu_models(facts: HostFacts) -> tuple[bool, str]:
    """Return (whether these are product names, the sorted models as text)."""
    if facts.gpus:
        return True, ", ".join(sorted({gpu.name for gpu in facts.gpus}))
    return False, ", ".join(sorted({gpu.device for gpu in facts.pci_gpus}))


def _others(values: Mapping[str, Any], host: str) -> str:
    return ", ".join(f"{other} {value}" for other, value in values.items() if other != host)


def _unequal(code: str, values: Mapping[str, Any], text: str, cause: str) -> Iterator[Finding]:
    if len(set(values.values())) < 2:
        return
    usual = _usual(values.values())
    for host, value in values.items():
        if value != usual:
            yield _unequal_finding(code, host, text.format(value=value), _others(values, host), cause)


def _unequal_finding(code: str, host: str, found: str, others: str, cause: str) -> Finding:
    return Finding(
        code=code,
        host=host,
        severity="error",
        message=f"{host}: {found}, unlike the other hosts of the replica ({others or 'its own GPUs differ'})",
        cause=cause,
        remedy="make the hosts of a replica equal, or put them into different replicas",
    )


def _check_drivers_equal(members: Sequence[tuple[HostInput, HostFacts]]) -> Iterator[Finding]:
    versions = {
        known.host: facts.driver.loaded_version
        for known, facts in members
        if known.settings["nvidia_driver_source"] == "preinstalled" and facts.driver.loaded_version
    }
    yield from _unequal(
        "driver-differs", versions, "driver {value}", "the hosts were set up at different times"
    )


def _check_clocks(facts: Mapping[str, HostFacts], limits: Mapping[str, float]) -> Iterator[Finding]:
    """Compare clocks pairwise; only what the measured intervals prove is an error.

    Where one host disagrees with many, it alone is named: a host is reported if it disagrees with at least as
    many hosts as each of those it disagrees with.
    """
    clocks = {host: known.clock for host, known in facts.items() if known.clock is not None}
    apart: dict[str, dict[str, float]] = {host: {} for host in clocks}
    for first, second in combinations(clocks, 2):
        limit = min(limits[first], limits[second])
        ahead = clocks[first].offset_low - clocks[second].offset_high
        behind = clocks[second].offset_low - clocks[first].offset_high
        if max(ahead, behind) > limit:
            apart[first][second] = ahead if ahead > 0 else -behind
            apart[second][first] = -apart[first][second]
    for host, others in apart.items():
        if others and all(len(others) >= len(apart[other]) for other in others):
            listed = ", ".join(
                f"at least {abs(seconds):.1f} s {'ahead of' if seconds > 0 else 'behind'} {other}"
                for other, seconds in others.items()
            )
            yield Finding(
                code="clock",
                host=host,
                severity="error",
                message=f"{host}: its clock is {listed}; {limits[host]:g} s is allowed",
                cause="time synchronisation is off or has no server",
                remedy="enable chrony or systemd-timesyncd on both hosts",
            )


def _check_machines(facts: Mapping[str, HostFacts]) -> Iterator[Finding]:
    """Find machines listed twice. Clones share a machine ID, containers a boot ID: all three must agree."""
    first: dict[tuple[str, str, str], str] = {}
    for host, known in facts.items():
        if not known.machine_id or not known.boot_id:
            continue
        other = first.setdefault((known.machine_id, known.boot_id, known.hostname), host)
        if other != host:
            yield Finding(
                code="same-machine",
                host=host,
                severity="error",
                message=f"{host} and {other} are the same machine ({known.hostname}, machine ID "
                f"{known.machine_id})",
                cause="it is in the inventory under two names",
                remedy=f"remove {host} or {other} from the inventory",
            )
