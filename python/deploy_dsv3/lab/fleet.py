"""A lab that is up: its hosts by name, for tests and for the command line.

lab = Lab.load()
lab["gpu-02"].reboot()
with lab["gpu-01"].cable_pulled(): ...
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from . import outer_engine
from .docker_cli import DockerCli
from .errors import LabError, LabUsageError
from .hosts import Host, HostRecord
from .images import ADMIN_USER
from .paths import LabPaths, default_paths
from .services import Services

DEFAULT_NAME = "lab"
_SCHEMA = 2


@dataclass(frozen=True, kw_only=True)
class LabRecord:
    """What is written down of a lab.

    Attributes:
        subnet: its network in CIDR notation.
        suite: release of Debian that its hosts run, where their profiles name no other.
        host_images: what its hosts are made from, by release.
        inventory: directory of its inventory.
    """

    name: str
    subnet: str
    suite: str
    host_images: Mapping[str, str]
    inventory: str
    hosts: tuple[HostRecord, ...]

    def save(self, folder: Path) -> None:
        """Write it down in the lab's folder."""
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "lab.json").write_text(json.dumps({"schema": _SCHEMA, **asdict(self)}, indent=2) + "\n")


def read_record(folder: Path) -> LabRecord | None:
    """The record of the lab in a folder, or None.

    Raises:
        LabError: it is of another version.
    """
    path = folder / "lab.json"
    if not path.is_file():
        return None
    fields = json.loads(path.read_text())
    if fields.pop("schema", None) != _SCHEMA:
        raise LabError(
            f"the lab {folder.name} was made by another version of deploy-dsv3",
            remedy=f"Take it down and bring it up anew: deploy-dsv3 lab down --name {folder.name}.",
        )
    fields["hosts"] = tuple(HostRecord(**host) for host in fields["hosts"])
    return LabRecord(**fields)


def names(paths: LabPaths) -> list[str]:
    """The labs that are up, or were left half-made."""
    folder = paths.state / "labs"
    return sorted(entry.name for entry in folder.iterdir() if entry.is_dir()) if folder.is_dir() else []


@dataclass(frozen=True, kw_only=True)
class Lab:
    """One lab and its hosts."""

    record: LabRecord
    paths: LabPaths
    docker: DockerCli

    @classmethod
    def load(cls, name: str = DEFAULT_NAME, paths: LabPaths | None = None) -> Lab:
        """The lab of this name.

        Raises:
            LabUsageError: it is not up.
        """
        paths = paths or default_paths()
        record = read_record(paths.lab(name))
        engine = outer_engine.recall(paths)
        if record is None or engine is None:
            up = ", ".join(names(paths)) or "none"
            raise LabUsageError(
                f"there is no lab {name} here (up: {up})",
                remedy=f"Bring it up: deploy-dsv3 lab up --name {name}.",
            )
        return cls(record=record, paths=paths, docker=engine.docker)

    @property
    def name(self) -> str:
        """Its name."""
        return self.record.name

    @property
    def folder(self) -> Path:
        """Its part of the state."""
        return self.paths.lab(self.name)

    @property
    def inventory(self) -> Path:
        """The directory of its inventory."""
        return Path(self.record.inventory)

    @property
    def labels(self) -> dict[str, str]:
        """Labels of all its containers, networks and volumes."""
        return labels(self.paths, self.name)

    @property
    def hosts(self) -> list[Host]:
        """Its hosts, the head first."""
        return [self.host(record) for record in self.record.hosts]

    def host(self, record: HostRecord) -> Host:
        """The handle of a host that need not exist yet."""
        return Host(
            record=record,
            lab=self.name,
            docker=self.docker,
            folder=self.folder / "hosts" / record.name,
            labels=self.labels,
        )

    def __getitem__(self, name: str) -> Host:
        for host in self.hosts:
            if host.name == name:
                return host
        raise LabUsageError(
            f"the lab {self.name} has no host {name}",
            remedy=f"It has {', '.join(host.name for host in self.hosts)}.",
        )

    def __iter__(self) -> Iterator[Host]:
        return iter(self.hosts)

    @property
    def services(self) -> Services:
        """Its package repository and registry."""
        return Services(
            lab=self.name,
            subnet=self.record.subnet,
            docker=self.docker,
            repository=self.paths.cache / "repository",
            labels=self.labels,
        )

    @property
    def key(self) -> Path:
        """Private key of the administrator."""
        return self.folder / "ssh" / "id_ed25519"

    @property
    def known_hosts(self) -> Path:
        """Host keys of its hosts."""
        return self.folder / "ssh" / "known_hosts"

    @property
    def password_file(self) -> Path:
        """The administrator's sudo password, on hosts that ask for one."""
        return self.folder / "ssh" / "sudo_password"

    def suite(self, host: Host) -> str:
        """Release of Debian that a host runs."""
        return host.record.hardware_profile().suite or self.record.suite

    def host_image(self, host: Host) -> str:
        """What a host is made from."""
        return self.record.host_images[self.suite(host)]

    def reset(self, host: Host) -> None:
        """Make a host bare again: a new server with the old one's name, address and host key."""
        host.remove()
        self.bear(host)

    def bear(self, host: Host) -> None:
        """Make a host and switch it on, with what its profile says it is born with."""
        host.create(self.host_image(host), self.key.with_suffix(".pub").read_text())
        host.start()
        if failed := host.failed_units():
            raise LabError(
                f"{host.name}: {', '.join(failed)} failed on a bare host", remedy=f"Look at {host.container}."
            )
        profile = host.record.hardware_profile()
        if profile.sudo == "password":
            host.run(["chpasswd"], stdin=f"{ADMIN_USER}:{self.password_file.read_text().strip()}\n".encode())
        if profile.born_with:
            self.services.install(host, profile.born_with)
            host.reboot()

    def status(self) -> dict[str, Any]:
        """What is there, for `lab status --json`."""
        return {
            "name": self.name,
            "inventory": self.record.inventory,
            "subnet": self.record.subnet,
            "registry": self.services.registry,
            "packages": self.services.packages_url,
            "engine": self.docker.host,
            "hosts": [
                {
                    "name": host.name,
                    "address": host.address,
                    "state": host.state(),
                    "profile": host.record.profile,
                    "gpus": host.record.hardware_profile().gpus.count,
                    "container": host.container,
                }
                for host in self.hosts
            ],
        }


def labels(paths: LabPaths, name: str) -> dict[str, str]:
    """Labels that tell what belongs to a lab of this state folder from everything else."""
    return {"io.deploy-dsv3.lab": name, "io.deploy-dsv3.lab.state": paths.tag}
