"""The acceptance scripts, as far as they need no GPU: archives in parts, the model's shapes, the summary."""

from __future__ import annotations

import argparse
import csv
import importlib.util
import ipaddress
import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from datetime import datetime
from itertools import pairwise
from math import prod
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from deploy_dsv3 import capacity, inventory, settings, topology

REPOSITORY = Path(__file__).parents[2]
ACCEPTANCE = REPOSITORY / "acceptance"


@pytest.fixture(scope="module")
def script() -> Callable[[str], ModuleType]:
    """A script of the folder as a module."""

    def load(name: str) -> ModuleType:
        spec = importlib.util.spec_from_file_location(f"acceptance_{name}", ACCEPTANCE / f"{name}.py")
        assert spec and spec.loader
        module = importlib.util.module_from_spec(spec)
        sys.modules[spec.name] = module
        spec.loader.exec_module(module)
        return module

    return load


@pytest.fixture
def bundle(tmp_path: Path, script: Callable[[str], ModuleType], monkeypatch: pytest.MonkeyPatch) -> Path:
    """A bundle whose archive `engine` fills several parts of 2 kB."""
    make_bundle = script("make_bundle")
    # The real window takes 2.5 GiB to compress with.
    monkeypatch.setattr(make_bundle, "_FILTERS", [{"id": make_bundle.lzma.FILTER_LZMA2, "preset": 0}])
    tree = tmp_path / "tree"
    (tree / "bin").mkdir(parents=True)
    (tree / "bin" / "tool").write_text("#!/made/here/bin/python3.12\nprint('runs')\n")
    (tree / "bin" / "tool").chmod(0o755)
    (tree / "bin" / "link").symlink_to("tool")
    (tree / "package" / "__pycache__").mkdir(parents=True)
    (tree / "package" / "__pycache__" / "old.pyc").write_bytes(b"stale")
    (tree / "package" / "data").write_bytes(bytes(i * i % 251 ^ i >> 3 & 255 for i in range(50_000)))
    folder = tmp_path / "bundle"
    folder.mkdir()
    parts = make_bundle.pack(tree, folder / "engine.tar.xz", 2_000)
    assert len(parts) > 2
    (folder / "bundle.json").write_text(json.dumps({"engine": {"parts": [vars(part) for part in parts]}}))
    return folder


def unpack(bundle: Path, target: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ACCEPTANCE / "unpack.py"), str(bundle), "engine", str(target)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_what_was_packed_in_parts_is_unpacked_whole(bundle: Path, tmp_path: Path) -> None:
    done = unpack(bundle, tmp_path / "out")
    assert done.returncode == 0, done.stderr
    out = tmp_path / "out"
    assert (out / "package" / "data").read_bytes() == (tmp_path / "tree" / "package" / "data").read_bytes()
    assert (out / "bin" / "link").readlink() == Path("tool")
    assert not (out / "package" / "__pycache__").exists()


def test_scripts_find_the_servers_python(bundle: Path, tmp_path: Path) -> None:
    unpack(bundle, tmp_path / "out")
    done = subprocess.run([tmp_path / "out" / "bin" / "tool"], capture_output=True, text=True, check=True)
    assert done.stdout == "runs\n"


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda part: part.unlink(), "is not here: carry it"),
        (lambda part: part.write_bytes(b"x" + part.read_bytes()[1:]), "is damaged: carry it again"),
    ],
)
def test_a_missing_or_damaged_part_is_named(
    bundle: Path, tmp_path: Path, damage: Callable[[Path], Any], words: str
) -> None:
    damage(bundle / "engine.tar.xz.01")
    done = unpack(bundle, tmp_path / "out")
    assert done.returncode == 1
    assert "engine.tar.xz.01" in done.stderr
    assert words in done.stderr
    assert not (tmp_path / "out").exists()


def test_packages_that_the_server_has_are_read_from_a_freeze(
    tmp_path: Path, script: Callable[[str], ModuleType]
) -> None:
    freeze = tmp_path / "present.txt"
    freeze.write_text("# comment\nTorch==2.11.0+cu130\nhuggingface_hub==1.33.0\nmine @ file:///src/mine\nbare\n\n")
    assert script("make_bundle")._read_present(freeze) == {
        "torch": "2.11.0+cu130",
        "huggingface-hub": "1.33.0",
        "mine": "",
        "bare": "",
    }


