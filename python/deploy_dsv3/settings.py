"""Everything an operator can set: the catalogue, and the check of an inventory against it.

A setting is an Ansible variable described in its role's ``meta/argument_specs.yml`` (entry ``main``): name,
type, choices, description, unit in brackets. Its default is in the role's ``defaults/main.yml``. Both are
read here, so a setting exists once. All hosts' values are checked offline and as a whole: every mistake is
told at once, with file and line, key, what was found, what was expected, and the remedy.
"""

from __future__ import annotations

import difflib
import math
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Any

from deploy_dsv3 import content, setting_rules
from deploy_dsv3.errors import ConfigError, ConfigErrors
from deploy_dsv3.inventory import COMMAND_LINE, Inventory, Variable, check_secret_file, vault_error
from deploy_dsv3.topology import Deployment

#: Facts and derived values that the playbooks compute; an operator's value would be ignored or do harm.
COMPUTED = ("dsv3_facts", "dsv3_node", "dsv3_release")
#: Variables of ours that are no settings of a role; `destroy` sets them.
FLAGS = ("dsv3_destroy_drivers", "dsv3_destroy_weights")

#: Secrets that Ansible itself reads.
_ANSIBLE_SECRETS = (
    "ansible_password",
    "ansible_ssh_pass",
    "ansible_ssh_password",
    "ansible_become_password",
    "ansible_become_pass",
    "ansible_sudo_pass",
)
#: Settings that must be the same on all hosts of a replica: one image, one model, one cluster.
_SAME_IN_REPLICA = ("engine_image_", "model_weights_", "ray_cluster_", "lmdeploy_")
#: Similarity from which a name that has none of our prefixes is taken for a misspelt setting.
_MISSPELT = 0.88
_HIDDEN = "(hidden)"
_TRUE = frozenset({"true", "yes", "on", "1", "t", "y"})
_FALSE = frozenset({"false", "no", "off", "0", "f", "n"})


@dataclass(frozen=True, kw_only=True)
class Setting:
    """One setting as its role describes it.

    Attributes:
        name: the variable, prefixed with its role's name.
        role: the role.
        type: Ansible's name of the type: ``str int float bool list dict path raw``.
        elements: type of a list's elements; empty if any.
        default: value if nothing sets it; empty string, list or dictionary for "not set".
        choices: the only values allowed; empty if any.
        doc: what it does, in the words of the role.
        unit: the unit in the description's brackets, e.g. ``seconds``; empty if none.
        secret: whether its value is never shown.
        internal: whether playbooks hand it to the role; operators cannot set it.
        former_names: names it had before.
    """

    name: str
    role: str
    type: str
    elements: str = ""
    default: Any = None
    choices: tuple[Any, ...] = ()
    doc: str = ""
    unit: str = ""
    secret: bool = False
    internal: bool = False
    former_names: tuple[str, ...] = ()

    def is_unset(self, value: Any) -> bool:
        """Whether a value means "not set" for this setting."""
        return value in ("", [], {}) and self.default in ("", [], {})


@dataclass(frozen=True, kw_only=True)
class Value:
    """A setting's value on one host, and where it was written; `file` is empty for the default."""

    setting: Setting
    value: Any = field(repr=False)  # it may be a secret
    file: str = ""
    line: int | None = None
    pending: bool = False

    @property
    def source(self) -> str:
        """``file:line`` or ``default``."""
        if not self.file:
            return "default"
        return f"{self.file}:{self.line}" if self.line else self.file

    @property
    def shown(self) -> Any:
        """The value for people: secrets only as ``set`` or ``unset``."""
        if self.setting.secret:
            return "unset" if self.setting.is_unset(self.value) else "set"
        return self.value


@dataclass(frozen=True, kw_only=True)
class Settings:
    """The checked settings of a deployment.

    Attributes:
        values: host to setting name to value; every setting is there.
        warnings: what is allowed and not advisable.
        secrets: values that must not be shown, for striking them out of logs.
        extra_vars: values of ``-e key=value`` in their setting's type; on the command line everything is
            text.
    """

    values: Mapping[str, Mapping[str, Value]]
    warnings: tuple[str, ...] = ()
    secrets: frozenset[str] = field(default=frozenset(), repr=False)
    extra_vars: Mapping[str, Any] = field(default_factory=dict, repr=False)

    def of(self, host: str) -> dict[str, Any]:
        """Plain values of one host by name."""
        return {name: value.value for name, value in self.values[host].items()}


