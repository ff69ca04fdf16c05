"""``deploy-dsv3 init``: the command line of it."""

from __future__ import annotations

import json
import shlex
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from deploy_dsv3 import settings
from deploy_dsv3.draft import answers, files, questions
from deploy_dsv3.draft.answers import SUGGESTED_IMAGE, Answers, Replica
from deploy_dsv3.draft.files import Written
from deploy_dsv3.errors import UsageError
from deploy_dsv3.options import is_given

#: Flags for the settings that differ from site to site; `--set` takes any other.
_SETTINGS: dict[str, str] = {
    "model": "model_weights_name",
    "model-path": "model_weights_path",
    "image": "engine_image_name",
    "digest": "engine_image_digest",
    "image-archive": "engine_image_archive_path",
    "registry-mirror": "docker_engine_registry_mirrors",
    "port": "endpoint_port",
    "driver-source": "nvidia_driver_source",
    "driver-repository": "nvidia_driver_repository_url",
    "toolkit-source": "nvidia_container_toolkit_source",
    "toolkit-repository": "nvidia_container_toolkit_repository_url",
    "docker-source": "docker_engine_source",
}


def _setting_flags(function: Callable[..., Any]) -> Callable[..., Any]:
    """Add the flags of `_SETTINGS`, each in the words of its setting."""
    for flag, name in reversed(_SETTINGS.items()):
        setting = settings.catalogue()[name]
        kind: Any = click.Choice([str(choice) for choice in setting.choices]) if setting.choices else None
        option = click.option(
            f"--{flag}",
            name,
            type=kind or {"int": int}.get(setting.type, str),
            multiple=setting.type == "list",
            metavar=None if kind else {"int": "N", "path": "PATH", "list": "URL"}.get(setting.type, "TEXT"),
            help=f"{setting.doc} [{name}]",
        )
        function = option(function)
    return function


@click.command(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.argument("folder", type=click.Path(path_type=Path), default=Path("prod"))
@click.option("--head", metavar="HOST", help="The head of the only replica: NAME, or NAME=ADDRESS.")
@click.option("--worker", "workers", metavar="HOST", multiple=True, help="A worker of it. May be repeated.")
@click.option(
    "--replica",
    "replicas",
    metavar="NAME:HOST,…",
    multiple=True,
    help="One of several replicas, its head first: a:gpu-01=192.0.2.11,gpu-02=192.0.2.12. May be repeated.",
)
@click.option("--user", metavar="NAME", help="User of the hosts, with sudo.")
@click.option("--ssh-key", metavar="FILE", help="Private key to log in with.")
@click.option("--sudo-password-file", metavar="FILE", help="File with the sudo password, readable only by you.")
@click.option(
    "--api-keys-file",
    metavar="FILE",
    help="File with the API keys of clients, one a line; made with a new key if it is not there.",
)
@click.option(
    "--vault-password-file", metavar="FILE", help="Put a new API key into a vault that this password opens instead."
)
@_setting_flags
@click.option("--set", "further", metavar="NAME=VALUE", multiple=True, help="Any other setting. May be repeated.")
@click.option("--force", is_flag=True, help="Overwrite files that are there.")
@click.option("--json", is_flag=True, help="One JSON document on standard output, and nothing else there.")
@click.pass_context
def init(context: click.Context, /, **given: Any) -> None:
    """Write a first inventory with comments to FOLDER (default: prod).

    From flags; at a terminal, what no flag says is asked for. Nothing is connected to, nothing overwritten.
    """
    wanted = _answers(given)
    written = files.write(given["folder"], wanted, force=given["force"])
    follow = ["deploy-dsv3", "plan", "--inventory", str(written.folder)]
    if wanted.vault_password_file:
        follow += ["--vault-password-file", str(wanted.vault_password_file)]
    if is_given(context, "json"):
        document = {
            "schema": 1,
            "verb": "init",
            "exit_code": 0,
            "inventory": str(written.folder),
            "files": [str(path) for path in written.files],
            "warnings": list(written.warnings),
            "next": follow,
        }
        click.echo(json.dumps(document, indent=2, ensure_ascii=False))
    else:
        _render(written, follow)
    raise click.exceptions.Exit(0)


def _render(written: Written, follow: list[str]) -> None:
    for path in written.files:
        click.echo(f"wrote {path}")
    for warning in written.warnings:
        click.echo(f"warning: {warning}")
    click.echo(f"Look it over, then: {shlex.join(follow)}")


def _answers(given: dict[str, Any]) -> Answers:
    if given["api_keys_file"] and given["vault_password_file"]:
        raise UsageError(
            "--api-keys-file and --vault-password-file exclude each other", remedy="Keep the keys in one place."
        )
    values = {name: _plain(given[name]) for name in _SETTINGS.values() if given[name] not in (None, ())}
    values |= dict(answers.read_setting(text) for text in given["further"])
    replicas = _replicas(given)
    asked = replicas is None
    if replicas is None:
        if not (sys.stdin.isatty() and sys.stderr.isatty()):
            raise UsageError(
                "no hosts given", remedy="Give them: --head HOST --worker HOST, or --replica NAME:HOST,… for several."
            )
        replicas = questions.ask_replicas()
    user = given["user"] if given["user"] is not None or not asked else questions.ask_user()
    key = given["ssh_key"] if given["ssh_key"] is not None or not asked else questions.ask_ssh_key()
    keys_file, vault = (_path(given[name]) for name in ("api_keys_file", "vault_password_file"))
    if asked:
        values |= questions.ask_settings(values)
        if keys_file is None and vault is None:
            keys_file, vault = questions.ask_keys(given["folder"])
    values.setdefault("engine_image_name", SUGGESTED_IMAGE)
    return Answers(
        replicas=replicas,
        user=answers.check_user(user or ""),
        ssh_key=answers.check_file(key or "", what="the SSH key"),
        sudo_password_file=answers.check_file(given["sudo_password_file"] or "", what="the sudo password file"),
        settings=values,
        keys_file=keys_file,
        vault_password_file=vault,
    )


def _replicas(given: dict[str, Any]) -> tuple[Replica, ...] | None:
    """The replicas of the flags; None where they name no host."""
    several = tuple(answers.read_replica(text) for text in given["replicas"])
    if several and (given["head"] or given["workers"]):
        raise UsageError(
            "--replica is for several replicas, --head and --worker are for the only one", remedy="Use one of the ways."
        )
    if several:
        return several
    if given["head"]:
        return answers.single(answers.read_host(given["head"]), map(answers.read_host, given["workers"]))
    if given["workers"]:
        raise UsageError("there are workers and no head", remedy="Name the head: --head HOST.")
    return None


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def _path(name: str | None) -> Path | None:
    return Path(answers.check_file(name, what="the file")) if name else None
