"""What can be told about inventory files from their text alone, before Ansible reads them.

Ansible accepts much that is a mistake (a repeated key, a repeated host, a byte order mark that becomes part
of a name) and reports the rest without a line number. These checks run first and name file and line.
"""

from __future__ import annotations

import os
import re
import shlex
import stat
from collections.abc import Iterator
from pathlib import Path

from deploy_dsv3 import inventory_syntax
from deploy_dsv3.errors import ConfigError

#: An inventory is written by people: more than this is a file of another kind.
MAX_BYTES = 4 * 1024 * 1024

VAULT_HEADER = "$ANSIBLE_VAULT;"
YAML_SUFFIXES = (".yml", ".yaml", ".json")
VARS_DIRECTORIES = ("group_vars", "host_vars")


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
        ``(directory, entity, file)``: e.g. ``("group_vars", "all", Path(".../group_vars/all.yml"))``. Files
        whose name Ansible never looks for (``group_vars/all.ini``) are yielded with an empty entity.
    """
    base = path if path.is_dir() else path.parent
    for directory in VARS_DIRECTORIES:
        top = base / directory
        if not top.is_dir():
            continue
        for entry in sorted(top.iterdir()):
            if entry.name.startswith(".") or entry.name.endswith("~"):
                continue
            if entry.is_dir() and entry.suffix not in YAML_SUFFIXES:
                yield from ((directory, entry.name, file) for file in _files_below(entry))
            elif entry.suffix in YAML_SUFFIXES:  # a directory of such a name is told by `read`
                yield directory, entry.stem, entry
            else:
                yield directory, entry.name if not _other_suffix(entry) else "", entry


def _files_below(directory: Path) -> Iterator[Path]:
    for file in sorted(directory.rglob("*")):
        if file.is_file() and not file.name.startswith(".") and file.suffix in (*YAML_SUFFIXES, ""):
            yield file


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
        return [] if variables else [inventory_syntax.empty(path)]
    if variables or is_yaml(path, text):
        return inventory_syntax.check_yaml(path, text, variables=variables)
    if path.suffix == ".toml":
        return []
    return inventory_syntax.check_ini(path, text)


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
                message="this file starts with a byte order mark (BOM), which becomes part of the first name",
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
            found=f"-> {path.readlink()}",
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


def _kind(mode: int) -> str:
    kinds = ((stat.S_ISFIFO, "a pipe"), (stat.S_ISSOCK, "a socket"), (stat.S_ISCHR, "a device"))
    return next((name for test, name in kinds if test(mode)), "a special file")


def _other_suffix(entry: Path) -> bool:
    return entry.suffix in (".ini", ".cfg", ".txt", ".toml", ".bak", ".orig", ".yml~")
