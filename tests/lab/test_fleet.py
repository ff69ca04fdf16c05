"""A second deployment on the same hosts and a new one: two replicas, no registry, API keys from a vault.

Its hosts have HCAs by three namings: mlx5_*, ibp*, none. On the way it is interrupted, refused, torn down half-made.
"""

from __future__ import annotations

import os
import secrets
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest
import sight
import yaml
from conftest import NAME, PAIR, up
from product import Product, Run, Times

from deploy_dsv3.lab import bringup
from deploy_dsv3.lab.fleet import Lab
from deploy_dsv3.lab.hosts import Host

IMAGE = "openmmlab/lmdeploy:latest-cu12"
ARCHIVE = "/srv/images/lmdeploy.tar"
PROFILE = Path(__file__).parent / "profiles" / "pcie-sudo-password.yml"

HOSTS = """\
[pair_head]
{0.name} ansible_host={0.address}

[pair_workers]
{1.name} ansible_host={1.address}

[single_head]
{2.name} ansible_host={2.address}

[pair:children]
pair_head
pair_workers

[single:children]
single_head

[dsv3:children]
pair
single
"""


@dataclass(frozen=True, kw_only=True)
class Fleet:
    """The deployment of this file.

    Attributes:
        key: what its clients send.
        canaries: every secret of it, by what it is.
    """

    lab: Lab
    inventory: Path
    key: str
    canaries: dict[str, str]

    @property
    def options(self) -> tuple[str | Path, ...]:
        """What every command on it takes."""
        vault = self.inventory.parent / "vault-password"
        return ("--inventory", self.inventory, "--vault-password-file", vault)

    @property
    def endpoints(self) -> dict[str, str]:
        """Replica to endpoint."""
        pair, _, single = self.lab.hosts
        return {"pair": f"http://{pair.address}:8000", "single": f"http://{single.address}:8000"}


@pytest.fixture(scope="module")
def fleet(lab: Lab, times: Times, tmp_path_factory: pytest.TempPathFactory) -> Fleet:
    """The lab with a third host, and an inventory for it without a registry."""
    grown = up(bringup.Wish(name=NAME, hosts=3, profiles=(*PAIR, str(PROFILE))), times)
    folder = tmp_path_factory.mktemp("fleet")
    key, vault_password = (f"canary-{secrets.token_hex(12)}" for _ in range(2))
    site = yaml.safe_load((grown.inventory / "group_vars" / "all.yml").read_text())
    site |= {"docker_engine_registry_mirrors": [], "engine_image_archive_path": ARCHIVE}
    variables = folder / "inventory" / "group_vars"
    (variables / "dsv3").mkdir(parents=True)
    (folder / "inventory" / "hosts.ini").write_text(HOSTS.format(*grown.hosts))
    (variables / "all.yml").write_text(yaml.safe_dump(site))
    vaulted = variables / "dsv3" / "vault.yml"
    vaulted.write_text(yaml.safe_dump({"endpoint_api_keys": [key]}))
    password_file = folder / "vault-password"
    password_file.touch(mode=0o600)
    password_file.write_text(vault_password)
    encrypt = [Path(sys.executable).with_name("ansible-vault"), "encrypt"]
    subprocess.run([*encrypt, "--vault-password-file", password_file, vaulted], check=True, capture_output=True)
    return Fleet(
        lab=grown,
        inventory=folder / "inventory",
        key=key,
        canaries={
            "API key": key,
            "vault password": vault_password,
            "sudo password": grown.password_file.read_text().strip(),
        },
    )


