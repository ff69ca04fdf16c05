"""What each host of a replica is to be: addresses, ranks, devices, environment.

Pure: facts and settings in, plans out.
Nothing here is typed by an operator, and each value can be overridden by a setting (`node_network_*`,
`rdma_*`, `lmdeploy_tp`, `engine_environment`).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from . import driver, ports, serving
from .facts import HostFacts
from .findings import Finding
from .network import HostView, Socket, as_ip, choose_sockets, host_port, socket_environment
from .rdma import LinkLayer, Rdma, RdmaView, choose_rdma, rdma_environment
from .topology import Replica

# The engine's nodes talk to each other directly; a proxy in between breaks that (DESIGN, traps).
_PROXY = re.compile(r"(https?|all|ftp|socks)_proxy", re.IGNORECASE)
_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
#: Where the engine keeps what it compiles; role engine mounts a folder of the host there.
CACHE = "/var/cache/deploy-dsv3"


@dataclass(frozen=True, kw_only=True)
class HostInput:
    """What is known of one host.

    `facts` is None for a host that was not looked at in this run; `settings` holds every public setting by
    name; `connect_address` is the address Ansible connects to, empty when it is not an IP address.
    """

    host: str
    facts: HostFacts | None
    settings: Mapping[str, Any]
    connect_address: str = ""


@dataclass(frozen=True, kw_only=True)
class Peer:
    """Another host of the replica."""

    host: str
    address: str


@dataclass(frozen=True, kw_only=True)
class ReachTarget:
    """A connection that must be possible from the host: the probe's option `reach`."""

    host: str
    address: str
    port: int
    source: str


@dataclass(frozen=True, kw_only=True)
class Expected:
    """What the Ray cluster of the replica must show."""

    nodes: int
    gpus: int


@dataclass(frozen=True, kw_only=True)
class NodePlan:
    """What one host is to be: the variable `dsv3_node` of the roles.

    `rank` counts from the head (0) through the workers in inventory order. `gid_index` -1 is NCCL's own
    choice. `reserved_ports` is what the kernel is to keep from programs that name no port, "" for as it is.
    `kernel_modules` is the flavour of the driver's, `reboot` why the host has to be rebooted for its driver.
    `environment` is complete but for the Ray token; `node_file` and `serve_file` are the launcher's
    two files; `reach` is what the probe connects to in order to prove the network between the hosts.
    """

    replica: str
    role: Literal["head", "worker"]
    rank: int
    address: str
    interface: str
    head_host: str
    head_address: str
    peers: tuple[Peer, ...]
    gpus: int
    kernel_modules: driver.Modules
    reboot: tuple[str, ...]
    expected: Expected
    tp: int
    devices: tuple[str, ...]
    hcas: tuple[str, ...]
    gid_index: int
    link_layer: LinkLayer
    environment: Mapping[str, str]
    endpoint: str
    reserved_ports: str
    container_name: str
    model_path: str
    served_model: str
    ray_authentication: str
    node_file: Mapping[str, Any]
    serve_file: Mapping[str, Any]
    reach: tuple[ReachTarget, ...]
    warnings: tuple[str, ...] = field(default=())

    def to_json(self) -> dict[str, Any]:
        """Return the plan as plain data: lists, dictionaries, strings and numbers."""
        return {key: list(value) if isinstance(value, tuple) else value for key, value in asdict(self).items()}


