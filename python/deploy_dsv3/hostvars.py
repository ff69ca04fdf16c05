"""What action plugins read of every host: its settings, facts and connect address, as plain data.

A role's defaults are not visible in `hostvars` outside of that role, so they are read from the roles
themselves. Only the keys that are needed are templated: templating all variables of all hosts is what makes a
controller slow.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from functools import cache
from typing import Any

from ansible.module_utils.common.validation import (
    check_type_bool,
    check_type_dict,
    check_type_float,
    check_type_int,
    check_type_list,
    check_type_str,
)

from . import content
from .derive import HostInput
from .facts import load_facts
from .network import as_ip

# Values given by `-e key=value` are strings; the default tells what they stand for.
_CONVERTERS: Mapping[type, Callable[[Any], Any]] = {
    bool: check_type_bool,
    int: check_type_int,
    float: check_type_float,
    str: check_type_str,
    list: check_type_list,
    dict: check_type_dict,
}


class SettingError(ValueError):
    """A variable of a host is not of its setting's type; the text names host, key, value and type."""


@cache
def role_defaults() -> Mapping[str, Any]:
    """Return the default of every public setting by name. They are literal values, not templates."""
    defaults: dict[str, Any] = {}
    for path in sorted(content.roles().glob("*/defaults/main.yml")):
        defaults.update(content.read_yaml(path) or {})
    return defaults


def settings_of(hostvars: Any, host: str) -> dict[str, Any]:
    """Return every public setting of a host: the roles' defaults under its variables; raises SettingError."""
    templated = hostvars[host]
    return {
        name: _convert(host, name, default, templated[name]) if name in templated else default
        for name, default in role_defaults().items()
    }


def host_inputs(hostvars: Any, hosts: Iterable[str]) -> dict[str, HostInput]:
    """Return what is known of each host from Ansible's `hostvars`; raises SettingError and FactsError."""
    return {host: _host_input(hostvars, host) for host in hosts}


def fact(variables: Mapping[str, Any], name: str) -> Any:
    """Return one of our facts from a host's variables, None when there is none.

    With `inject_facts_as_vars` off, Ansible keeps facts below `ansible_facts` only.
    """
    if name in variables:
        return variables[name]
    return variables.get("ansible_facts", {}).get(name)


def plain(value: Any) -> Any:
    """Return a copy of a templated value that consists of plain dictionaries and lists."""
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    return value


def _host_input(hostvars: Any, host: str) -> HostInput:
    # Facts are data and never templates: reading them past the templar saves most of the time.
    document = fact(hostvars.raw_get(host), "dsv3_facts")
    facts = load_facts(document) if document else None
    address = facts.connection.server_address if facts else ""
    if not address:
        address = str(hostvars[host].get("ansible_host", host))
    return HostInput(
        host=host,
        facts=facts,
        settings=settings_of(hostvars, host),
        connect_address=address if as_ip(address) else "",
    )


def _convert(host: str, name: str, default: Any, value: Any) -> Any:
    wanted = type(default)
    try:
        return plain(_CONVERTERS[wanted](plain(value)))
    except (TypeError, ValueError):
        # Neither the value nor the converter's words, which quote it: it may be a secret.
        found = type(plain(value)).__name__
        raise SettingError(
            f"{host}: {name} is a value of type {found} that cannot be taken as {wanted.__name__}"
        ) from None
