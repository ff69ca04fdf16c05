"""Hardware profiles: what a simulated server is made of, and what is wrong with it.

A profile is a YAML file in `profiles/` (or any file that an operator names). `describe` turns it into the
hardware.json of one host, from which that host's simulated kernel and vendor tools answer.
"""

from __future__ import annotations

import json
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from .errors import LabUsageError
from .paths import PROFILES

DEFAULT_PROFILE = "h800-ib"
MAX_GPUS = 16

_PORT_STATES = {"ACTIVE": "4: ACTIVE", "ARMED": "3: ARMED", "INIT": "2: INIT", "DOWN": "1: DOWN"}
_PHYSICAL_STATES = {"ACTIVE": "5: LinkUp", "ARMED": "5: LinkUp", "INIT": "5: LinkUp", "DOWN": "3: Disabled"}
#: What the kernel shows as the rate of a port without a link.
_RATE_WITHOUT_LINK = "10 Gb/sec (4X SDR)"
#: Networks of the RoCE rails, one /24 a rail, in the range of test networks; `network` keeps labs out of it.
_RAIL_NETWORK = "198.19.{rail}.{host}"
_FIRST_RAIL = 200

PortState = Literal["ACTIVE", "ARMED", "INIT", "DOWN"]


class _Model(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Gpus(_Model):
    """The GPUs of a server."""

    model: str
    count: int = Field(ge=0, le=MAX_GPUS)
    memory_mib: int = Field(gt=0)
    pci_device: str = Field(pattern=r"^0x[0-9a-f]{4}$")


class PortFault(_Model):
    """How a port of an HCA differs from its profile."""

    state: PortState = "ACTIVE"
    rate: str = ""


class Hcas(_Model):
    """The host channel adapters, one port each, in the kernel's order."""

    names: tuple[str, ...] = ()
    pci_device: str = Field(default="0x1021", pattern=r"^0x[0-9a-f]{4}$")
    firmware: str = "28.43.2566"
    link_layer: Literal["InfiniBand", "Ethernet"] = "InfiniBand"
    rate: str = "400 Gb/sec (4X NDR)"
    #: Names of the network interfaces, one an HCA (Ethernet only).
    interfaces: tuple[str, ...] = ()
    #: Where the RoCE v2 GID of the interface's address stands in the table (Ethernet only).
    gid_index: int = Field(default=3, ge=1, le=15)
    faults: Mapping[str, PortFault] = Field(default_factory=dict)

    @model_validator(mode="after")
    def _consistent(self) -> Hcas:
        if self.link_layer == "Ethernet" and len(self.interfaces) != len(self.names):
            raise ValueError("Ethernet HCAs need one entry in `interfaces` for each name")
        if self.link_layer == "InfiniBand" and self.interfaces:
            raise ValueError("`interfaces` is for Ethernet HCAs")
        unknown = set(self.faults) - set(self.names)
        if unknown:
            raise ValueError(f"faults of HCAs that are not in `names`: {', '.join(sorted(unknown))}")
        return self


class Profile(_Model):
    """One kind of server.

    Attributes:
        extends: name of the profile that this one changes.
        nvswitches: NVSwitch chips; more than none means that a fabric manager is needed.
        missing_gpus: indices of GPUs that fell off the bus.
        nouveau: the kernel loads nouveau at boot unless that is forbidden in the initramfs.
        born_with: packages of the lab's vendor repository that are there from the start, name to version.
        sudo: whether the administrator's sudo asks for a password.
        suite: release of Debian that it came with; the lab's where empty.
    """

    description: str
    extends: str = ""
    gpus: Gpus
    nvswitches: int = Field(default=0, ge=0, le=8)
    missing_gpus: tuple[int, ...] = ()
    hcas: Hcas = Hcas()
    nouveau: bool = False
    born_with: Mapping[str, str] = Field(default_factory=dict)
    sudo: Literal["nopasswd", "password"] = "nopasswd"
    suite: Literal["", "bookworm", "trixie"] = ""

    @model_validator(mode="after")
    def _consistent(self) -> Profile:
        unknown = [index for index in self.missing_gpus if index >= self.gpus.count]
        if unknown:
            raise ValueError(f"missing_gpus {unknown}: there are {self.gpus.count} GPUs")
        return self

    def with_gpus(self, count: int | None) -> Profile:
        """The same server with another number of GPUs."""
        if count is None:
            return self
        gpus = self.gpus.model_copy(update={"count": count})
        missing = tuple(index for index in self.missing_gpus if index < count)
        return self.model_copy(update={"gpus": gpus, "missing_gpus": missing})


def names() -> list[str]:
    """The profiles that come with the lab."""
    return sorted(path.stem for path in PROFILES.glob("*.yml"))


def load(name: str) -> Profile:
    """A profile by its name, or by the path of a file.

    Raises:
        LabUsageError: there is none, or it is wrong.
    """
    fields = _read(name, seen=())
    try:
        return Profile.model_validate(fields)
    except ValidationError as error:
        problems = "; ".join(
            f"{'.'.join(map(str, problem['loc'])) or 'profile'}: {problem['msg']}" for problem in error.errors()
        )
        raise LabUsageError(f"hardware profile {name}: {problems}", remedy="Correct the profile.") from error


def _read(name: str, seen: tuple[str, ...]) -> dict[str, Any]:
    path = Path(name) if name.endswith((".yml", ".yaml")) else PROFILES / f"{name}.yml"
    if name in seen:
        raise LabUsageError(f"hardware profile {name} extends itself", remedy="Correct `extends`.")
    try:
        fields = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise LabUsageError(
            f"there is no hardware profile {name}",
            remedy=f"Use one of {', '.join(names())}, or the path of a file.",
        ) from error
    except yaml.YAMLError as error:
        raise LabUsageError(f"hardware profile {path}: {error}", remedy="Correct the YAML.") from error
    if not isinstance(fields, dict):
        raise LabUsageError(f"hardware profile {path} is not a mapping", remedy="See the profiles of the lab.")
    parent = fields.get("extends")
    return _merge(_read(str(parent), (*seen, name)), fields) if parent else fields


def _merge(below: dict[str, Any], above: Mapping[str, Any]) -> dict[str, Any]:
    merged = dict(below)
    for key, value in above.items():
        inherited = merged.get(key)
        both = isinstance(value, Mapping) and isinstance(inherited, dict)
        merged[key] = _merge(inherited, value) if both else value  # type: ignore[arg-type]
    return merged


def describe(profile: Profile, *, host: str, number: int) -> dict[str, Any]:
    """The hardware.json of one host.

    Args:
        number: of the host in its lab, from 1; makes identifiers and addresses unique.
    """
    return {
        "schema": 1,
        "host": host,
        "gpus": [_gpu(profile, host, index) for index in range(profile.gpus.count)],
        "nvswitches": [
            {"pci_slot": f"0000:{0xD0 + index:02x}:00.0", "pci_device": "0x22a3", "numa": 1}
            for index in range(profile.nvswitches)
        ],
        "hcas": [_hca(profile.hcas, number, index) for index in range(len(profile.hcas.names))],
        "management": {"pci_slot": "0000:01:00.0", "pci_device": "0x1572", "numa": 0},
        "nouveau": profile.nouveau,
    }


def document(hardware: Mapping[str, Any]) -> str:
    """The text of a hardware.json."""
    return json.dumps(hardware, indent=2) + "\n"


def _gpu(profile: Profile, host: str, index: int) -> dict[str, Any]:
    return {
        "index": index,
        "name": profile.gpus.model,
        "uuid": f"GPU-{uuid.uuid5(uuid.NAMESPACE_DNS, f'{host}.gpu{index}.lab')}",
        "memory_mib": profile.gpus.memory_mib,
        "pci_slot": f"0000:{0x18 + 8 * index:02x}:00.0",
        "pci_device": profile.gpus.pci_device,
        "numa": 0 if index < (profile.gpus.count + 1) // 2 else 1,
        "present": index not in profile.missing_gpus,
    }


def _hca(hcas: Hcas, number: int, index: int) -> dict[str, Any]:
    name = hcas.names[index]
    guid = f"a088:c203:00{number:02x}:{index:02x}00"
    fault = hcas.faults.get(name, PortFault())
    interface = None
    if hcas.interfaces:
        address = _RAIL_NETWORK.format(rail=_FIRST_RAIL + index, host=10 + number)
        interface = {"name": hcas.interfaces[index], "address": f"{address}/24"}
    down = fault.state == "DOWN"
    return {
        "name": name,
        "guid": guid,
        "firmware": hcas.firmware,
        "pci_slot": f"0000:{0x19 + 8 * index:02x}:00.0",
        "pci_device": hcas.pci_device,
        "numa": 0 if index < (len(hcas.names) + 1) // 2 else 1,
        "ports": [
            {
                "port": 1,
                "state": _PORT_STATES[fault.state],
                "phys_state": _PHYSICAL_STATES[fault.state],
                "rate": fault.rate or (_RATE_WITHOUT_LINK if down else hcas.rate),
                "link_layer": hcas.link_layer,
                "lid": f"0x{16 * number + index:x}" if hcas.link_layer == "InfiniBand" else "0x0",
                "sm_lid": "0x1" if hcas.link_layer == "InfiniBand" else "0x0",
                "interface": interface,
                "gids": _gids(hcas, guid, interface, down=down),
            }
        ],
    }


def _gids(hcas: Hcas, guid: str, interface: Mapping[str, str] | None, *, down: bool) -> list[dict[str, Any]]:
    """The GID table as the kernel shows it; an empty entry has no type."""
    link_local = f"fe80:0000:0000:0000:{guid}"
    if interface is None:
        return [{"index": 0, "gid": link_local, "type": "IB/RoCE v1", "ndev": ""}]
    octets = [int(part) for part in interface["address"].split("/")[0].split(".")]
    mapped = f"0000:0000:0000:0000:0000:ffff:{octets[0]:02x}{octets[1]:02x}:{octets[2]:02x}{octets[3]:02x}"
    table: dict[int, tuple[str, str]] = {0: (link_local, "IB/RoCE v1"), 1: (link_local, "RoCE v2")}
    if not down:
        table[hcas.gid_index] = (mapped, "RoCE v2")
        table[hcas.gid_index - 1 if hcas.gid_index > 2 else hcas.gid_index + 1] = (mapped, "IB/RoCE v1")
    empty = "0000:0000:0000:0000:0000:0000:0000:0000"
    return [
        {"index": index, "gid": gid, "type": type_, "ndev": interface["name"] if type_ else ""}
        for index in range(max(table) + 3)
        for gid, type_ in [table.get(index, (empty, ""))]
    ]
