"""The addresses of a lab: its own /24 of a range for tests (RFC 2544), which no site uses."""

from __future__ import annotations

import hashlib
import ipaddress
from collections.abc import Iterable

from .errors import LabError

_RANGE = ipaddress.IPv4Network("198.18.0.0/16")
_PACKAGES, _REGISTRY, _FIRST_HOST = 2, 3, 11
MAX_HOSTS = 64


def choose_subnet(lab: str, taken: Iterable[str]) -> str:
    """A free /24 for a lab; the same for the same name if nothing is in the way.

    Args:
        taken: IPv4 networks in CIDR notation that are in use on this machine.

    Raises:
        LabError: none is free.
    """
    used = [ipaddress.IPv4Network(cidr, strict=False) for cidr in taken]
    candidates = list(_RANGE.subnets(new_prefix=24))
    first = 0 if lab == "lab" else hashlib.sha256(lab.encode()).digest()[0]
    for step in range(len(candidates)):
        candidate = candidates[(first + step) % len(candidates)]
        if not any(candidate.overlaps(other) for other in used):
            return str(candidate)
    raise LabError(f"no network of {_RANGE} is free for the lab", remedy="Stop another lab: deploy-dsv3 lab status.")


def packages_address(subnet: str) -> str:
    """Address of the package repository."""
    return _address(subnet, _PACKAGES)


def registry_address(subnet: str) -> str:
    """Address of the image registry."""
    return _address(subnet, _REGISTRY)


def host_address(subnet: str, number: int) -> str:
    """Address of a host by its number, from 1."""
    return _address(subnet, _FIRST_HOST + number - 1)


def _address(subnet: str, offset: int) -> str:
    return str(ipaddress.ip_network(subnet)[offset])