def test_collections_of_the_roles_and_what_they_need_are_brought(
    tmp_path: Path, script: Callable[[str], ModuleType]
) -> None:
    versions = script("make_bundle")._copy_collections(tmp_path)
    assert "community.docker" in versions
    assert "ansible.builtin" not in versions
    for name in versions:
        assert (tmp_path.joinpath(*name.split(".")) / "MANIFEST.json").is_file()
    assert "community.library_inventory_filtering_v1" in versions, "community.docker imports it"


def test_the_largest_part_cannot_be_nothing(script: Callable[[str], ModuleType]) -> None:
    with pytest.raises(SystemExit) as stopped:
        script("make_bundle")._parse(["--part-size", "0"])
    assert stopped.value.code == 2
    parsed = script("make_bundle")._parse(["--only", "control", "--only", "engine"])
    assert isinstance(parsed, argparse.Namespace)
    assert parsed.only == ["control", "engine"]


def test_the_small_model_is_one_that_capacity_knows(tmp_path: Path, script: Callable[[str], ModuleType]) -> None:
    """Its tensors are those that the arithmetic counts: what LMDeploy builds is what the file holds."""
    make_model = script("make_model")
    (tmp_path / "config.json").write_text(json.dumps(make_model.CONFIG))
    shape = capacity.load_model(tmp_path)
    parameters = sum(prod(dimensions) for _, dimensions in make_model.shapes())
    assert parameters == pytest.approx(194.4e6, rel=0.001)
    absorbed = 4 * 16 * (64 + 64) * 512
    counted = capacity.weights_bytes(shape, capacity.Layout()) / 2
    assert counted == pytest.approx(parameters + absorbed, rel=0.001)


def test_a_tensor_is_written_once(script: Callable[[str], ModuleType]) -> None:
    names = [name for name, _ in script("make_model").shapes()]
    assert len(names) == len(set(names))


def test_an_address_is_printed_that_others_could_reach() -> None:
    done = subprocess.run(
        [sys.executable, str(ACCEPTANCE / "node_address.py")], capture_output=True, text=True, check=True
    )
    address = ipaddress.ip_address(done.stdout.strip())
    assert not address.is_loopback
    assert not address.is_link_local


ENGINE_LOG = """\
2026-11-24T06:44:20.100200300Z 2026-11-24T06:44:20Z ray| started
2026-11-24T06:44:21.500000000Z 2026-11-24T06:44:21Z launcher| loading: api_server starts
2026-11-24 06:44:40,000 - lmdeploy - INFO - async_engine.py:1 - input backend=pytorch, backend_config=X(block_size=64, \
num_gpu_blocks=0)
2026-11-24 06:45:10,500 - lmdeploy - INFO - ray_executor.py:277 - Init ray cluster.
2026-11-24 06:45:11,000 - lmdeploy - INFO - ray_executor.py:308 - Init ray workers.
2026-11-24 06:45:31,000 - lmdeploy - INFO - base.py:430 - Building Model.
2026-11-24 06:45:35,000 - lmdeploy - INFO - base.py:432 - Updating configs.
2026-11-24 06:45:36,250 - lmdeploy - INFO - base.py:439 - Building CacheEngine with config:
CacheConfig(max_batches=64, block_size=32, num_cpu_blocks=0, num_gpu_blocks=303061, kernel_block_size=32).
2026-11-24 06:45:37,000 - lmdeploy - INFO - base.py:446 - Warming up model.
2026-11-24 06:46:32,000 - lmdeploy - INFO - agent.py:557 - Engine warmup completed in 55.00 seconds.
2026-11-24T06:50:00.000000000Z 2026-11-24T06:50:00Z launcher| loading: api_server starts
2026-11-24 12:20:30,000 - lmdeploy - INFO - base.py:430 - Building Model.
"""


def test_every_start_of_the_engine_is_broken_down(script: Callable[[str], ModuleType]) -> None:
    """From the launcher's word that it starts, which is in UTC; a step that the log does not tell is left out."""
    starts = script("summarise").start_breakdowns(ENGINE_LOG.splitlines())
    assert [(step["step"], step["seconds"]) for step in starts[0]] == [
        ("imports of the server", 18.5),
        ("imports of the engine process", 30.5),
        ("joining Ray", 0.5),
        ("ranks: imports and process group", 20.0),
        ("model and weights", 4.0),
        ("graph runner", 1.2),
        ("cache", 0.8),
        ("warm-up and graph capture", 55.0),
    ]
    assert [(step["step"], step["seconds"]) for step in starts[1]] == [("ranks: imports and process group", 30.0)]
    assert len(starts) == 2


