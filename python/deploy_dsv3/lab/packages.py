"""Simulated vendor packages: the vendor's names, versions and dependencies, with a simulated payload.

`plan` says what there is; `build` makes two flat, signed apt repositories of it as the vendor lays them out:
``nvidia/<distribution>/x86_64/`` (driver) and ``libnvidia-container/stable/deb/amd64/`` (container toolkit). The
roles take the same path to them as in production.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from . import machine, shell
from .docker_cli import DockerCli
from .errors import LabError, LabUsageError
from .images import fingerprint
from .paths import FILES

#: Driver version to the CUDA version it brings: two releases of the wanted branch, older ones, and a newer branch
#: for a meta package to drift to.
DRIVERS = {
    "535.261.03": "12.2",
    "570.195.03": "12.8",
    "580.95.05": "13.0",
    "580.105.08": "13.0",
    "590.48.01": "13.1",
}
TOOLKITS = ("1.19.1", "1.20.1")
#: From this branch on the vendor's packages carry no branch in their names.
_FIRST_UNVERSIONED_BRANCH = 590
#: The branch that is packaged under both kinds of names.
_TRANSITION_BRANCH = 580

DRIVER_REPOSITORY, TOOLKIT_REPOSITORY = "nvidia", "toolkit"
_TOOLKIT_PATH = "libnvidia-container/stable/deb/amd64"
_DISTRIBUTIONS = ("debian12", "debian13")
_PAYLOADS = FILES / "packages"


@dataclass(frozen=True, kw_only=True)
class Package:
    """A binary package to build.

    Attributes:
        version: Debian version, e.g. ``580.95.05-1``.
        repository: which of the two repositories carries it.
        payload: folder below files/packages with its files; empty for a meta package.
        files: further files, absolute path to text.
        relations: control fields such as Depends, Conflicts, Provides, Recommends.
        scripts: maintainer scripts, name to shell text.
        variables: what ``@NAME@`` stands for in its files.
    """

    name: str
    version: str
    repository: str
    summary: str
    payload: str = ""
    files: Mapping[str, str] | None = None
    relations: Mapping[str, str] | None = None
    scripts: Mapping[str, str] | None = None
    variables: Mapping[str, str] | None = None

    @property
    def deb(self) -> str:
        """Name of its file."""
        return f"{self.name}_{self.version}_amd64.deb"

    def control(self) -> str:
        """Its control file."""
        fields = {
            "Package": self.name,
            "Version": self.version,
            "Architecture": "amd64",
            "Maintainer": "deploy-dsv3 lab <lab@localhost>",
            "Section": "contrib/misc",
            "Priority": "optional",
            **(self.relations or {}),
            "Description": f"{self.summary} (simulated by the deploy-dsv3 lab)",
        }
        return "".join(f"{name}: {value}\n" for name, value in fields.items())

    def tree(self) -> dict[str, str]:
        """All its files with their text, absolute paths."""
        found = dict(self.files or {})
        root = _PAYLOADS / self.payload
        if self.payload:
            found |= {
                f"/{path.relative_to(root)}": path.read_text()
                for path in sorted(root.rglob("*"))
                if path.is_file()
            }
        for path, text in found.items():
            for name, value in (self.variables or {}).items():
                text = text.replace(f"@{name}@", value)
            found[path] = text
        return found


def plan(kernel: str) -> list[Package]:
    """Every package of both repositories.

    Args:
        kernel: the running kernel, whose headers a host needs to build modules.
    """
    found = [*_kernel_packages(kernel)]
    for driver, cuda in DRIVERS.items():
        found += _driver_packages(driver, cuda)
    for branch in sorted({driver.split(".")[0] for driver in DRIVERS}):
        found.append(_pinning(branch, f"{branch}.*"))
    for toolkit in TOOLKITS:
        found += _toolkit_packages(toolkit)
    return found


def _kernel_packages(kernel: str) -> list[Package]:
    return [
        Package(
            name=f"linux-headers-{kernel}",
            version="1.0-1",
            repository=DRIVER_REPOSITORY,
            summary="Headers of the running kernel",
            files={f"/usr/src/linux-headers-{kernel}/Makefile": "# simulated\n"},
            relations={"Provides": "linux-headers"},
            # Debian's headers run /etc/kernel/header_postinst.d/dkms.
            scripts={"postinst": "if command -v dkms > /dev/null; then dkms autoinstall; fi"},
        ),
        Package(
            name="dkms",
            version="3.99-1",
            repository=DRIVER_REPOSITORY,
            summary="Dynamic Kernel Module System",
            payload="dkms",
            relations={"Recommends": f"linux-headers-{kernel}"},
        ),
    ]


def _driver_packages(driver: str, cuda: str) -> list[Package]:
    version, branch = f"{driver}-1", driver.split(".")[0]
    variables = {"DRIVER": driver, "CUDA": cuda}

    def package(
        name: str, summary: str, *, payload: str = "", depends: Sequence[str] = (), **more: object
    ) -> Package:
        relations = dict(more.pop("relations", {}) or {})  # type: ignore[call-overload]
        if depends:
            relations["Depends"] = ", ".join(depends)
        return Package(
            name=name,
            version=version,
            repository=DRIVER_REPOSITORY,
            summary=summary,
            payload=payload,
            relations=relations,
            variables=variables,
            **more,  # type: ignore[arg-type]
        )

    def same(*names: str) -> list[str]:
        return [f"{name} (= {version})" for name in names]

    found = [
        package(
            "nvidia-open",
            "NVIDIA driver with open kernel modules",
            depends=same("nvidia-kernel-open-dkms", "nvidia-driver-cuda"),
        ),
        package(
            "cuda-drivers",
            "NVIDIA driver with proprietary kernel modules",
            depends=same("nvidia-kernel-dkms", "nvidia-driver-cuda"),
        ),
        package(
            "nvidia-driver-cuda",
            "NVIDIA compute driver and nvidia-smi",
            payload="driver-cuda",
            depends=[
                *same("libcuda1", "libnvidia-ml1", "nvidia-persistenced", "nvidia-modprobe"),
                f"nvidia-kernel-open-dkms (= {version}) | nvidia-kernel-dkms (= {version})",
            ],
        ),
        package(
            "libcuda1",
            "NVIDIA CUDA driver library",
            files={f"/usr/share/doc/libcuda1/{driver}": "simulated\n"},
        ),
        package(
            "libnvidia-ml1",
            "NVIDIA Management Library",
            files={f"/usr/share/doc/libnvidia-ml1/{driver}": "simulated\n"},
        ),
        package("nvidia-modprobe", "Loads the NVIDIA kernel module"),
        package(
            "nvidia-persistenced",
            "NVIDIA persistence daemon",
            payload="persistenced",
            scripts=_service_scripts("nvidia-persistenced.service"),
        ),
        *(
            package(
                name,
                f"NVIDIA kernel module sources ({flavour})",
                depends=["dkms"],
                relations={"Conflicts": other, "Replaces": other, "Provides": "nvidia-kernel-dkms-any"},
                files={
                    f"/usr/src/nvidia-{driver}/dkms.conf": f'PACKAGE_NAME="nvidia"\nPACKAGE_VERSION="{driver}"\n',
                    f"/usr/src/nvidia-{driver}/flavour": f"{flavour}\n",
                },
                scripts={"postinst": "dkms autoinstall", "prerm": f"dkms remove nvidia/{driver} || true"},
            )
            for name, flavour, other in (
                ("nvidia-kernel-open-dkms", "open", "nvidia-kernel-dkms"),
                ("nvidia-kernel-dkms", "proprietary", "nvidia-kernel-open-dkms"),
            )
        ),
        _pinning(driver, f"{driver}-*"),
    ]
    for stem, summary, payload, scripts in (
        (
            "nvidia-fabricmanager",
            "NVSwitch fabric manager",
            "fabricmanager",
            _install_only("nvidia-fabricmanager.service"),
        ),
        ("libnvidia-nscq", "NVSwitch configuration and query library", "", None),
    ):
        for name in _branch_names(stem, branch):
            others = [
                f"{stem}-{other}"
                for other in sorted({d.split(".")[0] for d in DRIVERS})
                if f"{stem}-{other}" != name
            ]
            rivals = ", ".join([*others, *([stem] if name != stem else [])])
            found.append(
                package(
                    name,
                    summary,
                    payload=payload,
                    scripts=scripts,
                    relations={"Conflicts": rivals, "Replaces": rivals},
                )
            )
    return found


def _branch_names(stem: str, branch: str) -> list[str]:
    """How the vendor names a package of a branch (reference: driver installation guide, package names)."""
    if int(branch) >= _FIRST_UNVERSIONED_BRANCH:
        return [stem]
    return [f"{stem}-{branch}", stem] if int(branch) == _TRANSITION_BRANCH else [f"{stem}-{branch}"]


def _pinning(what: str, version: str) -> Package:
    names = (
        "nvidia-open cuda-drivers nvidia-driver-cuda libcuda1 libnvidia-ml1 nvidia-modprobe nvidia-persistenced "
        "nvidia-kernel-open-dkms nvidia-kernel-dkms nvidia-fabricmanager libnvidia-nscq"
    )
    return Package(
        name=f"nvidia-driver-pinning-{what}",
        version="1-1",
        repository=DRIVER_REPOSITORY,
        summary=f"Pins the NVIDIA driver to {what}",
        files={
            f"/etc/apt/preferences.d/nvidia-driver-pinning-{what}": f"Package: {names}\nPin: version {version}\nPin-Priority: 1001\n"
        },
        relations={"Provides": "nvidia-driver-pinning", "Conflicts": "nvidia-driver-pinning"},
    )


def _toolkit_packages(toolkit: str) -> list[Package]:
    version = f"{toolkit}-1"
    variables = {"VERSION": toolkit}
    specs: list[tuple[str, str, str, str]] = [
        ("libnvidia-container1", "NVIDIA container runtime library", "", ""),
        (
            "libnvidia-container-tools",
            "NVIDIA container runtime library tools",
            "",
            f"libnvidia-container1 (>= {version})",
        ),
        ("nvidia-container-toolkit-base", "NVIDIA Container Toolkit base", "toolkit-base", ""),
        (
            "nvidia-container-toolkit",
            "NVIDIA Container Toolkit",
            "",
            f"nvidia-container-toolkit-base (= {version}), libnvidia-container-tools (>= {version})",
        ),
    ]
    return [
        Package(
            name=name,
            version=version,
            repository=TOOLKIT_REPOSITORY,
            summary=summary,
            payload=payload,
            relations={"Depends": depends} if depends else {},
            scripts=_service_scripts("nvidia-cdi-refresh.path", "nvidia-cdi-refresh.service")
            if payload
            else None,
            variables=variables,
        )
        for name, summary, payload, depends in specs
    ]


def _service_scripts(*units: str) -> dict[str, str]:
    """What debhelper writes for units that are enabled and started on installation."""
    names = " ".join(units)
    return {
        "postinst": f"systemctl daemon-reload\nsystemctl --quiet enable {names}\nsystemctl restart {names} || true",
        "prerm": f'if [ "$1" = remove ]; then systemctl --quiet disable --now {names} || true; fi',
        "postrm": "systemctl daemon-reload || true",
    }


def _install_only(unit: str) -> dict[str, str]:
    """Units that the vendor leaves to the administrator to enable."""
    return {
        "postinst": "systemctl daemon-reload",
        "prerm": f'if [ "$1" = remove ]; then systemctl --quiet disable --now {unit} || true; fi',
        "postrm": "systemctl daemon-reload || true",
    }


def closure(packages: Iterable[Package], wanted: Mapping[str, str]) -> list[Package]:
    """The wanted packages with what they depend on, dependencies first.

    Args:
        wanted: name to version, with or without Debian revision.

    Raises:
        LabUsageError: the repositories do not carry one.
    """
    available = {(package.name, package.version): package for package in packages}
    newest = {package.name: package for package in available.values()}
    ordered: dict[str, Package] = {}

    def visit(name: str, version: str) -> None:
        package = newest.get(name) if not version else available.get((name, version))
        if package is None:
            raise LabUsageError(
                f"the lab's repositories have no package {name} {version}",
                remedy=f"Versions of the driver: {', '.join(DRIVERS)}; of the toolkit: {', '.join(TOOLKITS)}.",
            )
        if name in ordered:
            return
        for group in (package.relations or {}).get("Depends", "").split(", "):
            alternatives = [part.strip() for part in group.split("|") if part.strip()]
            chosen = next(
                (part for part in alternatives if part.split()[0] in wanted),
                alternatives[0] if alternatives else "",
            )
            if chosen:
                dependency, _, bound = chosen.partition(" ")
                visit(dependency, bound.strip("(=) ") if bound.startswith("(=") else "")
        for recommended in (package.relations or {}).get("Recommends", "").split(", "):
            if recommended in newest:
                visit(recommended, "")
        ordered[name] = package

    for name, version in wanted.items():
        visit(name, version if "-" in version or not version else f"{version}-1")
    return list(ordered.values())


# ---------------------------------------------------------------------- building

_BUILD = """
export GNUPGHOME=/build/gnupg
mkdir -p -m 700 $GNUPGHOME
if ! gpg --batch --list-secret-keys lab@localhost > /dev/null 2>&1; then
    gpg --batch --quiet --passphrase '' --quick-generate-key 'deploy-dsv3 lab <lab@localhost>' rsa3072 sign never
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
    apt-ftparchive -o APT::FTPArchive::Release::Origin=deploy-dsv3-lab -o APT::FTPArchive::Release::Label=simulated release . > Release
    gpg --batch --yes --armor --detach-sign --output Release.gpg Release
    gpg --batch --yes --clearsign --output InRelease Release
    gpg --batch --armor --export lab@localhost > archive-key.asc
