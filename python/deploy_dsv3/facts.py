"""The facts that the probe reads from a host: a typed model of its JSON, schema 1.

`playbooks/library/dsv3_probe.py` writes them. A section that the probe could not read is absent or empty
here and is named in `HostFacts.errors`; fields this version does not know are ignored.
"""

from __future__ import annotations

import re
import types
from collections.abc import Iterator, Mapping
from typing import Any, Literal, get_args, get_origin

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from .findings import Finding

SCHEMA = 1


class Section(BaseModel):
    """Base of all parts: immutable, and tolerant of fields from a newer probe."""

    model_config = ConfigDict(frozen=True, extra="ignore")


class OperatingSystem(Section):
    """Operating system, kernel and interpreter."""

    id: str = Field("", description="`ID` of os-release, such as `debian`")
    version_id: str = Field("", description="`VERSION_ID` of os-release, such as `12`")
    codename: str = Field("", description="`VERSION_CODENAME` of os-release")
    family: Literal["Debian", "RedHat", "other"] = Field("other", description="Packaging family")
    arch: str = Field("", description="Machine as `uname -m` says")
    kernel: str = Field("", description="Kernel release")
    init: Literal["systemd", "other"] = Field("other", description="What PID 1 is")
    python: str = Field("", description="Version of the interpreter that ran the probe")
    secure_boot: bool | None = Field(
        None, description="Whether firmware enforces signed modules; null without such firmware"
    )


class User(Section):
    """The user that ran the probe."""

    uid: int = Field(-1, description="Effective user ID; 0 is root")


class Connection(Section):
    """How the controller reached the host."""

    server_address: str = Field("", description="Address of the host that SSH came in on, empty for other connections")


class Memory(Section):
    """Main memory."""

    total_bytes: int = Field(0, description="Installed memory that the kernel uses [bytes]")
    available_bytes: int = Field(0, description="Memory free for new processes [bytes]")


class Disk(Section):
    """The file system that holds a path."""

    path: str = Field(description="Path asked for")
    exists_path: str = Field("", description="The path, or its nearest parent that exists")
    total_bytes: int = Field(0, description="Size of the file system [bytes]")
    free_bytes: int = Field(0, description="Free for ordinary users [bytes]")


class Address(Section):
    """One address of a network interface."""

    address: str = Field(description="IPv4 or IPv6 address")
    prefix: int = Field(description="Prefix length of its subnet")
    family: Literal["inet", "inet6"] = Field("inet", description="Address family")
    scope: str = Field("global", description="`global`, `link` or `host`")


class Interface(Section):
    """One network interface."""

    name: str = Field(description="Kernel's name")
    mac: str = Field("", description="Link address")
    mtu: int = Field(0, description="Maximum transmission unit [bytes]")
    operstate: str = Field("", description="`up`, `down` or `unknown`")
    kind: Literal["physical", "virtual", "bridge", "loopback", "infiniband", "vlan", "bond"] = Field(
        "physical", description="What the interface is"
    )
    speed_mbps: int = Field(0, description="Link speed [Mb/s]; 0 when unknown")
    addresses: tuple[Address, ...] = Field((), description="Its addresses")


class Route(Section):
    """One route of the main table."""

    destination: str = Field(description="Network in CIDR notation; the default route is `0.0.0.0/0` or `::/0`")
    interface: str = Field("", description="Outgoing interface")
    source: str = Field("", description="Preferred source address, if the route names one")
    gateway: str = Field("", description="Next hop, empty on a connected network")
    metric: int = Field(0, description="The lowest wins among equal destinations")


class Network(Section):
    """Interfaces and routes."""

    interfaces: tuple[Interface, ...] = Field((), description="All interfaces")
    routes: tuple[Route, ...] = Field((), description="All routes")


class Listener(Section):
    """One listening TCP socket."""

    address: str = Field("", description="Local address; `0.0.0.0` and `::` are all")
    port: int = Field(description="TCP port")
    process: str = Field("", description="Name of the owning process, empty when it could not be seen")
    pid: int = Field(0, description="Its process ID, 0 when it could not be seen")
    container_id: str = Field("", description="ID of the container that it runs in, if any")
    unit: str = Field("", description="systemd service that it runs in, if any")


