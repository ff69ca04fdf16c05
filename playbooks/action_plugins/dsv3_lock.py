"""Controller's side of the lock: who takes it, and whether the holder of one that is taken still lives."""

from __future__ import annotations

import os
from typing import Any

from ansible.plugins.action import ActionBase

from deploy_dsv3 import hostvars, lock


class ActionModule(ActionBase):
    """Take the lock for this run, or give back the one that a run of plain ansible-playbook took."""

    TRANSFERS_FILES = False
    _supports_check_mode = True
    _requires_connection = True

    def run(self, tmp: str | None = None, task_vars: dict[str, Any] | None = None) -> dict[str, Any]:
        """Return the module's answer; failed, with a finding, where somebody else holds the lock."""
        variables = task_vars or {}
        result: dict[str, Any] = super().run(tmp, variables)
        _, arguments = self.validate_argument_spec(
            {
                "state": {"type": "str", "choices": ["held", "released"], "default": "held"},
                "forget": {"type": "bool", "default": False},
            }
        )
        mine = hostvars.plain(variables.get("dsv3_run")) or _alone()
        if arguments["state"] == "released":
            return {**result, **self._ask({"do": "release", "holder": mine, "forget": arguments["forget"]}, variables)}
        answer = self._ask({"do": "take", "holder": mine}, variables)
        known = answer.get("holder") or {}
        if answer.get("done") is False and lock.is_dead(known):
            answer = self._ask({"do": "take", "holder": mine, "replace": known["run"]}, variables)
            known = answer.get("holder") or {}
        result.update(answer)
        if answer.get("done") is False:
            finding = lock.refusal(variables["inventory_hostname"], known)
            result.update(failed=True, msg=finding.message, dsv3_findings=[finding.to_json()])
        return result

    def _ask(self, request: dict[str, Any], variables: dict[str, Any]) -> dict[str, Any]:
        answer: dict[str, Any] = self._execute_module("dsv3_lock", module_args=request, task_vars=variables)
        return answer


def _alone() -> dict[str, Any]:
    """The holder for a run of plain ansible-playbook, which is the parent of this worker process."""
    pid = os.getppid()
    return lock.holder(f"ansible-playbook-{pid}", "ansible-playbook", pid=pid, expires_s=lock.EXPIRES_ALONE_S).as_dict()