def derive(replica: Replica, hosts: Mapping[str, HostInput]) -> tuple[dict[str, NodePlan], list[Finding]]:
    """Return the plan of each host of a replica, and what is wrong.

    `hosts` has an entry for every host of the replica. A host that was not looked at (facts None) gets no
    plan, but counts for the others by its connect address and their number of GPUs. Hosts without an address,
    and all hosts when the head has none, get no plan either; the findings say so.
    """
    seen = {name: (hosts[name], facts) for name in replica.hosts if (facts := hosts[name].facts) is not None}
    sockets, findings = choose_sockets(
        [
            HostView(
                host=name,
                facts=facts,
                connect_address=known.connect_address,
                interface=known.settings["node_network_interface"],
                address=known.settings["node_network_address"],
            )
            for name, (known, facts) in seen.items()
        ]
    )
    rdma, rdma_findings = choose_rdma(
        [
            RdmaView(
                host=name,
                facts=facts,
                socket=sockets.get(name),
                devices=tuple(known.settings["rdma_devices"]),
                hcas=tuple(known.settings["rdma_hcas"]),
                gid_index=known.settings["rdma_gid_index"],
                required=known.settings["rdma_required"],
            )
            for name, (known, facts) in seen.items()
        ]
    )
    findings += rdma_findings
    gpus = {name: facts.gpu_count for name, (_, facts) in seen.items()}
    assumed = max(gpus.values(), default=0)
    expected = Expected(nodes=len(replica.hosts), gpus=sum(gpus.get(name, assumed) for name in replica.hosts))
    addresses = {name: socket.address for name, socket in sockets.items()}
    for name in replica.hosts:
        if name not in seen and (address := _known_address(hosts[name])):
            addresses[name] = address
    environments = {}
    for name, (known, _) in seen.items():
        findings += _check_tp(name, known.settings, expected)
        environments[name], environment_findings = _operator_environment(name, known.settings)
        findings += environment_findings
    plans = {}
    for name, socket in sockets.items():
        if replica.head not in addresses:
            break
        plans[name] = _plan(
            replica,
            hosts[name],
            facts=seen[name][1],
            socket=socket,
            rdma=rdma[name],
            addresses=addresses,
            gpus=gpus[name],
            expected=expected,
            operator=environments[name],
            warnings=tuple(f.message for f in findings if f.host == name and f.severity == "warning"),
        )
    return plans, findings


def endpoint_url(settings: Mapping[str, Any], head_address: str) -> str:
    """Return the address that clients of a replica use, without a trailing slash."""
    if settings["endpoint_url"]:
        return str(settings["endpoint_url"]).rstrip("/")
    if settings["endpoint_mode"] == "direct":
        return f"http://{host_port(head_address, settings['lmdeploy_server_port'])}"
    scheme = "https" if settings["endpoint_tls_certificate_path"] else "http"
    configured = as_ip(settings["endpoint_address"])
    address = str(configured) if configured and not configured.is_unspecified else head_address
    return f"{scheme}://{host_port(address, settings['endpoint_port'])}"


def _plan(
    replica: Replica,
    known: HostInput,
    *,
    facts: HostFacts,
    socket: Socket,
    rdma: Rdma,
    addresses: Mapping[str, str],
    gpus: int,
    expected: Expected,
    operator: Mapping[str, str],
    warnings: tuple[str, ...],
) -> NodePlan:
    settings = known.settings
    head_address = addresses[replica.head]
    role: Literal["head", "worker"] = "head" if known.host == replica.head else "worker"
    tp = settings["lmdeploy_tp"] or expected.gpus
    peers = tuple(
        Peer(host=name, address=addresses[name]) for name in replica.hosts if name != known.host and name in addresses
    )
    return NodePlan(
        replica=replica.name,
        role=role,
        rank=replica.hosts.index(known.host),
        address=socket.address,
        interface=socket.interface,
        head_host=replica.head,
        head_address=head_address,
        peers=peers,
        gpus=gpus,
        kernel_modules=driver.kernel_modules(facts, settings),
        reboot=tuple(driver.reboot_reasons(facts, settings)),
        expected=expected,
        tp=tp,
        devices=rdma.devices,
        hcas=rdma.hcas,
        gid_index=rdma.gid_index,
        link_layer=rdma.link_layer,
        environment={
            **_environment(settings, head_address),
            **socket_environment(socket),
            **rdma_environment(rdma),
            **operator,
        },
        endpoint=endpoint_url(settings, head_address),
        reserved_ports=_reserved_ports(facts, settings, is_head=role == "head"),
        container_name=settings["engine_container_name"],
        model_path=settings["model_weights_path"],
        served_model=serving.served_model(settings),
        ray_authentication=settings["ray_cluster_authentication"],
        node_file=serving.node_file(
            settings,
            replica=replica.name,
            role=role,
            address=socket.address,
            head_address=head_address,
            gpus=gpus,
            expected=asdict(expected),
        ),
        serve_file=serving.serve_file(settings, tp=tp),
        reach=tuple(
            ReachTarget(
                host=peer.host,
                address=peer.address,
                port=settings["ray_cluster_port" if peer.host == replica.head else "ray_cluster_node_manager_port"],
                source=socket.address,
            )
            for peer in peers
        ),
        warnings=warnings,
    )


def _reserved_ports(facts: HostFacts, settings: Mapping[str, Any], *, is_head: bool) -> str:
    """Return `net.ipv4.ip_local_reserved_ports` with the host's own and what others have reserved already.

    A machine without systemd is a container, whose kernel settings are not its own.
    """
    if not settings["node_network_reserve_ports"] or facts.os.init != "systemd":
        return ""
    found = (facts.state.sysctls if facts.state else {}).get(ports.SYSCTL, "")
    return ports.to_text(ports.parse(found) | ports.of_host(settings, is_head=is_head))