@pytest.fixture
def results(tmp_path: Path, script: Callable[[str], ModuleType]) -> Path:
    """What a run leaves behind."""
    model = tmp_path / "model"
    model.mkdir()
    (model / "config.json").write_text(json.dumps(script("make_model").CONFIG))
    folder = tmp_path / "details"
    (folder / "benchmark").mkdir(parents=True)
    (folder / "phases.tsv").write_text("deploy\t101.5\tpassed\nrestart\t0\tleft out\n")
    host = {"gpus": [{"name": "NVIDIA H200", "memory_mib": 143771}], "versions": {"torch": "2.11.0"}}
    (folder / "host.json").write_text(json.dumps(host))
    argv = ["lmdeploy", "serve", "api_server", str(model), "--max-batch-size", "64"]
    argv += ["--cache-max-entry-count", "0.3"]
    (folder / "serve.json").write_text(json.dumps({"argv": argv}))
    (folder / "engine.log").write_text(ENGINE_LOG)
    (folder / "answer-first.json").write_text('{"text": "x"}')
    (folder / "benchmark" / "row.csv").write_text("completed,duration\n64,1.5\n")
    return folder


def summarise(folder: Path) -> dict[str, Any]:
    subprocess.run([sys.executable, str(ACCEPTANCE / "summarise.py"), str(folder)], check=True, capture_output=True)
    document: dict[str, Any] = json.loads((folder / "summary.json").read_text())
    return document


def test_the_summary_compares_reported_and_predicted_cache(results: Path) -> None:
    summary = summarise(results)
    assert summary["cache"]["reported_blocks"] == 303061
    assert summary["cache"]["ratio"] == pytest.approx(1, abs=0.002)
    assert summary["phases"][0] == {"name": "deploy", "seconds": 101.5, "result": "passed"}
    assert summary["benchmark"] == [{"file": "row.csv", "completed": "64", "duration": "1.5"}]
    text = (results / "summary.md").read_text()
    assert "| deploy | 101.5 | passed |" in text
    assert "303061 blocks of 32 tokens" in text


def test_a_summary_of_nothing_is_still_one(tmp_path: Path) -> None:
    summary = summarise(tmp_path)
    assert (summary["phases"], summary["cache"], summary["first_known_line"]) == ([], {}, None)


def test_the_documented_phases_are_those_of_the_script() -> None:
    text = (ACCEPTANCE / "run.sh").read_text()
    lists = [re.search(rf"^{name}=\((.*)\)$", text, flags=re.MULTILINE) for name in ("prepare", "prove")]
    phases = [phase for found in lists if found for phase in found.group(1).split()]
    assert [phase for phase in phases if f"phase_{phase}()" in text] == phases
    readme = (ACCEPTANCE / "README.md").read_text()
    table = readme[readme.index("| phase |") : readme.index("A run that was stopped")]
    assert re.findall(r"^\| (\w+) \|", table, flags=re.MULTILINE)[1:] == phases


def process(module: ModuleType, pid: int, parent: int, *argv: str) -> Any:
    return module.Process(pid=pid, parent=parent, argv=argv, cpu_s=0.0, started=0.0)


def test_the_processes_of_a_start_are_told_from_others(script: Callable[[str], ModuleType]) -> None:
    profile = script("profile_start")
    serve = ("/srv/engine/bin/lmdeploy", "serve", "api_server", "/data/models/x", "--tp", "1")
    spawned = ("python3", "-c", "from multiprocessing.spawn import spawn_main; spawn_main(pipe_handle=9)")
    tracker = ("python3", "-c", "from multiprocessing.resource_tracker import main;main(5)")
    known = {10: "server", 12: "engine"}
    seen = {
        "server": process(profile, 10, 1, "python3", *serve),
        "engine": process(profile, 12, 10, *spawned),
        "check": process(profile, 13, 12, *spawned),
        "ray-worker": process(profile, 20, 2, "ray::RayWorkerWrapper"),
    }
    assert {role: profile.role_of(one, known) for role, one in seen.items()} == {role: role for role in seen}
    others = (
        process(profile, 11, 10, "python3", *serve),  # the server's manager, a fork of it
        process(profile, 14, 10, *tracker),
        process(profile, 15, 1, "/sbin/docker-init", "--", "python3", *serve),
        process(profile, 16, 1, "docker", "run", "image", *serve),
        process(profile, 17, 99, *spawned),
    )
    assert [profile.role_of(one, known) for one in others] == [""] * len(others)


