"""The record that a finished deploy leaves on each host, /etc/deploy-dsv3/manifest.json.

It holds what the roles were given (`wanted`) and how they left the host (`drift`), so that a later plan can tell
what changed since. Pure; role `deployment_record` writes it.
"""

from __future__ import annotations

import secrets
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from deploy_dsv3 import __version__, drift, wanted
from deploy_dsv3.facts import HostFacts

SCHEMA = 1


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """A record as it was read.

    Attributes:
        state: the host as the deploy left it, see `drift.state_of`.
        inputs: what each role was given, see `wanted.inputs`.
        salt: key of the hashes of secrets.
        version: of deploy-dsv3 that made it.
    """

    state: Mapping[str, Any]
    inputs: Mapping[str, Mapping[str, Any]]
    salt: str
    version: str = ""


def make(facts: HostFacts, settings: Mapping[str, Any], node: Mapping[str, Any]) -> dict[str, Any]:
    """The content of the record of a host. The same host and settings give the same record.

    Args:
        facts: the host as it is now; an earlier record in there lends its salt.
        settings: the host's settings by name.
        node: what was derived for it, `NodePlan.to_json`.
    """
    earlier = load(facts)
    salt = earlier.salt if earlier else secrets.token_hex(16)
    roles = [role for role in wanted.ROLES if wanted.applies(role, settings, facts, is_head=node["role"] == "head")]
    return {
        "schema": SCHEMA,
        "version": __version__,
        "salt": salt,
        "inputs": {role: wanted.inputs(role, settings, node, salt=salt) for role in roles},
        "state": drift.state_of(facts, node["container_name"]),
    }


def load(facts: HostFacts) -> Manifest | None:
    """The record on a host; None where there is none that this version can read."""
    document = facts.deployment.manifest or {}
    state, inputs = document.get("state"), document.get("inputs")
    if document.get("schema") != SCHEMA or not isinstance(state, dict) or not isinstance(inputs, dict):
        return None
    return Manifest(
        state=state,
        inputs=inputs,
        salt=str(document.get("salt", "")),
        version=str(document.get("version", "")),
    )
