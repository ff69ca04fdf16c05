"""What each verb does: load and check, choose the playbook, run it, verify, report."""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import click

from deploy_dsv3 import content, inventory, progress, runner, topology
from deploy_dsv3.errors import ConfigErrors, Interrupted, UsageError
from deploy_dsv3.inventory import Inventory, VaultOptions
from deploy_dsv3.options import Options
from deploy_dsv3.report import Report
from deploy_dsv3.topology import Deployment


@dataclass(frozen=True, kw_only=True)
class Target:
    """A loaded and checked inventory: what a verb works on.

    Attributes:
        inventory: as loaded.
        deployment: the replicas chosen by ``--limit``.
        hosts: the hosts chosen by ``--limit``.
        warnings: what to look out for in inventory and settings.
        secrets: values that must not be shown.
    """

    inventory: Inventory
    deployment: Deployment
    hosts: tuple[str, ...]
    warnings: tuple[str, ...] = ()
    secrets: frozenset[str] = frozenset()


def load(options: Options, *, whole_replicas: bool) -> Target:
    """Read inventory and settings and check them as a whole; nothing is connected to.

    Args:
        options: the command line.
        whole_replicas: whether ``--limit`` must not cut a replica in two.

    Raises:
        ConfigErrors: all mistakes at once.
    """
    loaded = inventory.load(
        options.inventories,
        extra_vars=options.extra_vars,
        vault=VaultOptions(password_files=options.vault_files, password=options.vault_password),
    )
    deployment = topology.build(loaded.groups, source=loaded.label)
    errors = inventory.check_hosts(loaded, deployment.hosts)
    if errors:
        raise ConfigErrors(errors)
    hosts = deployment.hosts
    if options.limit:
        chosen = set(loaded.select(options.limit))
        hosts = tuple(host for host in hosts if host in chosen)
        if whole_replicas or not hosts:
            deployment = deployment.limited(hosts)
    return Target(
        inventory=loaded,
        deployment=deployment,
        hosts=hosts,
        warnings=loaded.warnings,
        secrets=frozenset(filter(None, (options.vault_password, options.become_password))),
    )


def deploy(options: Options) -> Report:
    """Take the hosts of an inventory to a served and verified model.

    Raises:
        DeployError: the run could not begin, or was stopped.
    """
    target = load(options, whole_replicas=True)
    return _play("deploy", options, target)


def destroy(options: Options, *, drivers: bool, weights: bool) -> Report:
    """Remove what a deployment created.

    Args:
        options: the command line.
        drivers: also remove the GPU driver, container toolkit and Docker packages that were installed.
        weights: also remove the model weights.

    Raises:
        UsageError: nobody said yes.
        DeployError: the run could not begin, or was stopped.
    """
    target = load(options, whole_replicas=False)
    if not options.check:
        _confirm(options, target, drivers=drivers, weights=weights)
    return _play(
        "destroy",
        options,
        target,
        extra_vars={"dsv3_destroy_drivers": drivers, "dsv3_destroy_weights": weights},
    )


def _confirm(options: Options, target: Target, *, drivers: bool, weights: bool) -> None:
    if options.yes:
        return
    what = ["the engine containers, their configuration and the endpoint"]
    what += ["the drivers and runtimes"] if drivers else []
    what += ["the model weights"] if weights else []
    question = f"Remove {' and '.join(what)} from {', '.join(target.hosts)}?"
    if not (sys.stdin.isatty() and sys.stderr.isatty()):
        raise UsageError(f"{question} Nobody is there to ask.", remedy="Add --yes to say so beforehand.")
    if not click.confirm(question, err=True):
        raise UsageError("not confirmed; nothing was removed", remedy="Answer y, or add --yes.")


def _play(
    verb: str, options: Options, target: Target, *, extra_vars: Mapping[str, Any] | None = None
) -> Report:
    started = time.monotonic()
    log = runner.RunLog(verb, target.secrets)
    job = runner.Job(
        playbook=content.playbook(verb),
        inventories=options.inventories,
        hosts=len(target.hosts),
        extra_vars=extra_vars or {},
        user_extra_vars=options.extra_vars,
        limit=options.limit,
        tags=options.tags,
        skip_tags=options.skip_tags,
        check=options.check,
        diff=options.diff,
        verbosity=options.verbosity,
        passwords=runner.Passwords(
            become=options.become_password,
            become_file=options.become_file,
            vault=options.vault_password,
            vault_files=options.vault_files,
        ),
        secrets=target.secrets,
    )
    with log, progress.choose(target.hosts, json=options.json) as shown:
        try:
            outcome = runner.run(job, log=log, on_record=shown.show)
        except Interrupted as error:
            error.remedy += f" The log is in {log.directory}."
            raise
    return Report(
        verb=verb,
        exit_code=outcome.exit_code,
        seconds=time.monotonic() - started,
        deployment=target.deployment,
        outcome=outcome,
        check=options.check,
        warnings=target.warnings,
        log=log.directory,
    )
