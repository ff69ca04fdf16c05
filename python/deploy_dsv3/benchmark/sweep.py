"""A sweep from the command to the verdict: target, plan, folder, worker, report, floor."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
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
class Service:
    """The target, and how to come to it again: None where only its URL was given."""

    target: Target
    loaded: verbs.Target | None = None
    options: Options | None = None
    replica: str = ""

    @property
    def head(self) -> Head | None:
        """The head's connection."""
        if self.loaded is None or self.options is None:
            return None
        return Head(self.loaded, self.options, self.target)

    def redeployed(self, batch_size: int | None) -> Service:
        """The service with another batch size, None for the inventory's own; clients are cut off meanwhile.

        Raises:
            HostError: the deploy failed.
        """
        if self.loaded is None or self.options is None:
            raise UsageError("a release is changed through its inventory", remedy="Give --inventory PATH.")
        changed = self.options
        if batch_size is not None:
            changed = replace(
                self.options, extra_vars=(*self.options.extra_vars, f"lmdeploy_max_batch_size={batch_size}")
            )
        result = verbs.deploy(changed)
        if result.exit_code:
            result.render(sys.stderr)
            raise HostError(
                f"changing the release to batch size {batch_size or 'of the inventory'} failed "
                f"(exit {result.exit_code}); what is measured is kept",
                remedy="`deploy-dsv3 --inventory PATH` continues it; then run the benchmark again.",
            )
        return replace(self, target=find_target(self.loaded, self.options, self.replica))


@dataclass
class _Sweep:
    request: Request
    service: Service
    plan: Plan
    rows: tuple[Row, ...]
    folder: RunFolder
    in_flight: dict[str, str] = field(default_factory=dict)

    @property
    def missing(self) -> list[Row]:
        return [row for row in self.rows if self.folder.result(row) is None]


def run(request: Request, service: Service) -> Result:
    """Measure what is missing, write the report, and judge.

    Raises:
        DeployError: nothing could be measured, or not all; what was measured is kept and in the report.
    """
    sweep = _prepare(request, service)
    tell = sys.stderr if request.json else sys.stdout
    reference = _reference(sweep)
    worker = _worker(sweep)
    if worker.alive():
        print(f"A benchmark measures into {sweep.folder.path} already: following it.", file=tell)
        follow_error = _follow(worker, tell)
    elif sweep.missing:
        _check_batch_size(sweep)
        about = {"base_url": service.target.base_url, "replica": service.target.replica}
        sweep.folder.create(sweep.plan, about)
        print(f"Results: {sweep.folder.path}", file=tell)
        if request.detach:
            return _detach(sweep)
        follow_error = _measure(sweep, tell)
    else:
        follow_error = None
    pages = write_report(sweep.folder)
    if follow_error is not None:
        if sweep.folder.results():
            follow_error.remedy += f" What is measured so far: {pages[0]}."
        raise follow_error
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


def _measure(sweep: _Sweep, tell: TextIO) -> DeployError | None:
    """Measure the missing rows; returns why not all of them were."""
    try:
        if not sweep.request.change_release:
            return _measure_rows(sweep, sweep.missing, tell)
        with _release_put_back(sweep, tell):
            for size, rows in groupby(sweep.missing, key=lambda row: row.max_batch_size):
                if size and size != sweep.service.target.max_batch_size:
                    print(f"Changing the release: max batch size {size}.", file=tell)
                    sweep.service = sweep.service.redeployed(size)
                if error := _measure_rows(sweep, list(rows), tell):
                    return error
    except DeployError as error:
        return error
    return None


@contextmanager
def _release_put_back(sweep: _Sweep, tell: TextIO) -> Iterator[None]:
    before = sweep.service
    try:
        yield
    finally:
        if sweep.service is not before:
            print("Putting the release back to the inventory's.", file=tell)
            sweep.service = before.redeployed(None)


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
            "in_flight": sweep.in_flight,
        },
    )


def _detach(sweep: _Sweep) -> Result:
    if sweep.request.change_release:
        raise UsageError("--detach cannot change the release", remedy="Leave one of the two out.")
    worker = _worker(sweep)
    sweep.folder.write_state("job.json", asdict(_job(sweep, sweep.missing)))
    worker.start(sweep.service.target.api_key)
    text = "Started. The same command without --detach follows it, and writes the report.\n"
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