@cache
def catalogue(roles: Path | None = None) -> Mapping[str, Setting]:
    """Every setting by name, role by role.

    Args:
        roles: directory of roles; by default the installed ones.

    Raises:
        InternalError: a role's description cannot be read.
    """
    found: dict[str, Setting] = {}
    for spec_file in sorted((roles or content.roles()).glob("*/meta/argument_specs.yml")):
        role = spec_file.parents[1].name
        options = _load(spec_file).get("argument_specs", {}).get("main", {}).get("options", {})
        defaults_file = spec_file.parents[1] / "defaults" / "main.yml"
        defaults = _load(defaults_file) if defaults_file.is_file() else {}
        for name, option in options.items():
            found[name] = _setting(name, role, option, defaults)
    return found


def resolve(
    inventory: Inventory,
    hosts: Sequence[str],
    deployment: Deployment | None = None,
    *,
    known: Mapping[str, Setting] | None = None,
) -> Settings:
    """Check every variable of every host against the catalogue.

    Args:
        inventory: the loaded inventory.
        hosts: hosts to look at.
        deployment: for what concerns whole replicas; None if the groups are wrong.
        known: the catalogue; by default that of the installed roles.

    Raises:
        ConfigErrors: all mistakes at once.
    """
    checker = _Checker(inventory, hosts, known or catalogue())
    settings = checker.check()
    if deployment is not None:
        checker.check_replicas(deployment)
    errors = checker.errors()
    if errors:
        raise ConfigErrors(errors)
    return settings


def suggest(name: str, known: Iterable[str]) -> str:
    """The setting that a misspelt name most likely means; empty if none is close."""
    close = difflib.get_close_matches(name, list(known), n=1, cutoff=0.7)
    return close[0] if close else ""


def _load(path: Path) -> dict[str, Any]:
    data = content.read_yaml(path)
    return data if isinstance(data, dict) else {}


def _setting(name: str, role: str, option: Mapping[str, Any], defaults: Mapping[str, Any]) -> Setting:
    doc = option.get("description", "")
    text = " ".join(" ".join(doc if isinstance(doc, list) else [str(doc)]).split())
    unit = re.search(r"\[([^\]]+)\]", text)
    return Setting(
        name=name,
        role=role,
        type=str(option.get("type", "str")),
        elements=str(option.get("elements", "")),
        default=defaults.get(name, option.get("default")),
        choices=tuple(option.get("choices", ())),
        doc=text,
        unit=unit[1] if unit else "",
        secret=bool(option.get("no_log", False)),
        internal=text.startswith("Handed in by"),
        former_names=tuple(option.get("aliases", ())),
    )


@dataclass(frozen=True, kw_only=True)
class _Typed:
    """A value read as a type: `problem` says what was expected, if it is none."""

    value: Any
    problem: str = ""
    remedy: str = ""


