"""Judges the current host by the facts and settings of all hosts; refuses it with all findings at once."""

from __future__ import annotations

from typing import Any

from ansible.errors import AnsibleActionFail
from ansible.plugins.action import ActionBase

from deploy_dsv3 import hostvars
from deploy_dsv3.errors import ConfigErrors
from deploy_dsv3.facts import FactsError
from deploy_dsv3.findings import describe
from deploy_dsv3.preflight import check
from deploy_dsv3.topology import from_group_hosts


class ActionModule(ActionBase):
    """Fail on an error of this host; `dsv3_findings` has all findings as data, warnings included."""

    TRANSFERS_FILES = False
    _supports_check_mode = True
    _requires_connection = False
    _VALID_ARGS: frozenset[str] = frozenset()

    def run(self, tmp: str | None = None, task_vars: dict[str, Any] | None = None) -> dict[str, Any]:
        """Return `dsv3_findings`; failed with a readable message when one of them is an error."""
        variables = task_vars or {}
        result: dict[str, Any] = super().run(tmp, variables)
        host = variables["inventory_hostname"]
        try:
            deployment = from_group_hosts(hostvars.plain(variables["groups"]))
            inputs = hostvars.host_inputs(variables["hostvars"], deployment.hosts)
        except (ConfigErrors, FactsError, hostvars.SettingError) as error:
            raise AnsibleActionFail(str(error)) from error
        findings = check(deployment.replicas, inputs).get(host, [])
        errors = [finding for finding in findings if finding.severity == "error"]
        warnings = [finding for finding in findings if finding.severity == "warning"]
        result["dsv3_findings"] = [finding.to_json() for finding in findings]
        if errors:
            result["failed"] = True
            result["msg"] = describe(findings)
        if warnings:
            result["warnings"] = [finding.message for finding in warnings]
        return result