class PciDevice(Section):
    """One PCI device of NVIDIA's."""

    slot: str = Field(description="PCI address")
    vendor: str = Field("", description="PCI vendor, `0x10de`")
    device: str = Field("", description="PCI device ID")
    class_code: str = Field("", alias="class", description="PCI class")


class Gpu(Section):
    """One GPU as nvidia-smi lists it."""

    index: int = Field(0, description="Index")
    name: str = Field("", description="Product name")
    uuid: str = Field("", description="UUID")
    memory_total_mib: int = Field(0, description="Memory [MiB]")
    driver_version: str = Field("", description="Driver's version")


class NvidiaSmi(Section):
    """How calling nvidia-smi ended."""

    path: str = Field("", description="Path of the command, empty when it is not installed")
    rc: int = Field(-1, description="Exit status, -1 when it did not run or gave no answer in time")
    error: str = Field("", description="What it said when it failed")


class Driver(Section):
    """GPU kernel modules that are loaded."""

    loaded_version: str = Field("", description="Version of the loaded NVIDIA module, empty for none")
    flavour: Literal["open", "proprietary", ""] = Field("", description="Flavour of the loaded module, empty for none")
    installed_version: str = Field("", description="Version of the module that the next boot loads, empty for none")
    nouveau_loaded: bool = Field(False, description="Whether nouveau holds the GPUs")


class Fabric(Section):
    """The NVSwitch fabric, as the GPU that is furthest behind tells it."""

    state: str = Field("", description="`Completed` once it is formed; empty where nvidia-smi gave no answer")
    status: str = Field("", description="`Success` where it was formed without an error")


class Gid(Section):
    """One filled entry of an HCA port's GID table."""

    index: int = Field(description="Position in the table, as in NCCL_IB_GID_INDEX")
    gid: str = Field(description="GID in IPv6 notation")
    type: str = Field("", description="`IB/RoCE v1` or `RoCE v2`")
    ndev: str = Field("", description="Network interface of the entry (RoCE)")


class HcaPort(Section):
    """One port of one HCA."""

    device: str = Field(description="RDMA device, such as `mlx5_0`")
    port: int = Field(description="Port number, counted from 1")
    model: str = Field("", description="`hca_type` of the device, such as `MT4129`")
    state: str = Field("", description="`ACTIVE`, `DOWN`, `INIT` (no subnet manager) or `ARMED`")
    phys_state: str = Field("", description="`LinkUp`, `Disabled`, `Polling`, …")
    rate_gbps: float = Field(0.0, description="Rate [Gb/s]")
    link_layer: str = Field("", description="`InfiniBand`, or `Ethernet` for RoCE")
    netdevs: tuple[str, ...] = Field((), description="Its network interfaces")
    gids: tuple[Gid, ...] = Field((), description="Filled entries of its GID table")


class Infiniband(Section):
    """RDMA device files and HCA ports."""

    devices: tuple[str, ...] = Field((), description="Names in /dev/infiniband")
    ports: tuple[HcaPort, ...] = Field((), description="Every port of every HCA")
    pci_hcas: int = Field(0, description="NVIDIA (Mellanox) network controllers on the PCI bus; needs no driver")
    modules: tuple[str, ...] = Field((), description="Kernel modules of RDMA that are loaded")
    ofed: str = Field("", description="Release of an installed MLNX_OFED or DOCA-OFED, empty for none")

    @property
    def has_hca(self) -> bool:
        """Whether the host has an HCA, driven or not."""
        return bool(self.ports or self.pci_hcas)


