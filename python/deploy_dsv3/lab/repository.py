"""The lab's package repositories: two flat, signed apt repositories, laid out as the vendor's.

``nvidia/<distribution>/x86_64/`` holds the driver, ``libnvidia-container/stable/deb/amd64/`` the
container toolkit.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Sequence
from pathlib import Path

from . import machine, packages, shell
from .docker_cli import DockerCli
from .errors import LabError
from .images import fingerprint
from .packages import Package

DISTRIBUTIONS = ("debian12", "debian13")
_TOOLKIT = "libnvidia-container/stable/deb/amd64"

# Runs in the services image: the machine itself need not have these tools.
_SCRIPT = """
export GNUPGHOME=/build/gnupg
mkdir -p -m 700 $GNUPGHOME
if ! gpg --batch --list-secret-keys lab@localhost > /dev/null 2>&1; then
    gpg --batch --quiet --passphrase '' --quick-generate-key \\
        'deploy-dsv3 lab <lab@localhost>' rsa3072 sign never
fi
cd /build/new/packages
for folder in */*; do
    repository=${folder%%/*}
    mkdir -p ../www/$repository
    dpkg-deb --root-owner-group -Zgzip -z1 --build $folder ../www/$repository > /dev/null
done
for repository in /build/new/www/*; do
    cd $repository
    apt-ftparchive packages . > Packages
    gzip --keep --fast Packages
    apt-ftparchive \\
        -o APT::FTPArchive::Release::Origin=deploy-dsv3-lab \\
        -o APT::FTPArchive::Release::Label=simulated release . > Release
    gpg --batch --yes --armor --detach-sign --output Release.gpg Release
    gpg --batch --yes --clearsign --output InRelease Release
    gpg --batch --armor --export lab@localhost > archive-key.asc
done
"""


def build(docker: DockerCli, image: str, folder: Path) -> None:
    """Have both repositories in a folder; nothing to do if it holds this very plan already.

    Args:
        image: an image with dpkg-deb, apt-ftparchive and gpg.
    """
    wanted = packages.plan(machine.kernel_release())
    stamp = folder / "stamp"
    mark = fingerprint(_SCRIPT, *(f"{p.control()}{p.scripts}{sorted(p.tree().items())}" for p in wanted))
    if stamp.is_file() and stamp.read_text() == mark:
        return
    work = folder.with_name(f"{folder.name}.build")
    _clear(work / "new")
    for package in wanted:
        _lay_out(package, work / "new" / "packages" / package.repository / package.deb.removesuffix(".deb"))
    options = ("--rm", "--interactive", "--network=none", f"--volume={work}:/build")
    script = f"{_SCRIPT}\nchown -R {os.getuid()}:{os.getgid()} /build\n"
    docker.run("run", *options, image, "/bin/sh", "-eu", stdin=script.encode())
    _publish(work / "new" / "www", folder)
    _clear(work / "new")
    stamp.write_text(mark)


def deb_files(folder: Path, wanted: Sequence[Package]) -> list[Path]:
    """Where built packages are.

    Raises:
        LabError: one was not built.
    """
    places = {"driver": folder / "nvidia" / DISTRIBUTIONS[0] / "x86_64", "toolkit": folder / _TOOLKIT}
    found = [places[package.repository] / package.deb for package in wanted]
    for path in found:
        if not path.is_file():
            raise LabError(f"{path.name} is not in the lab's repository", remedy="Run `lab up` again.")
    return found


def _publish(built: Path, folder: Path) -> None:
    # The folder itself stays: running services have it mounted.
    folder.mkdir(parents=True, exist_ok=True)
    for entry in folder.iterdir():
        _clear(entry)
    for distribution in DISTRIBUTIONS:
        shutil.copytree(built / "driver", folder / "nvidia" / distribution / "x86_64", copy_function=os.link)
    shutil.copytree(built / "toolkit", folder / _TOOLKIT, copy_function=os.link)
    shutil.copy(built / "toolkit" / "archive-key.asc", folder / "libnvidia-container" / "gpgkey")


def _clear(path: Path) -> None:
    shell.run(shell.as_root(["rm", "--recursive", "--force", str(path)]))


def _lay_out(package: Package, folder: Path) -> None:
    contents = {"/DEBIAN/control": package.control(), **package.tree()}
    contents |= {f"/DEBIAN/{name}": f"#!/bin/sh\nset -e\n{text}\n" for name, text in package.scripts.items()}
    if configuration := [path for path in package.tree() if path.startswith("/etc/")]:
        contents["/DEBIAN/conffiles"] = "\n".join(configuration) + "\n"
    for name, text in contents.items():
        path = folder / name.lstrip("/")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
        path.chmod(0o755 if text.startswith("#!") else 0o644)
