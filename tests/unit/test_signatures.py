"""The catalogue of log signatures against lines as the real programs write them."""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from deploy_dsv3.signatures import RUNBOOK, SIGNATURES, Signature, Weight, find, first_cause

REPOSITORY = Path(__file__).parents[2]

# (signature, where the line's text is from, the line)
LINES = [
    (
        "fabric-manager",
        "PyTorch c10/cuda/CUDAFunctions.cpp",
        "RuntimeError: Unexpected error from cudaGetDeviceCount(). Did you run some cuda functions before "
        "calling "
        "NumCudaDevices() that might have already set an error? Error 802: system not yet initialized",
    ),
    (
        "fabric-manager",
        "fabric manager's own log",
        "[ERROR] [tid 2101] fabric manager NVIDIA GPU driver interface version 580.95.05 don't match with "
        "driver "
        "version 580.82.07. Please update with matching NVIDIA driver package.",
    ),
    (
        "driver-too-old",
        "PyTorch torch/csrc/cuda/Module.cpp",
        "RuntimeError: The NVIDIA driver on your system is too old (found version 12020). Please update "
        "your GPU "
        "driver by downloading and installing a new version from the URL",
    ),
    (
        "driver-too-old",
        "nvidia-container-cli",
        "nvidia-container-cli: requirement error: unsatisfied condition: cuda>=12.8, please update your "
        "driver to a "
        "newer version, or use an earlier cuda container: unknown.",
    ),
    (
        "driver-library-mismatch",
        "nvidia-smi",
        "Failed to initialize NVML: Driver/library version mismatch",
    ),
    (
        "gpu-lost",
        "NVIDIA kernel module",
        "[812345.678] NVRM: Xid (PCI:0000:1b:00): 79, pid='<unknown>', name=<unknown>, GPU has fallen off the bus.",
    ),
    (
        "gpu-lost",
        "NVIDIA kernel module",
        "NVRM: Xid (PCI:0000:4e:00): 94, Contained: SM (0x1). RST: No, D-RST: No",
    ),
    ("gpu-lost", "nvidia-smi in a container", "Failed to initialize NVML: Unknown Error"),
    (
        "no-gpu-in-container",
        "moby daemon/devices.go",
        'docker: Error response from daemon: could not select device driver "" with capabilities: [[gpu]].',
    ),
    (
        "no-gpu-in-container",
        "moby daemon/cdi.go",
        "Error response from daemon: CDI device injection failed: unresolvable CDI devices nvidia.com/gpu=all",
    ),
    (
        "no-gpu-in-container",
        "roles/engine/tasks/preflight.yml",
        "gpu-02: a container of openmmlab/lmdeploy:latest-cu12 sees 7 of the host's 8 GPUs",
    ),
    (
        "fp8-unsupported",
        "lmdeploy/pytorch/check_env/cuda.py",
        "\x1b[31mmodel_format=fp8 requires sm>=9.0.\x1b[0m",
    ),
    (
        "gpu-out-of-memory",
        "PyTorch c10/cuda/CUDACachingAllocator.cpp",
        "torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 896.00 MiB. GPU 0 has a total "
        "capacity of "
        "79.11 GiB of which 310.88 MiB is free.",
    ),
    (
        "no-cache-memory",
        "lmdeploy/pytorch/engine/executor/base.py",
        "RuntimeError: No enough gpu memory for kv cache.",
    ),
    (
        "host-out-of-memory",
        "Linux mm/oom_kill.c",
        "Out of memory: Killed process 4711 (ray::RayWorkerW) total-vm:98765432kB, anon-rss:65432100kB",
    ),
    (
        "host-out-of-memory",
        "Ray raylet",
        "(raylet) 2 Workers (tasks / actors) killed due to memory pressure (OOM), 0 Workers crashed due to "
        "other "
        "reasons",
    ),
    (
        "shared-memory",
        "NCCL misc/shmutils.cc",
        "node1:168:168 [0] misc/shmutils.cc:113 NCCL WARN Error while creating shared memory segment "
        "/dev/shm/nccl-UbzKZ9 (size 9637888), error: No space left on device (28)",
    ),
    (
        "shared-memory",
        "ray/_private/services.py",
        "ValueError: The configured object store size (80.0 GB) exceeds /dev/shm size (67.0 GB). This will "
        "harm "
        "performance.",
    ),
    (
        "ray-shared-memory",
        "ray/_private/services.py",
        "WARNING: The object store is using /tmp/ray instead of /dev/shm because /dev/shm has only "
        "67108864 bytes "
        "available. This will harm performance!",
    ),
    (
        "memlock",
        "NCCL misc/ibvwrap.cc",
        "node1:4016:4653 [7] misc/ibvwrap.cc:190 NCCL WARN Call to ibv_create_cq failed with error Cannot "
        "allocate "
        "memory",
    ),
    (
        "memlock",
        "NCCL misc/ibvwrap.cc",
        "misc/ibvwrap.cc:278 NCCL WARN Call to ibv_reg_mr_iova2 failed with error Cannot allocate memory",
    ),
    ("open-files", "Python", "OSError: [Errno 24] Too many open files: '/proc/self/status'"),
    ("disk-full", "Python", "OSError: [Errno 28] No space left on device: '/tmp/ray/session_latest/logs'"),
    (
        "disk-nearly-full",
        "Ray src/ray/common/file_system_monitor.cc",
        "[file_system_monitor.cc:116] /tmp/ray/session_2026-11-23 is over 95% full, available space: 1.2 GB; "
        "capacity: 49.0 GB. Object creation will fail if spilling is required.",
    ),
    (
        "missing-shards",
        "safetensors safe_open",
        'FileNotFoundError: No such file or directory: "/data/DeepSeek-V3/model-00012-of-000163.safetensors"',
    ),
    (
        "missing-shards",
        "safetensors",
        "safetensors_rust.SafetensorError: Error while deserializing header: incomplete metadata, file not "
        "fully "
        "covered",
    ),
    (
        "missing-shards",
        "lmdeploy/pytorch/weight_loader/model_weight_loader.py",
        "RuntimeError: Unknown weight type.",
    ),
    (
        "hub-offline",
        "huggingface_hub",
        "huggingface_hub.errors.LocalEntryNotFoundError: Cannot find an appropriate cached snapshot folder "
        "for the "
        "specified revision on the local disk and outgoing traffic has been disabled.",
    ),
    (
        "unauthorized",
        "requests",
        "requests.exceptions.HTTPError: 401 Client Error: Unauthorized for url: the model's",
    ),
    (
        "unauthorized",
        "moby",
        "Error response from daemon: pull access denied for site/lmdeploy, repository does not exist or "
        "may require "
        "'docker login'",
    ),
    (
        "client-unauthorized",
        "uvicorn access log",
        'INFO:     192.0.2.7:51034 - "POST /v1/chat/completions HTTP/1.1" 401 Unauthorized',
    ),
    (
        "image-not-found",
        "moby",
        "Error response from daemon: manifest for openmmlab/lmdeploy:v9 not found: manifest unknown: manifest unknown",
    ),
    (
        "registry-unreachable",
        "moby",
        'Error response from daemon: Get "https://registry.example.org/v2/": dial tcp 192.0.2.9:443: '
        "connect: "
        "connection refused",
    ),
    (
        "ray-version-mismatch",
        "ray/_private/utils.py, check_version_info",
        "RuntimeError: Version mismatch: The cluster was started with:",
    ),
    (
        "ray-token",
        "Ray src/ray/rpc/authentication",
        "InvalidAuthToken: Authentication token is missing or incorrect. Note: RAY_AUTH_MODE is currently 'disabled'",
    ),
    (
        "placement-group",
        "lmdeploy/pytorch/ray.py, _wait_until_pg_ready",
        "ValueError: Cannot provide a placement group of placement_group_specs=[{'GPU': 1.0}, {'GPU': "
        "1.0}] within "
        "1800 seconds. See `ray status` to make sure the cluster has enough resources.",
    ),
    (
        "placement-group-pending",
        "lmdeploy/pytorch/ray.py, init_ray_cluster",
        "lmdeploy - WARNING - ray.py:124 - The number of required GPUs exceeds the total number of "
        "available GPUs in "
        "the placement group.",
    ),
    (
        "ray-head-unreachable",
        "ray/_private/state.py",
        "ray.exceptions.RaySystemError: System error: Failed to connect to GCS. Please check if the GCS "
        "server is "
        "running and if this node can connect to the head node.",
    ),
    ("private-ray", "ray/_private/worker.py", "INFO worker.py:2027 -- Started a local Ray instance."),
    (
        "ray-node-lost",
        "Ray GCS",
        "The node with node id: 5f2a and address: 192.0.2.12 and node name: 192.0.2.12 has been marked "
        "dead because "
        "the detector has missed too many heartbeats from it.",
    ),
    (
        "engine-worker-died",
        "ray/exceptions.py",
        "ray.exceptions.ActorDiedError: The actor died unexpectedly before finishing this task.",
    ),
    (
        "engine-worker-died",
        "lmdeploy/pytorch/engine/executor/ray_executor.py",
        "lmdeploy - ERROR - ray_executor.py:592 - Ray worker exited.",
    ),
    (
        "nccl-no-interface",
        "NCCL bootstrap.cc",
        "node2:77:77 [0] NCCL WARN Bootstrap : no socket interface found",
    ),
    (
        "rdma-gid",
        "NCCL misc/ibvwrap.cc",
        "[5] ibvwrap.c:262 NCCL WARN Call to ibv_modify_qp failed with 110 Connection timed out, on dev "
        "mlx5_0:1, "
        "curr state INIT, next state RTR, local GID index 3, local GID ::ffff:192.0.2.11, remote GID "
        "::ffff:192.0.2.12",
    ),
    (
        "rdma-retries",
        "NCCL transport/net_ib",
        "node2:319733:319761 [1] transport/net_ib/p2p.cc:648 NCCL WARN NET/IB: Got completion from peer "
        "192.0.2.13<40554> with status=IBV_WC_RETRY_EXC_ERR(12) opcode=IBV_WC_RECV_RDMA_WITH_IMM(129) "
        "vendor_err=129",
    ),
    (
        "rdma-retries",
        "NCCL 2.19 transport/net_ib.cc",
        "NCCL WARN NET/IB : Got completion from peer 192.0.2.5<33092> with error 12, opcode 0, len 0, vendor err 129",
    ),
    (
        "rdma-memory-access",
        "NCCL transport/net_ib.cc",
        "NCCL WARN NET/IB: Got completion from peer 192.0.2.63<51161> with status=4 opcode=32614 len=32614 "
        "vendor err "
        "81 (Send)",
    ),
    ("nccl-no-device", "NCCL transport/net_ib.cc", "node1:880:887 [0] NCCL INFO NET/IB : No device found."),
    (
        "nvshmem-ibgda",
        "NVSHMEM modules/transport/ibgda",
        "src/modules/transport/ibgda/ibgda.cpp:2234: NULL value Unable to create ah.",
    ),
    (
        "nvshmem-ibgda",
        "NVSHMEM modules/transport/ibrc",
        "src/modules/transport/ibrc/ibrc.cpp:nvshmemt_init:1851: neither nv_peer_mem, or nvidia_peermem "
        "detected. "
        "Skipping transport.",
    ),
    (
        "expert-parallel-libraries",
        "lmdeploy/pytorch/check_env/dist.py",
        "ep>1 requires install DeepEP(and its address) and DeepGEMM(and its address).",
    ),
    (
        "peer-lost",
        "NCCL, through torch.distributed",
        "ncclRemoteError: A call failed possibly due to a network error or a remote process exiting prematurely.",
    ),
    (
        "nccl-failed",
        "torch/csrc/distributed/c10d/NCCLUtils.cpp",
        "torch.distributed.DistBackendError: NCCL error in: torch/csrc/distributed/c10d/NCCLUtils.cpp:94, "
        "unhandled "
        "system error (run with NCCL_DEBUG=INFO for details), NCCL version 2.27.5",
    ),
    (
        "no-route",
        "lmdeploy/serve/openai/launch_server.py, get_host_ip",
        "OSError: [Errno 101] Network is unreachable",
    ),
    (
        "port-in-use",
        "uvicorn",
        "ERROR:    [Errno 98] error while attempting to bind on address ('0.0.0.0', 23333): address already in use",
    ),
    (
        "port-in-use",
        "PyTorch TCPStore",
        "The server socket has failed to listen on any local network address. port: 29500, useIpv6: false, "
        "code: -98, "
        "name: EADDRINUSE, message: address already in use",
    ),
    (
        "port-in-use",
        "lmdeploy/serve/openai/launch_server.py",
        "ValueError: Port 23340 is not available",
    ),
    (
        "empty-environment",
        "lmdeploy/pytorch/envs.py, env_to_bool",
        "ValueError: Cannot convert environment variable 'LMDEPLOY_SKIP_WARMUP=' to boolean. Allowed true "
        "values: "
        "{'1'}, false values: {'0'}",
    ),
    (
        "flash-mla-block-size",
        "lmdeploy/pytorch/engine/executor/base.py",
        "ValueError: Please set block_size to 64 for flash_mla.",
    ),
    (
        "unknown-option",
        "argparse",
        "lmdeploy serve api_server: error: unrecognized arguments: --enable-metrics",
    ),
    (
        "unknown-option",
        "argparse",
        "lmdeploy serve api_server: error: argument --backend: invalid choice: 'torch'",
    ),
    (
        "remote-code",
        "transformers",
        "ValueError: The repository /data/models/DeepSeek-V3 contains custom code which must be executed to "
        "correctly load the model.",
    ),
    (
        "environment-check",
        "lmdeploy/pytorch/check_env/base.py",
        "lmdeploy - ERROR - base.py:55 - <Model> check failed!",
    ),
    ("missing-module", "Python", "ModuleNotFoundError: No module named 'flash_mla'"),
]