class ContainerConfig(Section):
    """How a container was made, from `docker inspect`."""

    image: str = Field("", description="Image as it was asked for")
    image_id: str = Field("", description="Image ID")
    command: tuple[str, ...] = Field((), description="Entrypoint and command")
    user: str = Field("", description="User, empty for the image's")
    environment: dict[str, str] = Field(
        default_factory=dict, description="Environment; `sha256:` and a hash where a value may be a secret"
    )
    devices: tuple[str, ...] = Field((), description="Device files")
    device_requests: tuple[str, ...] = Field((), description="Devices by driver, `cdi: nvidia.com/gpu=all`")
    mounts: tuple[str, ...] = Field((), description="Mounts, `/host:/container:ro`")
    ulimits: tuple[str, ...] = Field((), description="Limits, `name:soft:hard`")
    capabilities: tuple[str, ...] = Field((), description="Added capabilities")
    privileged: bool = Field(False, description="Whether it runs privileged")
    ipc_mode: str = Field("", description="IPC namespace")
    network_mode: str = Field("", description="Network namespace")
    pid_mode: str = Field("", description="PID namespace")
    memory_bytes: int = Field(0, description="Memory limit [bytes], 0 for none")
    cpus: str = Field("", description="CPUs it is held to, empty for all")
    restart_policy: str = Field("", description="Restart policy")
    log: dict[str, str] = Field(default_factory=dict, description="Log driver and its options")
    init: bool = Field(False, description="Whether it has Docker's init")
    stop_timeout_s: int = Field(0, description="Time to stop before it is killed [seconds], 0 for Docker's default")
    healthcheck: str = Field("", description="Command of its health check")
    labels: dict[str, str] = Field(default_factory=dict, description="Labels")


class Image(Section):
    """One Docker image."""

    id: str = Field(description="Image ID")
    names: tuple[str, ...] = Field((), description="Tags and digests, `name:tag` and `name@sha256:…`")
    size_bytes: int = Field(0, description="Size on disk [bytes]")


class Container(Section):
    """One Docker container, running or not."""

    name: str = Field(description="Name")
    id: str = Field("", description="ID")
    image: str = Field("", description="Image as it was asked for")
    image_id: str = Field("", description="Image ID")
    labels: dict[str, str] = Field(default_factory=dict, description="Labels")
    state: str = Field("", description="`running`, `exited`, …")
    started_at: str = Field("", description="Start time (RFC 3339) of a container that deploy-dsv3 manages")
    config: ContainerConfig | None = Field(None, description="How a container that deploy-dsv3 manages was made")


class Docker(Section):
    """The Docker engine."""

    installed: bool = Field(False, description="Whether dockerd is there")
    version: str = Field("", description="Version that answers")
    running: bool = Field(False, description="Whether it answers on its socket")
    root_dir: str = Field("", description="Data directory in use")
    error: str = Field("", description="What asking it ended with, empty when it went well")
    daemon_json: dict[str, Any] | None = Field(None, description="Content of daemon.json, null without the file")
    daemon_json_error: str = Field("", description="Why daemon.json could not be read")
    images: tuple[Image, ...] = Field((), description="All images")
    containers: tuple[Container, ...] = Field((), description="All containers")


class Cdi(Section):
    """Container Device Interface."""

    specs: tuple[str, ...] = Field((), description="Specification files")


class Deployed(Section):
    """What earlier runs left on the host. A file that is not JSON is an object with `error`."""

    release: dict[str, Any] | None = Field(None, description="release.json, null when there is none")
    image: dict[str, Any] | None = Field(None, description="image.json: name and digest of the last deploy")
    node_file: dict[str, Any] | None = Field(None, description="engine/node.json: what the launcher is told")
    serve_file: dict[str, Any] | None = Field(None, description="engine/serve.json: the serving command (head)")
    manifest: dict[str, Any] | None = Field(None, description="manifest.json: what the last finished deploy made")
    status: dict[str, Any] | None = Field(None, description="The launcher's own state")
    lock: dict[str, Any] | None = Field(None, description="The run that changes this deployment now (head)")
    runs: tuple[dict[str, Any], ...] = Field((), description="The last runs, oldest first (head)")
    endpoint: bool = Field(False, description="Whether the client endpoint is configured here")


class FileState(Section):
    """A file's content and rights."""

    mode: str = Field("", description="Permissions in octal, `0644`")
    owner: str = Field("", description="User and group ID, `0:0`")
    sha256: str = Field("", description="SHA-256 of the content, empty for a link")
    link: str = Field("", description="Target of a link")


class UnitState(Section):
    """A systemd service."""

    active: str = Field("", description="`active`, `inactive`, `failed`, …")
    enabled: str = Field("", description="`enabled`, `disabled`, `masked`, …")
    reload_due: bool = Field(False, description="Whether files of its configuration are newer than what it runs with")


