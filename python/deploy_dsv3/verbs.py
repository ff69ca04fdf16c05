"""What each verb does: load and check, choose the playbook, run it, verify, report."""

from __future__ import annotations

import io
import json
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

import click

from deploy_dsv3 import content, inventory, progress, release, runbook, runner, settings, topology
from deploy_dsv3.errors import (
    ConfigError,
    ConfigErrors,
    InternalError,
    Interrupted,
    UnreachableError,
    UsageError,
)
from deploy_dsv3.events import (
    Failure,
    Finished,
    HostFailed,
    HostOk,
    HostStats,
    Outcome,
    Record,
    StageStarted,
    explained,
    recognised,
)
from deploy_dsv3.interruption import number_of
from deploy_dsv3.inventory import Inventory, VaultOptions
from deploy_dsv3.options import Options
from deploy_dsv3.settings import Settings
from deploy_dsv3.topology import Deployment

if TYPE_CHECKING:
    from deploy_dsv3.observation import Observation
    from deploy_dsv3.plan import Plan
    from deploy_dsv3.probing import Fleet


#: Stages that fail for what the engine's log says.
_ENGINE_STAGES = ("container", "ray", "engine", "first-token")


@dataclass(frozen=True, kw_only=True)
class Result:
    """What a verb came to: the exit status, the JSON document, and how to write it for people."""

    exit_code: int
    document: Mapping[str, Any]
    render: Callable[[TextIO], None]


@dataclass(frozen=True, kw_only=True)
class Target:
    """A loaded and checked inventory: what a verb works on.

    Attributes:
        inventory: as loaded.
        deployment: the replicas chosen by ``--limit``.
        hosts: the hosts chosen by ``--limit``.
        settings: checked settings of all hosts.
        warnings: what to look out for in inventory and settings.
        secrets: values that must not be shown.
    """

    inventory: Inventory
    deployment: Deployment
    hosts: tuple[str, ...]
    settings: Settings
    warnings: tuple[str, ...] = ()
    secrets: frozenset[str] = field(default=frozenset(), repr=False)

    @property
    def plain_settings(self) -> dict[str, dict[str, Any]]:
        """Each host's settings by name, defaults included."""
        return {host: self.settings.of(host) for host in self.settings.values}

    def connections(self, options: Options) -> dict[str, dict[str, Any]]:
        """Each host's variables for connecting, with the passwords that were typed."""
        from deploy_dsv3 import observation

        return observation.connections(self.inventory, self.deployment.hosts, _passwords(options))


@dataclass(frozen=True, kw_only=True)
class Selection:
    """What of a playbook is run: tags and hosts, as Ansible's options take them."""

    tags: str
    limit: str


def load(options: Options, *, whole_replicas: bool) -> Target:
    """Read inventory and settings and check them as a whole; nothing is connected to.

    Args:
        options: the command line.
        whole_replicas: whether ``--limit`` must not cut a replica in two.

    Raises:
        ConfigErrors: all mistakes at once.
    """
    mistakes = release.check(options.release) if options.release else []
    try:
        loaded = inventory.load(
            options.inventories,
            extra_vars=options.variables,
            vault=VaultOptions(password_files=options.vault_files, password=options.vault_password),
        )
        deployment, checked = check(loaded)
    except ConfigErrors as problem:
        raise ConfigErrors([*mistakes, *problem]) from problem
    if mistakes:
        raise ConfigErrors(mistakes)
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
        settings=checked,
        warnings=(*loaded.warnings, *checked.warnings),
        secrets=checked.secrets.union(filter(None, (options.vault_password, options.become_password))),
    )