@pytest.mark.parametrize(("identifier", "source", "line"), LINES, ids=[f"{line[0]}: {line[1]}" for line in LINES])
def test_recognises_the_line_of_the_real_program(identifier: str, source: str, line: str) -> None:
    match = first_cause(["Loading weights\n", line + "\n", "and so on\n"])
    assert match is not None, source
    assert match.signature.id == identifier
    assert match.line_number == 2
    assert "\x1b" not in match.line


def test_every_signature_has_a_line() -> None:
    assert {signature.id for signature in SIGNATURES} == {line[0] for line in LINES}


def test_identifiers_are_unique() -> None:
    assert [count for count in Counter(signature.id for signature in SIGNATURES).values() if count > 1] == []


# A worker on the second node runs out of memory while loading: Ray writes its traceback with its prefix, then
# the driver raises it again as RayTaskError, then the engine and the server fail in turn.
OUT_OF_MEMORY_ON_A_WORKER = """\
lmdeploy - INFO - ray.py:62 - Waiting for creating a placement group of specs for 10 seconds.
lmdeploy - INFO - base.py:430 - Building Model.
\x1b[36m(RayWorkerWrapper pid=812, ip=192.0.2.12)\x1b[0m node2:812:812 [0] NCCL INFO NET/IB : No device found.
\x1b[36m(RayWorkerWrapper pid=812, ip=192.0.2.12)\x1b[0m Traceback (most recent call last):
\x1b[36m(RayWorkerWrapper pid=812, ip=192.0.2.12)\x1b[0m   File "blocked_fp8.py", line 36, in __init__
\x1b[36m(RayWorkerWrapper pid=812, ip=192.0.2.12)\x1b[0m torch.OutOfMemoryError: CUDA out of memory.
Traceback (most recent call last):
  File "lmdeploy/pytorch/engine/executor/ray_executor.py", line 336, in init
    super().init()
ray.exceptions.RayTaskError(OutOfMemoryError): ray::RayWorkerWrapper.build_model() (pid=812, ip=192.0.2.12)
torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 896.00 MiB.

During handling of the above exception, another exception occurred:

ray.exceptions.ActorDiedError: The actor died unexpectedly before finishing this task.
lmdeploy - ERROR - engine_loop.py:686 - EngineLoop wait_tasks failed.
ERROR:    [Errno 98] error while attempting to bind on address ('0.0.0.0', 23333): address already in use
"""

