"""Filters of the roles: each is a function of deploy_dsv3, made to take and give what templates have."""

from __future__ import annotations

import base64
from collections.abc import Callable
from typing import Any

from ansible.errors import AnsibleFilterError

from deploy_dsv3 import openpgp


def openpgp_fingerprints(content: str) -> list[str]:
    """Fingerprints of a key file that `slurp` read; a file that is no key is an error with what is wrong in it."""
    try:
        return openpgp.fingerprints(base64.b64decode(content))
    except ValueError as error:
        raise AnsibleFilterError(f"no OpenPGP key: {error}") from error


class FilterModule:
    """What Ansible asks for the filters of this file."""

    def filters(self) -> dict[str, Callable[..., Any]]:
        """Return the filters by name."""
        return {"dsv3_openpgp_fingerprints": openpgp_fingerprints}
