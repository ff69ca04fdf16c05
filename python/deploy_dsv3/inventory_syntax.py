"""Syntax of inventory files, checked before Ansible reads them: INI and YAML, each mistake with its line.

Beyond what does not parse, this finds what parses and is a mistake: a key or a host that is there twice, a
section that nothing describes, aliases that blow up.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Protocol

import yaml

from deploy_dsv3.errors import ConfigError

#: Nodes after all YAML aliases are followed; far beyond any real inventory ("billion laughs").
MAX_YAML_NODES = 200_000
#: Deeper YAML is no inventory, and from some ten thousand levels on libyaml overflows the stack.
MAX_YAML_DEPTH = 100

# As Ansible's INI plugin has it, ansible/plugins/inventory/ini.py, InventoryModule._compile_patterns.
_SECTION = re.compile(r"^\[([^:\]\s]+)(?::(\w+))?\]\s*(?:#.*)?$")
_HOST = re.compile(r"^[A-Za-z0-9_.\-:\[\]]+$")

_LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)

#: Called with line number, name, and what it names: tells if it was there before.
_Once = Callable[[int, str, str], None]


class _Report(Protocol):
    def __call__(self, number: int, message: str, **fields: str) -> None:
        """Note a mistake in a line."""


def empty(path: Path) -> ConfigError:
    """The message for an inventory that says nothing."""
    return ConfigError(
        message="this inventory is empty",
        file=str(path),
        expected="[dsv3_head] with one host",
        remedy="Write one after inventory/example/prod.ini.",
    )


def too_deep(text: str) -> int | None:
    """The line at which YAML is nested too deeply to be composed; None if it never is.

    Raises:
        yaml.YAMLError: it is not valid.
    """
    depth = 0
    for event in yaml.parse(text, Loader=_LOADER):
        if isinstance(event, yaml.CollectionStartEvent):
            depth += 1
            if depth > MAX_YAML_DEPTH:
                return event.start_mark.line + 1 if event.start_mark else 1
        elif isinstance(event, yaml.CollectionEndEvent):
            depth -= 1
    return None


def check_yaml(path: Path, text: str, *, variables: bool) -> list[ConfigError]:
    """Syntax, repeated keys, more than one document, and aliases that blow up or contain themselves."""
    try:
        if line := too_deep(text):
            return [
                ConfigError(
                    message="this YAML is nested too deeply",
                    file=str(path),
                    line=line,
                    expected=f"at most {MAX_YAML_DEPTH} levels",
                    remedy="Look for brackets that are not closed.",
                )
            ]
        node = yaml.compose(text, Loader=_LOADER)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        problem = error.problem or str(error)
        line = mark.line + 1 if mark else None
        lines = text.splitlines()
        # libyaml does not say that the character it trips over is a tab.
        if "'\\t'" in problem or (line and line <= len(lines) and re.match(r" *\t", lines[line - 1])):
            return [
                ConfigError(
                    message="a tab is where YAML wants spaces",
                    file=str(path),
                    line=line,
                    remedy="Indent with spaces.",
                )
            ]
        if "single document" in problem or "another document" in problem:
            return [
                ConfigError(
                    message="more than one YAML document",
                    file=str(path),
                    line=line,
                    remedy="Keep one document: remove the second '---' and what follows it, or merge them.",
                )
            ]
        return [
            ConfigError(
                message=f"this is not valid YAML: {problem}",
                file=str(path),
                line=line,
                remedy="Look at that line and the one above it: indentation, quotes, a missing colon.",
            )
        ]
    except (yaml.YAMLError, RecursionError, ValueError) as error:
        return [ConfigError(message=f"this is not valid YAML: {_first_line(error)}", file=str(path))]
    # With "---" and nothing but comments after it there is a node: that of nothing.
    if node is None or (isinstance(node, yaml.ScalarNode) and node.tag == "tag:yaml.org,2002:null" and not node.value):
        return [] if variables else [empty(path)]
    if not isinstance(node, yaml.MappingNode):
        return [
            ConfigError(
                message="this is not a mapping of names to values",
                file=str(path),
                line=node.start_mark.line + 1,
                found=_node_kind(node),
                expected="key: value" if variables else "groups, as in 'dsv3_head: {hosts: {gpu-a: {}}}'",
                remedy="See inventory/example for the shape.",
            )
        ]
    return _check_nodes(path, node)


def check_ini(path: Path, text: str) -> list[ConfigError]:
    """Sections, host names, ``key=value`` and everything that is there twice."""
    errors: list[ConfigError] = []

    def error(number: int, message: str, **fields: str) -> None:
        errors.append(ConfigError(message=message, file=str(path), line=number, **fields))

    seen: dict[tuple[str, str], int] = {}
    declared: set[str] = set()
    used: dict[str, tuple[int, str]] = {}
    group, kind = "ungrouped", "hosts"

    def once(number: int, name: str, what: str) -> None:
        first = seen.setdefault((f"{group}:{kind}", name), number)
        if first != number:
            error(
                number,
                f"{what} {name!r} is there twice in [{group if kind == 'hosts' else f'{group}:{kind}'}]",
                key=name,
                found=f"first on line {first}",
                expected="once",
                remedy="Keep one of them.",
            )

    for number, raw in enumerate(text.splitlines(), start=1):
        line = raw.strip()
        if not line or line[0] in "#;":
            continue
        if line.startswith("[") and not (kind == "vars" and "=" in line.split("]")[0]):
            match = _SECTION.match(line)
            if not match:
                error(
                    number,
                    "this section header is not valid",
                    found=line,
                    expected="[group], [group:vars] or [group:children], without spaces",
                    remedy="Correct the brackets or the name.",
                )
                continue
            group, kind = match[1], match[2] or "hosts"
            if kind not in ("hosts", "vars", "children"):
                error(
                    number,
                    f"section [{group}:{kind}] is of no known kind",
                    key=group,
                    expected=f"[{group}], [{group}:vars] or [{group}:children]",
                    remedy="Correct the word after the colon.",
                )
                kind = "unknown"
            elif kind == "vars":
                used.setdefault(group, (number, f"[{group}:vars]"))
            else:
                declared.add(group)
        elif kind == "vars":
            key, found, _ = line.partition("=")
            if not found or not key.strip():
                error(
                    number,
                    f"this line of [{group}:vars] is not a variable",
                    found=line.split()[0] if not found else "no name before '='",
                    expected="name=value",
                    remedy="Write name=value; with YAML's 'name: value' use a .yml inventory or group_vars.",
                )
            else:
                once(number, key.strip(), "variable")
        elif kind == "children":
            name = line.split("#")[0].strip()
            once(number, name, "group")
            used.setdefault(name, (number, f"[{group}:children]"))
        elif kind == "hosts":
            _check_host_line(line, number, error, once)
    for name, (number, where) in used.items():
        if name not in declared and name not in ("all", "ungrouped"):
            error(
                number,
                f"{where} names group {name!r}, which is not described",
                key=name,
                expected=f"a section [{name}]",
                remedy=f"Add [{name}], or correct the name.",
            )
    return errors


def _check_host_line(line: str, number: int, error: _Report, once: _Once) -> None:
    try:
        tokens = shlex.split(line, comments=True)
    except ValueError as problem:
        # Not the whole line: it may hold a password.
        error(number, f"this host line cannot be read: {problem}", found=line.split()[0], remedy="Close the quotes.")
        return
    if not tokens:
        return
    name = tokens[0]
    if name == "---":
        error(
            number,
            "this looks like YAML in a file that is read as INI",
            found="---",
            remedy="Name the file with the ending .yml.",
        )
        return
    if not _HOST.match(name):
        error(
            number,
            f"host name {name!r} has characters that no host name has",
            key=name,
            expected="letters, digits, '.', '-' and '_'",
            remedy="Correct the name. A comment starts with '#'; variables are written name=value.",
        )
    else:
        once(number, name, "host")
    keys: set[str] = set()
    for token in tokens[1:]:
        key, found, _ = token.partition("=")
        if not found or not key:
            error(
                number,
                f"{token!r} after host {name!r} is not a variable",
                key=name,
                expected="name=value without spaces around '='",
                remedy="Write name=value, and quote values with spaces.",
            )
        elif key in keys:
            error(
                number,
                f"variable {key!r} is there twice for host {name!r}",
                key=key,
                expected="once",
                remedy="Keep one of them.",
            )
        keys.add(key)


def _check_nodes(path: Path, root: yaml.Node) -> list[ConfigError]:
    errors: list[ConfigError] = []
    sizes: dict[int, int] = {}
    open_nodes: set[int] = set()

    def visit(node: yaml.Node) -> int:
        """Size of the tree below a node with all aliases followed."""
        key = id(node)
        if key in open_nodes:
            errors.append(
                ConfigError(
                    message="a YAML alias contains itself",
                    file=str(path),
                    line=node.start_mark.line + 1,
                    remedy="Write the value out.",
                )
            )
            return 1
        if key in sizes:
            return sizes[key]
        open_nodes.add(key)
        size = 1
        if isinstance(node, yaml.MappingNode):
            first: dict[str, int] = {}
            for name, value in node.value:
                line = name.start_mark.line + 1
                if isinstance(name, yaml.ScalarNode) and name.tag != "tag:yaml.org,2002:merge":
                    if name.value in first:
                        errors.append(
                            ConfigError(
                                message=f"key {name.value!r} is there twice",
                                file=str(path),
                                line=line,
                                key=name.value,
                                found=f"first on line {first[name.value]}",
                                expected="once",
                                remedy="Keep one of them: YAML would silently take the last.",
                            )
                        )
                    first.setdefault(name.value, line)
                size += visit(name) + visit(value)
        elif isinstance(node, yaml.SequenceNode):
            size += sum(visit(item) for item in node.value)
        open_nodes.discard(key)
        sizes[key] = size
        return size

    size = visit(root)
    if size > MAX_YAML_NODES:
        errors.append(
            ConfigError(
                message="YAML aliases make this file too large",
                file=str(path),
                found=f"{size} values once all aliases are followed",
                expected=f"at most {MAX_YAML_NODES}",
                remedy="Write the values out.",
            )
        )
    return errors


def _node_kind(node: yaml.Node) -> str:
    return "a list" if isinstance(node, yaml.SequenceNode) else f"the text {str(node.value)[:40]!r}"


def _first_line(error: BaseException) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