def check(loaded: Inventory) -> tuple[Deployment, Settings]:
    """Groups, hosts and settings of an inventory, with every mistake told at once.

    Raises:
        ConfigErrors: all mistakes.
    """
    errors: list[ConfigError] = []
    deployment: Deployment | None = None
    try:
        deployment = topology.build(loaded.groups, source=loaded.label)
        hosts = deployment.hosts
    except ConfigErrors as problem:
        errors.extend(problem)
        hosts = topology.all_hosts(loaded.groups)
    errors.extend(inventory.check_hosts(loaded, hosts))
    checked: Settings | None = None
    try:
        checked = settings.resolve(loaded, hosts, deployment)
    except ConfigErrors as problem:
        errors.extend(problem)
    if errors or deployment is None or checked is None:
        raise ConfigErrors(errors)
    return deployment, checked


def deploy(options: Options, *, full: bool = False, planned: Path | None = None) -> Result:
    """Take the hosts of an inventory to a served and verified model.

    Where the plan finds nothing to do, the hosts and the endpoint are verified and no role is walked; where it finds
    something, only those roles are, on the replicas that differ.

    Args:
        options: the command line.
        full: walk every role even so.
        planned: a plan that was kept; it is refused if it would be another one now.

    Raises:
        DeployError: the run could not begin, nobody agreed to the plan, or it was stopped.
    """
    from deploy_dsv3 import observation

    with observation.shared_connections():
        return _deploy(options, full=full, planned=planned)


def _deploy(options: Options, *, full: bool, planned: Path | None) -> Result:
    from deploy_dsv3 import plan_file

    target = load(options, whole_replicas=True)
    made, fleet = (None, None) if options.check and not planned else make_plan(target, options)
    if made and planned:
        plan_file.check(made, planned)
    elif made:
        _agree(options, made)
    whole = full or bool(options.check or options.tags or options.skip_tags)
    return _play(
        "deploy",
        options,
        target,
        plan=made,
        unchanged=fleet if made and made.converged and not whole else None,
        selected=_selection(made) if made and made.selectable and not whole else None,
        verify_after=_stage_is_wanted("verify", options) and not options.check,
    )


def _selection(made: Plan) -> Selection:
    """The roles and hosts that differ; the playbooks' tags know which roles have to follow a role."""
    roles = dict.fromkeys(action.role for action in made.actions)
    return Selection(
        # What no role makes is only recorded; that part of the playbook always runs.
        tags=",".join(f"role_{role}" for role in roles) or "role_none",
        limit=",".join(host.host for replica in made.replicas if replica.differs for host in replica.hosts),
    )


def _agree(options: Options, made: Plan) -> None:
    """Show the plan to somebody at a terminal, and ask; what preflight refuses, it refuses by itself.

    Raises:
        UsageError: they do not agree.
    """
    from deploy_dsv3 import plan_text

    if options.yes or not _somebody_is_there() or made.nothing_to_do or made.unreachable or made.errors:
        return
    plan_text.render(made, sys.stderr, brief=True)
    _ask(options, "Do it?", "nothing was changed")


def plan(options: Options, *, out: Path | None = None) -> Result:
    """Tell what a deploy would do, and why; looks at every host once and changes nothing.

    Args:
        options: the command line.
        out: where to keep the plan, if anywhere, for a later `deploy`.

    Raises:
        DeployError: it could not begin, or the plan cannot be written.
    """
    from deploy_dsv3 import plan_file, plan_text

    target = load(options, whole_replicas=True)
    made, _ = make_plan(target, options)
    if out:
        plan_file.save(made, out)
    return Result(
        exit_code=made.exit_code,
        document=made.as_dict(),
        render=lambda stream: plan_text.render(made, stream),
    )


def make_plan(target: Target, options: Options) -> tuple[Plan, Fleet]:
    """The plan, and the hosts as they were seen for it."""
    from deploy_dsv3 import plan, probing

    fleet = probing.probe(target.plain_settings, target.connections(options))
    made = plan.make(target.deployment, fleet.hosts, unreachable=fleet.unreachable, warnings=target.warnings)
    return made, fleet


