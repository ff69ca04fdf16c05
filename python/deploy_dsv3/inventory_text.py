"""What can be told about inventory files from their text alone, before Ansible reads them.

Ansible accepts much that is a mistake (a repeated key, a repeated host, a byte order mark that becomes part of a
name) and reports the rest without a line number. These checks run first and name file and line.
"""

from __future__ import annotations

import os
import re
import shlex
import stat
from collections.abc import Iterator
from pathlib import Path

import yaml

from deploy_dsv3.errors import ConfigError

#: An inventory is written by people: more than this is a file of another kind.
MAX_BYTES = 4 * 1024 * 1024
#: Nodes after all YAML aliases are followed; far beyond any real inventory ("billion laughs").
MAX_YAML_NODES = 200_000

VAULT_HEADER = "$ANSIBLE_VAULT;"
YAML_SUFFIXES = (".yml", ".yaml", ".json")
VARS_DIRECTORIES = ("group_vars", "host_vars")

# As Ansible's INI plugin has it, ansible/plugins/inventory/ini.py, InventoryModule._compile_patterns.
_SECTION = re.compile(r"^\[([^:\]\s]+)(?::(\w+))?\]\s*(?:#.*)?$")
_HOST = re.compile(r"^[A-Za-z0-9_.\-:\[\]]+$")


def is_script(path: Path) -> bool:
    """Whether Ansible runs this file instead of reading it."""
    if not os.access(path, os.X_OK):
        return False
    with path.open("rb") as file:
        return file.read(2) == b"#!"


def is_yaml(path: Path, text: str) -> bool:
    """Whether a file is YAML: by its suffix, and by its first line if it has none that says so."""
    if path.suffix in YAML_SUFFIXES:
        return True
    if path.suffix:
        return False
    for line in text.splitlines():
        stripped = line.strip()
        if stripped and not stripped.startswith(("#", ";")):
            # `all:` opens a YAML mapping; `host:2222` and `host key=value` are INI.
            return stripped in ("---", "{") or bool(re.match(r"^[\w-]+:$", stripped))
    return False


def check_path(path: Path) -> list[ConfigError]:
    """Whether there is something to read at `path`: a file, or a directory with files in it."""
    try:
        mode = path.stat().st_mode
    except FileNotFoundError:
        return [_missing(path)]
    except OSError as error:
        return [_unreadable(path, error)]
    if stat.S_ISDIR(mode):
        return _check_directory(path)
    if not stat.S_ISREG(mode):
        return [
            ConfigError(
                message="this is neither a file nor a directory",
                file=str(path),
                found=_kind(mode),
                remedy="Give an inventory file, or a directory of them.",
            )
        ]
    return []


def inventory_files(path: Path) -> Iterator[Path]:
    """The files that Ansible reads as inventories below `path` (itself, if it is a file)."""
    if not path.is_dir():
        yield path
        return
    # The same names as ansible.inventory.manager.IGNORED with Ansible's default settings.
    ignored = (".pyc", ".pyo", ".swp", ".bak", "~", ".rpm", ".md", ".txt", ".rst", ".orig", ".cfg", ".retry")
    for entry in sorted(path.iterdir()):
        if entry.name.startswith(".") or entry.name.endswith(ignored):
            continue
        if entry.is_dir() and entry.name in (*VARS_DIRECTORIES, "vars_plugins"):
            continue
        yield from inventory_files(entry)


def variable_files(path: Path) -> Iterator[tuple[str, str, Path]]:
    """The files below ``group_vars`` and ``host_vars`` beside an inventory.

    Yields:
        ``(directory, entity, file)``: e.g. ``("group_vars", "all", Path(".../group_vars/all.yml"))``. Files whose
        name Ansible never looks for (``group_vars/all.ini``) are yielded with an empty entity.
    """
    base = path if path.is_dir() else path.parent
    for directory in VARS_DIRECTORIES:
        top = base / directory
        if not top.is_dir():
            continue
        for entry in sorted(top.iterdir()):
            if entry.name.startswith(".") or entry.name.endswith("~"):
                continue
            if entry.is_dir():
                for file in sorted(entry.rglob("*")):
                    if file.is_file() and not file.name.startswith(".") and file.suffix in (*YAML_SUFFIXES, ""):
                        yield directory, entry.name, file
            elif entry.suffix in YAML_SUFFIXES:
                yield directory, entry.stem, entry
            else:
                yield directory, entry.name if not _other_suffix(entry) else "", entry


