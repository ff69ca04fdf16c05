"""The ``deploy-dsv3`` command: options and verbs, and the one place that exits.

What a verb does is in `deploy_dsv3.verbs`; it is imported when a verb runs, so that ``--help`` stays quick.
"""

from __future__ import annotations

import difflib
import importlib
import json
import signal
import sys
import traceback
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from deploy_dsv3 import __version__
from deploy_dsv3.errors import DeployError, InternalError, Interrupted
from deploy_dsv3.interruption import Stop, terminable
from deploy_dsv3.options import collect, inventory_options, is_given, run_options

if TYPE_CHECKING:
    from deploy_dsv3.verbs import Result

_EPILOG = """\b
Examples:
  deploy-dsv3 --inventory prod.ini              bare servers to a verified service
  deploy-dsv3 plan -i prod.ini                  what that would do, and why
  deploy-dsv3 -i prod.ini -e lmdeploy_tp=16     with a setting of its own
  deploy-dsv3 status -i prod.ini --json         for a monitor
  deploy-dsv3 lab up                            a rehearsal fleet on this machine

\b
Exit status: 0 done and verified; 2 usage, inventory or settings wrong; 3 preflight
says no; 4 a host failed, run again to continue; 5 verification failed; 6 a host could
not be reached; 7 another run holds the lock; 10 (plan) something to do; 130/143 stopped,
run again to continue.
"""

#: Verbs that live in other packages: ``name: (module:attribute, help)``.
_LAZY = {
    "benchmark": ("deploy_dsv3.benchmark.commands:benchmark", "Measure the served model."),
    "init": ("deploy_dsv3.draft.commands:init", "Write a first inventory, from flags or from answers."),
    "lab": ("deploy_dsv3.lab.commands:lab", "Rehearse on simulated hosts on this machine."),
}


class _Verbs(click.Group):
    """A group that imports some verbs only when they are used, and suggests verbs for misspelt ones."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return sorted({*super().list_commands(ctx), *_LAZY})

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in _LAZY:
            return super().get_command(ctx, cmd_name)
        module, _, attribute = _LAZY[cmd_name][0].partition(":")
        command: click.Command = getattr(importlib.import_module(module), attribute)
        return command

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        name = args[0]
        if name not in self.list_commands(ctx) and not name.startswith("-"):
            close = difflib.get_close_matches(name, self.list_commands(ctx), n=1)
            hint = f" Did you mean {close[0]!r}?" if close else ""
            verbs = ", ".join(self.list_commands(ctx))
            raise click.UsageError(f"There is no verb {name!r}.{hint} Verbs: {verbs}.", ctx)
        return super().resolve_command(ctx, args)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        rows = []
        for name in self.list_commands(ctx):
            command = None if name in _LAZY else self.get_command(ctx, name)
            rows.append((name, command.get_short_help_str(80) if command else _LAZY[name][1]))
        with formatter.section("Verbs"):
            formatter.write_dl(rows)


@click.group(
    cls=_Verbs,
    invoke_without_command=True,
    epilog=_EPILOG,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
)
@run_options
@inventory_options
@click.option(
    "--plan",
    "planned",
    metavar="FILE",
    type=click.Path(dir_okay=False, path_type=Path),
    help="Do what `plan --out FILE` showed; refused if hosts or settings have changed since.",
)
@click.option("--full", is_flag=True, help="Walk every task even if the plan finds nothing to do.")
@click.version_option(__version__, prog_name="deploy-dsv3")
@click.pass_context
def cli(context: click.Context, /, **_: Any) -> None:
    """Take bare GPU servers to a served, verified DeepSeek-V3 on LMDeploy.

    Without a verb, deploys what the inventory describes. Running it again changes only what differs, and
    continues a run that was stopped or failed.
    """
    if context.invoked_subcommand is None:
        if not context.args and not _given(context):
            click.echo(context.get_help())
            raise click.exceptions.Exit(2)
        from deploy_dsv3 import verbs

        own = context.params
        _finish(verbs.deploy(collect(context), full=own["full"], planned=own["planned"]), context)


@cli.command()
@inventory_options
@click.option(
    "--out",
    metavar="FILE",
    type=click.Path(dir_okay=False, path_type=Path),
    help="Keep the plan in a file, readable only by you.",
)
@click.pass_context
def plan(context: click.Context, /, *, out: Path | None, **_: Any) -> None:
    """Show what a deploy would do on each host, and why; changes nothing.

    Also shows what somebody changed by hand, how long clients would wait, whether the model fits and what will be
    served how. Exit status 0 means nothing to do, 10 something.
    """
    from deploy_dsv3 import verbs

    _finish(verbs.plan(collect(context), out=out), context)


@cli.command()
@inventory_options
@click.pass_context
def history(context: click.Context, /, **_: Any) -> None:
    """List the runs that changed a deployment: who, when, what, how it ended."""
    from deploy_dsv3 import verbs

    _finish(verbs.history(collect(context)), context)


@cli.command()
@inventory_options
@click.option("--yes", "-y", is_flag=True, help="Do not ask before doing it.")
@click.pass_context
def unlock(context: click.Context, /, **_: Any) -> None:
    """Break the lock that a run holds while it changes a deployment.

    Runs that end give it back, and one that was killed loses it by itself in a few minutes at most.
    """
    from deploy_dsv3 import verbs

    _finish(verbs.unlock(collect(context)), context)


@cli.command()
@inventory_options
@click.option(
    "--junit",
    metavar="FILE",
    type=click.Path(dir_okay=False, path_type=Path),
    help="Also write the checks as JUnit XML.",
)
@click.pass_context
def verify(context: click.Context, /, *, junit: Path | None, **_: Any) -> None:
    """Check every host of a running deployment, and its endpoint.

    Looks at packages, driver, container, devices, limits, environment, ports, Ray as each host sees it, and
    the answers that clients get. Changes nothing.
    """
    from deploy_dsv3 import verbs

    _finish(verbs.verify(collect(context), junit=junit), context)


@cli.command()
@inventory_options
@click.option("--canary", is_flag=True, help="Also ask each endpoint for a completion of one token.")
@click.pass_context
def status(context: click.Context, /, *, canary: bool, **_: Any) -> None:
    """Tell how a deployment is doing: nodes, GPUs, engine, endpoint, release."""
    from deploy_dsv3 import verbs

    _finish(verbs.status(collect(context), canary=canary), context)


@cli.command()
@inventory_options
@click.option("--schema", is_flag=True, help="Print the JSON Schema of a variables file instead, for editors.")
@click.pass_context
def settings(context: click.Context, /, *, schema: bool, **_: Any) -> None:
    """List every setting: its value and where it comes from, default, type, and what it does.

    Without an inventory, lists the defaults. Secrets show only as set or unset.
    """
    if schema:
        from deploy_dsv3 import settings_text

        _print_json(settings_text.json_schema())
        return
    from deploy_dsv3 import verbs

    _finish(verbs.list_settings(collect(context) if is_given(context, "inventories") else None), context)


@cli.command()
@run_options
@inventory_options
@click.option("--remove-drivers", is_flag=True, help="Also remove drivers, container toolkit and Docker.")
@click.option("--remove-weights", is_flag=True, help="Also remove the model weights.")
@click.pass_context
def destroy(context: click.Context, /, *, remove_drivers: bool, remove_weights: bool, **_: Any) -> None:
    """Remove what a deployment created, and nothing else.

    Model weights and drivers stay unless you say so. Safe on a deployment that was only half made.
    """
    from deploy_dsv3 import verbs

    _finish(verbs.destroy(collect(context), drivers=remove_drivers, weights=remove_weights), context)


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command and exit with its status."""
    sys.exit(run(sys.argv[1:] if argv is None else argv))


