"""What an operator wants written down: hosts, how to log in, settings, and where the clients' keys are kept."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from deploy_dsv3 import inventory, settings
from deploy_dsv3.errors import UsageError
from deploy_dsv3.topology import ROOT_GROUP

#: A version that was released and tested, instead of the guide's moving tag; the same as in inventory/example.
SUGGESTED_IMAGE = "openmmlab/lmdeploy:v0.16.0-cu12.8"

_HOST = re.compile(r"[A-Za-z0-9_]([A-Za-z0-9_.-]*[A-Za-z0-9_])?")
_REPLICA = re.compile(r"[a-z][a-z0-9_]*")
_USER = re.compile(r"[A-Za-z_][A-Za-z0-9_.-]*\$?")


@dataclass(frozen=True, kw_only=True)
class Host:
    """A host by its name in the inventory; `address` is empty where the name itself is one."""

    name: str
    address: str = ""


@dataclass(frozen=True, kw_only=True)
class Replica:
    """One copy of the model: the hosts that serve it together."""

    name: str
    head: Host
    workers: tuple[Host, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Answers:
    """Everything that is written down.

    Attributes:
        replicas: at least one.
        user: whom to log in as; empty for ssh's own choice.
        ssh_key: private key; empty for ssh's own choice.
        sudo_password_file: file on this machine with the hosts' sudo password; empty where sudo asks for none.
        settings: settings that differ from their defaults, by name; no secrets.
        keys_file: file on this machine with the clients' API keys, one a line; None for none.
        vault_password_file: password of a vault that a new API key is put into; None for none.
    """

    replicas: tuple[Replica, ...]
    user: str = ""
    ssh_key: str = ""
    sudo_password_file: str = ""
    settings: Mapping[str, Any] = field(default_factory=dict)
    keys_file: Path | None = None
    vault_password_file: Path | None = None


def read_host(text: str) -> Host:
    """A host from ``NAME`` or ``NAME=ADDRESS``.

    Raises:
        UsageError: name or address cannot be those of a host.
    """
    name, equals, address = text.strip().partition("=")
    if not _HOST.fullmatch(name):
        raise UsageError(
            f"{text!r} names no host: letters, digits, '.', '-' and '_' only",
            remedy="Write NAME, or NAME=ADDRESS, e.g. gpu-01=192.0.2.11.",
        )
    if equals and not address:
        raise UsageError(f"{text!r} has no address", remedy="Leave out the '=', or write the address after it.")
    if problem := inventory.address_problem(address or name):
        raise UsageError(f"{text!r}: {address or name!r} is not an address: {problem}", remedy="Correct it.")
    return Host(name=name, address=address)


def read_replica(text: str) -> Replica:
    """A replica from ``NAME:HEAD,WORKER,…``, each host as `read_host` takes it.

    Raises:
        UsageError: it is written otherwise.
    """
    name, colon, hosts = text.partition(":")
    if not colon or not hosts.strip(", "):
        raise UsageError(
            f"{text!r} is no replica", remedy="Write NAME:HEAD,WORKER,…, e.g. a:gpu-01=192.0.2.11,gpu-02=192.0.2.12."
        )
    head, *workers = (read_host(word) for word in hosts.split(",") if word.strip())
    return Replica(name=check_replica_name(name.strip()), head=head, workers=tuple(workers))


def check_replica_name(name: str) -> str:
    """The name, which becomes the beginning of groups' names.

    Raises:
        UsageError: it cannot.
    """
    if not _REPLICA.fullmatch(name) or name in ("all", "ungrouped", ROOT_GROUP):
        raise UsageError(
            f"{name!r} cannot be the name of a replica", remedy="Use small letters, digits and '_', e.g. replica_a."
        )
    return name


def check_user(name: str) -> str:
    """The name of a user of the hosts, empty for none.

    Raises:
        UsageError: no user has such a name.
    """
    if name and not _USER.fullmatch(name):
        raise UsageError(f"{name!r} is no user name", remedy="Name the user that ssh logs in as.")
    return name


def check_file(name: str, *, what: str) -> str:
    """The absolute path of a file of this machine, empty for none.

    Raises:
        UsageError: Ansible would take it for something else.
    """
    if not name:
        return ""
    path = str(Path(name).expanduser().absolute())
    if re.search(r"""[{}'"\\\x00-\x1f]""", path):
        raise UsageError(f"{what} {path!r} has braces, quotes or backslashes in its name", remedy="Rename the file.")
    return path


def read_setting(text: str) -> tuple[str, Any]:
    """A setting from ``NAME=VALUE``; the value is text or YAML, as the setting's type has it.

    Raises:
        UsageError: there is no such setting, or it is a secret.
    """
    name, equals, value = text.partition("=")
    name = name.strip()
    known = settings.catalogue()
    if not equals or name not in known or known[name].internal:
        meant = settings.suggest(name, [one.name for one in known.values() if not one.internal])
        hint = f"Did you mean {meant!r}?" if meant else "`deploy-dsv3 settings` lists what there is."
        raise UsageError(f"{text!r} sets nothing: NAME=VALUE is wanted, with a setting's name", remedy=hint)
    if known[name].secret:
        raise UsageError(
            f"{name} is a secret, and the command line shows to every user of this machine",
            remedy="Use --api-keys-file or --vault-password-file, or add it to a vault of the inventory afterwards.",
        )
    if known[name].type in ("str", "path"):
        return name, value
    try:
        return name, yaml.safe_load(value)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise UsageError(
            f"the value of {name} cannot be read: {str(error).splitlines()[0]}", remedy="Write it as in YAML."
        ) from error


def single(head: Host, workers: Iterable[Host]) -> tuple[Replica, ...]:
    """The one replica of a small deployment."""
    return (Replica(name=ROOT_GROUP, head=head, workers=tuple(workers)),)
