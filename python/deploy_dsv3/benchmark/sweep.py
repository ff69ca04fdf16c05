"""A sweep from the command to the verdict: target, plan, folder, worker, report, floor."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from itertools import groupby
from pathlib import Path
from typing import Any, TextIO

from deploy_dsv3 import verbs
from deploy_dsv3.benchmark import display, page
from deploy_dsv3.benchmark.comparison import share_of
from deploy_dsv3.benchmark.head import Head, HeadWorker
from deploy_dsv3.benchmark.plan import Plan, Row
from deploy_dsv3.benchmark.profiles import Wishes, find_profile, make_plan, select_rows
from deploy_dsv3.benchmark.runs import RowResult, RunFolder, now, unfinished_run
from deploy_dsv3.benchmark.supervision import LocalWorker, Worker, follow
from deploy_dsv3.benchmark.tables import results_table
from deploy_dsv3.benchmark.target import Target, find_target, fitting_concurrency, needed_change
from deploy_dsv3.benchmark.worker import Job
from deploy_dsv3.errors import DeployError, HostError, UsageError, VerificationError
from deploy_dsv3.options import Options
from deploy_dsv3.verbs import Result

_DEFAULT_RESULTS = Path("benchmark-results")


@dataclass(frozen=True, kw_only=True)
class Request:
    """What the operator asked for, beyond the target."""

    profile: str
    rows: str
    wishes: Wishes
    where: str = "control"
    tokenizer: Path | None = None
    output: Path | None = None
    detach: bool = False
    change_release: bool = False
    any_batch_size: bool = False
    max_failed: float = 0.01
    fail_below: float | None = None
    against: Path | None = None
    json: bool = False


@dataclass(frozen=True, kw_only=True)
class Origin:
    """Where a target was found: what is needed to come to its hosts again."""

    loaded: verbs.Target
    options: Options
    replica: str = ""
    """The operator's choice; empty where the inventory has one."""


@dataclass(frozen=True, kw_only=True)
class Service:
    """The target, and its origin: None where only its URL was given."""

    target: Target
    origin: Origin | None = None

    @property
    def head(self) -> Head | None:
        """The head's connection."""
        return Head(self.origin.loaded, self.origin.options, self.target) if self.origin else None

    def is_inventorys_own(self) -> bool:
        """Whether what runs is what the inventory says; False: it is, but for the batch size.

        Raises:
            UsageError: more differs, which a change of release would change as well.
        """
        if not verbs.plan(self._options()).exit_code:
            return True
        size = self.target.max_batch_size
        if size and not verbs.plan(self._options(size)).exit_code:
            return False
        raise UsageError(
            f"{self.target.replica}: the hosts are not as the inventory says, and changing the release would change "
            "that too",
            remedy="See what differs with `deploy-dsv3 plan`, and deploy first. "
            "If it was deployed with --extra-vars, the benchmark needs them as well.",
        )

    def redeployed(self, batch_size: int | None) -> Service:
        """The service with another batch size, None for the inventory's own; clients are cut off meanwhile.

        Raises:
            HostError: the deploy failed.
        """
        result = verbs.deploy(self._options(batch_size))
        if result.exit_code:
            result.render(sys.stderr)
            wanted = f"max batch size {batch_size}" if batch_size else "what the inventory says"
            raise HostError(
                f"changing the release to {wanted} failed (exit {result.exit_code}); what is measured is kept",
                remedy="`deploy-dsv3 --inventory PATH` continues it; then run the benchmark again.",
            )
        origin = self._origin()
        return replace(self, target=find_target(origin.loaded, origin.options, origin.replica))

    def _options(self, batch_size: int | None = None) -> Options:
        """Those of a deploy of this replica alone. --change-release is the consent that a deploy asks for."""
        options = self._origin().options
        changed = (f"lmdeploy_max_batch_size={batch_size}",) if batch_size else ()
        return replace(
            options,
            yes=True,
            limit=",".join(self.target.environment["nodes"]),
            extra_vars=(*options.extra_vars, *changed),
        )

    def _origin(self) -> Origin:
        if self.origin is None:
            raise UsageError("a release is changed through its inventory", remedy="Give --inventory PATH.")
        return self.origin


@dataclass
class _Sweep:
    request: Request
    service: Service
    plan: Plan
    rows: tuple[Row, ...]
    folder: RunFolder
    in_flight: dict[str, str] = field(default_factory=dict)
    release_changed: bool = False
    """Whether another release than the inventory's runs, for the rows' sake."""

    @property
    def missing(self) -> list[Row]:
        return [row for row in self.rows if self.folder.result(row) is None]


