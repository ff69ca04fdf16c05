"""`deploy-dsv3 benchmark`: measure, compare, report."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from deploy_dsv3.benchmark.profiles import Wishes, find_profile, make_plan
from deploy_dsv3.errors import ConfigErrors, UsageError
from deploy_dsv3.options import collect, inventory_options, is_given

if TYPE_CHECKING:
    from deploy_dsv3.benchmark.sweep import Request, Service

_REQUESTED = (
    "profile",
    "rows",
    "where",
    "tokenizer",
    "output",
    "detach",
    "change_release",
    "any_batch_size",
    "max_failed",
    "fail_below",
    "against",
)
_FOLDER = click.Path(path_type=Path, file_okay=False)
_FILE = click.Path(path_type=Path, dir_okay=False)


@click.group(invoke_without_command=True, context_settings={"help_option_names": ["-h", "--help"]})
@inventory_options
@click.option("--replica", metavar="NAME", default="", help="The replica, where the inventory has several.")
@click.option("--base-url", metavar="URL", help="Measure this endpoint instead of an inventory's.")
@click.option("--api-key-file", type=_FILE, metavar="FILE", help="File with the API key (with --base-url).")
@click.option("--ca-file", type=_FILE, metavar="FILE", help="CA that signed the endpoint's certificate.")
@click.option("--model", metavar="NAME", default="", help="Model to ask for; the first one served if not given.")
@click.option(
    "--tokenizer",
    type=click.Path(path_type=Path),
    metavar="PATH",
    help="The model's folder or tokenizer.json, for exact prompt lengths; by default the head's.",
)
@click.option("--profile", metavar="NAME", default="published", show_default=True, help="published, smoke or custom.")
@click.option("--rows", metavar="ROWS", default="", help="Rows by number or output length: 1-4, 1,6, out8192.")
@click.option("--num-prompts", type=int, metavar="N", help="Requests a row.")
@click.option("--input-len", type=int, metavar="TOKENS", help="Nominal prompt length.")
@click.option("--output-len", type=int, metavar="TOKENS", help="Nominal output length.")
@click.option("--range-ratio", type=float, default=0.0, show_default=True, help="Shortest length / nominal; 0: from 1.")
@click.option("--request-rate", type=float, default=0.0, metavar="PER_S", help="Poisson arrivals; all at once if 0.")
@click.option("--concurrency", type=int, metavar="N", help="Most requests in flight; 0: no limit, as upstream.")
@click.option("--seed", type=int, default=1, show_default=True, help="For lengths, texts and arrivals.")
@click.option(
    "--lengths",
    type=click.Choice(["current", "guide"]),
    default="current",
    show_default=True,
    help="Upstream's rule for lengths: today's, or the one the published figures were measured with.",
)
@click.option("--dataset", type=click.Choice(["random", "sharegpt"]), default="random", show_default=True)
@click.option("--dataset-path", type=_FILE, metavar="FILE", help="ShareGPT's JSON; synthetic text if not given.")
@click.option(
    "--from",
    "where",
    type=click.Choice(["control", "head"]),
    default="control",
    show_default=True,
    help="The machine that makes the load.",
)
@click.option("--output", type=_FOLDER, metavar="DIR", help="Folder of the results; a new one, or one to continue.")
@click.option("--detach", is_flag=True, help="Start, and return; the same command without it follows.")
@click.option(
    "--change-release",
    is_flag=True,
    help="Redeploy with the batch size that a row calls for, and back in the end.",
)
@click.option("--any-batch-size", is_flag=True, help="Measure with the batch size that runs, and say so.")
@click.option(
    "--max-failed",
    type=click.FloatRange(0, 1),
    default=0.01,
    show_default=True,
    metavar="SHARE",
    help="A row with more failed requests does not count.",
)
@click.option(
    "--fail-below",
    type=click.FloatRange(min=0, min_open=True),
    metavar="SHARE",
    help="Exit 5 when a row gives less than this share of the published output throughput, or of --against.",
)
@click.option("--against", type=_FOLDER, metavar="DIR", help="An earlier run, as the reference of --fail-below.")
@click.pass_context
def benchmark(context: click.Context, /, **given: Any) -> None:
    """Measure the service as the LMDeploy guide does, and compare with what it published.

    Results go into a folder; running the same command again continues at the first row that is missing.
    """
    if context.invoked_subcommand is not None:
        return
    from deploy_dsv3.benchmark import sweep

    request = _request(context, given)
    # What needs no host is told before one is looked at.
    make_plan(find_profile(request.profile), request.wishes)
    result = sweep.run(request, _service(context, given))
    if request.json:
        click.echo(json.dumps(result.document, indent=2, ensure_ascii=False))
    else:
        result.render(sys.stdout)
    raise click.exceptions.Exit(result.exit_code)


@benchmark.command()
@click.argument("before", type=_FOLDER)
@click.argument("after", type=_FOLDER)
@click.option("--json", "as_json", is_flag=True, help="One JSON document on standard output.")
def compare(before: Path, after: Path, as_json: bool) -> None:
    """Compare two runs, row by row, and say what is change and what is noise."""
    from deploy_dsv3.benchmark.comparison import compare_runs
    from deploy_dsv3.benchmark.runs import RunFolder

    rows = compare_runs(RunFolder(before), RunFolder(after))
    if as_json:
        click.echo(json.dumps({"exit_code": 0, "rows": [row.as_json() for row in rows]}, indent=2))
        return
    from deploy_dsv3.benchmark.tables import comparison_table

    comparison_table(rows, sys.stdout)


@benchmark.command()
@click.argument("folder", type=_FOLDER)
def report(folder: Path) -> None:
    """Write report.html and report.md of a run anew."""
    from deploy_dsv3.benchmark.runs import RunFolder
    from deploy_dsv3.benchmark.sweep import write_report

    for path in write_report(RunFolder(folder)):
        click.echo(path)


def _request(context: click.Context, given: Mapping[str, Any]) -> Request:
    wishes = Wishes(
        num_prompts=given["num_prompts"],
        input_len=given["input_len"],
        output_len=given["output_len"],
        concurrency=given["concurrency"],
        request_rate=given["request_rate"],
        range_ratio=given["range_ratio"],
        seed=given["seed"],
        lengths=given["lengths"],
        dataset=given["dataset"],
        dataset_path=given["dataset_path"],
    )
    from deploy_dsv3.benchmark.sweep import Request

    return Request(wishes=wishes, json=is_given(context, "json"), **{name: given[name] for name in _REQUESTED})


def _service(context: click.Context, given: Mapping[str, Any]) -> Service:
    from deploy_dsv3 import verbs
    from deploy_dsv3.benchmark.sweep import Origin, Service
    from deploy_dsv3.benchmark.target import Target, find_target

    if not given["base_url"]:
        for option in ("api_key_file", "ca_file"):
            if given[option]:
                flag = option.replace("_", "-")
                raise UsageError(f"--{flag} goes with --base-url; an inventory has its own", remedy="Leave it out.")
        options = collect(context)
        loaded = verbs.load(options, whole_replicas=True)
        target = find_target(loaded, options, given["replica"])
        if given["model"]:
            target = replace(target, model=given["model"])
        return Service(target=target, origin=Origin(loaded=loaded, options=options, replica=given["replica"]))
    if is_given(context, "inventories"):
        raise UsageError("--base-url and --inventory name two endpoints", remedy="Give one of them.")
    base_url = given["base_url"].rstrip("/").removesuffix("/v1")
    if not base_url.startswith(("http://", "https://")):
        raise UsageError(
            f"--base-url {base_url}: not a URL", remedy="Write it as http://HOST:PORT or https://HOST:PORT."
        )
    key_file, ca_file = given["api_key_file"], given["ca_file"]
    target = Target(
        base_url=base_url,
        api_key=_read_key(key_file) if key_file else "",
        ca_file=str(ca_file.absolute()) if ca_file else "",
        model=given["model"],
    )
    return Service(target=target)


def _read_key(path: Path) -> str:
    from deploy_dsv3.inventory import check_secret_file

    if problem := check_secret_file(path, what="API key file"):
        raise ConfigErrors([problem])
    lines = path.read_text(encoding="utf-8").split()
    return lines[0]