# The cause is in NCCL's warning, the exception that everybody quotes is below it.
SHARED_MEMORY = """\
node1:168:168 [0] NCCL INFO NET/IB : No device found.
node1:168:168 [0] misc/shmutils.cc:72 NCCL WARN Error: failed to extend /dev/shm/nccl-UbzKZ9 to 9637892 bytes
node1:168:168 [0] shmutils.cc:113 NCCL WARN Error while creating shared memory segment /dev/shm/nccl-UbzKZ9
DistBackendError: NCCL error in: NCCLUtils.cpp:94, unhandled system error (run with NCCL_DEBUG=INFO)
ncclSystemError: System call (e.g. socket, malloc) or external library call failed or device error.
"""

# Chained exceptions: Python writes the one that came first on top.
CHAINED = """\
Traceback (most recent call last):
  File "lmdeploy/pytorch/weight_loader/model_weight_loader.py", line 96, in _get_safetensors_weights_iterator
FileNotFoundError: No such file or directory: "/data/models/DeepSeek-V3/model-00012-of-000163.safetensors"

The above exception was the direct cause of the following exception:

Traceback (most recent call last):
RuntimeError: No enough gpu memory for kv cache.
"""

# A driver that only hears of a dead peer: nothing here is a cause.
LOST_PEER = """\
[rank3] ncclRemoteError: A call failed possibly due to a network error or a remote process exiting
ray.exceptions.ActorDiedError: The actor died unexpectedly before finishing this task.
"""