@pytest.fixture(scope="module")
def before(fleet: Fleet) -> dict[str, sight.State]:
    """The hosts with the archive of the image on them, and a container of somebody else's."""
    docker = fleet.lab.docker
    newest = docker.run("images", "--format", "{{.Repository}}:{{.Tag}}", "--filter=reference=dsv3-lab/engine")
    archive = fleet.inventory.parent / "lmdeploy.tar"
    docker.run("tag", newest.stdout.split()[0], IMAGE)
    try:
        docker.run("save", "--output", str(archive), IMAGE)
    finally:
        docker.run("rmi", IMAGE)
    for host in fleet.lab:
        host.run(["mkdir", "-p", str(Path(ARCHIVE).parent)])
        docker.run("cp", str(archive), f"{host.container}:{ARCHIVE}")
    archive.unlink()
    return {host.name: sight.state(host) for host in fleet.lab}


def _is_at_work(host: Host) -> bool:
    return host.run(["pgrep", "-x", "dpkg"], check=False).returncode == 0


def _descendants(pid: int) -> list[psutil.Process]:
    """Processes below one, without the SSH connections that are kept for a while on purpose."""
    return [one for one in psutil.Process(pid).children(recursive=True) if "[mux]" not in " ".join(one.cmdline())]


@pytest.fixture(scope="module")
def killed(product: Product, fleet: Fleet, before: dict[str, sight.State]) -> None:
    """A run killed while packages were being installed on the new host."""
    del before
    new = fleet.lab.hosts[2]
    running = subprocess.Popen(
        product.argv(*fleet.options),
        cwd=product.folder,
        env=product.environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    sight.eventually(lambda: _is_at_work(new), "packages are being installed", within_s=180)
    below = _descendants(running.pid)
    os.kill(running.pid, signal.SIGKILL)
    running.wait()
    _, alive = psutil.wait_procs(below, timeout=30)
    assert alive == [], "nobody goes on changing hosts after the run was killed"


@pytest.fixture(scope="module")
def mixed(product: Product, fleet: Fleet, killed: None) -> tuple[Run, str]:
    """The run after it, and another image under the engine's name on one of the hosts."""
    worker = fleet.lab.hosts[1]
    worker.run(["sh", "-c", "command -v docker || apt-get install -qy --no-install-recommends docker.io docker-cli"])
    other = worker.run(["sh", "-c", f"tar --create /etc/hostname | docker import - {IMAGE}"]).stdout.strip()
    run = product(*fleet.options, "--json", expect=4, what="rerun after the kill; refused: two images of one name")
    return run, other


@pytest.fixture(scope="module")
def watched() -> Iterator[set[str]]:
    """Command lines of every process on this machine, those of the hosts included, while it is in use."""
    seen: set[str] = set()
    done = threading.Event()

    def look() -> None:
        while not done.wait(0.5):
            for process in psutil.process_iter(["cmdline"]):
                seen.add(" ".join(process.info["cmdline"] or ()))

    thread = threading.Thread(target=look, daemon=True)
    thread.start()
    yield seen
    done.set()
    thread.join()


@pytest.fixture(scope="module")
def served(
    product: Product, fleet: Fleet, mixed: tuple[Run, str], watched: set[str], times: Times
) -> Run:
    """The deployment, made at last."""
    fleet.lab.hosts[1].run(["docker", "rmi", IMAGE])
    run = product(*fleet.options, "-vvv", "--diff", "--json", what="deploy, two replicas, three hosts, -vvv")
    for stage in run.document["stages"]:
        times.note(f"    {stage['name']}", stage["seconds"])
    return run


def test_a_killed_run_leaves_nothing_of_it_running(killed: None) -> None:
    """Its own fixture looks; here it is named."""


def test_two_images_under_one_name_are_refused(mixed: tuple[Run, str], fleet: Fleet) -> None:
    run, other = mixed
    (failure,) = [one for one in run.document["failures"] if other in one["message"]]
    assert failure["stage"] == "image"
    right = fleet.lab.hosts[0].run(["docker", "images", "--no-trunc", "--quiet", IMAGE]).stdout.strip()
    assert right in failure["message"] and "gpu-02" in failure["message"]
    for host in fleet.lab:
        running = host.run(["docker", "ps", "--all", "--quiet"]).stdout
        assert running == "", "before anything was started"
