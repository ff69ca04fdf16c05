"""Loads an inventory with Ansible's own classes, in this process, and says what is wrong with it.

Whatever ``ansible-playbook -i`` reads is read here in the same way: INI, YAML, directories with
``group_vars`` and ``host_vars``, vaulted values, scripts and inventory plugins; the precedence of variables
is Ansible's. Nothing is connected to. Where Ansible only warns (a file that could not be parsed leaves an
empty inventory), this raises.
"""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from deploy_dsv3 import inventory_text
from deploy_dsv3.errors import ConfigError, ConfigErrors
from deploy_dsv3.topology import Group

#: Where a value was written: what that means for its type differs (INI and ``-e key=value`` know only text).
SourceKind = Literal["ini", "yaml", "extra", "other"]

#: The source shown for values of ``-e key=value``.
COMMAND_LINE = "-e on the command line"

_HOST_NAME = re.compile(r"^[A-Za-z0-9_]([A-Za-z0-9_.:-]*[A-Za-z0-9_])?$")


@dataclass(frozen=True, kw_only=True)
class Variable:
    """One variable of one host, as Ansible's precedence decides it.

    Attributes:
        name: its name.
        value: plain Python data; the template text while `pending`.
        file: file it was written in (`COMMAND_LINE` for ``-e key=value``, empty if unknown).
        line: line in that file, from 1.
        source: what kind of file that is.
        vaulted: whether the value was encrypted.
        templated: whether it was written as a template.
        pending: a template that needs facts of the host: its type is not known yet.
        error: why the template or the vaulted value could not be resolved; empty if it could.
    """

    name: str
    value: Any = field(repr=False)  # it may be a secret
    file: str = ""
    line: int | None = None
    source: SourceKind = "other"
    vaulted: bool = False
    templated: bool = False
    pending: bool = False
    error: str = ""


@dataclass(frozen=True, kw_only=True)
class VaultOptions:
    """Where vault passwords come from, as ansible-playbook's options of the same names.

    Attributes:
        password_files: ``--vault-password-file`` and ``--vault-id``, each ``PATH`` or ``LABEL@PATH``; an
            executable file is run and prints the password.
        password: typed at ``--ask-vault-pass``.
    """

    password_files: tuple[str, ...] = ()
    password: str = field(default="", repr=False)

    def __bool__(self) -> bool:
        return bool(self.password_files or self.password)


@dataclass(frozen=True, kw_only=True)
class Inventory:
    """A loaded inventory.

    Attributes:
        paths: the sources, as given.
        groups: every group but ``all`` and ``ungrouped``.
        hosts: every host, in the inventory's order.
        warnings: what Ansible remarked while reading, and files it will never read.
    """

    paths: tuple[Path, ...]
    groups: Mapping[str, Group]
    hosts: tuple[str, ...]
    warnings: tuple[str, ...] = ()
    _names: Callable[[str], Sequence[str]] = field(repr=False)
    _resolve: Callable[[str, str], Variable] = field(repr=False)
    _select: Callable[[str], tuple[str, ...]] = field(repr=False)

    @property
    def label(self) -> str:
        """The sources in one word, for messages."""
        return ", ".join(map(str, self.paths))

    def names(self, host: str) -> Sequence[str]:
        """Names of all variables of a host."""
        return self._names(host)

    def variable(self, host: str, name: str) -> Variable:
        """One variable, its template resolved where that needs nothing from the host.

        Raises:
            KeyError: the host has no such variable.
        """
        return self._resolve(host, name)

    def select(self, pattern: str) -> tuple[str, ...]:
        """The hosts of an Ansible pattern, as ``--limit`` takes it (also ``@FILE``).

        Raises:
            ConfigErrors: the pattern is wrong or matches no host.
        """
        return self._select(pattern)


def load(
    paths: Sequence[Path],
    *,
    extra_vars: Sequence[str] = (),
    vault: VaultOptions | None = None,
) -> Inventory:
    """Read an inventory.

    Args:
        paths: inventory files or directories, later ones winning.
        extra_vars: values of ``-e``: ``key=value ...``, JSON or YAML, or ``@FILE``.
        vault: where vault passwords come from.

    Raises:
        ConfigErrors: all mistakes found, each with its file.
    """
    errors = [error for path in paths for error in inventory_text.check_path(path)]
    if errors:
        raise ConfigErrors(errors)
    errors = [error for path in paths for error in _check_texts(path)]
    if errors:
        raise ConfigErrors(errors)
    # Imports Ansible, which takes a third of a second: only who loads an inventory pays.
    from deploy_dsv3.ansible_inventory import Loader

    return Loader(tuple(paths), vault or VaultOptions()).load(extra_vars)


