"""The profiles, and the plan that an operator's options make of one."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Any

import yaml

from deploy_dsv3.benchmark.plan import Plan, Published, Row
from deploy_dsv3.errors import UsageError


@dataclass(frozen=True, kw_only=True)
class Profile:
    """A named set of rows."""

    name: str
    about: str
    rows: tuple[Row, ...]


@dataclass(frozen=True, kw_only=True)
class Wishes:
    """What the operator asked for on top of a profile; None leaves the profile's own."""

    num_prompts: int | None = None
    input_len: int | None = None
    output_len: int | None = None
    concurrency: int | None = None
    request_rate: float = 0.0
    range_ratio: float = 0.0
    seed: int = 1
    lengths: str = "current"
    dataset: str = "random"
    dataset_path: Path | None = None


@cache
def profiles() -> Mapping[str, Profile]:
    """All profiles by name, from `profiles.yml`."""
    text = resources.files(__package__).joinpath("profiles.yml").read_text(encoding="utf-8")
    return {
        name: Profile(name=name, about=entry["about"], rows=tuple(map(_row, entry["rows"])))
        for name, entry in yaml.safe_load(text).items()
    }


def find_profile(name: str) -> Profile:
    """A profile.

    Raises:
        UsageError: there is none of that name; names close to it are suggested.
    """
    known = profiles()
    if name in known:
        return known[name]
    close = difflib.get_close_matches(name, known, n=1)
    hint = f"Did you mean {close[0]}? " if close else ""
    raise UsageError(f"unknown profile {name!r}", remedy=f"{hint}Profiles: {', '.join(known)}.")


def make_plan(profile: Profile, wishes: Wishes) -> Plan:
    """The plan of a profile with the operator's wishes.

    Raises:
        UsageError: the wishes contradict each other or the profile.
    """
    _check(profile, wishes)
    rows = tuple(_wished(row, profile, wishes) for row in profile.rows)
    names = [row.name for row in rows]
    if len(set(names)) < len(names):
        raise UsageError(
            f"with these options rows of {profile.name} become the same: {', '.join(sorted(set(names)))}",
            remedy="Use --profile custom for one row of your own.",
        )
    return Plan(
        profile=profile.name,
        rows=rows,
        seed=wishes.seed,
        range_ratio=wishes.range_ratio,
        lengths=wishes.lengths,
        dataset=wishes.dataset,
        dataset_path=str(wishes.dataset_path.absolute()) if wishes.dataset_path else "",
        request_rate=wishes.request_rate,
    )


def select_rows(plan: Plan, chosen: str) -> tuple[Row, ...]:
    """The rows of `--rows`: numbers from 1, ranges, or output lengths (`1-4`, `1,6`, `out8192`); empty: all.

    Raises:
        UsageError: something in it names no row.
    """
    if not chosen:
        return plan.rows
    wanted: set[int] = set()
    for part in chosen.split(","):
        name = part.strip()
        first, dash, last = name.partition("-")
        by_name = [place for place, row in enumerate(plan.rows, 1) if name in (row.name, f"out{row.output_len}")]
        if by_name:
            wanted.update(by_name)
        elif first.isdigit() and (last.isdigit() if dash else True):
            wanted.update(range(int(first), int(last or first) + 1))
        else:
            wanted.add(0)
        if not wanted <= set(range(1, len(plan.rows) + 1)):
            rows = "; ".join(f"{place} {row.name}" for place, row in enumerate(plan.rows, 1))
            raise UsageError(f"--rows {chosen}: {name!r} is no row of {plan.profile}", remedy=f"Rows: {rows}.")
    return tuple(row for place, row in enumerate(plan.rows, 1) if place in wanted)


def _row(entry: Mapping[str, Any]) -> Row:
    fields = dict(entry)
    published = fields.pop("published", None)
    if published:
        names = ("input_throughput", "output_throughput", "request_throughput")
        fields["published"] = Published(**dict(zip(names, published, strict=True)))
        fields["published_prompts"] = fields["num_prompts"]
    return Row(**fields)


def _wished(row: Row, profile: Profile, wishes: Wishes) -> Row:
    sharegpt = wishes.dataset == "sharegpt"
    changes: dict[str, Any] = {
        "num_prompts": wishes.num_prompts,
        "input_len": 0 if sharegpt else wishes.input_len,
        "output_len": (wishes.output_len or 0) if sharegpt else wishes.output_len,
        "concurrency": wishes.concurrency,
    }
    return replace(row, **{name: value for name, value in changes.items() if value is not None})


def _check(profile: Profile, wishes: Wishes) -> None:
    if wishes.dataset == "sharegpt":
        if profile.name != "custom":
            raise UsageError(
                f"profile {profile.name} is made of random lengths, not of ShareGPT's own",
                remedy="Use --profile custom with --dataset sharegpt.",
            )
        if wishes.input_len is not None:
            raise UsageError("--input-len has no meaning with --dataset sharegpt", remedy="Leave it out.")
        if wishes.dataset_path is None:
            raise UsageError("--dataset sharegpt needs the file", remedy="Name it: --dataset-path FILE.")
    if profile.name == "published" and (wishes.input_len is not None or wishes.output_len is not None):
        raise UsageError("the rows of profile published have the published lengths", remedy="Use --profile custom.")
    lowest = {"--num-prompts": wishes.num_prompts, "--input-len": wishes.input_len}
    lowest["--output-len"] = wishes.output_len
    for option, value in lowest.items():
        if value is not None and value < 1:
            raise UsageError(f"{option} {value}: must be at least 1")
    if not 0 <= wishes.range_ratio <= 1:
        raise UsageError(f"--range-ratio {wishes.range_ratio}: must be between 0 and 1")
    if wishes.request_rate < 0 or (wishes.concurrency or 0) < 0:
        raise UsageError("--request-rate and --concurrency must not be negative; 0 means no limit")
