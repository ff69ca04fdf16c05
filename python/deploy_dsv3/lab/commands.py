"""``deploy-dsv3 lab``: the rehearsal fleet on the command line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import get_args

import click
from rich.console import Console
from rich.table import Table

from . import bringup, fleet, hardware, outer_engine
from .fleet import Lab
from .paths import default_paths
from .progress import Steps

_console = Console()


@click.group()
def lab() -> None:
    """The rehearsal fleet: hosts with simulated GPUs, in containers on this machine. Not for serving."""


_name = click.option("--name", default=fleet.DEFAULT_NAME, show_default=True, help="Name of the lab.")


@lab.command()
@click.option(
    "--hosts", "count", type=click.IntRange(min=1), help=f"Number of hosts; {bringup.DEFAULT_HOSTS} at first."
)
@click.option("--gpus", type=click.IntRange(0, hardware.MAX_GPUS), help="GPUs of each host, instead of the profile's.")
@click.option(
    "--profile",
    "profiles",
    multiple=True,
    metavar="NAME",
    help="Hardware of the hosts, in their order; the last holds for the rest. "
    f"One of {', '.join(hardware.names())}, or the path of a profile; {hardware.DEFAULT_PROFILE} at first.",
)
@_name
@click.option(
    "--inventory-dir",
    type=click.Path(file_okay=False, path_type=Path),
    help="Where to write the inventory; inventory/NAME in a checkout.",
)
@click.option("--suite", type=click.Choice(list(bringup.SUITES)), help="Release of Debian on the hosts.")
@click.option("--mirror", default="", metavar="URL", help="Debian mirror, instead of the one this machine's apt uses.")
@click.option(
    "--engine",
    type=click.Choice(get_args(outer_engine.Choice)),
    default="auto",
    show_default=True,
    help="Docker engine for the hosts: one that runs already, a private one, or whatever works.",
)
def up(
    count: int | None,
    gpus: int | None,
    profiles: tuple[str, ...],
    name: str,
    inventory_dir: Path | None,
    suite: str | None,
    mirror: str,
    engine: outer_engine.Choice,
) -> None:
    """Bring the lab up, or make it as asked; what is right already stays."""
    wish = bringup.Wish(
        name=name,
        hosts=count,
        gpus=gpus,
        profiles=profiles,
        inventory=inventory_dir,
        suite=suite,
        mirror=mirror,
        engine=engine,
    )
    with Steps(_console) as steps:
        found = bringup.up(wish, default_paths(), steps)
    _show(found)
    _console.print(f"\nA SIMULATION. Its inventory: [bold]{_short(found.inventory)}[/bold]", highlight=False)
    _console.print(f"Log in:  {_login(found)}", highlight=False, soft_wrap=True)
    _console.print(f"Stop it: deploy-dsv3 lab down{'' if name == fleet.DEFAULT_NAME else f' --name {name}'}")


@lab.command()
@_name
@click.option("--json", "as_json", is_flag=True, help="One JSON document.")
def status(name: str, as_json: bool) -> None:
    """Show the lab's hosts."""
    found = Lab.load(name)
    if as_json:
        click.echo(json.dumps(found.status(), indent=2))
    else:
        _show(found)


@lab.command()
@click.option("--name", help="Only this lab; all of them otherwise.")
@click.option("--purge", is_flag=True, help="Drop the caches too (images, packages): the next `lab up` is slow.")
def down(name: str | None, purge: bool) -> None:
    """Remove labs and everything they started; keeps the caches."""
    with Steps(_console) as steps:
        gone = bringup.down(default_paths(), name, steps, purge=purge)
    if not gone:
        _console.print("No lab is up." if name is None else f"There is no lab {name}.")


def _show(found: Lab) -> None:
    table = Table(box=None, header_style="bold")
    for column in ("host", "address", "state", "profile", "GPUs"):
        table.add_column(column)
    for host in found.status()["hosts"]:
        table.add_row(host["name"], host["address"], host["state"], host["profile"], str(host["gpus"]))
    _console.print(table)


def _login(found: Lab) -> str:
    host = found.hosts[0]
    return f"ssh -i {_short(found.key)} -o UserKnownHostsFile={_short(found.known_hosts)} ops@{host.address}"


def _short(path: Path) -> str:
    return str(path.relative_to(Path.cwd())) if path.is_relative_to(Path.cwd()) else str(path)
