"""The images of the lab's containers.

* ``debian``: a minimal Debian made by debootstrap from the machine's own mirror (or pulled, where a
  registry can be reached and no mirror is known); the slow one. The stand-in engine's image is built on
  it too.
* ``host``: `debian` with a user, sshd's settings and the simulated kernel: what a bare server looks like.
* ``services``: `debian` with a registry and the tools of a package repository.

Every image's tag carries a fingerprint of what went into it, so a changed input makes a new one.
"""

from __future__ import annotations

import hashlib
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path

from . import machine, prerequisites, shell
from .docker_cli import DockerCli, File, tree
from .errors import LabError
from .paths import FILES, LabPaths

#: What a Debian server carries that a minimal debootstrap lacks; nothing of ours or of Docker.
_SERVER_PACKAGES = (
    *("ca-certificates", "dbus", "iproute2", "iputils-ping", "kmod", "openssh-server"),
    *("procps", "python3", "sudo", "systemd", "systemd-sysv"),
)
_SERVICES_PACKAGES = ("apt-utils", "docker-registry", "gpg", "gpg-agent")

_CA_BUNDLE = "/etc/ssl/certs/ca-certificates.crt"

#: The administrator of a lab host: an ordinary user with sudo.
ADMIN_USER, ADMIN_UID = "ops", 1000

_HOST_SCRIPT = f"""
for tool in modprobe lsmod modinfo; do
    dpkg-divert --quiet --local --rename --divert /usr/sbin/$tool.distrib --add /usr/sbin/$tool
    ln -s /usr/lib/dsv3-lab/kernel.py /usr/sbin/$tool
done
ln -s /usr/lib/dsv3-lab/kernel.py /usr/sbin/update-initramfs
useradd --uid {ADMIN_UID} --create-home --shell /bin/bash {ADMIN_USER}
install --directory --owner={ADMIN_USER} --group={ADMIN_USER} --mode=0700 /home/{ADMIN_USER}/.ssh
rm -f /etc/ssh/ssh_host_* /etc/machine-id /var/lib/dbus/machine-id
systemctl --quiet enable ssh.service
systemctl --quiet mask getty.target console-getty.service apt-daily.timer apt-daily-upgrade.timer
"""


def fingerprint(*parts: str | bytes) -> str:
    """Twelve characters that change when any part does."""
    digest = hashlib.sha256()
    for part in parts:
        data = part.encode() if isinstance(part, str) else part
        digest.update(f"{len(data)}:".encode() + data)
    return digest.hexdigest()[:12]


def _of_files(files: dict[str, File]) -> Iterable[bytes]:
    for path, file in sorted(files.items()):
        yield path.encode() + b"\0" + file.content


def exists(docker: DockerCli, tag: str) -> bool:
    """Whether the engine holds this image."""
    return docker.inspect("image", tag) is not None


def debian(docker: DockerCli, paths: LabPaths, suite: str, mirror: str = "") -> str:
    """Have the base image of a Debian release; returns its tag. About a minute the first time.

    Args:
        mirror: archive to use instead of the one that the machine's apt configuration names.

    Raises:
        LabError: there is neither a mirror of Debian nor a registry with its image.
    """
    apt = machine.apt_settings(mirror)
    sources, configuration = apt.sources(suite), apt.configuration()
    tag = f"dsv3-lab/debian:{suite}-{fingerprint(sources, configuration, *_SERVER_PACKAGES)}"
    if exists(docker, tag):
        return tag
    files = {"/etc/apt/apt.conf.d/90mirror": File(content=configuration.encode())}
    if bundle := machine.ca_bundle():  # a mirror may stand behind a private CA
        files[_CA_BUNDLE] = File(content=bundle.read_bytes())
    if apt.archive:
        files["/etc/apt/sources.list"] = File(content=sources.encode())
        bare, script = _debootstrap(docker, paths, suite, apt.archive), ""
    else:
        bare, script = _pull(docker, f"debian:{suite}"), _install(_SERVER_PACKAGES)
        if bundle:  # which the installation of ca-certificates writes anew
            script = f"cp {_CA_BUNDLE} /run/bundle; {script}; cp /run/bundle {_CA_BUNDLE}"
    docker.extend(bare, tag, script, files, ['CMD ["/bin/bash"]'])
    docker.run("rmi", bare)
    return tag


def _pull(docker: DockerCli, image: str) -> str:
    if docker.run("pull", image, check=False).returncode != 0:
        raise LabError(
            "no Debian to make hosts of: the apt configuration of this machine names no mirror of Debian over http "
            f"or https, and the image {image} cannot be pulled",
            remedy="Name a mirror: deploy-dsv3 lab up --mirror URL.",
        )
    return image


def _install(packages: Sequence[str]) -> str:
    return (
        "export DEBIAN_FRONTEND=noninteractive; apt-get -q update; "
        f"apt-get -qy --no-install-recommends install {' '.join(packages)}; "
        "apt-get clean; rm -rf /var/lib/apt/lists/*"
    )


def _debootstrap(docker: DockerCli, paths: LabPaths, suite: str, archive: str) -> str:
    """Make a minimal Debian and import it; returns the tag of the image."""
    prerequisites.have("debootstrap")
    paths.cache.mkdir(parents=True, exist_ok=True)
    log = paths.cache / "debootstrap.log"
    log.unlink(missing_ok=True)
    work = Path(tempfile.mkdtemp(prefix="debootstrap-", dir=paths.cache))
    root, tag = work / "root", f"dsv3-lab/debian:{suite}-bare"
    options = ["--variant=minbase", "--force-check-gpg", f"--include={','.join(_SERVER_PACKAGES)}"]
    command = [shell.which("debootstrap") or "debootstrap", *options, suite, str(root), archive]
    pack = f"rm -rf {root}/var/cache/apt/archives/*.deb {root}/var/lib/apt/lists/*; tar -C {root} -cf {work}/root.tar ."
    try:
        shell.run(shell.as_root(command), log=log)
        shell.run(shell.as_root(["sh", "-euc", pack]))
        docker.run("import", str(work / "root.tar"), tag)
    finally:
        shell.run(shell.as_root(["rm", "--recursive", "--force", "--one-file-system", str(work)]), check=False)
    return tag


def host(docker: DockerCli, base: str, suite: str) -> str:
    """Have the image of a bare server with a release of Debian; returns its tag."""
    files = tree(FILES / "host")
    tag = f"dsv3-lab/host-{suite}:{fingerprint(base, _HOST_SCRIPT, *_of_files(files))}"
    if not exists(docker, tag):
        docker.extend(base, tag, _HOST_SCRIPT, files, ['CMD ["/usr/lib/dsv3-lab/kernel.py", "boot"]'])
    return tag


def services(docker: DockerCli, base: str) -> str:
    """Have the image of the lab's services; returns its tag."""
    script = _install(_SERVICES_PACKAGES)
    tag = f"dsv3-lab/services:{fingerprint(base, script)}"
    if not exists(docker, tag):
        docker.extend(base, tag, script, {})
    return tag


def tidy(docker: DockerCli) -> None:
    """Remove images of earlier fingerprints, except those that containers were made from."""
    listing = docker.run("images", "--format", "{{.Repository}} {{.Tag}}", "--filter=reference=dsv3-lab/*").stdout
    seen: set[str] = set()
    for line in listing.splitlines():  # the newest first
        repository, tag = line.split()
        if repository != "dsv3-lab/debian" and repository in seen:
            docker.run("rmi", f"{repository}:{tag}", check=False)
        seen.add(repository)
