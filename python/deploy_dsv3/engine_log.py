"""Why an engine is not well, by its log: the lines are picked out on the host, and explained here.

A log may have millions of lines, so the host sends those alone in which a phrase of the catalogue stands
(`observer.engine_log`); what counts among them is decided by `signatures.first_cause`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

from deploy_dsv3 import observation, signatures
from deploy_dsv3.observation import Observation
from deploy_dsv3.signatures import Match


def explain(seen: Observation) -> Match | None:
    """The first cause in the log of a host's engine; None for one that is well, and where nothing is recognised.

    `Match.line_number` counts from the container's start; it is 0 for words of Docker's or the launcher's own.
    """
    log = seen.seen.get("log")
    if not log:
        return None
    state = seen.container.get("State", {})
    lines = [
        # Why Docker could not start it; then what it wrote; then what its launcher made of that.
        (0, str(state.get("Error", ""))),
        *((int(number), str(text)) for number, text in log.get("lines", ())),
        (0, str(seen.document("status").get("last_error", ""))),
    ]
    match = signatures.first_cause(text for _, text in lines)
    return replace(match, line_number=lines[match.line_number - 1][0]) if match else None


def look(
    hosts: Iterable[str],
    settings: Mapping[str, Mapping[str, Any]],
    connections: Mapping[str, Mapping[str, Any]],
) -> tuple[str, Match] | None:
    """The first cause in the logs of several hosts, and the host that has it: of those that weigh the same, the first.

    Args:
        hosts: where to look, the likeliest first.
        settings: each host's settings by name.
        connections: each host's variables for connecting, see `observation.connections`.
    """
    seen = observation.look({host: connections[host] for host in hosts}, settings, deep=False)
    found = [(host, match) for host, one in seen.items() if (match := explain(one))]
    return min(found, key=lambda one: one[1].signature.weight, default=None)
