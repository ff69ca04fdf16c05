"""Options that verbs share, and the values an operator gave for them.

The same options are taken before and after the verb (``deploy-dsv3 -i prod.ini status`` and
``deploy-dsv3 status -i prod.ini``); those after it win, those that may be repeated add up.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import click
from click.core import ParameterSource

from deploy_dsv3.errors import UsageError

F = TypeVar("F", bound=Callable[..., Any])


@dataclass(frozen=True, kw_only=True)
class Options:
    """What the operator asked for on the command line.

    Attributes:
        inventories: ``--inventory``, at least one.
        extra_vars: ``-e``, as given.
        release: ``--release``.
        limit, tags, skip_tags: Ansible patterns; empty for none.
        check, diff, yes, json: flags.
        verbosity: number of ``-v``.
        vault_files: ``--vault-password-file`` and ``--vault-id``.
        become_file: ``--become-password-file``.
        vault_password, become_password: typed at a prompt.
    """

    inventories: tuple[Path, ...]
    extra_vars: tuple[str, ...] = field(default=(), repr=False)
    release: Path | None = None
    limit: str = ""
    tags: str = ""
    skip_tags: str = ""
    check: bool = False
    diff: bool = False
    yes: bool = False
    json: bool = False
    verbosity: int = 0
    vault_files: tuple[str, ...] = ()
    become_file: str = ""
    vault_password: str = field(default="", repr=False)
    become_password: str = field(default="", repr=False)

    @property
    def variables(self) -> tuple[str, ...]:
        """The values of ``-e`` for Ansible, the release before those that win over it."""
        return (*([f"@{self.release}"] if self.release else []), *self.extra_vars)


_INVENTORY = (
    click.option(
        "--inventory",
        "-i",
        "inventories",
        multiple=True,
        type=click.Path(path_type=Path),
        metavar="PATH",
        help="Ansible inventory: a file (INI, YAML, script) or a directory. May be repeated.",
    ),
    click.option(
        "--limit",
        "-l",
        metavar="PATTERN",
        help="Only these hosts or groups. A deployment takes whole replicas.",
    ),
    click.option(
        "--extra-vars",
        "-e",
        "extra_vars",
        multiple=True,
        metavar="VARS",
        help="Settings that win over the inventory: key=value, JSON, or @FILE. May be repeated.",
    ),
    click.option(
        "--release",
        metavar="FILE",
        type=click.Path(path_type=Path),
        help="Release: pinned settings, the same for every host. They win over the inventory; -e wins over them.",
    ),
    click.option(
        "--vault-password-file",
        "vault_password_files",
        multiple=True,
        metavar="FILE",
        help="File with the password of vaulted values, or a program that prints it.",
    ),
    click.option(
        "--vault-id",
        "vault_ids",
        multiple=True,
        metavar="LABEL@FILE",
        help="The same for one vault identity.",
    ),
    click.option("--ask-vault-pass", "-J", is_flag=True, help="Ask for the password of vaulted values."),
    click.option("--ask-become-pass", "-K", is_flag=True, help="Ask for the sudo password of the hosts."),
    click.option("--become-password-file", metavar="FILE", help="File with the sudo password, readable only by you."),
    click.option("--json", is_flag=True, help="One JSON document on standard output, and nothing else there."),
    click.option("--verbose", "-v", count=True, help="More of Ansible's output in the run's log (-vvv: most)."),
)

_RUN = (
    click.option("--check", "-C", is_flag=True, help="Only say what would change; change nothing."),
    click.option("--diff", "-D", is_flag=True, help="Keep the differences of changed files in the run's log."),
    click.option("--tags", "-t", metavar="STAGES", help="Only these stages or tags, separated by commas."),
    click.option("--skip-tags", metavar="STAGES", help="All but these stages or tags."),
    click.option("--yes", "-y", is_flag=True, help="Do not ask before doing it."),
)


def inventory_options(function: F) -> F:
    """Add the options of every verb that looks at an inventory."""
    for option in reversed(_INVENTORY):
        function = option(function)
    return function


def run_options(function: F) -> F:
    """Add the options of verbs that change hosts; use above `inventory_options`."""
    for option in reversed(_RUN):
        function = option(function)
    return function


def collect(context: click.Context) -> Options:
    """The options of a verb together with those given before it.

    Raises:
        UsageError: no inventory, or an option before the verb that the verb does not have.
    """
    values = _merged(context)
    inventories = values.get("inventories") or ()
    if not inventories:
        raise UsageError(
            "no inventory given",
            remedy="Give one: --inventory PATH. `deploy-dsv3 init` writes a first one.",
        )
    return Options(
        inventories=tuple(inventories),
        extra_vars=tuple(values.get("extra_vars") or ()),
        release=values.get("release"),
        limit=values.get("limit") or "",
        tags=values.get("tags") or "",
        skip_tags=values.get("skip_tags") or "",
        check=bool(values.get("check")),
        diff=bool(values.get("diff")),
        yes=bool(values.get("yes")),
        json=bool(values.get("json")),
        verbosity=int(values.get("verbose") or 0),
        vault_files=(*(values.get("vault_password_files") or ()), *(values.get("vault_ids") or ())),
        become_file=values.get("become_password_file") or "",
        vault_password=_ask("Vault password") if values.get("ask_vault_pass") else "",
        become_password=_ask("sudo password of the hosts") if values.get("ask_become_pass") else "",
    )


def is_given(context: click.Context, name: str) -> bool:
    """Whether an option was given, before or after the verb."""
    current: click.Context | None = context
    while current is not None:
        if current.params.get(name):
            return True
        current = current.parent
    return False


def _merged(context: click.Context) -> dict[str, Any]:
    chain: list[click.Context] = []
    current: click.Context | None = context
    while current is not None:
        chain.insert(0, current)
        current = current.parent
    own = {parameter.name for parameter in context.command.params}
    merged: dict[str, Any] = {}
    for level in chain:
        for name, value in level.params.items():
            given = level.get_parameter_source(name) not in (None, ParameterSource.DEFAULT)
            if given and name not in own:
                flag = next(p.opts[0] for p in level.command.params if p.name == name)
                raise UsageError(
                    f"{flag} means nothing to {context.info_name!r}",
                    remedy=f"Leave it out; `deploy-dsv3 {context.info_name} --help` lists what it takes.",
                )
            if isinstance(value, tuple):
                merged[name] = (*merged.get(name, ()), *value)
            elif given or name not in merged:
                merged[name] = value
    return merged


def _ask(what: str) -> str:
    answer: str = click.prompt(what, hide_input=True, default="", show_default=False, err=True)
    return answer
