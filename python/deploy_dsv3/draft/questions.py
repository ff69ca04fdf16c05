"""Asks at a terminal for what the flags have not said. An answer that cannot be is asked for again."""

from __future__ import annotations

import getpass
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import click

from deploy_dsv3 import setting_rules, settings
from deploy_dsv3.draft import answers
from deploy_dsv3.draft.answers import SUGGESTED_IMAGE, Host, Replica
from deploy_dsv3.errors import UsageError

T = TypeVar("T")


def ask_replicas() -> tuple[Replica, ...]:
    """The hosts, replica by replica."""
    click.echo("Hosts: NAME, or NAME=ADDRESS where the name is not one that ssh finds.", err=True)
    count = click.prompt("How many copies of the model (replicas)", type=click.IntRange(1, 99), default=1, err=True)
    if count == 1:
        return answers.single(*_ask_hosts(""))
    found = []
    for number in range(count):
        name = _ask("Name of the replica", f"replica_{chr(ord('a') + number % 26)}", answers.check_replica_name)
        head, workers = _ask_hosts(f" of {name}")
        found.append(Replica(name=name, head=head, workers=workers))
    return tuple(found)


def _ask_hosts(of: str) -> tuple[Host, tuple[Host, ...]]:
    head = _ask(f"Head{of}: runs the API server and its share of the model", None, answers.read_host)
    workers = _ask(f"Workers{of}, separated by blanks; empty for none", "", _read_hosts)
    return head, workers


def _read_hosts(text: str) -> tuple[Host, ...]:
    return tuple(answers.read_host(word) for word in text.replace(",", " ").split())


def ask_user() -> str:
    """Whom to log in as."""
    return _ask("User of the hosts, with sudo", getpass.getuser(), answers.check_user)


def ask_ssh_key() -> str:
    """The key to log in with."""
    return _ask(
        "SSH private key; empty for ssh's own choice", "", lambda text: answers.check_file(text, what="the SSH key")
    )


def ask_settings(given: Mapping[str, Any]) -> dict[str, Any]:
    """The settings that differ from site to site, but for those that are given."""
    found: dict[str, Any] = {}

    def ask(name: str, question: str, default: Any = None) -> Any:
        if name in given:
            return given[name]
        known = settings.catalogue()[name]
        default = known.default if default is None else default
        value = _ask(question, default, lambda text: _checked(known, text))
        if value != known.default:
            found[name] = value
        return value

    ask("model_weights_name", "Model")
    ask("model_weights_path", "Folder of its weights, the same on every host")
    ask("engine_image_name", "Engine image", SUGGESTED_IMAGE)
    ask("endpoint_port", "Port that clients reach")
    if not click.confirm("Do the hosts reach the internet?", default=True, err=True):
        click.echo("Each comes from a mirror of this site, or is there already (preinstalled).", err=True)
        if not ask("engine_image_archive_path", "Archive of the image (docker save), one path on every host; or empty"):
            ask("docker_engine_registry_mirrors", "Mirrors of Docker Hub (URLs), separated by blanks; or empty")
        for role, what in (("nvidia_driver", "driver"), ("nvidia_container_toolkit", "container toolkit")):
            if ask(f"{role}_source", f"Source of the {what}", "preinstalled") == "vendor":
                ask(f"{role}_repository_url", f"Mirror of NVIDIA's repository of the {what} (URL); or empty")
        ask("docker_engine_source", "Source of Docker")
    return found


def ask_keys(folder: Path) -> tuple[Path | None, Path | None]:
    """Where the clients' keys are: a file, or a vault by its password file; neither for an open endpoint."""
    kinds = click.Choice(["file", "vault", "none"])
    kind = click.prompt(
        "Keep the clients' API keys in a file of this machine, a vault, or none", type=kinds, default="file", err=True
    )
    if kind == "none":
        return None, None
    if kind == "file":
        question, default = "File; made with a new key if it is not there", f"{folder}.api-keys"
    else:
        question, default = "File with the vault's password", None
    path = _ask(question, default, lambda text: answers.check_file(text, what="the file"))
    return (Path(path), None) if kind == "file" else (None, Path(path))


def _checked(setting: settings.Setting, text: Any) -> Any:
    """The value of a setting from an answer."""
    value: Any = text.strip() if isinstance(text, str) else text
    if setting.type == "list":
        value = value.split() if isinstance(value, str) else value
    elif setting.type == "int" and isinstance(value, str):
        if not (value.isascii() and value.isdigit()):
            raise UsageError(f"{value!r} is no whole number")
        value = int(value)
    if setting.choices and value not in setting.choices:
        raise UsageError(f"{value!r} is none of {', '.join(map(str, setting.choices))}")
    if not setting.is_unset(value):
        for problem in setting_rules.problems(setting.name, setting.type, value, setting.default):
            raise UsageError(f"{value!r} {problem.message}; {problem.expected}")
    return value


def _ask(question: str, default: Any, read: Callable[[Any], T]) -> T:
    """Ask until the answer can be read."""

    def convert(text: Any) -> T:
        try:
            return read(text)
        except UsageError as error:
            raise click.UsageError(f"{error.message}. {error.remedy}".strip()) from error

    shown = " ".join(default) if isinstance(default, list) else default
    found: T = click.prompt(question, default=shown, value_proc=convert, show_default=shown not in ("", None), err=True)
    return found