def history(options: Options) -> Result:
    """List the runs that changed a deployment, as its heads remember them.

    Raises:
        DeployError: it could not begin, or a head could not be reached.
    """
    from deploy_dsv3 import history, lock

    target = load(options, whole_replicas=True)
    answers = lock.ask(_heads(target, options), {"do": "read"})
    _insist(answers)
    runs = history.merge(answer.seen["runs"] for answer in answers.values())
    return Result(
        exit_code=0,
        document={"schema": history.SCHEMA, "verb": "history", "exit_code": 0, "runs": runs},
        render=lambda stream: history.render(runs, stream),
    )


def unlock(options: Options) -> Result:
    """Break the lock of a deployment, whoever holds it; asks first.

    Raises:
        UsageError: nobody said yes.
        DeployError: it could not begin, or a head could not be reached.
    """
    from deploy_dsv3 import lock

    target = load(options, whole_replicas=True)
    heads = _heads(target, options)
    answers = lock.ask(heads, {"do": "read"})
    _insist(answers)
    held = {host: answer.seen["holder"] for host, answer in answers.items() if answer.seen["holder"]}
    told = [lock.refusal(host, holder).message for host, holder in held.items()]
    if held:
        for line in told:
            click.echo(line, err=True)
        _ask(options, "Break the lock? A run that still goes on would no longer be alone.", "the lock is still held")
        answers = lock.ask({host: heads[host] for host in held}, {"do": "break"})
        _insist(answers)
    return Result(
        exit_code=0,
        document={"schema": 1, "verb": "unlock", "exit_code": 0, "broken": held},
        render=lambda stream: click.echo(
            f"unlock: {', '.join(held)} freed" if held else "unlock: no lock is held", file=stream
        ),
    )


def _heads(target: Target, options: Options) -> dict[str, dict[str, Any]]:
    """The heads' variables for connecting."""
    connections = target.connections(options)
    return {replica.head: connections[replica.head] for replica in target.deployment.replicas}


def _insist(answers: Mapping[str, Observation]) -> None:
    away = [f"{host}: {answer.error}" for host, answer in answers.items() if not answer.reached]
    if away:
        raise UnreachableError("; ".join(away), remedy="The head keeps lock and history: bring it back first.")


def verify(options: Options, *, junit: Path | None = None) -> Result:
    """Look at every host of a running deployment, and at its endpoint; changes nothing.

    Args:
        options: the command line.
        junit: where to write the checks as JUnit XML, if anywhere.

    Raises:
        DeployError: it could not begin.
    """
    from deploy_dsv3 import verification

    target = load(options, whole_replicas=True)
    _note(f"verify: looking at {', '.join(target.hosts)}")
    found = verification.verify(target.deployment, target.plain_settings, target.connections(options), junit=junit)
    return Result(
        exit_code=found.exit_code,
        document={**found.as_dict(), "verb": "verify", "warnings": list(target.warnings)},
        render=lambda stream: verification.render(found, stream),
    )


def status(options: Options, *, canary: bool = False) -> Result:
    """Tell how a deployment is doing; changes nothing.

    Args:
        options: the command line.
        canary: also ask each endpoint for a completion of one token.

    Raises:
        DeployError: it could not begin.
    """
    from deploy_dsv3 import status as status_module

    target = load(options, whole_replicas=True)
    found = status_module.collect(target.deployment, target.plain_settings, target.connections(options), canary=canary)
    return Result(
        exit_code=found.exit_code,
        document=found.as_dict(),
        render=lambda stream: status_module.render(found, stream),
    )


def list_settings(options: Options | None) -> Result:
    """List every setting with its value on the inventory's hosts; defaults alone without an inventory.

    Raises:
        ConfigErrors: the inventory or its settings are wrong.
    """
    from deploy_dsv3 import settings_text

    checked = load(options, whole_replicas=False).settings if options else None
    return Result(
        exit_code=0,
        document=settings_text.document(checked),
        render=lambda stream: settings_text.render(checked, stream),
    )