def read(path: Path) -> tuple[str, list[ConfigError]]:
    """The text of a file and what is wrong with it as text; the text is empty if it cannot be read."""
    try:
        if path.is_dir():
            return "", [
                ConfigError(
                    message="a directory is where a file belongs",
                    file=str(path),
                    remedy="Move it away, or give the file inside it.",
                )
            ]
        size = path.stat().st_size
        if size > MAX_BYTES:
            return "", [
                ConfigError(
                    message="this file is too large for an inventory",
                    file=str(path),
                    found=f"{size} bytes",
                    expected=f"at most {MAX_BYTES} bytes",
                    remedy="Check that it is the file you meant.",
                )
            ]
        raw = path.read_bytes()
    except FileNotFoundError:
        return "", [_missing(path)]
    except OSError as error:
        return "", [_unreadable(path, error)]
    return _decode(path, raw)


def check_file(path: Path, *, variables: bool = False) -> list[ConfigError]:
    """What is wrong with one inventory file, or (`variables`) one file of ``group_vars``/``host_vars``."""
    if not variables and path.is_file() and os.access(path, os.R_OK):
        with path.open("rb") as file:
            shebang = file.read(2) == b"#!"
        if shebang and not os.access(path, os.X_OK):
            return [
                ConfigError(
                    message="this inventory is a script, and it is not executable",
                    file=str(path),
                    line=1,
                    remedy=f"Run: chmod +x {shlex.quote(str(path))}",
                )
            ]
        if shebang:
            return []
    text, errors = read(path)
    if errors or text.startswith(VAULT_HEADER):
        return errors
    if not text.strip():
        return [] if variables else [_empty(path)]
    if variables or is_yaml(path, text):
        return check_yaml(path, text, variables=variables)
    if path.suffix == ".toml":
        return []
    return check_ini(path, text)