def check_hosts(inventory: Inventory, hosts: Iterable[str]) -> list[ConfigError]:
    """Names and addresses of the deployment's hosts: well-formed, and each machine there once.

    Args:
        inventory: the inventory.
        hosts: the hosts of the deployment.
    """
    errors: list[ConfigError] = []
    owners: dict[tuple[str, str], str] = {}
    for host in hosts:
        if not _HOST_NAME.match(host):
            errors.append(
                ConfigError(
                    message=f"host name {host!r} has characters that no host name has",
                    file=inventory.label,
                    host=host,
                    expected="letters, digits, '.', '-' and '_'",
                    remedy="Correct the name.",
                )
            )
            continue
        connection = _optional(inventory, host, "ansible_host")
        address = str(connection.value) if connection else host
        if connection and (connection.pending or connection.error):
            continue
        fields: dict[str, Any] = {
            "file": (connection.file if connection else "") or inventory.label,
            "line": connection.line if connection else None,
            "key": "ansible_host" if connection else host,
            "host": host,
        }
        problem = address_problem(address)
        if problem:
            errors.append(
                ConfigError(
                    message=f"{address!r} is not an address: {problem}",
                    expected="an IP address or a host name",
                    remedy="Correct it.",
                    **fields,
                )
            )
            continue
        port = _optional(inventory, host, "ansible_port")
        if port and not port.pending and not (str(port.value).isascii() and str(port.value).isdigit()):
            errors.append(
                ConfigError(
                    message="ansible_port is not a port",
                    file=port.file or inventory.label,
                    line=port.line,
                    key="ansible_port",
                    host=host,
                    found=repr(port.value),
                    expected="a number from 1 to 65535",
                    remedy="Write the port of the host's SSH server.",
                )
            )
            continue
        machine = (_normal_address(address), str(port.value) if port else "22")
        first = owners.setdefault(machine, host)
        if first != host:
            errors.append(
                ConfigError(
                    message=f"{first} and {host} are the same machine",
                    found=f"both at {address}",
                    expected="one name for each machine",
                    remedy="Correct one of the addresses, or remove one of the names.",
                    **fields,
                )
            )
    return errors


def _check_texts(path: Path) -> Iterator[ConfigError]:
    for file in inventory_text.inventory_files(path):
        yield from inventory_text.check_file(file)
    for _directory, entity, file in inventory_text.variable_files(path):
        if entity:
            yield from inventory_text.check_file(file, variables=True)


def _optional(inventory: Inventory, host: str, name: str) -> Variable | None:
    try:
        return inventory.variable(host, name)
    except KeyError:
        return None


def address_problem(address: str) -> str:
    """What is wrong with an IP address or host name; empty if nothing is."""
    if not address or address.strip() != address or re.search(r"[\s{}/\\$;|&<>`'\"()]", address):
        return "it has characters that no address has" if address else "it is empty"
    if re.fullmatch(r"[\d.]+", address) or ":" in address:
        try:
            ip = ipaddress.ip_address(address.strip("[]").split("%")[0])
        except ValueError:
            return "no valid IP address"
        if ip.is_unspecified or ip.is_multicast:
            return "no machine has it"
        return ""
    return "" if _HOST_NAME.match(address) else "it has characters that no address has"


def _normal_address(address: str) -> str:
    try:
        return str(ipaddress.ip_address(address.strip("[]")))
    except ValueError:
        return address.lower().rstrip(".")


def vault_error(text: str, *, file: str, line: int | None, key: str = "") -> ConfigError:
    """The message for something encrypted that cannot be opened.

    Args:
        text: Ansible's own words, which tell whether there was any password to try.
        file: file of the value.
        line: its line.
        key: the variable, if it is one value.
    """
    options = "--vault-password-file FILE or --ask-vault-pass"
    if "that could decrypt" in text or "HMAC" in text:
        return ConfigError(
            message="the vault password does not open this",
            file=file,
            line=line,
            key=key,
            remedy=f"Give the right one: {options}.",
        )
    return ConfigError(
        message="this is encrypted, and no vault password is given",
        file=file,
        line=line,
        key=key,
        found=text,
        remedy=f"Give it: {options}.",
    )


def check_secret_file(path: Path, *, what: str) -> ConfigError | None:
    """What is wrong with a file that holds a password or key of this machine; None if nothing is.

    Args:
        path: the file.
        what: what it is, for the message, e.g. ``vault password file``.
    """
    quoted = str(path)
    try:
        mode = path.stat().st_mode
    except FileNotFoundError:
        return ConfigError(message=f"there is no such {what}", file=quoted, remedy="Check the path.")
    except OSError as error:
        return ConfigError(
            message=f"this {what} cannot be read: {error.strerror}", file=quoted, remedy="Check the path."
        )
    if path.is_dir():
        return ConfigError(message=f"this {what} is a directory", file=quoted, remedy="Give the file inside it.")
    if inventory_text.is_script(path):
        return None
    if mode & 0o077:
        return ConfigError(
            message=f"this {what} can be read by other users",
            file=quoted,
            found=f"mode {mode & 0o777:04o}",
            expected="mode 0600",
            remedy=f"Run: chmod 600 {quoted}",
        )
    try:
        content = path.read_bytes()
    except OSError as error:
        return ConfigError(
            message=f"this {what} cannot be read: {error.strerror}", file=quoted, remedy="Check its owner."
        )
    if not content.strip():
        return ConfigError(message=f"this {what} is empty", file=quoted, remedy="Put the password in it.")
    return None
