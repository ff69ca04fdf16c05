"""The report of a run: one HTML page that needs nothing but itself, and the same in Markdown."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined, select_autoescape
from markupsafe import Markup

import deploy_dsv3
from deploy_dsv3.benchmark import plots
from deploy_dsv3.benchmark.display import duration
from deploy_dsv3.benchmark.plan import Plan, Row
from deploy_dsv3.benchmark.runs import RowResult, RunFolder

_LATENCIES = (
    ("ttft_ms", "Time to first token"),
    ("tpot_ms", "Time per output token"),
    ("itl_ms", "Inter-token latency"),
    ("e2e_ms", "End to end"),
)
_TEXTS = {
    "sharegpt": "ShareGPT, cut or repeated to length by the model's tokenizer, as upstream does",
    "synthetic": "SYNTHETIC (not ShareGPT): random common words, cut to length by the model's tokenizer",
    "synthetic-words": "SYNTHETIC (not ShareGPT): random common words, counted, without a tokenizer",
}
# Where the server's own count and what was asked for differ by more, the figures are not what they say.
_MOST_MISCOUNT = 0.005
# A generator that is busier than this may itself be what is measured.
_MOST_BUSY = 0.8


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One figure of the guide's table."""

    name: str
    published: float | None
    measured: float | None
    comparable: bool
    """Whether the two measure the same thing."""

    @property
    def ratio(self) -> float | None:
        """Measured / published."""
        return self.measured / self.published if self.measured is not None and self.published else None

    @property
    def grade(self) -> str:
        """For its colour: `good` from 95 % of the published on, `fair` from 80 %, else `poor`."""
        if self.ratio is None or not self.comparable:
            return ""
        return "good" if self.ratio >= 0.95 else "fair" if self.ratio >= 0.8 else "poor"


@dataclass(frozen=True, kw_only=True)
class Line:
    """One row of the table, measured or not."""

    row: Row
    label: str
    result: RowResult | None
    cells: tuple[Cell, ...]
    notes: tuple[str, ...]
    """What keeps the row from being taken at face value."""


