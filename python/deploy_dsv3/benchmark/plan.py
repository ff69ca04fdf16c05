"""What a sweep measures, as data: rows, the plan that holds them, and both as JSON.

The plan is written once into a run's folder. Everything that decides which requests are sent is in it, so two
folders with equal plans measured the same thing, and a sweep is continued only under the plan it began with.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

SCHEMA = 1


@dataclass(frozen=True, kw_only=True)
class Published:
    """Figures of the upstream guide, totals of the cluster."""

    input_throughput: float
    """[tokens/s]"""
    output_throughput: float
    """[tokens/s]"""
    request_throughput: float
    """[requests/s]"""


@dataclass(frozen=True, kw_only=True)
class Row:
    """One measurement: `num_prompts` requests of one nominal shape."""

    num_prompts: int
    input_len: int
    """Nominal prompt length [tokens]; 0: the dataset's own (ShareGPT)."""
    output_len: int
    """Nominal output length [tokens]; 0: the dataset's own (ShareGPT)."""
    max_batch_size: int = 0
    """The server's `--max-batch-size` that the row calls for; 0 accepts any."""
    concurrency: int = 0
    """Most requests in flight; 0: no limit, as upstream."""
    published: Published | None = None
    published_prompts: int = 0
    """Prompts behind the published figures; where the row has fewer, the two do not compare."""

    @property
    def name(self) -> str:
        """The guide's name for the row's CSV, without the suffix; ShareGPT's lengths have a name of ours."""
        if not self.input_len:
            fixed = f"_out{self.output_len}" if self.output_len else ""
            return f"api_n{self.num_prompts}_sharegpt{fixed}_dsv3"
        return f"api_n{self.num_prompts}_in{self.input_len}_out{self.output_len}_dsv3"


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Everything that decides which requests a sweep sends."""

    profile: str
    rows: tuple[Row, ...]
    seed: int = 1
    range_ratio: float = 0.0
    """A request's length is uniform in max(1, length * ratio)..length, both ends included."""
    lengths: str = "current"
    """`current`: upstream's rule today; `guide`: its rule when the guide was written, see `workload`."""
    dataset: str = "random"
    """`random` or `sharegpt`, upstream's names."""
    dataset_path: str = ""
    """ShareGPT's JSON file; empty: synthetic text (dataset `random` only)."""
    request_rate: float = 0.0
    """Poisson arrivals [requests/s]; 0: all requests at once."""
    schema: int = field(default=SCHEMA)

    def fingerprint(self) -> str:
        """A short name for the plan: equal plans, equal fingerprints."""
        return hashlib.sha256(json.dumps(asdict(self), sort_keys=True).encode()).hexdigest()[:12]


def plan_as_json(plan: Plan) -> dict[str, Any]:
    """The plan as JSON-ready data; `plan_from_json` turns it back."""
    return asdict(plan)


def plan_from_json(data: Mapping[str, Any]) -> Plan:
    """The plan that `plan_as_json` wrote.

    Raises:
        ValueError: the data was written by another schema, or is not a plan.
    """
    if data.get("schema") != SCHEMA:
        raise ValueError(f"plan schema {data.get('schema')!r}, this version reads {SCHEMA}")
    try:
        rows = tuple(
            Row(**{**row, "published": Published(**row["published"]) if row["published"] else None})
            for row in data["rows"]
        )
        return Plan(**{**data, "rows": rows})
    except (KeyError, TypeError) as broken:
        raise ValueError(f"not a benchmark plan: {broken}") from broken