@pytest.mark.parametrize(
    ("log", "identifier", "line_number", "address"),
    [
        (OUT_OF_MEMORY_ON_A_WORKER, "gpu-out-of-memory", 6, "192.0.2.12"),
        (SHARED_MEMORY, "shared-memory", 2, ""),
        (CHAINED, "missing-shards", 3, ""),
        (LOST_PEER, "peer-lost", 1, ""),
    ],
    ids=["nested RayTaskError", "NCCL", "chained exceptions", "only echoes"],
)
def test_finds_the_first_cause_and_not_its_echo(log: str, identifier: str, line_number: int, address: str) -> None:
    match = first_cause(log.splitlines())
    assert match is not None
    assert (match.signature.id, match.line_number, match.address) == (identifier, line_number, address)


def test_a_hint_counts_only_without_a_cause() -> None:
    hint = "node1:880:887 [0] NCCL INFO NET/IB : No device found."
    echo = "lmdeploy - ERROR - Ray worker exited."
    found = first_cause([echo, hint, echo])
    assert found is not None
    assert (found.signature.weight, found.line_number) == (Weight.HINT, 2)


def test_parts_of_a_phrase_count_in_order_only() -> None:
    assert first_cause(["Cannot allocate memory for a message about ibv_create_cq"]) is None


