"""Plans kept in a file, to be applied later if the hosts and the settings are still the same."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from deploy_dsv3 import __version__, drift
from deploy_dsv3.errors import PreflightError, UnreachableError, UsageError
from deploy_dsv3.plan import Plan

SCHEMA = 1
_MOST_TOLD = 10


def save(plan: Plan, path: Path) -> None:
    """Write a plan with everything that it was made from; readable by its owner only.

    Raises:
        UsageError: it cannot be written.
    """
    document = {
        "schema": SCHEMA,
        "version": __version__,
        "made": time.time(),
        "fingerprint": plan.fingerprint,
        "states": plan.states,
        "wants": plan.wants,
        "plan": plan.as_dict(),
    }
    try:
        with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "w", encoding="utf-8") as file:
            json.dump(document, file, indent=1)
    except OSError as error:
        raise UsageError(
            f"the plan cannot be written to {path}: {error.strerror}", remedy="Name a file that you may write."
        ) from error


def check(plan: Plan, path: Path) -> None:
    """Compare a kept plan with one made now.

    Raises:
        UsageError: the file is not a plan, or the settings are not those of the plan: plan again.
        PreflightError: the hosts are not as they were; what differs is named.
        UnreachableError: a host could not be looked at.
    """
    kept = _read(path)
    if plan.unreachable:
        raise UnreachableError(
            "; ".join(f"{host}: {why}" for host, why in plan.unreachable.items()),
            remedy="A plan is applied only to hosts that are seen to be as it says.",
        )
    if kept["fingerprint"] == plan.fingerprint:
        return
    changed = [f"{one.host}: {one}" for one in _changes(kept["states"], plan)]
    if changed:
        more = f" and {len(changed) - _MOST_TOLD} more" if len(changed) > _MOST_TOLD else ""
        raise PreflightError(
            f"the hosts changed since {path} was made, so nothing was done: {'; '.join(changed[:_MOST_TOLD])}{more}",
            remedy="Look at a new plan: deploy-dsv3 plan --out FILE.",
        )
    hosts = sorted(
        host for host in kept["wants"].keys() | plan.wants.keys() if kept["wants"].get(host) != plan.wants.get(host)
    )
    raise UsageError(
        f"the inventory, its settings or deploy-dsv3 itself changed since {path} was made: {', '.join(hosts)} "
        "would become something else",
        remedy="Look at a new plan: deploy-dsv3 plan --out FILE.",
    )


def _changes(states: Mapping[str, Mapping[str, Any]], plan: Plan) -> Iterator[drift.Drift]:
    for host in sorted(states.keys() | plan.states.keys()):
        yield from drift.find(host, states.get(host, {}), plan.states.get(host, {}))


def _read(path: Path) -> dict[str, Any]:
    remedy = "Make one: deploy-dsv3 plan --out FILE."
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UsageError(f"the plan {path} cannot be read: {error.strerror}", remedy=remedy) from error
    except (ValueError, RecursionError) as error:
        raise UsageError(f"{path} is not a plan: {error}", remedy=remedy) from error
    wanted = {"schema": int, "fingerprint": str, "states": dict, "wants": dict}
    if not isinstance(document, dict) or any(not isinstance(document.get(key), kind) for key, kind in wanted.items()):
        raise UsageError(f"{path} is not a plan", remedy=remedy)
    if document["schema"] != SCHEMA:
        raise UsageError(f"{path} is of another version of deploy-dsv3", remedy=remedy)
    if not all(isinstance(state, dict) for state in document["states"].values()):
        raise UsageError(f"{path} is not a plan", remedy=remedy)
    return document
