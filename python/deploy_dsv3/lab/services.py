"""The lab's own package repository and image registry: what a site without internet has as mirrors."""

from __future__ import annotations

import json
import time
import urllib.error
import urllib.request
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from . import machine, network, packages, repository
from .docker_cli import DockerCli, File
from .errors import LabError
from .hosts import Host

#: The engine image's true name, which the registry serves as a mirror of Docker Hub.
ENGINE_IMAGE = "openmmlab/lmdeploy"
ENGINE_TAG = "latest-cu12"

_REGISTRY_PORT = 5000
_REGISTRY_CONFIG = f"""\
version: 0.1
log: {{level: warn}}
storage:
  filesystem: {{rootdirectory: /var/lib/registry}}
  delete: {{enabled: true}}
http: {{addr: ":{_REGISTRY_PORT}"}}
"""
_MANIFEST = "application/vnd.docker.distribution.manifest.v2+json"
_READY_TIMEOUT_S = 90.0


@dataclass(frozen=True, kw_only=True)
class Services:
    """The service containers of one lab.

    Attributes:
        repository: folder that holds the package repositories.
        labels: labels of everything that belongs to the lab.
    """

    lab: str
    subnet: str
    docker: DockerCli
    repository: Path
    labels: Mapping[str, str]

    @property
    def packages_url(self) -> str:
        """Base address of the package repositories."""
        return f"http://{network.packages_address(self.subnet)}"

    @property
    def registry(self) -> str:
        """``address:port`` of the registry, as the hosts see it."""
        return f"{network.registry_address(self.subnet)}:{_REGISTRY_PORT}"

    def ensure(self, image: str) -> None:
        """Have both running from this image; returns when they answer."""
        self._ensure(
            "packages",
            image,
            network.packages_address(self.subnet),
            [f"--volume={self.repository}:/srv/packages:ro"],
            ["python3", "-m", "http.server", "80", "--protocol=HTTP/1.1", "--directory=/srv/packages"],
            {},
        )
        # One store for all labs of the engine, kept when a lab goes: pushing the engine image takes a while.
        self._ensure(
            "registry",
            image,
            network.registry_address(self.subnet),
            ["--volume=dsv3-lab-registry:/var/lib/registry", f"--publish=127.0.0.1::{_REGISTRY_PORT}"],
            ["docker-registry", "serve", "/etc/docker/registry/lab.yml"],
            {"/etc/docker/registry/lab.yml": File(content=_REGISTRY_CONFIG.encode())},
        )
        _wait(f"{self.packages_url}/")
        _wait(f"http://{self.registry}/v2/")

    def _ensure(
        self,
        role: str,
        image: str,
        address: str,
        options: list[str],
        command: list[str],
        files: dict[str, File],
    ) -> None:
        name = f"dsv3-{self.lab}-{role}"
        found = self.docker.inspect("container", name)
        if found and found["Config"]["Image"] != image:
            self.docker.run("rm", "--force", name)
            found = None
        if not found:
            labels = {**self.labels, "io.deploy-dsv3.lab.role": role}
            self.docker.run(
                "create",
                f"--name={name}",
                f"--hostname={role}",
                *(f"--label={key}={value}" for key, value in labels.items()),
                f"--network=dsv3-{self.lab}",
                f"--ip={address}",
                "--restart=unless-stopped",
                "--init",
                *options,
                image,
                *command,
            )
            if files:
                self.docker.copy_in(name, files)
        self.docker.run("start", name)

    def publish_image(self, local: str) -> bool:
        """Have the registry serve an image of the engine under the engine image's true name.

        Returns:
            Whether it had to be pushed.
        """
        found = self.docker.inspect("image", local)
        if found is None:
            raise LabError(f"the image {local} is not there")
        if found["Id"] in self._served_image_ids():
            return False
        published = self.docker.run("port", f"dsv3-{self.lab}-registry", str(_REGISTRY_PORT)).stdout.split()
        port = published[0].rpartition(":")[2]
        # 127.0.0.0/8 needs no TLS for any daemon, so a running engine's settings stay as they are.
        target = f"127.0.0.1:{port}/{ENGINE_IMAGE}:{ENGINE_TAG}"
        self.docker.run("tag", local, target)
        try:
            self.docker.run("push", "--quiet", target)
        finally:
            self.docker.run("rmi", target)
        return True

    def install(self, host: Host, wanted: Mapping[str, str]) -> None:
        """Install packages of the repository on a host without telling its apt of the repository.

        Args:
            wanted: name to version.
        """
        found = packages.closure(packages.plan(machine.kernel_release()), wanted)
        debs = repository.deb_files(self.repository, found)
        files = {f"/var/tmp/{path.name}": File(content=path.read_bytes()) for path in debs}
        host.docker.copy_in(host.container, files)
        host.run(["sh", "-c", 'dpkg --install "$@"; code=$?; rm -f "$@"; exit $code', "install", *files])
        # The vendor leaves the fabric manager to the administrator to enable.
        host.run(["systemctl", "enable", "nvidia-fabricmanager.service"], check=False)

    def _served_image_ids(self) -> set[str]:
        """Digests of configuration and manifest: an image's ID is one of them, by the daemon's store."""
        request = urllib.request.Request(
            f"http://{self.registry}/v2/{ENGINE_IMAGE}/manifests/{ENGINE_TAG}", headers={"Accept": _MANIFEST}
        )
        try:
            with urllib.request.urlopen(request, timeout=10) as answer:
                return {
                    str(json.load(answer)["config"]["digest"]),
                    str(answer.headers["Docker-Content-Digest"]),
                }
        except urllib.error.HTTPError:
            return set()


def _wait(url: str) -> None:
    deadline = time.monotonic() + _READY_TIMEOUT_S
    while True:
        try:
            urllib.request.urlopen(url, timeout=2).close()
            return
        except OSError as error:
            if time.monotonic() > deadline:
                raise LabError(f"the lab's service at {url} does not answer: {error}") from error
            time.sleep(0.1)
