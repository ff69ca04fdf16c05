"""A site behind a proxy, whose registry asks for a password and whose certificates are of a CA of its own.

What is refused and how it is told, where packages and images come from, and where password and proxy are seen.
"""

from __future__ import annotations

import ipaddress
import json
import re
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

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
REGISTRY = """\
version: 0.1
log: {level: warn}
storage:
  filesystem: {rootdirectory: /var/lib/registry}
http: {addr: ":5000", tls: {certificate: /srv/site/site.pem, key: /srv/site/site.key}}
auth:
  htpasswd: {realm: private, path: /srv/site/htpasswd}
"""
PROXY = """\
Port 3128
LogLevel Connect
"""
PACKAGES = """\
import functools, http.server, ssl
handler = http.server.SimpleHTTPRequestHandler
handler.protocol_version = "HTTP/1.1"
server = http.server.ThreadingHTTPServer(("", 443), functools.partial(handler, directory="/srv/packages"))
context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
context.load_cert_chain("/srv/site/site.pem", "/srv/site/site.key")
server.socket = context.wrap_socket(server.socket, server_side=True)
server.serve_forever()
"""
START = """\
docker-registry serve /srv/site/registry.yml &
python3 /srv/site/packages.py &
exec tinyproxy -d -c /srv/site/tinyproxy.conf
"""
#: Where the hosts have the site's CA.
CA = "/etc/ssl/site-ca.pem"
TOOLKIT = (
    *("nvidia-container-toolkit", "nvidia-container-toolkit-base"),
    *("libnvidia-container-tools", "libnvidia-container1"),
)
DAEMON = "/etc/docker/daemon.json"


@dataclass(frozen=True, kw_only=True)
class Site:
    """A container with a registry, a package repository and a proxy, and how to ask for them.

    Attributes:
        address: of all three.
    """

    lab: Lab
    container: str
    address: str

    @property
    def registry(self) -> str:
        """``address:port``."""
        return f"{self.address}:5000"

    @property
    def settings(self) -> dict[str, Any]:
        """What an operator sets for this site, but for the password."""
        packages = f"https://{self.address}/libnvidia-container"
        return {
            "package_repository_proxy_url": f"http://{self.address}:3128",
            "package_repository_ca_path": CA,
            "nvidia_container_toolkit_repository_url": f"{packages}/stable/deb/amd64/",
            "nvidia_container_toolkit_repository_key_url": f"{packages}/gpgkey",
            "docker_engine_proxy_url": f"http://{self.address}:3128",
            "docker_engine_registry_mirrors": [],
            "docker_engine_registry_ca_paths": {self.registry: CA},
            "engine_image_name": f"{self.registry}/{ENGINE_IMAGE}:{ENGINE_TAG}",
            "engine_image_registry_username": USER,
        }

    def asked_for(self) -> list[str]:
        """What was asked of the proxy: ``METHOD TARGET``."""
        told = self.lab.docker.run("logs", self.container)
        return re.findall(r"Request \(file descriptor \d+\): (\S+ \S+) HTTP/", told.stdout + told.stderr)


def _certificates(folder: Path, address: str) -> None:
    """A CA (``ca.pem``) and a certificate of it for an address (``site.pem``, ``site.key``)."""
    (folder / "site.ext").write_text(f"subjectAltName=IP:{address}\nauthorityKeyIdentifier=keyid\n")
    new_key = "-newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes"
    for command in (
        # Newer Pythons insist on a CA's key usage.
        f"req -x509 -days 2 {new_key} -subj /CN=site-ca -addext keyUsage=keyCertSign -keyout ca.key -out ca.pem",
        f"req {new_key} -subj /CN=site -keyout site.key -out site.csr",
        "x509 -req -days 2 -in site.csr -CA ca.pem -CAkey ca.key -CAcreateserial -extfile site.ext -out site.pem",
    ):
        subprocess.run(["openssl", *command.split()], cwd=folder, check=True, capture_output=True)