def destroy(options: Options, *, drivers: bool, weights: bool) -> Result:
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
    what = ["the engine containers, their configuration and the endpoint"]
    what += ["the drivers and runtimes"] if drivers else []
    what += ["the model weights"] if weights else []
    _ask(options, f"Remove {' and '.join(what)} from {', '.join(target.hosts)}?", "nothing was removed")


def _ask(options: Options, question: str, otherwise: str) -> None:
    """Go on only if somebody says yes.

    Raises:
        UsageError: nobody does.
    """
    if options.yes:
        return
    if not _somebody_is_there():
        raise UsageError(f"{question} Nobody is there to ask.", remedy="Add --yes to say so beforehand.")
    if not click.confirm(question, err=True):
        raise UsageError(f"not confirmed; {otherwise}", remedy="Answer y, or add --yes.")


def _somebody_is_there() -> bool:
    return sys.stdin.isatty() and sys.stderr.isatty()


def _play(
    verb: str,
    options: Options,
    target: Target,
    *,
    plan: Plan | None = None,
    unchanged: Fleet | None = None,
    selected: Selection | None = None,
    extra_vars: Mapping[str, Any] | None = None,
    verify_after: bool = False,
) -> Result:
    """Run a verb's playbook under the deployment's lock, and verify; hosts that are `unchanged` are only verified."""
    from deploy_dsv3 import history, lock, plan_text
    from deploy_dsv3 import report as report_module

    started = time.time()
    log = runner.RunLog(verb, target.secrets)
    mine = lock.holder(log.id, verb)
    ours = {"dsv3_run": mine.as_dict(), **({"dsv3_selected": True} if selected else {})}
    job = runner.Job(
        playbook=content.playbook(verb),
        inventories=options.inventories,
        hosts=len(target.hosts),
        extra_vars={**target.settings.extra_vars, **(extra_vars or {}), **ours},
        user_extra_vars=options.variables,
        limit=selected.limit if selected else options.limit,
        tags=selected.tags if selected else options.tags,
        skip_tags=options.skip_tags,
        check=options.check,
        diff=options.diff,
        verbosity=options.verbosity,
        passwords=_passwords(options),
    )
    outcome: Outcome | None = None
    verification: Any = None
    exit_code = InternalError.exit_code
    keeper = lock.Keeper(mine, _heads(target, options), locks=unchanged is None)
    with log, progress.choose(target.hosts, json=options.json) as shown, keeper:

        def show(record: Record) -> None:
            keeper.watch(record)
            shown.show(record)

        try:
            if plan and unchanged:
                outcome = _nothing_to_do(target, plan, show)
            else:
                outcome = runner.run(job, log=log, on_record=show)
            _ask_the_engine(target, options, outcome, log)
            if verify_after and outcome.exit_code == 0:
                facts = unchanged.documents if unchanged else {}
                verification = _verify_stage(target, options, outcome, show, facts=facts)
            exit_code = outcome.exit_code
        except KeyboardInterrupt as error:
            stopped = Interrupted(number_of(error))
            exit_code = stopped.exit_code
            stopped.remedy += f" The log is in {log.directory}."
            raise stopped from error
        except Interrupted as error:
            exit_code = error.exit_code
            error.remedy += f" The log is in {log.directory}."
            raise
        finally:
            line = history.entry(
                mine,
                started=started,
                seconds=time.time() - started,
                exit_code=exit_code,
                plan=plan_text.summary(plan) if plan else "",
                outcome=outcome,
            )
            keeper.entry = {} if options.check else json.loads(log.strike_out(json.dumps(line)))
            keeper.forget = verb == "destroy" and exit_code == 0
    report = report_module.Report(
        verb=verb,
        exit_code=exit_code,
        seconds=time.time() - started,
        deployment=target.deployment,
        outcome=outcome,
        check=options.check,
        warnings=(*target.warnings, *keeper.problems),
        verification=verification,
        log=log.directory,
    )
    told = io.StringIO()
    report_module.render(report, told)
    log.conclude(told.getvalue())
    return Result(
        exit_code=report.exit_code,
        document=report.as_dict(),
        render=lambda stream: report_module.render(report, stream),
    )


