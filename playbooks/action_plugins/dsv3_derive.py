"""Works out what the current host is to be from the facts and settings of all hosts of its replica."""

from __future__ import annotations

from typing import Any

from ansible.errors import AnsibleActionFail
from ansible.plugins.action import ActionBase

from deploy_dsv3 import hostvars
from deploy_dsv3.derive import derive
from deploy_dsv3.errors import ConfigErrors
from deploy_dsv3.facts import FactsError
from deploy_dsv3.topology import from_group_hosts


class ActionModule(ActionBase):
    """Set the fact `dsv3_node`; empty where it cannot be worked out, which `dsv3_preflight` then explains."""

    TRANSFERS_FILES = False
    _supports_check_mode = True
    _requires_connection = False
    _VALID_ARGS: frozenset[str] = frozenset()

    def run(self, tmp: str | None = None, task_vars: dict[str, Any] | None = None) -> dict[str, Any]:
        """Return `ansible_facts` with `dsv3_node`, and what the operator should know as warnings."""
        variables = task_vars or {}
        result: dict[str, Any] = super().run(tmp, variables)
        host = variables["inventory_hostname"]
        try:
            replica = from_group_hosts(hostvars.plain(variables["groups"])).replica_of(host)
            plans, _ = derive(replica, hostvars.host_inputs(variables["hostvars"], replica.hosts))
        except KeyError as error:
            raise AnsibleActionFail(
                f"{host} is not part of the deployment. Remedy: put it into dsv3_head or dsv3_workers."
            ) from error
        except (ConfigErrors, FactsError, hostvars.SettingError) as error:
            raise AnsibleActionFail(str(error)) from error
        plan = plans.get(host)
        result["ansible_facts"] = {"dsv3_node": plan.to_json() if plan else {}}
        if plan and plan.warnings:
            result["warnings"] = list(plan.warnings)
        return result