def render(folder: RunFolder) -> tuple[str, str]:
    """The report of a run as HTML and as Markdown.

    Raises:
        UsageError: the folder holds no run, or a row that cannot be read.
    """
    known = folder.read()
    plan = folder.plan()
    lines = [_line(folder, row, plan) for row in plan.rows]
    ratios = [cell.ratio for line in lines if (cell := line.cells[1]).ratio and cell.comparable]
    data = {
        "version": deploy_dsv3.__version__,
        "run": known,
        "plan": plan,
        "lines": lines,
        "headline": _headline(lines),
        "notes": _gathered(lines),
        "overall": math.exp(sum(map(math.log, ratios)) / len(ratios)) if ratios else None,
        "latencies": _LATENCIES,
        "facts": _facts(known, plan, lines),
        "pictures": _pictures(lines),
        "has_published": any(line.row.published for line in lines),
    }
    environment = Environment(
        loader=PackageLoader("deploy_dsv3.benchmark", "templates"),
        autoescape=select_autoescape(["html.j2"], default=False),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(number=number, percent=percent, duration=duration)
    html, markdown = (environment.get_template(name) for name in ("report.html.j2", "report.md.j2"))
    return html.render(data), markdown.render(data)


def number(value: float | None) -> str:
    """A figure for people: `3,489.5`, `1.62`, `0.0711`, or a dash."""
    if value is None:
        return "–"
    if abs(value) >= 100:
        return f"{value:,.1f}"
    return f"{value:.2f}" if abs(value) >= 1 or value == 0 else f"{value:.3g}"


def percent(value: float | None) -> str:
    """`98 %`, or a dash."""
    return "–" if value is None else f"{100 * value:.0f} %"


def _line(folder: RunFolder, row: Row, plan: Plan) -> Line:
    result = folder.result(row)
    names = ("input_throughput", "output_throughput", "request_throughput")
    cells = tuple(
        Cell(
            name=name,
            published=getattr(row.published, name) if row.published else None,
            measured=getattr(result.figures, name) if result else None,
            comparable=row.num_prompts >= row.published_prompts,
        )
        for name in names
    )
    label = f"out {row.output_len:,}" if row.output_len else "ShareGPT"
    return Line(row=row, label=label, result=result, cells=cells, notes=tuple(_notes(folder, row, result)))


def _notes(folder: RunFolder, row: Row, result: RowResult | None) -> list[str]:
    attempts = [attempt["why"] for attempt in folder.attempts(row) if "why" in attempt]
    if result is None:
        return [f"NOT COUNTED: {attempts[-1]}"] if attempts else ["not measured"]
    notes, figures, record = [], result.figures, result.record
    if figures.failed:
        worst = ", ".join(f"{error['count']} × {error['error']}" for error in record["errors"][:3])
        notes.append(f"{figures.failed} of {row.num_prompts} requests FAILED and are in no figure: {worst}")
    if row.num_prompts < row.published_prompts:
        notes.append(
            f"{row.num_prompts} prompts, published with {row.published_prompts}: "
            "ramp and tail weigh more, so this does not compare"
        )
    if row.concurrency:
        why = record["environment"].get("in_flight", {}).get(row.name, "as asked")
        notes.append(f"at most {row.concurrency} requests in flight ({why}); upstream sends all at once")
    running, wanted = record["environment"].get("max_batch_size", 0), row.max_batch_size
    if running and wanted and running != wanted:
        notes.append(f"measured with max batch size {running}; the row calls for {wanted}")
    if record["environment"].get("release_changed"):
        notes.append(f"the release was changed to max batch size {running} for it")
    asked, counted = figures.total_output_tokens, figures.counted_output_tokens
    if counted is not None and abs(counted - asked) > _MOST_MISCOUNT * asked:
        notes.append(
            f"the server counted {counted:,} output tokens where {asked:,} were asked for "
            "and are counted here, as upstream does"
        )
    if record["client"]["busy"] > _MOST_BUSY:
        busy = percent(record["client"]["busy"])
        notes.append(f"the load generator kept its core {busy} busy and may itself be the limit")
    if attempts:
        notes.append(f"{len(attempts)} earlier attempt{'s' if len(attempts) > 1 else ''} kept in attempts/")
    return notes


def _headline(lines: Sequence[Line]) -> str:
    done = f"{sum(1 for line in lines if line.result)} of {len(lines)} rows measured"
    compared = [line for line in lines if line.cells[1].ratio and line.cells[1].comparable]
    if not compared:
        shortened = any(line.cells[1].ratio for line in lines)
        return f"{done}, none as it was published: see the notes." if shortened else f"{done}."
    lowest = min(compared, key=lambda line: line.cells[1].ratio or math.inf)
    return f"{done}; the lowest is {lowest.label} with {percent(lowest.cells[1].ratio)} of the published output."


def _gathered(lines: Sequence[Line]) -> list[tuple[str, str]]:
    """The notes, each once with the rows that it is about."""
    found: dict[str, list[str]] = {}
    for line in lines:
        for note in line.notes:
            found.setdefault(note, []).append(line.label)
    return [(", ".join(labels), note) for note, labels in found.items()]


def _facts(known: dict[str, Any], plan: Plan, lines: Sequence[Line]) -> list[tuple[str, str]]:
    results = [line.result for line in lines if line.result]
    measured = f"{results[0].record['started']} to {results[-1].record['ended']}" if results else "nothing yet"
    texts = sorted({result.record["text"] for result in results})
    rate = f"Poisson, {plan.request_rate:g}/s" if plan.request_rate else "all at once"
    lengths = f"uniform in 1…L (range ratio {plan.range_ratio:g}), seed {plan.seed}, rule {plan.lengths}"
    facts = [
        ("Measured", measured),
        ("Endpoint", known.get("base_url", "")),
        *((name, _of_all(lines, told)) for name, told in _ROW_FACTS),
        ("Request lengths", lengths if plan.dataset == "random" else "ShareGPT's own"),
        ("Prompt text", "; ".join(_TEXTS[text] for text in texts)),
        ("Arrivals", rate),
        ("Run", f"profile {plan.profile}, plan {plan.fingerprint()}, begun {known['created']}"),
    ]
    return [(name, value) for name, value in facts if value]


def _of_all(lines: Sequence[Line], told: Callable[[Mapping[str, Any]], str]) -> str:
    """What the rows' records say of one thing; where they do not agree, each with the rows that say so."""
    found: dict[str, list[str]] = {}
    for line in lines:
        if line.result:
            found.setdefault(told(line.result.record), []).append(line.label)
    if len(found) < 2:
        return next(iter(found), "")
    return "; ".join(f"{', '.join(labels)}: {value or 'not known'}" for value, labels in found.items())


def _gpus(record: Mapping[str, Any]) -> str:
    gpus = record["environment"].get("gpus") or {}
    if not gpus.get("name"):
        return ""
    counts = gpus.get("per_node", {})
    spread = " + ".join(str(count) for count in counts.values())
    return f"{spread} × {gpus['name']}"


def _transport(record: Mapping[str, Any]) -> str:
    transport = record["environment"].get("nccl_transport")
    return f"{transport}, as configured" if transport else ""


def _image(record: Mapping[str, Any]) -> str:
    image = record["environment"].get("image") or {}
    return " ".join(filter(None, (str(image.get("name", "")), str(image.get("digest", "")))))


def _versions(record: Mapping[str, Any]) -> str:
    versions = record["environment"].get("versions") or {}
    return ", ".join(f"{name} {version}" for name, version in versions.items() if name != "image")


#: What is told of each row, as a sweep that is continued may meet another release, driver or cluster.
_ROW_FACTS: tuple[tuple[str, Callable[[Mapping[str, Any]], str]], ...] = (
    ("Load from", lambda record: "the head" if record["where"] == "head" else "the control machine"),
    ("Model", lambda record: str(record["model"])),
    ("Layout", lambda record: str(record["environment"].get("layout", ""))),
    ("GPUs", _gpus),
    ("Driver", lambda record: str(record["environment"].get("driver", ""))),
    ("NCCL transport", _transport),
    ("Image", _image),
    ("Versions", _versions),
    ("Serving command", lambda record: " ".join(record["environment"].get("serve_argv", ()))),
)


def _pictures(lines: Sequence[Line]) -> dict[str, Markup]:
    bars = [
        plots.Bar(
            label=line.label,
            measured=line.cells[1].measured,
            published=line.cells[1].published,
            note="not counted" if line.notes and line.notes[0].startswith("NOT COUNTED") else "",
        )
        for line in lines
    ]
    measured = [(line, line.result) for line in lines if line.result]
    panels = []
    for name, title in _LATENCIES:
        spreads = [(line.label, getattr(result.figures, name)) for line, result in measured]
        panels.append(
            (
                title,
                [
                    plots.LatencyRow(label=label, p50=spread.p50, p90=spread.p90, p99=spread.p99)
                    for label, spread in spreads
                    if spread
                ],
            )
        )
    courses = [
        plots.Course(
            label=line.label,
            rates=plots.rates(result.record["timeline"]),
            bin_s=result.record["timeline"]["bin_s"],
            mean=result.figures.output_throughput,
            published=line.cells[1].published,
        )
        for line, result in measured
    ]
    # Every text in these is escaped where they are drawn.
    return {
        "throughput": Markup("".join(plots.throughput(bars, width) for width in (plots.WIDE, plots.NARROW))),
        "latency": Markup("".join(plots.latencies(panels, width) for width in (plots.WIDE, plots.NARROW))),
        "course": Markup("".join(plots.courses(courses, width) for width in (plots.WIDE, plots.NARROW))),
    }
