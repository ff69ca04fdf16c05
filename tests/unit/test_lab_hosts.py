"""How the containers of the lab's hosts are made, and what is laid into them."""

from __future__ import annotations

import io
import json
import struct
import tarfile
from pathlib import Path

import pytest

from deploy_dsv3.lab import hosts, model
from deploy_dsv3.lab.docker_cli import DockerCli, File, archive, tree
from deploy_dsv3.lab.paths import FILES

WITHOUT_RESOURCE = f"CapBnd:\t{((1 << 38) - 1) & ~(1 << 24):016x}\n"
HYBRID = "cgroup /sys/fs/cgroup/cpu cgroup rw 0 0\ncgroup2 /sys/fs/cgroup/unified cgroup2 rw 0 0\n"
UNIFIED = "cgroup2 /sys/fs/cgroup cgroup2 rw 0 0\n"


@pytest.fixture
def host(tmp_path: Path) -> hosts.Host:
    return hosts.Host(
        record=hosts.record(2, "198.18.0.0/24", "h800-ib", None),
        lab="rehearsal",
        docker=DockerCli(host="unix:///nowhere"),
        folder=tmp_path,
        labels={"io.deploy-dsv3.lab": "rehearsal"},
    )


def test_container_has_its_place_on_the_network_and_its_lab_in_its_labels(host: hosts.Host) -> None:
    arguments = host.create_arguments("image", status=WITHOUT_RESOURCE, mounts=UNIFIED)
    for expected in (
        "--name=dsv3-rehearsal-gpu-02",
        "--hostname=gpu-02",
        "--network=dsv3-rehearsal",
        "--ip=198.18.0.12",
        "--label=io.deploy-dsv3.lab=rehearsal",
    ):
        assert expected in arguments
    assert arguments[-1] == "image"


def test_capabilities_are_named_one_by_one_without_those_that_the_machine_lacks(host: hosts.Host) -> None:
    arguments = host.create_arguments("image", status=WITHOUT_RESOURCE, mounts=UNIFIED)
    assert "--privileged" not in arguments
    assert "--cap-add=SYS_ADMIN" in arguments
    assert "--cap-add=SYS_RESOURCE" not in arguments


@pytest.mark.parametrize(
    ("mounts", "volume"),
    [
        (UNIFIED, "--volume=/sys/fs/cgroup:/sys/fs/cgroup:rw"),
        (HYBRID, "--volume=/sys/fs/cgroup/unified:/sys/fs/cgroup:rw"),
    ],
)
def test_host_sees_a_pure_cgroup_v2_tree(host: hosts.Host, mounts: str, volume: str) -> None:
    assert volume in host.create_arguments("image", status=WITHOUT_RESOURCE, mounts=mounts)


def test_docker_inside_gets_volumes_for_its_data(host: hosts.Host) -> None:
    arguments = host.create_arguments("image", status=WITHOUT_RESOURCE, mounts=UNIFIED)
    assert "--volume=dsv3-rehearsal-gpu-02-docker:/var/lib/docker" in arguments
    assert "--volume=dsv3-rehearsal-gpu-02-containerd:/var/lib/containerd" in arguments


def test_archive_keeps_rights_and_owners() -> None:
    files = {"/a/key": File(content=b"secret", mode=0o600, uid=7, gid=8), "/b": File(content=b"")}
    with tarfile.open(fileobj=io.BytesIO(archive(files))) as tar:
        entry = tar.getmember("a/key")
        assert (entry.mode, entry.uid, entry.gid) == (0o600, 7, 8)
        stream = tar.extractfile(entry)
        assert stream is not None and stream.read() == b"secret"


def test_scripts_of_the_simulated_kernel_can_be_executed() -> None:
    files = tree(FILES / "host")
    assert files["/usr/lib/dsv3-lab/kernel.py"].mode == 0o755
    assert {file.mode for path, file in files.items() if path.startswith("/etc/")} == {0o644}


def test_model_directory_is_complete_by_its_own_index() -> None:
    files = model.files()
    index = json.loads(files["model.safetensors.index.json"])
    assert json.loads(files["config.json"])["architectures"] == ["DeepseekV3ForCausalLM"]
    total = 0
    for tensor, shard in index["weight_map"].items():
        (length,) = struct.unpack("<Q", files[shard][:8])
        header = json.loads(files[shard][8 : 8 + length])
        begin, end = header[tensor]["data_offsets"]
        assert len(files[shard]) == 8 + length + end
        total += end - begin
    assert total == index["metadata"]["total_size"]
    assert set(index["weight_map"].values()) == {name for name in files if name.endswith(".safetensors")}