class State(Section):
    """What a deployment made or depends on, and a person could change by hand."""

    files: dict[str, FileState] = Field(
        default_factory=dict, description="Files below /etc/deploy-dsv3 and those that roles write elsewhere, by path"
    )
    units: dict[str, UnitState] = Field(default_factory=dict, description="Services that exist, by name")
    packages: dict[str, str] = Field(
        default_factory=dict, description="Versions of installed packages (driver, Docker, proxy), by name"
    )
    sysctls: dict[str, str] = Field(default_factory=dict, description="Kernel settings by name")


class Registry(Section):
    """What an image's registry says."""

    registry: str = Field("", description="Address that answered, empty when none did")
    digest: str = Field("", description="Digest")
    bytes: int = Field(0, description="Compressed size, which is what a pull downloads at most [bytes]")
    error: str = Field("", description="Why none answered")


class Reach(Section):
    """Outcome of one TCP connection to another host."""

    host: str = Field("", description="Host that was tried, by inventory name")
    address: str = Field("", description="Address that was tried")
    port: int = Field(0, description="TCP port that was tried")
    reachable: bool = Field(False, description="Whether it answered or refused")
    error: str = Field("", description="Why it is not reachable")


class Clock(Section):
    """Bounds of the host's clock minus the controller's; the controller adds them."""

    offset_low: float = Field(description="The host is at least this much ahead [seconds]")
    offset_high: float = Field(description="The host is at most this much ahead [seconds]")


class HostFacts(Section):
    """All that the probe reads from one host."""

    schema_version: int = Field(SCHEMA, alias="schema", description="Version of this schema")
    time: float = Field(0.0, description="Host's clock when the probe began [seconds since the epoch]")
    time_end: float = Field(0.0, description="Host's clock when the probe ended [seconds since the epoch]")
    hostname: str = Field("", description="Host's own name")
    machine_id: str = Field("", description="/etc/machine-id")
    boot_id: str = Field("", description="Kernel's boot ID")
    errors: dict[str, str] = Field(default_factory=dict, description="Why a section could not be read, by section")
    os: OperatingSystem = Field(default_factory=OperatingSystem, description="Operating system")
    user: User = Field(default_factory=User, description="User of the probe")
    connection: Connection = Field(default_factory=Connection, description="Connection")
    memory: Memory = Field(default_factory=Memory, description="Main memory")
    cpus: int = Field(0, description="Online CPUs")
    disks: tuple[Disk, ...] = Field((), description="File systems of the paths asked for")
    network: Network = Field(default_factory=Network, description="Network")
    listening: tuple[Listener, ...] = Field((), description="Listening TCP sockets")
    pci_gpus: tuple[PciDevice, ...] = Field((), description="GPUs on the PCI bus")
    pci_nvswitches: tuple[PciDevice, ...] = Field((), description="NVSwitches on the PCI bus")
    gpus: tuple[Gpu, ...] = Field((), description="GPUs that nvidia-smi lists")
    nvidia_smi: NvidiaSmi = Field(default_factory=NvidiaSmi, description="nvidia-smi")
    driver: Driver = Field(default_factory=Driver, description="GPU kernel modules")
    fabric: Fabric | None = Field(None, description="NVSwitch fabric; null without NVSwitches or unread")
    infiniband: Infiniband = Field(default_factory=Infiniband, description="RDMA")
    docker: Docker = Field(default_factory=Docker, description="Docker engine")
    cdi: Cdi = Field(default_factory=Cdi, description="Container Device Interface")
    deployment: Deployed = Field(default_factory=Deployed, description="Earlier deployment")
    state: State | None = Field(None, description="What a person could change by hand; null where it was not read")
    model: dict[str, Any] | None = Field(None, description="Numbers and names of the model's config.json")
    registry: Registry | None = Field(None, description="The engine image's registry; null where it was not asked")
    reach: tuple[Reach, ...] = Field((), description="Connections that were tried")
    clock: Clock | None = Field(None, description="Clock offset; null where it was not measured")

    @property
    def gpu_count(self) -> int:
        """Number of GPUs: as nvidia-smi lists them, on the PCI bus before there is a driver."""
        return len(self.gpus) or len(self.pci_gpus)

    @property
    def fabric_manager_version(self) -> str:
        """Version of the installed fabric manager, as the driver writes its own; empty for none."""
        for name, version in (self.state.packages if self.state else {}).items():
            if re.fullmatch(r"nvidia-fabric-?manager(-\d+)?", name):
                # Between an epoch and the packagers' own revision.
                return version.rpartition(":")[2].partition("-")[0]
        return ""


