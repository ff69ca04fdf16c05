"""Ansible's side of loading an inventory: manager, variables, templates, vault, and the origin of each value.

Everything that knows Ansible's classes from the inside is here. Values come with the file and line they were
written in, which ansible-core keeps as tags on them since 2.19.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

from yaml import YAMLError

from deploy_dsv3 import inventory_syntax, inventory_text
from deploy_dsv3.errors import ConfigError, ConfigErrors, config_error
from deploy_dsv3.inventory import (
    COMMAND_LINE,
    Inventory,
    SourceKind,
    Variable,
    VaultOptions,
    check_secret_file,
    vault_error,
)
from deploy_dsv3.topology import Group

_TEMPLATE = re.compile(r"\{\{|\{%")
_UNDEFINED = re.compile(r"'([^']+)' is undefined")
#: Variables of these names exist only once hosts were looked at.
_RUNTIME_PREFIXES = ("ansible_", "dsv3_", "__")


@cache
def _prepare_ansible() -> None:
    """Make inventory plugins of installed collections loadable, once per process."""
    from ansible.plugins.loader import init_plugin_loader

    with _listening():
        init_plugin_loader()


@dataclass(frozen=True, kw_only=True)
class _Remarks:
    warnings: list[str] = field(default_factory=list)
    failures: list[BaseException] = field(default_factory=list)


@contextmanager
def _listening() -> Iterator[_Remarks]:
    """Collect what Ansible would print.

    Ansible tells parse failures only to its display, as warnings, and goes on with an empty inventory.
    """
    from ansible.utils.display import Display

    display = Display()
    remarks = _Remarks()

    def failure(msg: str | None = None, exception: BaseException | None = None, **_: Any) -> None:
        if exception is not None:
            remarks.failures.append(exception)

    replaced: dict[str, Callable[..., None]] = {
        "error_as_warning": failure,
        "warning": lambda msg="", *_a, **_k: remarks.warnings.append(str(msg)),
        "deprecated": lambda *_a, **_k: None,
        "display": lambda *_a, **_k: None,
    }
    # The display is a singleton: attributes of the instance hide its methods until they are removed again.
    before = dict(vars(display))
    vars(display).update(replaced)
    try:
        yield remarks
    finally:
        for name in replaced:
            if name in before:
                vars(display)[name] = before[name]
            else:
                del vars(display)[name]


def _origin(value: Any) -> tuple[str, int | None]:
    """File and line that a value was written in; ``("", None)`` if it does not know.

    ansible-core 2.19 tags values with their origin in an internal module; without it, messages lose the line.
    """
    try:
        from ansible._internal._datatag._tags import Origin
    except ImportError:
        return "", None
    origin = Origin.get_tag(value)
    if origin is None:
        return "", None
    return origin.path or origin.description or "", origin.line_num or None


def _is_vaulted(value: Any) -> bool:
    """Whether a value, or anything in it, was encrypted inline or came from an encrypted file."""
    from ansible.parsing.vault import EncryptedString

    if isinstance(value, EncryptedString):
        return True
    if isinstance(value, Mapping):
        return any(_is_vaulted(item) for item in value.values())
    if isinstance(value, (list, tuple)):
        return any(_is_vaulted(item) for item in value)
    try:
        from ansible._internal._datatag._tags import SourceWasEncrypted, VaultedValue
    except ImportError:
        return False
    return bool(SourceWasEncrypted.is_tagged_on(value) or VaultedValue.is_tagged_on(value))


def _plain(value: Any) -> Any:
    """The value without Ansible's tags, decrypted.

    Raises:
        AnsibleError: a vaulted value cannot be opened.
    """
    from ansible.parsing.vault import EncryptedString

    if isinstance(value, EncryptedString):
        return _plain(str(value))
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, Mapping):
        return {_plain(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple, set)):
        return [_plain(item) for item in value]
    for kind in (int, float, str):
        if isinstance(value, kind):
            return kind(value)
    return value


def _has_template(value: Any) -> bool:
    if isinstance(value, str):
        return bool(_TEMPLATE.search(value))
    if isinstance(value, Mapping):
        return any(_has_template(item) for item in value.values())
    if isinstance(value, (list, tuple)):
        return any(_has_template(item) for item in value)
    return False


class Loader:
    """Loads one inventory.

    Args:
        paths: its sources.
        vault: where vault passwords come from.
    """

    def __init__(self, paths: tuple[Path, ...], vault: VaultOptions) -> None:
        self._paths = paths
        self._vault = vault

    def load(self, extra_vars: Sequence[str]) -> Inventory:
        """Read the sources and the values of ``-e``; raises ConfigErrors, as `inventory.load`."""
        _prepare_ansible()
        from ansible.parsing.dataloader import DataLoader
        from ansible.vars.manager import VariableManager

        loader = DataLoader()
        self._open_vault(loader)
        with _listening() as remarks:
            extra = self._extra_vars(loader, extra_vars)
            manager = self._parse(loader)
            variables = VariableManager(loader=loader, inventory=manager)
        variables._extra_vars = extra
        self._refuse(manager, remarks)
        views = _Views(loader, manager, variables, extra, self)
        remarked = [text for text in remarks.warnings if not text.startswith("Found variable using reserved")]
        return Inventory(
            paths=self._paths,
            groups={
                str(name): Group(
                    hosts=tuple(str(host.name) for host in group.hosts),
                    children=tuple(str(child.name) for child in group.child_groups),
                )
                for name, group in manager.groups.items()
                if name not in ("all", "ungrouped")
            },
            hosts=tuple(str(name) for name in manager.hosts),
            warnings=tuple(dict.fromkeys([*remarked, *self._unread_files(manager)])),
            _names=views.names,
            _resolve=views.resolve,
            _select=views.select,
        )

    def _parse(self, loader: Any) -> Any:
        from ansible.errors import AnsibleError
        from ansible.inventory.manager import InventoryManager

        try:
            return InventoryManager(loader, sources=[str(path.absolute()) for path in self._paths])
        except (AnsibleError, RecursionError, ValueError, TypeError, OSError) as error:
            raise ConfigErrors([self._explain(error)]) from error

    def _refuse(self, manager: Any, remarks: _Remarks) -> None:
        """Refuse what Ansible only warns of and then leaves out."""
        unparsed = [text for text in remarks.warnings if text.startswith("Unable to parse ")]
        if unparsed:
            raise ConfigErrors(
                [self._explain(error) for error in self._relevant(remarks.failures)]
                or [ConfigError(message=text, file=self._label) for text in unparsed]
            )
        dropped = [text for text in remarks.warnings if text.startswith("Skipping ")]
        if dropped:
            raise ConfigErrors(
                ConfigError(
                    message=f"part of this inventory would be dropped: {text}",
                    file=self._label,
                    expected="hosts, children and vars below a group, each a mapping",
                    remedy="Correct the key or its value.",
                )
                for text in dropped
            )
        if not manager.hosts:
            raise config_error(
                "this inventory has no hosts",
                file=self._label,
                expected="[dsv3_head] with one host",
                remedy="Write one after inventory/example/prod.ini.",
            )

    @property
    def _label(self) -> str:
        return ", ".join(map(str, self._paths))

    def _open_vault(self, loader: Any) -> None:
        from ansible import constants
        from ansible.errors import AnsibleError
        from ansible.parsing.vault import VaultSecret, VaultSecretsContext, get_file_vault_secret

        secrets: list[tuple[str, Any]] = []
        errors: list[ConfigError] = []
        if self._vault.password:
            secrets.append(("default", VaultSecret(self._vault.password.encode())))
        # ansible.cfg and Ansible's environment variables name some as well.
        configured = [*constants.DEFAULT_VAULT_IDENTITY_LIST, constants.DEFAULT_VAULT_PASSWORD_FILE]
        for item in (*self._vault.password_files, *filter(None, configured)):
            label, _, name = item.rpartition("@")
            path = Path(name).expanduser()
            problem = check_secret_file(path, what="vault password file")
            if problem:
                errors.append(problem)
                continue
            try:
                with _listening():
                    secret = get_file_vault_secret(filename=str(path), vault_id=label or "default", loader=loader)
                    secret.load()
            except (AnsibleError, OSError) as error:
                errors.append(
                    ConfigError(
                        message=f"the vault password cannot be read: {_message(error)}",
                        file=name,
                        key="--vault-password-file",
                        remedy="Check the file, or the program that prints the password.",
                    )
                )
            else:
                secrets.append((label or "default", secret))
        if errors:
            raise ConfigErrors(errors)
        loader.set_vault_secrets(secrets)
        # Values encrypted one by one are opened through this process-wide context, which Ansible's own
        # command line sets once; here each load sets its own.
        VaultSecretsContext._current = VaultSecretsContext(secrets)

    def _extra_vars(self, loader: Any, options: Sequence[str]) -> dict[str, Any]:
        from ansible.utils.vars import combine_vars

        merged: dict[str, Any] = {}
        errors: list[ConfigError] = []
        for option in options:
            try:
                merged = combine_vars(merged, self._extra_option(loader, option.strip()))
            except ConfigErrors as problem:
                errors.extend(problem)
        if errors:
            raise ConfigErrors(errors)
        return merged

    def _extra_option(self, loader: Any, text: str) -> Mapping[Any, Any]:
        """The variables of one ``-e``, as ansible.utils.vars.load_extra_vars reads it."""
        from ansible.errors import AnsibleError
        from ansible.parsing.splitter import parse_kv

        file = text[1:] if text.startswith("@") else ""
        if file and (problems := inventory_text.check_file(Path(file).expanduser(), variables=True)):
            raise ConfigErrors(problems)
        try:
            if file:
                path = str(Path(file).expanduser().absolute())
                data = loader.load_from_file(path, cache="none", trusted_as_template=True) or {}
            elif text.startswith(("{", "[")):
                if inventory_syntax.too_deep(text):
                    raise ValueError("it is nested too deeply")
                data = loader.load(_tagged(text))
            else:
                data = parse_kv(_tagged(text))
        except (AnsibleError, YAMLError, ValueError, TypeError, OSError, RecursionError) as error:
            raise config_error(
                f"-e cannot be read: {_message(error)}",
                file=file,
                key="-e",
                expected="key=value, JSON, or @FILE",
                remedy="Quote it for the shell, and check the syntax.",
            ) from error
        if not isinstance(data, Mapping) or "_raw_params" in data or not (data or file):
            raise config_error(
                f"-e {text!r} sets no variable",
                file=file,
                key="-e",
                expected="key=value, JSON with names, or @FILE",
                remedy="Write -e key=value, or -e @FILE for a file.",
            )
        return data

    def _relevant(self, failures: Sequence[BaseException]) -> Sequence[BaseException]:
        """Of the plugins that tried a file, the failure of the one meant for it.

        Ansible tries YAML before INI for names without an ending: a broken INI fails twice.
        """
        last: dict[str, BaseException] = {}
        for failure in failures:
            file = _origin_of(failure)[0]
            if file in last and inventory_text.is_yaml(Path(file), _peek(file)):
                continue
            last[file] = failure
        return tuple(last.values())

    def _explain(self, error: BaseException) -> ConfigError:
        file, line = _origin_of(error)
        text = _message(error)
        if "vault" in text.lower() or "decrypt" in text.lower():
            return vault_error(text, file=self._short(file), line=line)
        return ConfigError(
            message=f"this inventory cannot be read: {text}",
            file=self._short(file) or self._label,
            line=line,
            remedy="Correct it; `ansible-inventory --list -i FILE` reads it the same way.",
        )

    def _short(self, file: str) -> str:
        """The file as the operator named it, where it is one of the sources or below one."""
        for path in self._paths:
            base = path if path.is_dir() else path.parent
            try:
                return str(base / Path(file).relative_to(base.absolute()))
            except ValueError:
                continue
        return file

    def _unread_files(self, manager: Any) -> Iterator[str]:
        """Variable files of no group and no host: Ansible says nothing of a misspelt name."""
        for path in self._paths:
            for directory, entity, file in inventory_text.variable_files(path):
                names = manager.groups if directory == "group_vars" else manager.hosts
                what = "group" if directory == "group_vars" else "host"
                if not entity:
                    yield f"{file} is never read: Ansible looks for .yml, .yaml, .json or no ending"
                elif entity not in names:
                    close = difflib.get_close_matches(entity, list(names), n=1)
                    hint = f"; did you mean {close[0]!r}?" if close else ""
                    yield f"{file} is never read: the inventory has no {what} {entity!r}{hint}"


class _Views:
    """Variables of hosts, worked out once per host."""

    def __init__(self, loader: Any, manager: Any, variables: Any, extra: Mapping[str, Any], parent: Loader) -> None:
        self._loader = loader
        self._manager = manager
        self._variables = variables
        self._extra = extra
        self._parent = parent
        self._cache: dict[str, dict[str, Any]] = {}
        self._resolved: dict[tuple[str, str], Variable] = {}
        self._named: dict[str, Mapping[str, tuple[str, int | None]]] = {}

    def names(self, host: str) -> Sequence[str]:
        return [str(name) for name in self._of(host)]

    def select(self, pattern: str) -> tuple[str, ...]:
        from ansible.errors import AnsibleError

        with _listening() as remarks:
            try:
                self._manager.subset(pattern)
                found = tuple(str(host.name) for host in self._manager.get_hosts())
            except (AnsibleError, OSError, ValueError) as error:
                raise config_error(
                    f"--limit cannot be read: {_message(error)}",
                    key="--limit",
                    found=pattern,
                    remedy="Write hosts or groups separated by commas, or @FILE with one on each line.",
                ) from error
            finally:
                self._manager.subset(None)
        if not found or remarks.warnings:
            names = [*map(str, self._manager.hosts), *map(str, self._manager.groups)]
            close = difflib.get_close_matches(pattern, names, n=1)
            raise config_error(
                "--limit names hosts that the inventory does not have",
                key="--limit",
                found=pattern,
                expected="hosts or groups of the inventory",
                remedy=f"Did you mean {close[0]!r}?" if close else "Check the spelling.",
            )
        return found

    def resolve(self, host: str, name: str) -> Variable:
        key = (host, name)
        if key not in self._resolved:
            self._resolved[key] = self._variable(host, name)
        return self._resolved[key]

    def _of(self, host: str) -> dict[str, Any]:
        if host not in self._cache:
            from ansible.errors import AnsibleError

            with _listening():
                try:
                    self._cache[host] = self._variables.get_vars(host=self._manager.get_host(host))
                except (AnsibleError, ValueError, TypeError, OSError, RecursionError) as error:
                    raise ConfigErrors([self._parent._explain(error)]) from error
        return self._cache[host]

    def _variable(self, host: str, name: str) -> Variable:
        from ansible.errors import AnsibleError

        values = self._of(host)
        raw = values[name]
        file, line = _origin(raw)
        # The line of the name tells more than that of a value further down; true, false and null have none at
        # all.
        key_file, key_line = self._origins(host).get(name, ("", None))
        if key_file and (not file or file == key_file):
            file, line = key_file, key_line
        shown = self._parent._short(file)
        source = self._source(name, file)
        pending, templated, error, value = False, False, "", raw
        with _listening():
            try:
                vaulted = _is_vaulted(raw)
                templated = not vaulted and _has_template(raw)
                if templated:
                    value, pending, error = self._template(values, raw)
                value = _plain(value)
            except (AnsibleError, ValueError, TypeError, RecursionError) as problem:
                return Variable(
                    name=name,
                    value=None,
                    file=shown,
                    line=line,
                    source=source,
                    vaulted=True,
                    error=_message(problem),
                )
        return Variable(
            name=name,
            value=value,
            file=shown,
            line=line,
            source=source,
            # Of an encrypted file Ansible marks the whole, and not each value.
            vaulted=vaulted or _peek(file).startswith(inventory_text.VAULT_HEADER),
            templated=templated,
            pending=pending,
            error=error,
        )

    def _template(self, values: Mapping[str, Any], raw: Any) -> tuple[Any, bool, str]:
        from ansible.errors import AnsibleError, AnsibleUndefinedVariable
        from ansible.template import Templar

        try:
            return Templar(loader=self._loader, variables=values).template(raw), False, ""
        except AnsibleUndefinedVariable as problem:
            undefined = _UNDEFINED.search(_message(problem))
            if undefined and not undefined[1].startswith(_RUNTIME_PREFIXES):
                return raw, True, f"it refers to {undefined[1]!r}, which nothing defines"
            return raw, True, ""
        except (AnsibleError, ValueError, TypeError, RecursionError) as problem:
            return raw, True, f"its template cannot be read: {_message(problem)}"

    def _source(self, name: str, file: str) -> SourceKind:
        if file == COMMAND_LINE:
            return "extra"
        path = Path(file)
        if not file or not path.is_file():
            return "other"
        return "yaml" if name in self._extra or inventory_text.is_yaml(path, _peek(file)) else "ini"

    def _origins(self, host: str) -> Mapping[str, tuple[str, int | None]]:
        """Where each variable of a host was named, later layers of Ansible's precedence over earlier ones."""
        if host not in self._named:
            from ansible.inventory.helpers import sort_groups
            from ansible.vars.plugins import get_vars_from_inventory_sources

            entity = self._manager.get_host(host)
            named: dict[str, tuple[str, int | None]] = {}
            with _listening():
                for owner in (*sort_groups(entity.get_groups()), entity):
                    files = get_vars_from_inventory_sources(self._loader, self._manager._sources, [owner], "task")
                    for layer in (owner.vars, files):
                        named.update((str(key), _origin(key)) for key in layer)
            named.update((str(key), _origin(key)) for key in self._extra)
            self._named[host] = named
        return self._named[host]


