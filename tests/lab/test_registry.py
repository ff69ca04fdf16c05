"""A private registry that asks for a password: real credentials, wrong ones, and where they are seen."""

from __future__ import annotations

import ipaddress
import json
from collections.abc import Iterator
from pathlib import Path

import processes
import pytest
import sight
from product import Product

from deploy_dsv3.lab.docker_cli import File
from deploy_dsv3.lab.fleet import Lab
from deploy_dsv3.lab.services import ENGINE_IMAGE, ENGINE_TAG

USER, PASSWORD = "puller", "canary-of-the-registry"
#: bcrypt of the password, as `htpasswd -nB` prints it.
HTPASSWD = f"{USER}:$2b$05$abcdefghijklmnopqrstuuTQLdDQ2arfM5hmv74DJrVlfO6Ojq7Qm\n"
CONFIG = """\
version: 0.1
log: {level: warn}
storage:
  filesystem: {rootdirectory: /var/lib/registry}
http: {addr: ":5000"}
auth:
  htpasswd: {realm: private, path: /etc/docker/registry/htpasswd}
"""


@pytest.fixture(scope="module")
def registry(lab: Lab) -> Iterator[str]:
    """``address:port`` of a registry with the lab's images behind a password."""
    name = f"dsv3-{lab.name}-private-registry"
    public = lab.docker.inspect("container", f"dsv3-{lab.name}-registry")
    assert public
    address = str(ipaddress.ip_address(lab.services.registry.partition(":")[0]) + 1)
    lab.docker.run(
        "create",
        f"--name={name}",
        *(f"--label={key}={value}" for key, value in lab.labels.items()),
        f"--network=dsv3-{lab.name}",
        f"--ip={address}",
        "--volume=dsv3-lab-registry:/var/lib/registry:ro",
        public["Config"]["Image"],
        *("docker-registry", "serve", "/etc/docker/registry/private.yml"),
    )
    try:
        lab.docker.copy_in(
            name,
            {
                "/etc/docker/registry/private.yml": File(content=CONFIG.encode()),
                "/etc/docker/registry/htpasswd": File(content=HTPASSWD.encode()),
            },
        )
        lab.docker.run("start", name)
        yield f"{address}:5000"
    finally:
        lab.docker.run("rm", "--force", name)


def _settings(registry: str, folder: Path, password: str) -> Path:
    """Variables for a run that takes the image from the private registry."""
    file = folder / "private.yml"
    file.write_text(
        json.dumps(
            {
                "docker_engine_registry_mirrors": [],
                "docker_engine_insecure_registries": [registry],
                "engine_image_name": f"{registry}/{ENGINE_IMAGE}:{ENGINE_TAG}",
                "engine_image_registry_username": USER,
                "engine_image_registry_password": password,
            }
        )
    )
    return file


def test_a_wrong_password_is_told_before_anything_is_pulled(
    product: Product, lab: Lab, registry: str, tmp_path: Path
) -> None:
    settings = _settings(registry, tmp_path, "not-the-password")
    run = product(
        *("--inventory", lab.inventory, "--tags", "host,image", "--extra-vars", f"@{settings}", "--json"), expect=4
    )
    (failure,) = run.document["failures"]
    assert failure["stage"] == "image"
    assert registry in failure["message"]
    assert "unauthorized" in failure["message"]
    assert "engine_image_registry_username" in failure["remedy"]
    assert "not-the-password" not in run.told


def test_the_image_comes_by_digest(product: Product, lab: Lab, registry: str, tmp_path: Path) -> None:
    settings = _settings(registry, tmp_path, PASSWORD)
    arguments = ("--inventory", lab.inventory, "--tags", "host,image", "--extra-vars", f"@{settings}")
    with processes.watched({"registry password": PASSWORD}) as shown:
        run = product(*arguments, "-vvv", "--json", what="image from a private registry")
    assert shown == set()
    assert PASSWORD not in run.told
    look = ["docker", "images", "--no-trunc", "--digests", "--quiet", f"{registry}/{ENGINE_IMAGE}"]
    found = [host.run(look).stdout.split() for host in lab]
    assert found[0] == found[1] != []
    for host in lab:
        search = ["grep", "--recursive", "--files-with-matches", "--devices=skip", "--fixed-strings", PASSWORD]
        assert host.run([*search, "/etc", "/root", "/var/lib/deploy-dsv3", "/var/log"], check=False).stdout == ""
    for path in product.state.rglob("*"):
        assert not path.is_file() or PASSWORD not in path.read_text(errors="replace"), path


def test_afterwards_the_hosts_are_as_before(product: Product, lab: Lab, registry: str, tmp_path: Path) -> None:
    settings = _settings(registry, tmp_path, PASSWORD)
    product("destroy", "--inventory", lab.inventory, "--extra-vars", f"@{settings}", "--yes")
    for host in lab:
        assert sight.state(host)["images"] == {}, host.name