def trace(*steps: tuple[float, list[tuple[str, str]]], tid: int = 1) -> list[dict[str, Any]]:
    """A Chrome trace as py-spy writes it: from each moment [s] on a thread has this stack."""
    events: list[dict[str, Any]] = []
    before: list[tuple[str, str]] = []
    for moment, stack in steps:
        same = next((n for n, (a, b) in enumerate(zip(before, stack, strict=False)) if a != b), None)
        same = min(len(before), len(stack)) if same is None else same
        frames = [("E", frame) for frame in reversed(before[same:])] + [("B", frame) for frame in stack[same:]]
        for phase, (file, name) in frames:
            events.append(
                {"ph": phase, "name": name, "args": {"filename": file}, "ts": round(moment * 1e6), "tid": tid}
            )
        before = stack
    return events


def test_a_profile_tells_imports_by_package_and_the_warm_up_by_batch_size(
    tmp_path: Path, script: Callable[[str], ModuleType]
) -> None:
    profile = script("profile_start")
    site = "/opt/py3/lib/python3.12/site-packages"
    warm = [(f"{site}/lmdeploy/pytorch/engine/model_agent/agent.py", "ModelAgent.warmup")]
    compiles = [*warm, (f"{site}/triton/compiler/compiler.py", "compile"), ("/usr/lib/python3.12/subprocess.py", "run")]
    load = ("<frozen importlib._bootstrap>", "_find_and_load")
    sympy = [load, (f"{site}/torch/__init__.py", "<module>"), load, (f"{site}/sympy/__init__.py", "<module>")]
    events = trace((0, sympy[:2]), (1, sympy), (4, compiles), (6, warm), (8, compiles), (9, warm), (10, []))
    (tmp_path / "ray-worker-7.json").write_text(json.dumps(events))
    began = datetime(2026, 11, 24, 7, 0, 0).timestamp()
    note = {"pid": 7, "role": "ray-worker", "file": "ray-worker-7.json", "started": began - 2, "sampled_from": began}
    (tmp_path / "processes.json").write_text(json.dumps([note]))
    log = ["2026-11-24 07:00:07,500 - lmdeploy - INFO - Initialized CUDASingleGraphRunner with max_batches=64, max"]
    (found,) = profile.summarise(tmp_path, log)
    assert (found["role"], found["unseen_s"]) == ("rank", 2)
    assert found["activities"] == {"imports": 4, "Triton compiles": 3, "else": 3}
    assert found["imports"] == {"sympy": 3, "torch": 1}
    # A stretch belongs to the step that had begun when it did.
    assert found["warm_up"] == {
        "prefill": {"Triton compiles": 2, "else": 2},
        "batch size 64": {"Triton compiles": 1, "else": 1},
    }
    assert "| prefill | 4.0 | Triton compiles 2.0, else 2.0 |" in profile.markdown([found])


def test_the_server_by_hand_is_the_deployed_one_but_for_what_cannot_be_shared(
    script: Callable[[str], ModuleType],
) -> None:
    deployed = {
        "Image": "sha256:abc",
        "Config": {"Env": ["RAY_ADDRESS=192.0.2.2:6379", "RAY_AUTH_MODE=token", "NCCL_SOCKET_IFNAME==eth0"]},
        "HostConfig": {
            "IpcMode": "host",
            "DeviceRequests": [{"Driver": "cdi", "DeviceIDs": ["nvidia.com/gpu=all"]}],
            "Devices": [{"PathOnHost": "/dev/infiniband/rdma_cm", "PathInContainer": "/dev/infiniband/rdma_cm"}],
            "CapAdd": ["CAP_IPC_LOCK"],
            "Ulimits": [{"Name": "memlock", "Soft": -1, "Hard": -1}],
            "Binds": ["/data:/data:ro"],
        },
    }
    node = {"node_address": "192.0.2.2", "ray": {"num_gpus": 1, "object_store_memory_bytes": 5}}
    serve = ["lmdeploy", "serve", "api_server", "/data/x y", "--server-port", "23333", "--tp", "1"]
    argv = script("by_hand").run_argv(deployed, node, serve, name="by-hand", port=23533, key="sk")
    for request, gpus in (
        ({"Driver": "nvidia", "Count": -1, "DeviceIDs": None}, ["all"]),
        ({"Driver": "nvidia", "Count": 0, "DeviceIDs": ["0", "1"]}, ["device=0,1"]),
    ):
        deployed["HostConfig"] |= {"DeviceRequests": [request]}
        old = script("by_hand").run_argv(deployed, node, serve, name="by-hand", port=23533, key="sk")
        # Docker's client reads it as CSV.
        assert next(csv.reader([old[old.index("--gpus") + 1]])) == gpus
    for option, value in (
        ("--device", "nvidia.com/gpu=all"),
        ("--cap-add", "IPC_LOCK"),
        ("--ulimit", "memlock=-1:-1"),
        ("--volume", "/data:/data:ro"),
        ("--env", "NCCL_SOCKET_IFNAME==eth0"),
        ("--env", "RAY_ADDRESS=192.0.2.2:23534"),
        ("--env", "RAY_AUTH_MODE=disabled"),
        ("--entrypoint", "bash"),
    ):
        assert (option, value) in pairwise(argv)
    assert "RAY_AUTH_MODE=token" not in argv
    assert argv[-3:-1] == ["sha256:abc", "-c"]
    assert argv[-1].endswith("exec lmdeploy serve api_server '/data/x y' --server-port 23533 --tp 1 --api-keys sk\n")
    assert "ray start --head --node-ip-address=192.0.2.2 --port=23534 --num-gpus=1" in argv[-1]