class FactsError(ValueError):
    """A document is not what the probe writes; the text says which field is wrong."""


def load_facts(document: Mapping[str, Any]) -> HostFacts:
    """Return the typed facts of a probe's JSON object; raises FactsError."""
    try:
        facts = HostFacts.model_validate(document)
    except ValidationError as error:
        problems = [f"{'.'.join(str(p) for p in item['loc'])}: {item['msg']}" for item in error.errors()]
        raise FactsError("not facts of the probe: " + "; ".join(problems)) from error
    if facts.schema_version != SCHEMA:
        raise FactsError(f"facts have schema {facts.schema_version}, this version reads schema {SCHEMA}")
    return facts


def unread_sections(host: str, facts: HostFacts) -> list[Finding]:
    """Return a warning for each section that the probe could not read."""
    return [
        Finding(
            code="probe-section",
            host=host,
            severity="warning",
            message=f"{host}: the probe could not read '{section}': {reason}",
            cause="the host lacks the file or command, or the login user lacks the right",
            remedy="run as root (become) and look at the named section on the host",
        )
        for section, reason in sorted(facts.errors.items())
    ]


def reference() -> str:
    """Return docs/reference/probe-facts.md: every field of the schema with its type and meaning."""
    lines = [
        "# Facts of the probe",
        "",
        "<!-- Made by `python -m deploy_dsv3.facts`; a test fails when it is out of date. -->",
        "",
        "`playbooks/library/dsv3_probe.py` reads these from a host in one pass, without changing anything;",
        "in a play they are the variable `dsv3_facts`. It also runs by itself:",
        "",
        "```",
        "ssh HOST sudo python3 - < playbooks/library/dsv3_probe.py",
        "```",
        "",
        f"This is schema {SCHEMA}. New fields may be added to it; one that changes its meaning makes a new",
        "schema. A section that could not be read keeps its empty value and is named in `errors`.",
    ]
    for model in _models(HostFacts):
        doc = (model.__doc__ or "").strip()
        lines += [
            "",
            f"## {model.__name__}",
            "",
            doc,
            "",
            "| field | type | meaning |",
            "| --- | --- | --- |",
        ]
        for name, info in model.model_fields.items():
            lines.append(f"| `{info.alias or name}` | {_type_name(info.annotation)} | {info.description} |")
    return "\n".join(lines) + "\n"


def _models(model: type[Section]) -> Iterator[type[Section]]:
    """Yield a model and those it is made of, each once, in the order of its fields."""
    pending, seen = [model], set()
    while pending:
        current = pending.pop(0)
        if current not in seen:
            seen.add(current)
            yield current
            pending += [part for info in current.model_fields.values() for part in _parts(info.annotation)]


def _parts(annotation: Any) -> list[type[Section]]:
    if isinstance(annotation, type) and issubclass(annotation, Section):
        return [annotation]
    return [part for argument in get_args(annotation) for part in _parts(argument)]


def _type_name(annotation: Any) -> str:
    """Return the JSON type of an annotation in words."""
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Literal:
        return "one of " + ", ".join(f"`{value}`" for value in arguments)
    if origin is types.UnionType:
        return " or ".join(_type_name(part) for part in arguments)
    if origin is tuple:
        return f"list of {_type_name(arguments[0])}"
    if origin is dict and arguments[1] is not Any:
        return f"object of {_type_name(arguments[1])}"
    if isinstance(annotation, type) and issubclass(annotation, Section):
        return f"[{annotation.__name__}](#{annotation.__name__.lower()})"
    names = {str: "string", int: "integer", float: "number", bool: "boolean", types.NoneType: "null"}
    return names.get(annotation, "object")


if __name__ == "__main__":
    print(reference(), end="")