@pytest.fixture(scope="module")
def site(lab: Lab, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    """The site; the second host lacks the container toolkit, and in the end Docker is set up as it was."""
    name = f"dsv3-{lab.name}-site"
    services = lab.docker.inspect("container", f"dsv3-{lab.name}-registry")
    assert services
    address = str(ipaddress.ip_address(lab.services.registry.partition(":")[0]) + 1)
    folder = tmp_path_factory.mktemp("site")
    _certificates(folder, address)
    made = {path.name: path.read_bytes() for path in (folder / "site.pem", folder / "site.key")}
    texts = {"registry.yml": REGISTRY, "htpasswd": HTPASSWD, "tinyproxy.conf": PROXY, "packages.py": PACKAGES}
    content = made | {file: text.encode() for file, text in texts.items()}
    daemons = {host.name: host.run(["cat", DAEMON], check=False).stdout for host in lab}
    lab.docker.run(
        "create",
        f"--name={name}",
        *(f"--label={key}={value}" for key, value in lab.labels.items()),
        f"--network=dsv3-{lab.name}",
        f"--ip={address}",
        "--init",
        "--volume=dsv3-lab-registry:/var/lib/registry:ro",
        f"--volume={lab.services.repository}:/srv/packages:ro",
        services["Config"]["Image"],
        *("sh", "-euc", START),
    )
    try:
        lab.docker.copy_in(name, {f"/srv/site/{file}": File(content=data) for file, data in content.items()})
        lab.docker.run("start", name)
        for host in lab:
            host.run(["tee", CA], stdin=(folder / "ca.pem").read_bytes())
        lab.hosts[1].run(["dpkg", "--purge", "--force-hold", *TOOLKIT], check=False)
        yield Site(lab=lab, container=name, address=address)
    finally:
        lab.docker.run("rm", "--force", name)
        for host in lab:
            host.run(["rm", "--force", "--recursive", CA, "/etc/docker/certs.d"])
            if daemons[host.name]:
                host.run(["tee", DAEMON], stdin=daemons[host.name].encode())
                host.run(["systemctl", "restart", "docker"])


def _settings(site: Site, folder: Path, **more: Any) -> str:
    """Variables for a run at this site."""
    file = folder / "site.yml"
    file.write_text(json.dumps({**site.settings, "engine_image_registry_password": PASSWORD, **more}))
    return f"@{file}"


def test_a_certificate_of_an_unknown_ca_is_told_with_the_setting(
    product: Product, lab: Lab, site: Site, tmp_path: Path
) -> None:
    settings = _settings(site, tmp_path, docker_engine_registry_ca_paths={})
    options = ("--inventory", lab.inventory, "--tags", "host,image", "--extra-vars", settings)
    run = product(*options, "--json", expect=4, what="host stage through a proxy, registry of an unknown CA")
    (failure,) = run.document["failures"]
    assert (failure["stage"], failure["code"]) == ("image", "registry-unreachable")
    assert site.registry in failure["message"] and "unknown authority" in failure["message"]
    assert "docker_engine_registry_ca_paths" in failure["remedy"]


def test_packages_come_through_the_proxy(lab: Lab, site: Site) -> None:
    """The run before brought them: over TLS with the site's CA, and from the mirrors without."""
    asked = site.asked_for()
    assert f"CONNECT {site.address}:443" in asked
    assert any(line.startswith(f"GET {lab.services.packages_url}/nvidia/") for line in asked)
    installed = lab.hosts[1].run(["dpkg-query", "--show", "--showformat=${Package} ", *TOOLKIT]).stdout.split()
    assert sorted(installed) == sorted(TOOLKIT)


def test_a_wrong_password_is_told_before_anything_is_pulled(
    product: Product, lab: Lab, site: Site, tmp_path: Path
) -> None:
    settings = _settings(site, tmp_path, engine_image_registry_password="not-the-password")
    run = product(*("--inventory", lab.inventory, "--tags", "host,image", "--extra-vars", settings, "--json"), expect=4)
    (failure,) = run.document["failures"]
    assert failure["stage"] == "image"
    assert site.registry in failure["message"]
    assert "unauthorized" in failure["message"]
    assert "engine_image_registry_username" in failure["remedy"]
    assert "not-the-password" not in run.told


def test_the_image_comes_by_digest(product: Product, lab: Lab, site: Site, tmp_path: Path) -> None:
    arguments = ("--inventory", lab.inventory, "--tags", "image,container", "--extra-vars", _settings(site, tmp_path))
    with processes.watched({"registry password": PASSWORD}) as shown:
        run = product(*arguments, "-vvv", "--json", what="image from a private registry through a proxy, container")
    assert shown == set()
    assert PASSWORD not in run.told
    assert site.asked_for().count(f"CONNECT {site.registry}") > 1
    look = ["docker", "images", "--no-trunc", "--digests", "--quiet", f"{site.registry}/{ENGINE_IMAGE}"]
    found = [host.run(look).stdout.split() for host in lab]
    assert found[0] == found[1] != []
    for host in lab:
        search = ["grep", "--recursive", "--files-with-matches", "--devices=skip", "--fixed-strings", PASSWORD]
        assert host.run([*search, "/etc", "/root", "/var/lib/deploy-dsv3", "/var/log"], check=False).stdout == ""
    for path in product.state.rglob("*"):
        assert not path.is_file() or PASSWORD not in path.read_text(errors="replace"), path


def test_only_docker_knows_of_the_proxy(lab: Lab, site: Site) -> None:
    """It would come between the engine's nodes."""
    for host in lab:
        environment = sight.environment(host)
        assert not [name for name in environment if name.lower().endswith("_proxy")], host.name
        search = ["grep", "--recursive", "--files-with-matches", "--fixed-strings", f"{site.address}:3128", "/etc"]
        assert host.run(search).stdout.split() == [DAEMON], host.name


def test_afterwards_the_hosts_are_as_before(product: Product, lab: Lab, site: Site, tmp_path: Path) -> None:
    product("destroy", "--inventory", lab.inventory, "--extra-vars", _settings(site, tmp_path), "--yes")
    for host in lab:
        assert sight.state(host)["images"] == {}, host.name