def run(argv: Sequence[str]) -> int:
    """Run the command.

    Returns:
        The exit status, see `deploy_dsv3.errors`.
    """
    with terminable() as stop:
        return _run(argv, stop)


def _run(argv: Sequence[str], stop: Stop) -> int:
    as_json = "--json" in argv
    try:
        status = cli.main(args=list(argv), prog_name="deploy-dsv3", standalone_mode=False)
    except click.exceptions.Exit as error:
        return error.exit_code
    except (click.exceptions.Abort, KeyboardInterrupt):
        return _fail(Interrupted(stop.signal_number or signal.SIGINT), as_json=as_json)
    except click.UsageError as error:
        if as_json:
            _print_json({"schema": 1, "exit_code": 2, "error": {"message": error.format_message(), "remedy": ""}})
        else:
            error.show()
        return 2
    except DeployError as error:
        return _fail(error, as_json=as_json)
    except BrokenPipeError:
        return 141  # what a shell reports for SIGPIPE
    except Exception as error:
        return _fail(_defect(error), as_json=as_json)
    return status if isinstance(status, int) else 0


def _given(context: click.Context) -> bool:
    from click.core import ParameterSource

    return any(context.get_parameter_source(name) not in (None, ParameterSource.DEFAULT) for name in context.params)


def _finish(result: Result, context: click.Context) -> None:
    if is_given(context, "json"):
        _print_json(result.document)
    else:
        result.render(sys.stdout)
    raise click.exceptions.Exit(result.exit_code)


def _fail(error: DeployError, *, as_json: bool) -> int:
    if as_json:
        _print_json({"schema": 1, "exit_code": error.exit_code, "error": error.as_dict()})
    else:
        click.echo(f"deploy-dsv3: {error}", err=True)
        if error.remedy:
            click.echo(f"    remedy: {error.remedy}", err=True)
    return error.exit_code


def _defect(error: Exception) -> InternalError:
    """A defect of ours: a short message, and the trace in a file of the operator's."""
    from deploy_dsv3 import runner

    summary = f"{type(error).__name__}: {error}"
    try:
        path = runner.state_directory() / "defects" / f"{runner.new_id('trace')}.txt"
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        runner.write_private(path, traceback.format_exc())
    except OSError:
        return InternalError(f"a defect of deploy-dsv3: {summary}", remedy="Please report it.")
    return InternalError(
        f"a defect of deploy-dsv3: {summary}", remedy=f"Please report it with {path}, which has the details."
    )


def _print_json(document: Mapping[str, Any]) -> None:
    click.echo(json.dumps(document, indent=2, ensure_ascii=False, default=str))