def run(request: Request, service: Service) -> Result:
    """Measure what is missing, write the report, and judge.

    Raises:
        DeployError: nothing could be measured, or not all; what was measured is kept and in the report.
    """
    if request.detach and request.change_release:
        raise UsageError("--detach cannot change the release", remedy="Leave one of the two out.")
    sweep = _prepare(request, service)
    tell = sys.stderr if request.json else sys.stdout
    reference = _reference(sweep)
    worker = _worker(sweep)
    running = worker if worker.alive() else None
    if running:
        print(f"A benchmark measures into {sweep.folder.path} already: following it.", file=tell)
    elif sweep.missing:
        _check_batch_size(sweep)
    if request.change_release:
        sweep.release_changed = not service.is_inventorys_own()
    if sweep.missing and not running:
        about = {"base_url": service.target.base_url, "replica": service.target.replica}
        sweep.folder.create(sweep.plan, about)
        print(f"Results: {sweep.folder.path}", file=tell)
    if request.detach and (running or sweep.missing):
        return _detach(sweep, running)
    error = _measure(sweep, running, tell)
    pages = write_report(sweep.folder)
    if error is not None:
        if sweep.folder.results():
            error.remedy += f" What is measured so far: {pages[0]}."
        raise error
    return _verdict(sweep, reference, pages)


def write_report(folder: RunFolder) -> list[Path]:
    """Write both pages of a run into its folder; returns them, HTML first."""
    html, markdown = page.render(folder)
    return [folder.write_report("report.html", html), folder.write_report("report.md", markdown)]


def _prepare(request: Request, service: Service) -> _Sweep:
    profile, wishes = find_profile(request.profile), request.wishes
    plan, in_flight = make_plan(profile, wishes), {}
    if wishes.concurrency is None:
        fitted = []
        for row in plan.rows:
            most, why = fitting_concurrency(service.target, row)
            fitted.append(replace(row, concurrency=most))
            if why:
                in_flight[row.name] = why
        plan = replace(plan, rows=tuple(fitted))
    rows = select_rows(plan, request.rows)
    folder = RunFolder(request.output) if request.output else unfinished_run(_DEFAULT_RESULTS, plan)
    if folder is None:
        stamp = now().replace(":", "").replace("-", "")
        name = f"{service.target.replica or 'endpoint'}-{plan.profile}-{stamp}"
        folder = RunFolder(_DEFAULT_RESULTS / name)
    folder.check(plan)
    return _Sweep(request, service, plan, rows, folder, in_flight)


def _check_batch_size(sweep: _Sweep) -> None:
    """Never measure a row with a batch size it was not published for, unless told to."""
    request, target = sweep.request, sweep.service.target
    wrong = needed_change(target, sweep.missing)
    if not wrong or request.any_batch_size or request.change_release:
        return
    sizes = "; ".join(
        f"{', '.join(row.name for row in rows)} need{'s' if len(rows) == 1 else ''} {size}"
        for size, rows in wrong.items()
    )
    right = [
        str(place)
        for place, row in enumerate(sweep.plan.rows, 1)
        if row in sweep.missing and row.max_batch_size in (0, target.max_batch_size)
    ]
    choices = [
        "--change-release redeploys with what a row needs, and back in the end (clients are cut off)",
        *([f"--rows {','.join(right)} measures those that fit"] if right else []),
        "--any-batch-size measures with what runs, and marks it",
    ]
    message = f"the engine runs with max batch size {target.max_batch_size} ({target.batch_size_from}); {sizes}"
    raise UsageError(message, remedy=f"Nothing was measured. Choose: {'; '.join(choices)}.")


def _measure(sweep: _Sweep, running: Worker | None, tell: TextIO) -> DeployError | None:
    """Follow the worker that runs, then measure what is still missing; returns why not all of it was."""
    error: DeployError | None = None
    not_put_back: DeployError | None = None
    try:
        error = _follow(running, tell) if running else None
        if error is None and sweep.missing:
            error = _measure_missing(sweep, tell)
    except DeployError as failed:
        error = failed
    finally:
        if sweep.request.change_release:
            not_put_back = _put_release_back(sweep, tell)
    if error and not_put_back:
        error.remedy += f" And the release was not put back: {not_put_back.message}. {not_put_back.remedy}"
    return error or not_put_back


def _measure_missing(sweep: _Sweep, tell: TextIO) -> DeployError | None:
    _check_batch_size(sweep)
    if not sweep.request.change_release:
        return _measure_rows(sweep, sweep.missing, tell)
    for size, rows in groupby(sweep.missing, key=lambda row: row.max_batch_size):
        if size and size != sweep.service.target.max_batch_size:
            print(f"Changing the release: max batch size {size}.", file=tell)
            sweep.release_changed = True
            sweep.service = sweep.service.redeployed(size)
        if error := _measure_rows(sweep, list(rows), tell):
            return error
    return None


def _put_release_back(sweep: _Sweep, tell: TextIO) -> DeployError | None:
    """Deploy the inventory's own release where another one runs; returns why it could not."""
    if not sweep.release_changed:
        return None
    print("Putting the release back to the inventory's.", file=tell)
    try:
        sweep.service = sweep.service.redeployed(None)
    except DeployError as error:
        return error
    sweep.release_changed = False
    return None


def _measure_rows(sweep: _Sweep, rows: Sequence[Row], tell: TextIO) -> DeployError | None:
    worker = _worker(sweep)
    sweep.folder.write_state("job.json", asdict(_job(sweep, rows)))
    worker.start(sweep.service.target.api_key)
    return _follow(worker, tell)