class _Checker:
    def __init__(self, inventory: Inventory, hosts: Sequence[str], known: Mapping[str, Setting]) -> None:
        self._inventory = inventory
        self._hosts = hosts
        self._known = known
        self._former = {old: setting.name for setting in known.values() for old in setting.former_names}
        self._prefixes = sorted({f"{setting.role}_" for setting in known.values()}, key=len, reverse=True)
        self._found: dict[ConfigError, list[str]] = {}
        self._warnings: dict[str, list[str]] = {}
        self._secrets: set[str] = set()
        self._extra: dict[str, Any] = {}
        self._values: dict[str, dict[str, Value]] = {}

    def check(self) -> Settings:
        for host in self._hosts:
            self._values[host] = self._host(host)
        for host, values in self._values.items():
            plain = {name: value.value for name, value in values.items() if not value.pending}
            for problem in setting_rules.combinations(plain):
                self._add(host, self._located(problem, values))
        return Settings(
            values=self._values,
            warnings=tuple(self._told(self._warnings)),
            secrets=frozenset(self._secrets),
            extra_vars=self._extra,
        )

    def errors(self) -> list[ConfigError]:
        """All errors; the same mistake on several hosts is one that names them, or no host if it is all."""
        found = [
            replace(error, host="" if set(hosts) == set(self._hosts) else ", ".join(hosts))
            for error, hosts in self._found.items()
        ]
        return sorted(found, key=lambda error: (error.file, error.line or 0))

    def check_replicas(self, deployment: Deployment) -> None:
        """What must agree within a replica, and what must differ."""
        for replica in deployment.replicas:
            hosts = [host for host in replica.hosts if host in self._values]
            for name, setting in self._known.items():
                if not name.startswith(_SAME_IN_REPLICA) or setting.internal:
                    continue
                counts = Counter(repr(self._values[host][name].value) for host in hosts)
                if len(counts) < 2:
                    continue
                head = self._values[replica.head][name]
                odd = next(host for host in hosts if repr(self._values[host][name].value) != repr(head.value))
                other = self._values[odd][name]
                self._add(
                    odd,
                    ConfigError(
                        message=f"{name} differs within replica {replica.name!r}",
                        file=other.file or head.file,
                        line=other.line if other.file else head.line,
                        key=name,
                        found=f"{other.shown!r} on {odd}, {head.shown!r} on {replica.head}",
                        expected="the same on every host of a replica",
                        remedy="Set it for the replica's group, not for one host.",
                    ),
                )
            self._check_addresses(replica.name, hosts)

    def _check_addresses(self, replica: str, hosts: Sequence[str]) -> None:
        name = "node_network_address"
        if name not in self._known:
            return
        addresses = {
            host: self._values[host][name]
            for host in hosts
            if self._values[host][name].value and not self._values[host][name].pending
        }
        plain = {host: str(value.value) for host, value in addresses.items()}
        for host, problem in setting_rules.address_problems(plain):
            value = addresses[host]
            self._add(
                host,
                ConfigError(
                    message=f"{problem} in replica {replica!r}",
                    file=value.file,
                    line=value.line,
                    key=name,
                    found=str(value.value),
                    expected="a different address of one family for each host",
                    remedy="Correct it, or leave it out: it is derived from the route to the other hosts.",
                ),
            )

    def _add(self, host: str, error: ConfigError) -> None:
        hosts = self._found.setdefault(error, [])
        if host not in hosts:
            hosts.append(host)

    def _warn(self, host: str, text: str) -> None:
        hosts = self._warnings.setdefault(text, [])
        if host not in hosts:
            hosts.append(host)

    def _told(self, messages: Mapping[str, Sequence[str]]) -> Iterator[str]:
        for text, hosts in messages.items():
            yield text if set(hosts) == set(self._hosts) else f"{', '.join(hosts)}: {text}"

    def _host(self, host: str) -> dict[str, Value]:
        values = {name: Value(setting=setting, value=setting.default) for name, setting in self._known.items()}
        for name in self._inventory.names(host):
            setting = self._known.get(name)
            if setting is not None and not setting.internal:
                values[name] = self._value(host, setting, self._inventory.variable(host, name))
            elif name in _ANSIBLE_SECRETS:
                self._ansible_secret(host, name)
            elif name == "ansible_ssh_private_key_file":
                self._key_file(host, name)
            elif name not in FLAGS:
                self._unknown(host, name, setting)
        for text in setting_rules.advice({name: value.value for name, value in values.items()}):
            self._warn(host, text)
        return values

    def _value(self, host: str, setting: Setting, variable: Variable) -> Value:
        value = Value(
            setting=setting,
            value=variable.value,
            file=variable.file,
            line=variable.line,
            pending=variable.pending or bool(variable.error),
        )
        if variable.error:
            self._unresolved(host, variable)
            return replace(value, value=setting.default)
        if variable.pending:
            return value
        if setting.secret:
            self._note_secret(host, setting.name, variable)
        typed = _typed(setting, variable)
        shown = _HIDDEN if setting.secret else _shown(variable.value)
        if typed.problem:
            self._add(host, self._mistake(variable, "has the wrong type", shown, typed.problem, typed.remedy))
            return replace(value, value=setting.default, pending=True)
        if variable.file == COMMAND_LINE and typed.value != variable.value:
            self._extra[setting.name] = typed.value
        if setting.choices and typed.value not in setting.choices:
            choices = [str(choice) for choice in setting.choices]
            close = difflib.get_close_matches(str(typed.value), choices, n=1)
            self._add(
                host,
                self._mistake(
                    variable,
                    "is none of the choices",
                    shown,
                    f"one of {', '.join(choices)}",
                    f"Did you mean {close[0]!r}?" if close else "Choose one of them.",
                ),
            )
        elif not setting.is_unset(typed.value):
            for problem in setting_rules.problems(setting.name, setting.type, typed.value, setting.default):
                self._add(
                    host,
                    self._mistake(
                        variable,
                        problem.message,
                        _HIDDEN if setting.secret else problem.found or shown,
                        problem.expected,
                        problem.remedy,
                    ),
                )
        return replace(value, value=typed.value)

    def _mistake(self, variable: Variable, message: str, found: str, expected: str, remedy: str) -> ConfigError:
        return ConfigError(
            message=f"{variable.name} {message}",
            file=variable.file,
            line=variable.line,
            key=variable.name,
            found=found,
            expected=expected,
            remedy=remedy or "Correct the value.",
        )

    def _located(self, problem: setting_rules.Problem, values: Mapping[str, Value]) -> ConfigError:
        """A problem of several settings, placed at the first of them that somebody wrote."""
        written = next((values[name] for name in problem.names if values[name].file), values[problem.names[0]])
        return ConfigError(
            message=problem.message,
            file=written.file,
            line=written.line,
            key=", ".join(problem.names),
            found=problem.found,
            expected=problem.expected,
            remedy=problem.remedy,
        )

    def _unresolved(self, host: str, variable: Variable) -> None:
        if variable.vaulted:
            self._add(
                host,
                vault_error(variable.error, file=variable.file, line=variable.line, key=variable.name),
            )
            return
        self._add(
            host,
            ConfigError(
                message=f"{variable.name} cannot be worked out: {variable.error}",
                file=variable.file,
                line=variable.line,
                key=variable.name,
                found=_shown(variable.value),
                expected="a value, or a template of variables that exist",
                remedy="Define the variable, correct its name, or mark text with braces as !unsafe.",
            ),
        )

    def _note_secret(self, host: str, name: str, variable: Variable) -> None:
        texts = [text for text in _texts(variable.value) if text]
        self._secrets.update(texts)
        if not texts or variable.vaulted or variable.templated:
            return
        if variable.file == COMMAND_LINE:
            self._warn(host, f"{name} is on the command line, where `ps` shows it; use -e @FILE or a vault")
        elif variable.source in ("ini", "yaml"):
            self._warn(
                host,
                f"{name} is in plain text in {variable.file}; use ansible-vault encrypt_string",
            )

    def _ansible_secret(self, host: str, name: str) -> None:
        variable = self._inventory.variable(host, name)
        if variable.error:
            self._unresolved(host, variable)
        elif not variable.pending:
            self._note_secret(host, name, variable)

    def _key_file(self, host: str, name: str) -> None:
        variable = self._inventory.variable(host, name)
        if variable.pending or variable.error or not isinstance(variable.value, str) or not variable.value:
            return
        problem = check_secret_file(Path(variable.value).expanduser(), what="SSH private key")
        if problem:
            self._add(
                host,
                replace(
                    problem,
                    file=variable.file,
                    line=variable.line,
                    key=name,
                    found=f"{variable.value} {problem.found}".strip(),
                ),
            )

    def _unknown(self, host: str, name: str, setting: Setting | None) -> None:
        bare = name.lstrip("_")
        ours = bare.startswith((*self._prefixes, "dsv3_"))
        if name in self._former:
            message, remedy = "was renamed", f"Write {self._former[name]} instead."
        elif setting is not None:
            message, remedy = "is handed to its role by the playbooks", setting.doc
        elif name in COMPUTED:
            message, remedy = "is worked out from the host", "Leave it out."
        elif name.startswith("__") and ours:
            message, remedy = "is internal to its role", "Leave it out."
        elif ours:
            message, remedy = "is no setting", ""
        elif _close(name, tuple(self._known)):
            message, remedy = "is no setting, and looks like a misspelt one", ""
        else:
            return
        if not remedy:
            meant = suggest(name, [s.name for s in self._known.values() if not s.internal])
            remedy = f"Did you mean {meant!r}?" if meant else "`deploy-dsv3 settings` lists what there is."
        variable = self._inventory.variable(host, name)
        self._add(
            host,
            ConfigError(message=f"{name} {message}", file=variable.file, line=variable.line, key=name, remedy=remedy),
        )