done
"""


def build(docker: DockerCli, image: str, repository: Path) -> None:
    """Have both repositories in a folder; nothing to do if it holds this very plan already.

    Args:
        image: an image with dpkg-deb, apt-ftparchive and gpg.
    """
    packages = plan(machine.kernel_release())
    stamp = fingerprint(
        _BUILD,
        *(f"{package.control()}{package.scripts}{sorted(package.tree().items())}" for package in packages),
    )
    if (repository / "stamp").is_file() and (repository / "stamp").read_text() == stamp:
        return
    work = repository.with_name(f"{repository.name}.build")
    shell.run(shell.as_root(["rm", "--recursive", "--force", str(work / "new")]))
    for package in packages:
        _lay_out(package, work / "new" / "packages" / package.repository / package.deb.removesuffix(".deb"))
    owner = f"{os.getuid()}:{os.getgid()}"
    docker.run(
        "run", "--rm", "--interactive", "--network=none", f"--volume={work}:/build", image, "/bin/sh", "-eu",
        stdin=f"{_BUILD}\nchown -R {owner} /build\n".encode(),
    )  # fmt: skip
    built = work / "new" / "www"
    # The folder stays: running services have it mounted.
    repository.mkdir(parents=True, exist_ok=True)
    for entry in repository.iterdir():
        shutil.rmtree(entry) if entry.is_dir() else entry.unlink()
    for distribution in _DISTRIBUTIONS:
        shutil.copytree(
            built / DRIVER_REPOSITORY, repository / "nvidia" / distribution / "x86_64", copy_function=os.link
        )
    shutil.copytree(built / TOOLKIT_REPOSITORY, repository / _TOOLKIT_PATH, copy_function=os.link)
    shutil.copy(built / TOOLKIT_REPOSITORY / "archive-key.asc", repository / "libnvidia-container" / "gpgkey")
    shutil.rmtree(work / "new")
    (repository / "stamp").write_text(stamp)


def deb_path(repository: Path, package: Package) -> Path:
    """Where a built package is.

    Raises:
        LabError: it was not built.
    """
    folder = repository / (
        _TOOLKIT_PATH if package.repository == TOOLKIT_REPOSITORY else "nvidia/debian13/x86_64"
    )
    path = folder / package.deb
    if not path.is_file():
        raise LabError(f"{package.deb} is not in the lab's repository", remedy="Run `lab up` again.")
    return path


def _lay_out(package: Package, folder: Path) -> None:
    scripts = {
        f"/DEBIAN/{name}": f"#!/bin/sh\nset -e\n{text}\n" for name, text in (package.scripts or {}).items()
    }
    configuration = [path for path in package.tree() if path.startswith("/etc/")]
    control = {"/DEBIAN/control": package.control()}
    if configuration:
        control["/DEBIAN/conffiles"] = "\n".join(configuration) + "\n"
    for name, text in {**control, **scripts, **package.tree()}.items():
        path = folder / name.lstrip("/")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
        path.chmod(0o755 if text.startswith("#!") else 0o644)