def _follow(worker: Worker, tell: TextIO) -> DeployError | None:
    try:
        with display.shown_on(tell) as show:
            last = follow(worker, show)
    except DeployError as error:
        return error
    if rejected := last.get("rejected"):
        return VerificationError(
            "; ".join(f"{one['row']}: {one['why']}" for one in rejected),
            remedy="These rows do not count; their records are in attempts/. Run again to measure them anew.",
        )
    return None


def _worker(sweep: _Sweep) -> Worker:
    head = sweep.service.head
    if sweep.request.where == "control":
        return LocalWorker(sweep.folder)
    if head is None:
        raise UsageError("--from head needs an inventory", remedy="Give --inventory PATH, or --from control.")
    there = [sweep.plan.dataset_path, str(sweep.request.tokenizer or "")]
    return HeadWorker(head, sweep.folder, sweep.service.target, sweep.plan, tuple(filter(None, there)))


def _job(sweep: _Sweep, rows: Sequence[Row]) -> Job:
    request, target, head = sweep.request, sweep.service.target, sweep.service.head
    tokenizer = str(request.tokenizer.absolute()) if request.tokenizer else ""
    if not tokenizer and request.where == "head":
        tokenizer = target.weights_path
    elif not tokenizer and head is not None:
        tokenizer = str(head.fetch_tokenizer() or "")
    ca_file = "ca.pem" if request.where == "head" and target.ca_file else target.ca_file
    return Job(
        rows=tuple(row.name for row in rows),
        later=tuple(row.name for row in sweep.missing if row not in rows),
        base_url=target.base_url,
        ca_file=ca_file,
        model=target.model,
        tokenizer=tokenizer,
        tokenizer_required=request.tokenizer is not None,
        max_failed=request.max_failed,
        where=request.where,
        environment={
            **target.environment,
            "max_batch_size": target.max_batch_size,
            "release_changed": sweep.release_changed,
            "in_flight": sweep.in_flight,
        },
    )


def _detach(sweep: _Sweep, running: Worker | None) -> Result:
    text = "It runs already. The same command without --detach follows it, and writes the report.\n"
    if running is None:
        sweep.folder.write_state("job.json", asdict(_job(sweep, sweep.missing)))
        _worker(sweep).start(sweep.service.target.api_key)
        text = text.replace("It runs already", "Started")
    document = {"verb": "benchmark", "exit_code": 0, "folder": str(sweep.folder.path), "detached": True}
    return Result(exit_code=0, document=document, render=lambda stream: print(text, end="", file=stream))


def _reference(sweep: _Sweep) -> Mapping[str, RowResult]:
    """The earlier results that `--fail-below` compares with; empty: the published figures."""
    request = sweep.request
    if request.against is not None and request.fail_below is None:
        raise UsageError("--against says with what --fail-below compares", remedy="Add --fail-below SHARE.")
    if request.fail_below is None:
        return {}
    if request.against is None:
        without = [row.name for row in sweep.rows if row.published is None]
        if without:
            raise UsageError(
                f"--fail-below: nothing is published for {', '.join(without)}",
                remedy="Name an earlier run to compare with: --against DIR.",
            )
        return {}
    earlier = {result.row.name: result for result in RunFolder(request.against).results()}
    if missing := [row.name for row in sweep.rows if row.name not in earlier]:
        raise UsageError(
            f"--against {request.against}: it has no result for {', '.join(missing)}",
            remedy="Name a run that measured these rows, or choose others with --rows.",
        )
    return earlier


def _verdict(sweep: _Sweep, reference: Mapping[str, RowResult], pages: Sequence[Path]) -> Result:
    results = [result for row in sweep.rows if (result := sweep.folder.result(row))]
    shares = {result.row.name: share_of(result, reference.get(result.row.name)) for result in results}
    least = sweep.request.fail_below
    below = {name: share for name, share in shares.items() if least and share is not None and share < least}
    document: dict[str, Any] = {
        "verb": "benchmark",
        "exit_code": VerificationError.exit_code if below else 0,
        "folder": str(sweep.folder.path),
        "report": [str(path) for path in pages],
        "profile": sweep.plan.profile,
        "rows": [
            {
                "name": result.row.name,
                "share": shares[result.row.name],
                "published": asdict(result.row.published) if result.row.published else None,
                "figures": result.figures.as_json(),
                "errors": result.record["errors"],
                "text": result.record["text"],
            }
            for result in results
        ],
    }
    floor = f"{least:.0%} of {'the earlier run' if reference else 'the published output throughput'}" if least else ""
    if below:
        told = ", ".join(f"{name} with {share:.1%}" for name, share in below.items())
        document["error"] = {"message": f"below {floor}: {told}", "remedy": f"See {pages[0]}."}

    def render(stream: TextIO) -> None:
        results_table(results, shares, stream)
        print(f"Report: {pages[0]}", file=stream)
        if below:
            print(f"\nFAILED, {document['error']['message']}", file=stream)

    return Result(exit_code=document["exit_code"], document=document, render=render)