@cache
def _close(name: str, known: tuple[str, ...]) -> bool:
    return bool(difflib.get_close_matches(name, known, n=1, cutoff=_MISSPELT))


def _typed(setting: Setting, variable: Variable) -> _Typed:
    """Read a value as its setting's type.

    YAML has types, so there a number in quotes is a mistake. INI values are Python literals, or else text;
    values of ``-e key=value`` are always text, so what spells the type is taken for it.
    """
    value, kind = variable.value, setting.type
    textual = variable.source in ("ini", "extra")
    match kind:
        case "bool":
            return _bool(value, variable)
        case "int":
            if isinstance(value, int) and not isinstance(value, bool):
                return _Typed(value=value)
            if variable.source == "extra" and isinstance(value, str) and re.fullmatch(r"-?[0-9]{1,18}", value):
                return _Typed(value=int(value))
            return _Typed(value=value, problem="a whole number", remedy=_unquoted(value))
        case "float":
            if isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value):
                return _Typed(value=float(value))
            if variable.source == "extra" and isinstance(value, str):
                try:
                    number = float(value) if value.isascii() else math.nan
                except ValueError:
                    number = math.nan
                if math.isfinite(number):
                    return _Typed(value=number)
            return _Typed(value=value, problem="a number", remedy=_unquoted(value))
        case "str" | "path":
            if isinstance(value, str):
                return _Typed(value=value)
            if textual and isinstance(value, int) and not isinstance(value, bool):
                return _Typed(value=str(value))
            quoted = f"Write it in quotes: \"'{value}'\"." if textual else f'Write it in quotes: "{value}".'
            return _Typed(value=value, problem="text", remedy=quoted if _scalar(value) else "")
        case "list":
            return _list(setting, value)
        case "dict":
            if isinstance(value, dict):
                return _Typed(value=value)
            return _Typed(value=value, problem="a mapping of names to values", remedy="Write {name: value}.")
        case _:
            return _Typed(value=value)