def _known_address(known: HostInput) -> str:
    """Return the address of a host that was not looked at: as set, or as Ansible connects to it."""
    for text in (known.settings["node_network_address"], known.connect_address):
        address = as_ip(text)
        if address is not None and not address.is_loopback:
            return str(address)
    return ""


def _environment(settings: Mapping[str, Any], head_address: str) -> dict[str, str]:
    """Return the variables that every process of the engine needs, on every node, before Ray starts."""
    return {
        # Without it the server starts a private Ray and waits for GPUs that never come.
        "RAY_ADDRESS": host_port(head_address, settings["ray_cluster_port"]),
        "RAY_USAGE_STATS_ENABLED": "0",
        # Otherwise a random port, which no firewall could know.
        "LMDEPLOY_DIST_MASTER_ADDR": head_address,
        "LMDEPLOY_DIST_MASTER_PORT": str(settings["lmdeploy_dist_port"]),
        "HF_HUB_OFFLINE": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        # A check in one more process, which imports everything once more, before every start.
        "LMDEPLOY_ENABLE_CHECK_ENV": str(int(settings["lmdeploy_check_environment"])),
        **_CACHE_ENVIRONMENT,
    }


# Named one by one. Left alone, Triton's folder differs from start to start: at the first, TorchInductor moves it below
# its own (CachingAutotuner.__init__, torch 2.11); at the second it loads its kernels from its cache, moves nothing,
# and LMDeploy's kernels are all compiled again.
_CACHE_ENVIRONMENT: Mapping[str, str] = {
    "TRITON_CACHE_DIR": f"{CACHE}/triton",
    "TRITON_CACHE_AUTOTUNING": "1",
    "TORCHINDUCTOR_CACHE_DIR": f"{CACHE}/inductor",
    "DG_JIT_CACHE_DIR": f"{CACHE}/deep_gemm",
    "TILELANG_CACHE_DIR": f"{CACHE}/tilelang",
    "CUDA_CACHE_PATH": f"{CACHE}/cuda",
}


def _check_tp(host: str, settings: Mapping[str, Any], expected: Expected) -> list[Finding]:
    tp = settings["lmdeploy_tp"]
    if tp in (0, expected.gpus):
        return []
    return [
        Finding(
            code="tp-gpus",
            host=host,
            severity="error",
            message=f"{host}: lmdeploy_tp is {tp}, the replica has {expected.gpus} GPUs on {expected.nodes} hosts",
            cause="the setting was made for other hosts, or a GPU is missing",
            remedy=f"set lmdeploy_tp to {expected.gpus}, or to 0 for all GPUs of the replica",
        )
    ]


def _operator_environment(host: str, settings: Mapping[str, Any]) -> tuple[dict[str, str], list[Finding]]:
    """Return `engine_environment` as strings, and an error for each entry that would break the engine."""
    environment: dict[str, str] = {}
    findings = []
    for name, value in settings["engine_environment"].items():
        problem = _environment_problem(name, value)
        if problem is None:
            environment[name] = str(value)
            continue
        cause, remedy = problem
        findings.append(
            Finding(
                code="environment",
                host=host,
                severity="error",
                message=f"{host}: engine_environment has an entry {name!r} that cannot be used",
                cause=cause,
                remedy=remedy,
            )
        )
    return environment, findings


def _environment_problem(name: str, value: Any) -> tuple[str, str] | None:
    """Return cause and remedy of a bad entry, None for a good one. Never a value: it may be secret."""
    if not _NAME.fullmatch(name):
        return "a name has letters, digits and underscores only", "correct the name"
    if _PROXY.fullmatch(name):
        return "a proxy in the engine's environment breaks calls between the nodes", "remove it"
    if name == "RAY_AUTH_TOKEN":
        return (
            "a secret in the environment shows in `docker inspect`",
            "remove it: the token is handed over in a file",
        )
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        return f"a string or number is expected, found {type(value).__name__}", "quote the value"
    if "\n" in str(value) or "\0" in str(value):
        return "the value holds a line break", "remove the line break"
    if name.startswith("LMDEPLOY_") and str(value).strip() == "":
        return "an empty LMDEPLOY_ variable stops the engine at import", "remove it, or give it a value"
    return None