def _tagged(text: str) -> str:
    """Text of the command line, marked as such and trusted to hold templates, as ansible-playbook does."""
    try:
        from ansible._internal._datatag._tags import Origin, TrustedAsTemplate
    except ImportError:
        return text
    tagged: str = TrustedAsTemplate().tag(Origin(description=COMMAND_LINE).tag(text))
    return tagged


def _origin_of(error: BaseException) -> tuple[str, int | None]:
    """File and line that an Ansible error blames, looked for along its causes."""
    found: tuple[str, int | None] = ("", None)
    current: BaseException | None = error
    while current is not None:
        file, line = _origin(getattr(current, "obj", None))
        match = re.search(r"with source '([^']+)'", file)
        file = match[1] if match else file
        if file and line:
            return file, line
        found = found if found[0] else (file, line)
        current = current.__cause__ or current.__context__
    return found


def _message(error: BaseException) -> str:
    """Ansible's message in one line, without the excerpt of the file (it may show a secret)."""
    text = " ".join(str(error).split("\n\n")[0].split())
    return text.split(" Origin: ")[0] or type(error).__name__


def _peek(file: str) -> str:
    path = Path(file)
    if not path.is_file():
        return ""
    with path.open(encoding="utf-8", errors="replace") as stream:
        return stream.read(4096)
