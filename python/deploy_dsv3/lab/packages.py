"""Simulated vendor packages: the vendor's names, versions and dependencies, with a simulated payload.

`plan` says what there is; `repository` builds it. Names and rules are those of NVIDIA's driver
installation guide and of the container toolkit's repository, so that roles and pins meet what they meet
in production.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Literal

from .errors import LabUsageError
from .paths import FILES

#: Driver version to the CUDA version it brings: two releases of the wanted branch, older ones, and a newer
#: branch for a meta package to drift to.
DRIVERS = {
    "535.261.03": "12.2",
    "570.195.03": "12.8",
    "580.95.05": "13.0",
    "580.105.08": "13.0",
    "590.48.01": "13.1",
}
TOOLKITS = ("1.19.1", "1.20.1")

#: From this branch on the vendor's NVSwitch packages carry no branch in their names; the one before has both.
_FIRST_UNVERSIONED_BRANCH = 590
_TRANSITION_BRANCH = 580
_BRANCHES = sorted({driver.partition(".")[0] for driver in DRIVERS})

#: What a pin of the driver holds.
_PINNED = (
    "nvidia-open cuda-drivers nvidia-driver-cuda libcuda1 libnvidia-ml1 nvidia-modprobe nvidia-persistenced "
    "nvidia-kernel-open-dkms nvidia-kernel-dkms nvidia-fabricmanager libnvidia-nscq"
)
_PAYLOADS = FILES / "packages"

RepositoryName = Literal["driver", "toolkit"]


@dataclass(frozen=True, kw_only=True)
class Package:
    """A binary package to build.

    Attributes:
        version: Debian version, e.g. ``580.95.05-1``.
        repository: which of the vendor's two repositories carries it.
        payload: folder below files/packages with its files; empty for a meta package.
        files: further files, absolute path to text.
        depends: its dependencies, each as in a control file.
        relations: other control fields, such as Conflicts or Recommends.
        scripts: maintainer scripts, name to shell text.
        variables: what ``@NAME@`` stands for in its files.
    """

    name: str
    version: str
    repository: RepositoryName
    summary: str
    payload: str = ""
    files: Mapping[str, str] = field(default_factory=dict)
    depends: tuple[str, ...] = ()
    relations: Mapping[str, str] = field(default_factory=dict)
    scripts: Mapping[str, str] = field(default_factory=dict)
    variables: Mapping[str, str] = field(default_factory=dict)

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
            **({"Depends": ", ".join(self.depends)} if self.depends else {}),
            **self.relations,
            "Description": f"{self.summary} (simulated by the deploy-dsv3 lab)",
        }
        return "".join(f"{name}: {value}\n" for name, value in fields.items())

    def tree(self) -> dict[str, str]:
        """All its files with their text, absolute paths."""
        found = dict(self.files)
        if self.payload:
            root = _PAYLOADS / self.payload
            sources = [p for p in sorted(root.rglob("*")) if p.is_file() and "__pycache__" not in p.parts]
            found |= {f"/{path.relative_to(root)}": path.read_text() for path in sources}
        return {path: self._substituted(text) for path, text in found.items()}

    def _substituted(self, text: str) -> str:
        for name, value in self.variables.items():
            text = text.replace(f"@{name}@", value)
        return text


def plan(kernel: str) -> list[Package]:
    """Every package of both repositories.

    Args:
        kernel: the running kernel, whose headers a host needs to build modules.
    """
    found = _kernel_packages(kernel)
    for driver, cuda in DRIVERS.items():
        found += [
            *_driver_packages(driver, cuda),
            *_nvswitch_packages(driver),
            _pinning(driver, f"{driver}-*"),
        ]
    found += [_pinning(branch, f"{branch}.*") for branch in _BRANCHES]
    for toolkit in TOOLKITS:
        found += _toolkit_packages(toolkit)
    return [*found, _ofed()]


def _kernel_packages(kernel: str) -> list[Package]:
    return [
        Package(
            name=f"linux-headers-{kernel}",
            version="1.0-1",
            repository="driver",
            summary="Headers of the running kernel",
            files={f"/usr/src/linux-headers-{kernel}/Makefile": "# simulated\n"},
            relations={"Provides": "linux-headers"},
            # Debian's headers run /etc/kernel/header_postinst.d/dkms.
            scripts={"postinst": "if command -v dkms > /dev/null; then dkms autoinstall; fi"},
        ),
        Package(
            name="dkms",
            version="3.99-1",  # newer than the distribution's, so that no compiler has to be installed
            repository="driver",
            summary="Dynamic Kernel Module System",
            payload="dkms",
            relations={"Recommends": f"linux-headers-{kernel}"},
        ),
    ]


def _driver_packages(driver: str, cuda: str) -> list[Package]:
    version = f"{driver}-1"
    package = partial(Package, version=version, repository="driver", variables={"DRIVER": driver, "CUDA": cuda})

    def same(*names: str) -> tuple[str, ...]:
        return tuple(f"{name} (= {version})" for name in names)

    def library(name: str, summary: str) -> Package:
        return package(name=name, summary=summary, files={f"/usr/share/doc/{name}/{driver}": "simulated\n"})

    def modules(name: str, flavour: str, *, rival: str) -> Package:
        source = f"/usr/src/nvidia-{driver}"
        return package(
            name=name,
            summary=f"NVIDIA kernel module sources ({flavour})",
            files={
                f"{source}/dkms.conf": f'PACKAGE_NAME="nvidia"\nPACKAGE_VERSION="{driver}"\n',
                f"{source}/flavour": f"{flavour}\n",
            },
            depends=("dkms",),
            relations={"Conflicts": rival, "Replaces": rival},
            scripts={"postinst": "dkms autoinstall", "prerm": f"dkms remove nvidia/{driver} || true"},
        )

    return [
        package(
            name="nvidia-open",
            summary="NVIDIA driver with open kernel modules",
            depends=same("nvidia-kernel-open-dkms", "nvidia-driver-cuda"),
        ),
        package(
            name="cuda-drivers",
            summary="NVIDIA driver with proprietary kernel modules",
            depends=same("nvidia-kernel-dkms", "nvidia-driver-cuda"),
        ),
        package(
            name="nvidia-driver-cuda",
            summary="NVIDIA compute driver and nvidia-smi",
            payload="driver-cuda",
            depends=(
                *same("libcuda1", "libnvidia-ml1", "nvidia-persistenced", "nvidia-modprobe"),
                " | ".join(same("nvidia-kernel-open-dkms", "nvidia-kernel-dkms")),
            ),
        ),
        library("libcuda1", "NVIDIA CUDA driver library"),
        library("libnvidia-ml1", "NVIDIA Management Library"),
        package(name="nvidia-modprobe", summary="Loads the NVIDIA kernel module"),
        package(
            name="nvidia-persistenced",
            summary="NVIDIA persistence daemon",
            payload="persistenced",
            scripts=_started("nvidia-persistenced.service"),
        ),
        modules("nvidia-kernel-open-dkms", "open", rival="nvidia-kernel-dkms"),
        modules("nvidia-kernel-dkms", "proprietary", rival="nvidia-kernel-open-dkms"),
    ]


def _nvswitch_packages(driver: str) -> list[Package]:
    branch = driver.partition(".")[0]
    found = []
    for stem, summary, payload in (
        ("nvidia-fabricmanager", "NVSwitch fabric manager", "fabricmanager"),
        ("libnvidia-nscq", "NVSwitch configuration and query library", ""),
    ):
        every_name = [stem, *(f"{stem}-{other}" for other in _BRANCHES)]
        for name in nvswitch_names(stem, branch):
            rivals = ", ".join(other for other in every_name if other != name)
            found.append(
                Package(
                    name=name,
                    version=f"{driver}-1",
                    repository="driver",
                    summary=summary,
                    payload=payload,
                    relations={"Conflicts": rivals, "Replaces": rivals},
                    scripts=_installed("nvidia-fabricmanager.service") if payload else {},
                    variables={"DRIVER": driver},
                )
            )
    return found


def nvswitch_names(stem: str, branch: str) -> list[str]:
    """How the vendor names the NVSwitch packages of a branch: with it up to 580, without it from 590 on."""
    if int(branch) >= _FIRST_UNVERSIONED_BRANCH:
        return [stem]
    return [f"{stem}-{branch}", stem] if int(branch) == _TRANSITION_BRANCH else [f"{stem}-{branch}"]


def _pinning(what: str, version: str) -> Package:
    name = f"nvidia-driver-pinning-{what}"
    preferences = f"Package: {_PINNED}\nPin: version {version}\nPin-Priority: 1001\n"
    return Package(
        name=name,
        version="1-1",
        repository="driver",
        summary=f"Pins the NVIDIA driver to {what}",
        files={f"/etc/apt/preferences.d/{name}": preferences},
        relations={"Provides": "nvidia-driver-pinning", "Conflicts": "nvidia-driver-pinning"},
    )


def _ofed() -> Package:
    """What a DOCA-OFED is known by. Hosts are born with it; no role installs one."""
    return Package(
        name="ofed-scripts",
        version="25.07-1",
        repository="driver",
        summary="Scripts of DOCA-OFED",
        payload="ofed-scripts",
    )


def _toolkit_packages(toolkit: str) -> list[Package]:
    version = f"{toolkit}-1"
    package = partial(Package, version=version, repository="toolkit", variables={"VERSION": toolkit})
    return [
        package(name="libnvidia-container1", summary="NVIDIA container runtime library"),
        package(
            name="libnvidia-container-tools",
            summary="NVIDIA container runtime library tools",
            depends=(f"libnvidia-container1 (>= {version})",),
        ),
        package(
            name="nvidia-container-toolkit-base",
            summary="NVIDIA Container Toolkit base",
            payload="toolkit-base",
            scripts=_started("nvidia-cdi-refresh.path", "nvidia-cdi-refresh.service"),
        ),
        package(
            name="nvidia-container-toolkit",
            summary="NVIDIA Container Toolkit",
            payload="toolkit",
            depends=(
                f"nvidia-container-toolkit-base (= {version})",
                f"libnvidia-container-tools (>= {version})",
            ),
        ),
    ]


def _installed(unit: str) -> dict[str, str]:
    """Maintainer scripts for a unit that the vendor leaves to the administrator to enable."""
    return {
        "postinst": "systemctl daemon-reload",
        "prerm": f'if [ "$1" = remove ]; then systemctl --quiet disable --now {unit} || true; fi',
        "postrm": "systemctl daemon-reload || true",
    }


def _started(*units: str) -> dict[str, str]:
    """Maintainer scripts as debhelper writes them for units that are enabled and started on installation."""
    names = " ".join(units)
    start = f"systemctl --quiet enable {names}\nsystemctl restart {names} || true"
    return {**_installed(names), "postinst": f"systemctl daemon-reload\n{start}"}


def closure(packages: Iterable[Package], wanted: Mapping[str, str]) -> list[Package]:
    """The wanted packages with what they depend on and recommend, dependencies first.

    Args:
        wanted: name to version, with or without Debian revision.

    Raises:
        LabUsageError: the repositories do not carry one.
    """
    available = {(package.name, package.version): package for package in packages}
    newest = {package.name: package for package in available.values()}
    ordered: dict[str, Package] = {}

    def visit(name: str, version: str) -> None:
        if name in ordered:
            return
        package = available.get((name, version)) if version else newest.get(name)
        if package is None:
            raise LabUsageError(
                f"the lab's repositories have no package {name} {version}".rstrip(),
                remedy=f"They carry the drivers {', '.join(DRIVERS)} and the toolkits {', '.join(TOOLKITS)}.",
            )
        for group in package.depends:
            alternatives = group.split(" | ")
            chosen = next((part for part in alternatives if part.partition(" ")[0] in wanted), alternatives[0])
            dependency, _, bound = chosen.partition(" ")
            visit(dependency, bound.strip("(=) ") if bound.startswith("(=") else "")
        if recommended := package.relations.get("Recommends"):
            visit(recommended, "")
        ordered[name] = package

    for name, version in wanted.items():
        visit(name, version if "-" in version else f"{version}-1")
    return list(ordered.values())