def _bool(value: Any, variable: Variable) -> _Typed:
    if isinstance(value, bool):
        return _Typed(value=value)
    if variable.source == "extra" and isinstance(value, str) and value.lower() in _TRUE | _FALSE:
        return _Typed(value=value.lower() in _TRUE)
    if variable.source == "ini":
        return _Typed(
            value=value,
            problem="True or False",
            remedy="Write True or False: in INI files any other spelling is text to Ansible.",
        )
    return _Typed(value=value, problem="true or false", remedy="Write true or false, without quotes.")


def _list(setting: Setting, value: Any) -> _Typed:
    if not isinstance(value, list):
        return _Typed(value=value, problem="a list", remedy="Write [a, b], or one '- item' on each line.")
    kinds: dict[str, type] = {"str": str, "int": int, "dict": dict, "path": str}
    wanted = kinds.get(setting.elements)
    for item in value:
        if wanted and (not isinstance(item, wanted) or (wanted is int and isinstance(item, bool))):
            return _Typed(
                value=value,
                problem=f"a list of {'text' if wanted is str else setting.elements}",
                remedy="" if setting.secret else f"Correct the element {_shown(item)}.",
            )
    return _Typed(value=value)


def _unquoted(value: Any) -> str:
    if isinstance(value, str) and re.fullmatch(r"\s*-?\d+(\.\d+)?\s*", value):
        return "Write the digits 0-9 without quotes."
    return ""


def _scalar(value: Any) -> bool:
    return isinstance(value, (int, float, bool))


def _shown(value: Any) -> str:
    text = repr(value) if value is not None else "nothing (null)"
    return text if len(text) <= 120 else f"{text[:117]}..."


def _texts(value: Any) -> Iterator[str]:
    if isinstance(value, Mapping):
        for item in value.values():
            yield from _texts(item)
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from _texts(item)
    elif value is not None:
        yield str(value)