def check_yaml(path: Path, text: str, *, variables: bool) -> list[ConfigError]:
    """Syntax, repeated keys, more than one document, and aliases that blow up or contain themselves."""
    try:
        node = yaml.compose(text, Loader=yaml.CSafeLoader if hasattr(yaml, "CSafeLoader") else yaml.SafeLoader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        problem = error.problem or str(error)
        line = mark.line + 1 if mark else None
        if "'\\t'" in problem or (line and "\t" in text.splitlines()[min(line, text.count("\n") + 1) - 1 : line][0]):
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
    if node is None:
        return [] if variables else [_empty(path)]
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
                    found=line if not found else "no name before '='",
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
        error(number, f"this host line cannot be read: {problem}", found=line, remedy="Close the quotes.")
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


class _Report:  # signatures of the two callbacks above, for the type checker
    def __call__(self, number: int, message: str, **fields: str) -> None: ...


class _Once:
    def __call__(self, number: int, name: str, what: str) -> None: ...


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

    try:
        size = visit(root)
    except RecursionError:
        return [ConfigError(message="this YAML is nested too deeply", file=str(path), remedy="Flatten it.")]
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


def _decode(path: Path, raw: bytes) -> tuple[str, list[ConfigError]]:
    name = str(path)
    if raw.startswith((b"\xff\xfe", b"\xfe\xff")):
        return "", [
            ConfigError(
                message="this file is UTF-16, not UTF-8",
                file=name,
                line=1,
                remedy=f"Convert it: iconv -f UTF-16 -t UTF-8 {shlex.quote(name)}",
            )
        ]
    if raw.startswith(b"\xef\xbb\xbf"):
        return "", [
            ConfigError(
                message="this file starts with a byte order mark (BOM), which would become part of the first name",
                file=name,
                line=1,
                remedy=f"Remove it: sed -i '1s/^\\xef\\xbb\\xbf//' {shlex.quote(name)}",
            )
        ]
    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError as error:
        return "", [
            ConfigError(
                message="this file is not UTF-8",
                file=name,
                line=raw[: error.start].count(b"\n") + 1,
                found=f"byte 0x{raw[error.start]:02x}",
                remedy="Save it as UTF-8.",
            )
        ]
    if "\x00" in text:
        return "", [
            ConfigError(
                message="this file has NUL bytes: it is binary",
                file=name,
                line=text[: text.index("\x00")].count("\n") + 1,
                remedy="Check that it is the file you meant.",
            )
        ]
    if "\r" in text:
        return "", [
            ConfigError(
                message="this file has Windows line ends (CRLF), which would become part of values",
                file=name,
                line=text[: text.index("\r")].count("\n") + 1,
                remedy=f"Convert it: sed -i 's/\\r$//' {shlex.quote(name)}",
            )
        ]
    return text, []


def _check_directory(path: Path, above: tuple[Path, ...] = ()) -> list[ConfigError]:
    """A directory: readable, not its own ancestor through a symbolic link, and with something in it."""
    real = path.resolve()
    if real in above:
        return [
            ConfigError(
                message="a symbolic link leads back to a directory above it",
                file=str(path),
                found=f"-> {real}",
                remedy="Remove the link.",
            )
        ]
    try:
        entries = sorted(path.iterdir())
    except OSError as error:
        return [_unreadable(path, error)]
    errors: list[ConfigError] = []
    for entry in entries:
        try:
            entry.stat()
        except FileNotFoundError:
            errors.append(_missing(entry, link=True))
        except OSError as error:
            errors.append(_unreadable(entry, error))
        else:
            if entry.is_dir() and not entry.name.startswith("."):
                errors.extend(_check_directory(entry, (*above, real)))
    if not above and not errors and not any(True for _ in inventory_files(path)):
        errors.append(
            ConfigError(
                message="this directory has no inventory file",
                file=str(path),
                found="nothing" if not entries else ", ".join(entry.name for entry in entries[:5]),
                expected="a file such as hosts.ini or hosts.yml",
                remedy="Give the inventory file itself, or put one here.",
            )
        )
    return errors


def _missing(path: Path, *, link: bool = False) -> ConfigError:
    if link or path.is_symlink():
        return ConfigError(
            message="this symbolic link leads nowhere",
            file=str(path),
            found=f"-> {os.readlink(path)}",
            remedy="Correct or remove the link.",
        )
    if "," in path.name:
        return ConfigError(
            message="a list of hosts is no inventory: it says nothing of head and workers",
            file=str(path),
            expected="an inventory file with [dsv3_head] and [dsv3_workers]",
            remedy="Write one after inventory/example/prod.ini.",
        )
    parent = path.parent
    near = [p.name for p in parent.iterdir() if p.stem == path.stem] if parent.is_dir() else []
    return ConfigError(
        message="there is no such inventory",
        file=str(path),
        remedy=f"Did you mean {parent / near[0]}?" if near else "Check the path given with --inventory.",
    )


def _unreadable(path: Path, error: OSError) -> ConfigError:
    return ConfigError(
        message=f"this cannot be read: {error.strerror or error}",
        file=str(path),
        remedy="Remove the loop of symbolic links."
        if error.errno == 40
        else "Give yourself permission to read it, or run as the user who owns it.",
    )


def _empty(path: Path) -> ConfigError:
    return ConfigError(
        message="this inventory is empty",
        file=str(path),
        expected="[dsv3_head] with one host",
        remedy="Write one after inventory/example/prod.ini.",
    )


def _kind(mode: int) -> str:
    kinds = ((stat.S_ISFIFO, "a pipe"), (stat.S_ISSOCK, "a socket"), (stat.S_ISCHR, "a device"))
    return next((name for test, name in kinds if test(mode)), "a special file")


def _node_kind(node: yaml.Node) -> str:
    return "a list" if isinstance(node, yaml.SequenceNode) else f"the text {str(node.value)[:40]!r}"


def _other_suffix(entry: Path) -> bool:
    return entry.suffix in (".ini", ".cfg", ".txt", ".toml", ".bak", ".orig", ".yml~")


def _first_line(error: BaseException) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