def _nothing_to_do(target: Target, plan: Plan, show: Callable[[Record], None]) -> Outcome:
    """The outcome of a run that found every host as it should be."""
    outcome = Outcome()
    now = time.time()
    records: list[Record] = [
        StageStarted(time=now, stage="preflight", title="every host is as the last deploy left it")
    ]
    records += [HostOk(time=now, stage="preflight", host=host, task="Compare the host") for host in target.hosts]
    records.append(
        Finished(
            time=time.time(),
            hosts={host: HostStats(ok=1) for host in target.hosts},
            report={one.name: {"endpoint": one.endpoint, "model": one.model} for one in plan.replicas},
        )
    )
    for record in records:
        outcome.add(record)
        show(record)
    return outcome


def _ask_the_engine(target: Target, options: Options, outcome: Outcome, log: runner.RunLog) -> None:
    """Where a stage failed that the engine has a part in, add what its log says on any host of the replica."""
    from deploy_dsv3 import engine_log

    first = outcome.first
    if first is None or first.stage not in _ENGINE_STAGES or first.unreachable:
        return
    try:
        replica = target.deployment.replica_of(first.host)
    except KeyError:
        return
    hosts = dict.fromkeys((first.host, *replica.hosts))
    found = engine_log.look(hosts, target.plain_settings, target.connections(options))
    if found is None:
        return
    host, match = found
    said = log.strike_out(": ".join(filter(None, (match.where, match.line.strip()))))
    outcome.failures[0] = explained(
        replace(first, message=f"{first.message}\nThe engine's log on {host}: {said}"), match
    )


def _verify_stage(
    target: Target,
    options: Options,
    outcome: Outcome,
    show: Callable[[Record], None],
    *,
    facts: Mapping[str, Mapping[str, Any]],
) -> Any:
    """Verify after a deploy, as one more stage of it; what fails becomes the outcome's failure.

    Args:
        facts: of hosts that this run did not change, as it read them.
    """
    from deploy_dsv3 import verification

    def tell(record: Record) -> None:
        outcome.add(record)
        show(record)

    tell(StageStarted(time=time.time(), stage="verify", title="every host and the endpoint, as clients see it"))
    found = verification.verify(target.deployment, target.plain_settings, target.connections(options), facts=facts)
    for host in target.hosts:
        bad = [check for check in found.failures if check.host == host]
        task = f"{sum(check.host == host for check in found.checks)} checks"
        common: dict[str, Any] = {"time": time.time(), "stage": "verify", "host": host, "task": task}
        if not bad:
            tell(HostOk(**common))
            continue
        failure = Failure(
            host=host,
            stage="verify",
            task=bad[0].check,
            code="verification",
            message="\n".join(f"{check.check}: {check.message}" for check in bad),
            remedy="`deploy-dsv3 verify` looks again; `deploy-dsv3 status` tells how it is doing.",
            page=runbook.stage_page("verify"),
            unreachable=host in found.unreachable,
        )
        tell(HostFailed(**common, failure=replace(recognised(failure), code="verification")))
    outcome.close(time.time())
    return found


def _passwords(options: Options) -> runner.Passwords:
    return runner.Passwords(
        become=options.become_password,
        become_file=options.become_file,
        vault=options.vault_password,
        vault_files=options.vault_files,
    )


def _stage_is_wanted(stage: str, options: Options) -> bool:
    wanted = [tag.strip() for tag in options.tags.split(",") if tag.strip()]
    unwanted = [tag.strip() for tag in options.skip_tags.split(",")]
    return (not wanted or stage in wanted or "all" in wanted) and stage not in unwanted


def _note(text: str) -> None:
    """A word to whoever waits at a terminal."""
    if sys.stderr.isatty():
        click.echo(text, err=True)
