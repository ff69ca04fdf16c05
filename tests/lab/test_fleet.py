"""A second deployment, on the same hosts and a new one: two replicas, no registry, API keys from a vault.

Its hosts have HCAs of three namings: mlx5_*, ibp*, none. Before it serves it is killed, refused and torn down
half-made. The tests are its story, in order.
"""

from __future__ import annotations

import os
import secrets
import signal
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import httpx
import processes
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
#: Of a prepared host a teardown takes this too: what the run wrote down, and that the engine's ports are reserved.
GONE = ("/var/lib/deploy-dsv3", "/etc/sysctl.d/90-deploy-dsv3.conf")
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
    ansible_vault = Path(sys.executable).with_name("ansible-vault")
    encrypt = ["encrypt", f"--vault-password-file={password_file}", str(vaulted)]
    subprocess.run([ansible_vault, *encrypt], check=True, capture_output=True)
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
def archived(fleet: Fleet) -> None:
    """The image as a file on every host."""
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


def _is_at_work(host: Host) -> bool:
    return host.run(["pgrep", "-x", "dpkg"], check=False).returncode == 0


@pytest.fixture(scope="module")
def survivors(product: Product, fleet: Fleet) -> dict[int, str]:
    """What still runs of a deploy that was killed while packages were being installed on the new host."""
    running = subprocess.Popen(
        product.argv(*fleet.options),
        cwd=product.folder,
        env=product.environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    sight.eventually(lambda: _is_at_work(fleet.lab.hosts[2]), "packages are being installed", within_s=300)
    family = processes.below(running.pid)
    os.kill(running.pid, signal.SIGKILL)
    running.wait()
    # Connections are kept for the next run, on purpose; nobody works through them.
    return {pid: line for pid, line in processes.left_of(family, within_s=30).items() if "[mux]" not in line}


@pytest.fixture(scope="module")
def resumed(product: Product, fleet: Fleet, survivors: dict[int, str]) -> Run:
    """The run after it, as far as hosts are prepared."""
    assert survivors is not None
    return product(*fleet.options, "--tags", "host", "--json", what="host stage after the kill")


@pytest.fixture(scope="module")
def prepared(fleet: Fleet, resumed: Run, archived: None) -> dict[str, sight.State]:
    """The prepared hosts with a container of somebody else's: what every teardown must lead back to."""
    assert resumed.exit_code == 0
    for host in fleet.lab:
        host.run(["sh", "-euc", "tar --create /etc/hostname | docker import - somebody/else:1"])
        host.run(["docker", "create", "--name=somebody-elses", "somebody/else:1", "/bin/true"])
    return {host.name: sight.state(host) for host in fleet.lab}


@pytest.fixture(scope="module")
def mixed(product: Product, fleet: Fleet, prepared: dict[str, sight.State]) -> tuple[Run, str]:
    """A run refused because one host has another image under the engine's name, and that image."""
    assert prepared
    worker = fleet.lab.hosts[1]
    worker.run(["docker", "tag", "somebody/else:1", IMAGE])
    run = product(*fleet.options, "--json", expect=4, what="deploy refused for two images of one name")
    worker.run(["docker", "rmi", IMAGE])
    return run, worker.run(["docker", "images", "--no-trunc", "--quiet", "somebody/else:1"]).stdout.strip()


@pytest.fixture(scope="module")
def half_gone(product: Product, fleet: Fleet, mixed: tuple[Run, str]) -> Run:
    """The teardown of what that run left."""
    assert mixed
    return product("destroy", *fleet.options, "--yes", "--json", what="destroy, half-made deployment")


@pytest.fixture(scope="module")
def shown() -> set[str]:
    """Secrets that stood in a command line while the deployment was made."""
    return set()


@pytest.fixture(scope="module")
def served(product: Product, fleet: Fleet, half_gone: Run, shown: set[str]) -> Run:
    """The deployment, made at last, with as much told as can be."""
    assert half_gone.exit_code == 0
    with processes.watched(fleet.canaries) as seen:
        run = product(*fleet.options, "-vvv", "--diff", "--json", what="deploy, two replicas on three hosts, -vvv")
    shown.update(seen)
    for stage in run.document["stages"]:
        product.times.note(f"    {stage['name']}", stage["seconds"])
    return run


# ---------------------------------------------------------------------- until it serves


def test_a_wrong_sudo_password(product: Product, fleet: Fleet, tmp_path: Path) -> None:
    wrong = tmp_path / "wrong.yml"
    wrong.write_text("ansible_become_password: not-the-password\n")
    run = product(*fleet.options, "--json", "--limit", "single", "--extra-vars", f"@{wrong}", expect=6)
    (failure,) = run.document["failures"]
    assert (failure["host"], failure["code"]) == ("gpu-03", "sudo-password-wrong")
    assert "--ask-become-pass" in failure["remedy"]


def test_nothing_goes_on_after_a_run_was_killed(survivors: dict[int, str]) -> None:
    assert survivors == {}


def test_the_next_run_continues(resumed: Run) -> None:
    assert resumed.document["failures"] == []
    assert resumed.document["hosts"]["gpu-03"]["changed"] > 0


def test_two_images_of_one_name_are_refused(mixed: tuple[Run, str], fleet: Fleet) -> None:
    run, other = mixed
    (failure,) = [one for one in run.document["failures"] if other in one["message"]]
    assert (failure["stage"], failure["host"]) == ("image", "gpu-02")
    right = fleet.lab.hosts[0].run(["docker", "images", "--no-trunc", "--quiet", IMAGE]).stdout.strip()
    assert right == "" or right in failure["message"]
    assert [stage["name"] for stage in run.document["stages"]][-1] == "image", "nothing was started"


def test_teardown_of_a_half_made_deployment(half_gone: Run, fleet: Fleet, prepared: dict[str, sight.State]) -> None:
    assert half_gone.document["failures"] == []
    for host in fleet.lab:
        different = sight.changes(prepared[host.name], sight.state(host))
        assert {name for name in different if not any(path in name for path in GONE)} == set(), host.name


# ---------------------------------------------------------------------- while it serves


def test_both_replicas_serve(served: Run, fleet: Fleet) -> None:
    told = {replica["name"]: replica["endpoint"] for replica in served.document["replicas"]}
    assert told == fleet.endpoints
    assert served.document["verification"]["passed"] is True
    for url in fleet.endpoints.values():
        assert sight.serves(url, key=fleet.key)


def test_each_host_gets_the_devices_it_has(served: Run, fleet: Fleet) -> None:
    for host in fleet.lab:
        assert sight.devices(host) == sight.infiniband(host), host.name
    pair_head, pair_worker, single = (sight.environment(host) for host in fleet.lab)
    assert pair_head["NCCL_IB_HCA"].startswith("=mlx5_0:1")
    assert pair_worker["NCCL_IB_HCA"].startswith("=ibp25s0:1")
    assert "NCCL_IB_HCA" not in single and single["NCCL_IB_DISABLE"] == "1"


def test_the_image_came_from_the_archive(served: Run, fleet: Fleet) -> None:
    assert len({sight.container(host)["Image"] for host in fleet.lab}) == 1
    assert {sight.container(host)["Config"]["Image"] for host in fleet.lab} == {IMAGE}


def test_a_key_is_asked_for(served: Run, fleet: Fleet) -> None:
    for url in fleet.endpoints.values():
        assert sight.complete(url).status_code == 401
        assert sight.complete(url, key="sk-wrong").status_code == 401
        assert httpx.get(f"{url}/v1/models", trust_env=False).status_code == 401
        assert sight.complete(url, key=fleet.key).status_code == 200


def test_the_benchmark_takes_the_key_from_the_vault_and_is_refused_with_another(
    served: Run, product: Product, fleet: Fleet
) -> None:
    row = ("--profile", "custom", "--num-prompts", "8", "--input-len", "16", "--output-len", "8")
    chosen = ("--replica", "single", "--output", "with-the-key")
    run = product("benchmark", *fleet.options, *row, *chosen, "--json", what="benchmark with a key from the vault")
    assert run.document["rows"][0]["figures"]["completed"] == 8
    wrong = product.folder / "wrong-key"
    wrong.touch(mode=0o600)
    wrong.write_text("sk-wrong\n")
    endpoint = ("--base-url", fleet.endpoints["single"], "--api-key-file", wrong)
    told = product("benchmark", *endpoint, *row, "--output", "with-another", expect=2).err
    assert "HTTP 401, the API key is wrong" in told
    assert "Give one of endpoint_api_keys" in told
    assert not list((product.folder / "with-another").glob("api_n*"))


def test_status_tells_of_both(served: Run, product: Product, fleet: Fleet) -> None:
    run = product("status", *fleet.options, "--json")
    assert [(replica["name"], replica["serving"], replica["gpus_alive"]) for replica in run.document["replicas"]] == [
        ("pair", True, 16),
        ("single", True, 2),
    ]


# ---------------------------------------------------------------------- what it gave away


def test_no_secret_in_what_was_told(served: Run, fleet: Fleet) -> None:
    for what, canary in fleet.canaries.items():
        assert canary not in served.told, what


def test_no_secret_in_what_was_kept(served: Run, product: Product, fleet: Fleet) -> None:
    """The log of the run at -vvv with --diff, and every other file that this machine keeps of it."""
    kept = [path for path in product.folder.rglob("*") if path.is_file()]
    assert any(path.name == "ansible.log" for path in kept)
    for path in kept:
        text = path.read_text(errors="replace")
        assert [what for what, canary in fleet.canaries.items() if canary in text] == [], path


def test_no_secret_in_a_command_line(served: Run, shown: set[str]) -> None:
    assert shown == set()


def test_no_secret_in_docker(served: Run, fleet: Fleet) -> None:
    for host in fleet.lab:
        for command in (["docker", "inspect", sight.CONTAINER], ["docker", "logs", sight.CONTAINER]):
            done = host.run(command)
            for what, canary in (fleet.canaries | {"Ray token": _ray_token(host)}).items():
                assert canary not in done.stdout + done.stderr, (host.name, what)


def test_secrets_are_in_files_of_root_alone(served: Run, fleet: Fleet) -> None:
    folders = ["/etc", "/var/lib/deploy-dsv3", "/var/log", "/run", "/tmp", "/var/tmp", "/home", "/root", "/dev/shm"]
    for host in fleet.lab:
        for what, canary in (fleet.canaries | {"Ray token": _ray_token(host)}).items():
            search = ["grep", "--recursive", "--files-with-matches", "--devices=skip", "--fixed-strings"]
            found = host.run([*search, "--regexp", canary, *folders], check=False).stdout.split()
            for path in found:
                mode = host.run(["stat", "--format=%U %a", path]).stdout.split()
                assert mode == ["root", "600"], (host.name, what, path)


def _ray_token(host: Host) -> str:
    token = host.run(["cat", "/etc/deploy-dsv3/engine/secrets/ray_token"]).stdout.strip()
    assert len(token) >= 32
    return token


# ---------------------------------------------------------------------- the end of it


def test_one_replica_is_torn_down_and_the_other_serves(
    served: Run, product: Product, fleet: Fleet, prepared: dict[str, sight.State]
) -> None:
    before = [sight.started_at(host) for host in fleet.lab.hosts[:2]]
    product("destroy", *fleet.options, "--limit", "single", "--yes", what="destroy, one replica of two")
    left = sight.traces(prepared["gpu-03"], sight.state(fleet.lab.hosts[2]))
    assert {name for name in left if not any(path in name for path in GONE)} == set()
    assert [sight.started_at(host) for host in fleet.lab.hosts[:2]] == before
    assert sight.serves(fleet.endpoints["pair"], key=fleet.key)
