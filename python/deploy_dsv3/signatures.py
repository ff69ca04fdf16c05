"""What a line of a log means: a catalogue of known failures, and the search for the first cause among them.

A failing engine writes the same trouble many times: the cause once, in the process that met it, then its echo
in every process that depended on it. `first_cause` returns the cause. Each signature has a section of the
same name in docs/runbooks/troubleshooting.md; a test keeps the two alike.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from enum import IntEnum

from deploy_dsv3 import runbook

RUNBOOK = runbook.LOG_LINES


class Weight(IntEnum):
    """How much a line explains; the lower, the more."""

    CAUSE = 0
    """It is enough to make a deployment fail."""
    HINT = 1
    """Healthy runs write it too, for a while or under some settings; it explains when nothing else does."""
    ECHO = 2
    """The consequence of something that failed earlier or elsewhere."""


@dataclass(frozen=True, kw_only=True)
class Signature:
    """One known failure.

    Attributes:
        id: the anchor of its section in the runbook.
        weight: what it counts against others in the same log.
        phrases: any of them in one line betrays it, whatever its case; "…" stands for anything in between.
            Not regular expressions: a hundred of those take three minutes over a log of a million lines.
        cause: what has happened, in a sentence.
        remedy: what to do, in a sentence or two; settings by their name.
    """

    id: str
    weight: Weight = Weight.CAUSE
    phrases: tuple[str, ...]
    cause: str
    remedy: str

    @property
    def page(self) -> str:
        """File and anchor of its section in the runbook."""
        return f"{RUNBOOK}#{self.id}"


@dataclass(frozen=True, kw_only=True)
class Match:
    """A signature found in a log.

    Attributes:
        signature: what was recognised.
        line_number: from 1; 0 where the text is not a line of the log.
        line: the line without colours and line end.
        address: the node that wrote it, if Ray's prefix says so; else empty.
    """

    signature: Signature
    line_number: int
    line: str
    address: str = ""

    def as_dict(self) -> dict[str, str | int]:
        """For `--json`: id, cause, remedy, page, line_number, line, address."""
        return {
            "id": self.signature.id,
            "cause": self.signature.cause,
            "remedy": self.signature.remedy,
            "page": self.signature.page,
            "line_number": self.line_number,
            "line": self.line,
            "address": self.address,
        }

    @property
    def where(self) -> str:
        """Line and node, as far as they are known: ``line 3 on 192.0.2.12``."""
        parts = [f"line {self.line_number}"] if self.line_number else []
        return " ".join([*parts, *([f"on {self.address}"] if self.address else [])])

    def __str__(self) -> str:
        quoted = ": ".join(filter(None, (self.where, self.line.strip())))
        return f"{self.signature.cause} ({quoted}) {self.signature.remedy} See {self.signature.page}."


# Of signatures that meet the same line with the same weight, the first in this order counts.
SIGNATURES: tuple[Signature, ...] = (
    # Host and driver
    Signature(
        id="fabric-manager",
        phrases=(
            "Error 802: system not yet initialized",
            "Cuda failure 802 ",
            "CUDA_ERROR_SYSTEM_NOT_READY",
            "cudaErrorSystemNotReady",
            "fabric manager … don't match with driver version",
        ),
        cause="The NVLink fabric of this host is not ready: its fabric manager does not run, or has another "
        "version than the driver.",
        remedy="Install nvidia-fabricmanager in exactly the driver's version, start it, and wait until "
        "`nvidia-smi -q` says Fabric State: Completed.",
    ),
    Signature(
        id="driver-too-old",
        phrases=(
            "NVIDIA driver on your system is too old",
            "CUDA driver version is insufficient for CUDA runtime version",
            "unsatisfied condition: cuda",
            "system has unsupported display driver / cuda driver combination",
            "forward compatibility was attempted on non supported HW",
            "the provided PTX was compiled with an unsupported toolchain",
        ),
        cause="The image's CUDA is newer than this host's driver serves.",
        remedy="Raise nvidia_driver_branch (570 or later for cu12.8 images, 580 for cu13.0), or choose an "
        "image "
        "of an older CUDA.",
    ),
    Signature(
        id="driver-library-mismatch",
        phrases=("Driver/library version mismatch",),
        cause="The driver's libraries were upgraded while its old kernel module stayed loaded.",
        remedy="Reboot the host (nvidia_driver_allow_reboot), and keep unattended upgrades off the driver.",
    ),
    Signature(
        id="gpu-lost",
        phrases=(
            "GPU has fallen off the bus",
            # Memory, bus and firmware faults; 13, 31 and 43 are mostly the program's own.
            *(f"NVRM: Xid (…): {code}," for code in (46, 48, 62, 64, 74, 79, 92, 94, 95, 119, 120, 140)),
            "uncorrectable ECC error",
            "Failed to initialize NVML: Unknown Error",
            "GPU is lost",
        ),
        cause="A GPU of this host is broken, or was taken from the running container.",
        remedy="Look at `nvidia-smi -q` and at the kernel log for Xid. After a systemctl daemon-reload "
        "under the "
        "legacy runtime restart the container; else reset or replace the GPU.",
    ),
    Signature(
        id="no-gpu-in-container",
        phrases=(
            "could not select device driver … with capabilities: [[gpu]]",
            "unresolvable CDI devices",
            "CDI device injection failed",
            "No CUDA GPUs are available",
            "Found no NVIDIA driver on your system",
            "Torch not compiled with CUDA enabled",
            "cuda is not available.",
            "nvidia-container-cli: initialization error",
            "nvidia-container-cli: detection error",
            "sees … of the host's … GPUs",
        ),
        cause="The container does not get the host's GPUs: Docker does not know them, or the CDI specification is "
        "older than the driver or the GPUs.",
        remedy="Have the CDI specifications written anew: nvidia-cdi-refresh.service writes that in /var/run/cdi, "
        "which counts first, --tags host that in /etc/cdi (nvidia_container_toolkit_cdi_spec_path). Docker needs its "
        "cdi feature on, and a restart after the toolkit was installed.",
    ),
    Signature(
        id="fp8-unsupported",
        phrases=(
            "model_format=fp8 requires sm>=9.0",
            "type fp8e4nv not supported in this architecture",
        ),
        cause="This GPU is older than Hopper and cannot compute FP8.",
        remedy="Use H100, H800, H200, H20 or later, or a BF16 conversion of the weights on enough GPUs.",
    ),
    # Memory
    Signature(
        id="gpu-out-of-memory",
        phrases=(
            "CUDA out of memory",
            "CUDA error: out of memory",
            "CUDA_ERROR_OUT_OF_MEMORY",
            "Cuda failure 2 'out of memory'",
        ),
        cause="A GPU ran out of memory.",
        remedy="See with nvidia-smi what else holds it; then lower lmdeploy_cache_max_entry_count, "
        "lmdeploy_max_batch_size or lmdeploy_max_prefill_token_num, or spread the model over more GPUs.",
    ),
    Signature(
        id="no-cache-memory",
        phrases=(
            "No enough gpu memory for kv cache",
            "No enough gpu memory for state cache",
            "No enough gpu memory for runtime",
        ),
        cause="The weights fit, but leave no room for the cache.",
        remedy="Use more GPUs (lmdeploy_tp), or lower lmdeploy_max_batch_size and "
        "lmdeploy_max_prefill_token_num; docs/capacity.md works it out beforehand.",
    ),
    Signature(
        id="host-out-of-memory",
        phrases=(
            "Out of memory: Killed process",
            "oom-kill:constraint",
            "killed due to memory pressure (OOM)",
            "Memory cgroup out of memory",
        ),
        cause="The host ran out of memory, and the kernel or Ray killed a process.",
        remedy="Look for another consumer, and limit ray_cluster_object_store_memory_bytes.",
    ),
    Signature(
        id="shared-memory",
        phrases=(
            "Error while creating shared memory segment",
            "failed to extend /dev/shm/",
            "object store size … exceeds /dev/shm size",
            "unable to open shared memory object … No space left on device",
        ),
        cause="/dev/shm is too small for NCCL or Ray.",
        remedy="Leave engine_ipc_mode at host, see what fills /dev/shm (leftover nccl-* segments can go "
        "while "
        "nothing runs), and give ray_cluster_object_store_memory_bytes a value that fits.",
    ),
    Signature(
        id="ray-shared-memory",
        weight=Weight.HINT,
        phrases=("because /dev/shm has only … bytes available",),
        cause="/dev/shm is smaller than Ray's object store wants, so Ray uses slow disk space.",
        remedy="Leave engine_ipc_mode at host, or lower ray_cluster_object_store_memory_bytes.",
    ),
    Signature(
        id="memlock",
        phrases=(
            "ibv_reg_mr … Cannot allocate memory",
            "ibv_reg_dmabuf_mr … Cannot allocate memory",
            "ibv_create_cq … Cannot allocate memory",
            "ibv_create_qp … Cannot allocate memory",
            "libibverbs: Warning: RLIMIT_MEMLOCK is",
        ),
        cause="RDMA cannot pin memory: the limit of locked memory is too low.",
        remedy="Keep memlock -1 in engine_ulimits and IPC_LOCK in engine_capabilities; if Docker refuses the "
        "limit, set LimitMEMLOCK=infinity for its unit.",
    ),
    Signature(
        id="open-files",
        phrases=("[Errno 24] Too many open files", ": Too many open files"),
        cause="A process ran into the limit of open files.",
        remedy="Raise nofile in engine_ulimits (1048576).",
    ),
    Signature(
        id="disk-full",
        phrases=(
            "No space left on device",
            "local object store is full and the local disk's utilization is over capacity",
            "OutOfDiskError",
        ),
        cause="A file system is full.",
        remedy="Free space, or move docker_engine_data_path or Ray's temporary folder to a larger disk.",
    ),
    Signature(
        id="disk-nearly-full",
        weight=Weight.HINT,
        phrases=("is over … full, … Object creation will fail",),
        cause="The disk with Ray's temporary folder is nearly full, and Ray will refuse to store objects.",
        remedy="Free space there, or move it to a larger disk.",
    ),
    # Weights and image
    Signature(
        id="missing-shards",
        phrases=(
            "No such file or directory: … .safetensors",
            "RuntimeError: Unknown weight type.",
            "SafetensorError",
            "MetadataIncompleteBuffer",
            "does not appear to have a file named",
            "Attempted to load weight … into parameter",
        ),
        cause="The weights on this host are incomplete, cut off, or not this model's.",
        remedy="Fetch them again: the check of role model_weights names the files that are missing or too short.",
    ),
    Signature(
        id="hub-offline",
        phrases=(
            "LocalEntryNotFoundError",
            "OfflineModeIsEnabled",
            "offline mode is enabled",
            "We couldn't connect to … huggingface",
            "outgoing traffic has been disabled",
            "Cannot find the requested files in the … cache",
        ),
        cause="The engine looks for the model at the hub, since it finds it under no local path.",
        remedy="Set model_weights_path to the folder that holds config.json on every host.",
    ),
    Signature(
        id="unauthorized",
        phrases=(
            "401 Client Error",
            "GatedRepoError",
            "unauthorized: authentication required",
            "unauthorized: incorrect username or password",
            "pull access denied",
            "no basic auth credentials",
        ),
        cause="A registry or model hub refuses the credentials.",
        remedy="Set engine_image_registry_username and engine_image_registry_password, or the hub's token "
        "where "
        "the weights are fetched.",
    ),
    Signature(
        id="client-unauthorized",
        weight=Weight.HINT,
        phrases=('HTTP/1.1" 401', "authentication_error"),
        cause="A client's API key is wrong or missing.",
        remedy="Compare the client's key with endpoint_api_keys.",
    ),
    Signature(
        id="image-not-found",
        phrases=("manifest for … not found", "manifest unknown", "No such image:"),
        cause="The image is not known under that name and digest, at the registry or on this host.",
        remedy="Check engine_image_name and engine_image_digest; offline, set engine_image_archive_path.",
    ),
    Signature(
        id="registry-unreachable",
        phrases=(
            "/v2/ … connection refused",
            "/v2/ … no such host",
            "/v2/ … timeout",
            "/v2/ … network is unreachable",
            "server gave HTTP response to HTTPS client",
            "x509: certificate signed by unknown authority",
        ),
        cause="The registry cannot be reached, or its certificate is not trusted.",
        remedy="Set docker_engine_registry_mirrors, docker_engine_proxy_url where a proxy is in between, "
        "docker_engine_registry_ca_paths for a private CA, or docker_engine_insecure_registries for none.",
    ),
    # Ray
    Signature(
        id="ray-version-mismatch",
        phrases=("Version mismatch: The cluster was started with",),
        cause="Two nodes run different versions of Ray or Python.",
        remedy="Deploy the same image digest to every node (engine_image_digest), all nodes together.",
    ),
    Signature(
        id="ray-token",
        phrases=(
            "InvalidAuthToken",
            "Authentication token is missing or incorrect",
            "token authentication is enabled but",
            "ray.exceptions.AuthenticationError",
        ),
        cause="A node has another Ray token than the head, or none.",
        remedy="Deploy to all nodes together: RAY_AUTH_MODE and the token file must be the same on each.",
    ),
    Signature(
        id="placement-group",
        phrases=("Cannot provide a placement group of",),
        cause="Ray never had as many GPUs on the right nodes as the engine asks for.",
        remedy="Compare `ray status` with lmdeploy_tp; look for a missing node, for one with fewer GPUs, "
        "and for a "
        "head that registered another address than node_network_address.",
    ),
    Signature(
        id="placement-group-pending",
        weight=Weight.HINT,
        phrases=(
            "Waiting for creating a placement group of specs",
            "The number of required … exceeds the total number of available",
        ),
        cause="The engine waits for GPUs that Ray does not have (yet).",
        remedy="Compare `ray status` with lmdeploy_tp; why a node has not joined stands in its own log.",
    ),
    Signature(
        id="ray-head-unreachable",
        phrases=(
            "Failed to connect to GCS",
            "Unable to connect to GCS",
            "Could not find any running Ray instance",
        ),
        cause="A node cannot reach the Ray head.",
        remedy="Check that the head's container runs, that ray_cluster_port is open between the nodes, and "
        "that "
        "node_network_address is an address that the others reach.",
    ),
    Signature(
        id="private-ray",
        weight=Weight.HINT,
        phrases=("Started a local Ray instance",),
        cause="The engine found no Ray cluster and started one of its own, with this host's GPUs only.",
        remedy="RAY_ADDRESS must be in the engine's environment: start it through the deployed container only.",
    ),
    Signature(
        id="ray-node-lost",
        weight=Weight.ECHO,
        phrases=(
            "has been marked dead because the detector",
            "The task's local raylet died",
            "NodeDiedError",
        ),
        cause="A node left the Ray cluster.",
        remedy="Look at that node's own log and power; the deployment starts again by itself when it is back.",
    ),
    Signature(
        id="engine-worker-died",
        weight=Weight.ECHO,
        phrases=(
            "The actor died unexpectedly before finishing this task",
            "The worker died unexpectedly while executing this task",
            "ActorDiedError",
            "RayActorError",
            "WorkerCrashedError",
            "Ray worker exited.",
            "EngineLoop wait_tasks failed",
            "wait_tasks failed.",
        ),
        cause="A process of the engine ended, and others report it.",
        remedy="The reason is in the log of the process that ended, often on another node: `deploy-dsv3 status` looks "
        "at all of them.",
    ),
    # Network and RDMA
    Signature(
        id="nccl-no-interface",
        phrases=("no socket interface found", "NET/Socket : no interface found"),
        cause="NCCL finds no network interface of the name that it was given.",
        remedy="Set node_network_interface for that host: names differ from host to host.",
    ),
    Signature(
        id="rdma-gid",
        phrases=(
            "ibv_modify_qp failed with … Connection timed out",
            "ibv_modify_qp failed with … Network is unreachable",
            "ibv_modify_qp failed with … Invalid argument",
            "ibv_modify_qp failed with … No such device",
            "Failed to modify QP to ",
        ),
        cause="RDMA connections are not answered: on RoCE mostly a wrong GID, else a port that leads nowhere.",
        remedy="Compare rdma_gid_index with the host's RoCE v2 GID of the service network (-1 derives it), "
        "and "
        "rdma_hcas with the ports that are cabled.",
    ),
    Signature(
        id="rdma-retries",
        phrases=(
            "Got completion from peer … RETRY_EXC_ERR",
            "Got completion from peer … status=12 ",
            "Got completion from peer … error 12,",
            "transport retry counter exceeded",
        ),
        cause="RDMA packets get lost: a bad cable or port, or a RoCE network that is not lossless.",
        remedy="Check the error counters of both ports and the switch's flow control; a peer that was just "
        "killed "
        "causes it as well.",
    ),
    Signature(
        id="rdma-memory-access",
        phrases=(
            "Got completion from peer … LOC_PROT_ERR",
            "Got completion from peer … REM_ACCESS_ERR",
            "Got completion from peer … status=4 ",
            "Got completion from peer … status=10 ",
        ),
        cause="The network card may not read the GPU's memory.",
        remedy="Check for nvidia-peermem, or for dma-buf with the open kernel modules, and that ACS is off "
        "on the "
        "PCI bridges between card and GPU.",
    ),
    Signature(
        id="nccl-no-device",
        weight=Weight.HINT,
        phrases=("NET/IB : No device found", "Failed to open libibverbs.so"),
        cause="NCCL finds no InfiniBand or RoCE device in the container and uses plain sockets: very slow.",
        remedy="Check that /dev/infiniband/uverbs* exists on the host and reaches the container "
        "(rdma_devices), "
        "and that rdma_hcas names existing ports; rdma_required refuses such hosts.",
    ),
    Signature(
        id="nvshmem-ibgda",
        phrases=(
            "ibgda.cpp: … non-zero status",
            "ibgda.cpp: … NULL value",
            "neither nv_peer_mem, or nvidia_peermem detected",
            "NVSHMEM API called before NVSHMEM initialization has completed",
        ),
        cause="NVSHMEM cannot start its GPU-driven RDMA, which expert parallelism over several nodes needs.",
        remedy="Load the driver with NVreg_EnableStreamMemOPs=1 and PeerMappingOverride=1, or provide "
        "/dev/gdrdrv; a layout with tp alone does not need it.",
    ),
    Signature(
        id="expert-parallel-libraries",
        phrases=(
            "ep>1 requires install DeepEP",
            "DeepEP is not installed",
            "module 'deep_gemm' has no attribute",
        ),
        cause="The image lacks DeepEP or DeepGEMM in the version that this LMDeploy wants.",
        remedy="Use openmmlab/lmdeploy's image of the same release, not one put together by hand.",
    ),
    Signature(
        id="peer-lost",
        weight=Weight.ECHO,
        phrases=(
            "remote process exited or there was a network error",
            "Connection closed by remote peer",
            "Connection closed by peer",
            "ncclRemoteError",
        ),
        cause="NCCL lost a peer: another node's engine ended first.",
        remedy="Look at the other nodes' logs for what happened before.",
    ),
    Signature(
        id="nccl-failed",
        weight=Weight.ECHO,
        phrases=(
            "ncclSystemError",
            "ncclInternalError",
            "ncclUnhandledCudaError",
            "ncclInvalidUsage",
            "error (run with NCCL_DEBUG=INFO",
            "NCCL error in:",
        ),
        cause="NCCL failed; what made it fail stands above as NCCL WARN, or nowhere at this log level.",
        remedy="Add NCCL_DEBUG: INFO to engine_environment and start again.",
    ),
    Signature(
        id="no-route",
        phrases=("[Errno 101] Network is unreachable", "[Errno 113] No route to host"),
        cause="The host has no route to an address that the engine asks for; with dp above 1 LMDeploy "
        "finds its "
        "own address by the route to a public one.",
        remedy="Add a default route, or one to that address, through the service network.",
    ),
    Signature(
        id="port-in-use",
        phrases=(
            "address already in use",
            "EADDRINUSE",
            "because it's already occupied",
            "Port … is not available",
            "port is already allocated",
        ),
        cause="A port that the deployment wants is taken.",
        remedy="`ss -ltnp` names the owner: stop it, or change the setting that ends in _port.",
    ),
    # Settings
    Signature(
        id="empty-environment",
        phrases=("Cannot convert environment variable … to boolean",),
        cause="A boolean LMDEPLOY_ variable is empty or no boolean, and LMDeploy stops at import.",
        remedy="Leave the variable out of engine_environment, or set it to 0 or 1.",
    ),
    Signature(
        id="flash-mla-block-size",
        phrases=("Please set block_size to 64 for flash_mla",),
        cause="FlashMLA takes cache blocks of 64 tokens only.",
        remedy="Remove cache-block-seq-len from lmdeploy_options.",
    ),
    Signature(
        id="unknown-option",
        phrases=("lmdeploy … error: unrecognized arguments", "lmdeploy … error: argument"),
        cause="This LMDeploy does not know an option, or its value.",
        remedy="Compare lmdeploy_options with `lmdeploy serve api_server --help` of the image.",
    ),
    Signature(
        id="remote-code",
        phrases=("contains custom code which must be executed",),
        cause="The model's folder brings Python code of its own, which LMDeploy runs only when told to.",
        remedy="Add trust-remote-code: true to lmdeploy_options if you trust that folder.",
    ),
    Signature(
        id="environment-check",
        weight=Weight.HINT,
        phrases=("> check failed!",),
        cause="LMDeploy's own check of its environment failed.",
        remedy="The lines around it say which; the image may be incomplete.",
    ),
    Signature(
        id="missing-module",
        weight=Weight.HINT,
        phrases=(
            "ModuleNotFoundError: No module named",
            "ImportError: … cannot open shared object file",
            "ImportError: … undefined symbol",
        ),
        cause="The image lacks a library that the engine needs, or holds one built for another version.",
        remedy="Use a release of openmmlab/lmdeploy as it is, or rebuild your own image from it.",
    ),
)

_COLOUR = re.compile(r"\x1b\[[0-9;]*m")
# Ray's prefix for lines of other processes: (RayWorkerWrapper pid=812, ip=192.0.2.12) ...
_RAY_ADDRESS = re.compile(r"\(\w+ pid=\d+, ip=([0-9a-fA-F.:]+)\)")


@dataclass(frozen=True, kw_only=True)
class _Phrase:
    """A phrase ready to be looked for in a lower-case line. The longest part is looked for first."""

    signature: Signature
    parts: tuple[str, ...]
    longest: str

    def meets(self, line: str) -> bool:
        position = 0
        for part in self.parts:
            position = line.find(part, position)
            if position < 0:
                return False
            position += len(part)
        return True


def _phrases() -> Iterator[_Phrase]:
    for signature in SIGNATURES:
        for phrase in signature.phrases:
            parts = tuple(part.strip(" ") if "…" in phrase else part for part in phrase.lower().split("…"))
            yield _Phrase(signature=signature, parts=parts, longest=max(parts, key=len))


_PHRASES = tuple(_phrases())


def searched_for() -> list[str]:
    """What a line must hold, in lower case, to be worth a look: the longest part of each phrase."""
    return sorted({phrase.longest for phrase in _PHRASES})


def find(log: Iterable[str]) -> Iterator[Match]:
    """Every line that a signature explains, in order; of several for a line, the weightiest."""
    for number, raw in enumerate(log, start=1):
        lowered = raw.lower()
        candidates = [phrase for phrase in _PHRASES if phrase.longest in lowered]
        found = [phrase.signature for phrase in candidates if phrase.meets(lowered)]
        if not found:
            continue
        line = _COLOUR.sub("", raw.rstrip("\r\n"))
        address = _RAY_ADDRESS.search(line)
        yield Match(
            signature=min(found, key=lambda signature: signature.weight),
            line_number=number,
            line=line,
            address=address.group(1) if address else "",
        )


def first_cause(log: Iterable[str]) -> Match | None:
    """What made the run fail: the first cause, else the first hint, else the first echo; None if unknown.

    Order is what a log is good for: Python writes the exception that came first above those it led to, Ray
    repeats a worker's traceback in the driver after the worker wrote it, and NCCL warns before it returns an
    error. Weight corrects what order gets wrong: a harmless line at start, an echo of another node's trouble.
    """
    best: Match | None = None
    for match in find(log):
        if match.signature.weight is Weight.CAUSE:
            return match
        if best is None or match.signature.weight < best.signature.weight:
            best = match
    return best
