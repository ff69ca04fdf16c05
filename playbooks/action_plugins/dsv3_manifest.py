"""Puts together the record of a finished deploy from the current host's facts, settings and derived plan."""

from __future__ import annotations

from typing import Any

from ansible.errors import AnsibleActionFail
from ansible.plugins.action import ActionBase

from deploy_dsv3 import hostvars, manifest
from deploy_dsv3.facts import FactsError, load_facts


class ActionModule(ActionBase):
    """Return the record as `manifest`; nothing is written."""

    TRANSFERS_FILES = False
    _supports_check_mode = True
    _requires_connection = False
    _VALID_ARGS: frozenset[str] = frozenset()

    def run(self, tmp: str | None = None, task_vars: dict[str, Any] | None = None) -> dict[str, Any]:
        """Return `manifest`, see `deploy_dsv3.manifest`."""
        variables = task_vars or {}
        result: dict[str, Any] = super().run(tmp, variables)
        host = variables["inventory_hostname"]
        try:
            facts = load_facts(hostvars.plain(hostvars.fact(variables, "dsv3_facts") or {}))
            settings = hostvars.settings_of(variables["hostvars"], host)
        except (FactsError, hostvars.SettingError) as error:
            raise AnsibleActionFail(str(error)) from error
        node = hostvars.plain(hostvars.fact(variables, "dsv3_node"))
        result["manifest"] = manifest.make(facts, settings, node)
        return result