@pytest.mark.parametrize(
    "line",
    [
        "lmdeploy - INFO - agent.py:557 - Engine warmup completed in 55.12 seconds.",
        "INFO:     Application startup complete.",
        'INFO:     127.0.0.1:40112 - "POST /v1/chat/completions HTTP/1.1" 200 OK',
        "NVRM: Xid (PCI:0000:1b:00): 31, pid=1234, name=python3, MMU Fault",
        "node1:319:319 [0] NCCL INFO NET/IB : Using [0]mlx5_0:1/IB [RO]; OOB eth0:192.0.2.11<0>",
        "lmdeploy - WARNING - Free input ref failed: module 'ray.internal' has no attribute 'free'",
        "For higher performance, please install flash_mla",
        "",
    ],
)
def test_healthy_and_unrelated_lines_mean_nothing(line: str) -> None:
    assert first_cause([line]) is None


@given(st.lists(st.text(), max_size=20))
def test_no_log_breaks_the_search(log: list[str]) -> None:
    assert all(1 <= match.line_number <= len(log) for match in find(log))


def test_a_match_names_line_cause_remedy_and_page() -> None:
    match = first_cause(["(RayWorkerWrapper pid=1, ip=192.0.2.12) RuntimeError: Unknown weight type."])
    assert match is not None
    text = str(match)
    assert f"{RUNBOOK}#missing-shards" in text
    assert "line 1 on 192.0.2.12" in text
    assert match.signature.remedy in text
    assert match.as_dict()["id"] == "missing-shards"


def sections() -> dict[str, str]:
    """Anchor and text of each section of the runbook, by GitHub's rule for anchors."""
    text = (REPOSITORY / RUNBOOK).read_text(encoding="utf-8")
    parts = re.split(r"^### (.+)$", text, flags=re.MULTILINE)
    return dict(zip(parts[1::2], parts[2::2], strict=True))


def test_the_runbook_has_one_section_for_each_signature_in_the_same_order() -> None:
    assert list(sections()) == [signature.id for signature in SIGNATURES]


@pytest.mark.parametrize("signature", SIGNATURES, ids=lambda signature: signature.id)
def test_a_section_shows_a_line_that_its_signature_recognises(signature: Signature) -> None:
    section = sections()[signature.id]
    shown = re.search(r"^```text\n(.+?)^```", section, flags=re.MULTILINE | re.DOTALL)
    assert shown, "the section shows what the log says"
    assert signature.id in {match.signature.id for match in find(shown.group(1).splitlines())}
    assert len(section.replace(shown.group(0), "").split()) > 20, "and says more than the catalogue"