def test_throughput_is_told_by_start_beside_what_two_alike_differ(script: Callable[[str], ModuleType]) -> None:
    throughput = script("throughput")
    names = ("deployed", "by hand 1", "by hand 2")
    rounds = [
        {
            "start": start,
            "first": first,
            **{
                name: {"output_tokens_per_s": rate, "client_busy": rate / 2000}
                for name, rate in zip(names, rates, strict=True)
            },
        }
        for start, first, rates in (
            (1, "deployed", (990.0, 1000.0, 980.0)),
            (1, "by hand 1", (1010.0, 1000.0, 1020.0)),
            (2, "by hand 2", (1000.0, 1000.0, 1200.0)),
        )
    ]
    summary = throughput.summarise(rounds, names, 640)
    assert summary["ratios"] == {
        "deployed / by hand": [1.0, 1.0, 0.9091],
        "by hand 2 / by hand 1": [0.98, 1.02, 1.2],
    }
    assert summary["starts"] == {"deployed / by hand": [1.0, 0.9091], "by hand 2 / by hand 1": [1.0, 1.2]}
    assert summary["means"] == {"deployed / by hand": 0.9545, "by hand 2 / by hand 1": 1.1}
    assert summary["standard_errors"] == {"deployed / by hand": 0.0455, "by hand 2 / by hand 1": 0.1}
    assert summary["client_busy"] == 0.6
    table = throughput.markdown(summary)
    assert "| start | round | first | deployed | by hand 1 | by hand 2 | deployed / by hand | by hand 2 / by" in table
    assert "| 2 | 3 | by hand 2 | 1,000.0 | 1,000.0 | 1,200.0 | 0.909 | 1.200 |" in table
    assert "| 1,000.0 | 1,000.0 | 1,020.0 | **0.955** ± 0.045 | **1.100** ± 0.100 |" in table
    assert throughput.summarise(rounds[:1], names, 640)["standard_errors"]["deployed / by hand"] is None


@pytest.mark.parametrize("servers", [["a=http://h"], ["a=http://h", "a=http://i"], ["a=http://h", "http://i"]])
def test_throughput_wants_servers_with_names(
    script: Callable[[str], ModuleType], servers: list[str], tmp_path: Path
) -> None:
    with pytest.raises(SystemExit) as ended:
        script("throughput").main([str(tmp_path), *servers])
    assert ended.value.code == 2


@pytest.mark.parametrize("path", sorted(ACCEPTANCE.glob("*.sh")), ids=lambda path: path.name)
def test_shell_scripts_parse(path: Path) -> None:
    bash = shutil.which("bash")
    assert bash
    done = subprocess.run([bash, "-n", str(path)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_the_acceptance_inventory_is_valid_and_asks_for_nothing_from_outside() -> None:
    loaded = inventory.load([REPOSITORY / "inventory" / "gpu-acceptance.ini"])
    deployment = topology.build(loaded.groups, source=loaded.label)
    values = settings.resolve(loaded, deployment.hosts, deployment).of("acceptance")
    sources = ("nvidia_driver_source", "docker_engine_source", "nvidia_container_toolkit_source")
    assert [values[name] for name in sources] == ["preinstalled"] * 3
    assert values["engine_image_archive_path"], "an image without an archive path is pulled"
    assert values["endpoint_mode"] == "direct", "the proxy is a package"
