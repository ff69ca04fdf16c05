"""Controller's side of the probe: run it in one round trip, measure the clock's offset, keep the facts."""

from __future__ import annotations

import json
import shlex
import time
from typing import Any

from ansible.errors import AnsibleActionFail, AnsibleConnectionFailure, AnsibleError
from ansible.plugins.action import ActionBase

from deploy_dsv3 import content, hostvars

# A wider interval than this is worth another round trip: half of the usual limit between two clocks
# [seconds].
GOOD_CLOCK_S = 0.5
CLOCK_TRIES = 2
# Interpreters to look for where none is configured; the second is the system's on the Red Hat family.
INTERPRETERS = "python3 /usr/libexec/platform-python"


class ActionModule(ActionBase):
    """Read the host's state into the fact `dsv3_facts`; what is not read again stays."""

    TRANSFERS_FILES = False
    _supports_check_mode = True
    _supports_async = False
    _requires_connection = True

    def run(self, tmp: str | None = None, task_vars: dict[str, Any] | None = None) -> dict[str, Any]:
        """Return `ansible_facts` with `dsv3_facts`."""
        variables = task_vars or {}
        result: dict[str, Any] = super().run(tmp, variables)
        _, arguments = self.validate_argument_spec(
            {
                "paths": {"type": "list", "elements": "str", "default": []},
                "reach": {"type": "list", "elements": "dict", "default": []},
                "only": {"type": "list", "elements": "str", "default": []},
            }
        )
        host = variables["inventory_hostname"]
        if not arguments["only"] and not arguments["paths"]:
            arguments["paths"] = self._paths(host, variables)
        try:
            facts = self._probe(host, hostvars.plain(arguments), variables)
            clock = self._measure_clock(facts)
        except AnsibleConnectionFailure:
            raise
        except AnsibleError as error:
            raise AnsibleActionFail(
                f"{host}: {error}. Likely cause: the login user may not become root, or needs a password for "
                "it. "
                "Remedy: give the user sudo, or pass the password (ansible_become_password, "
                "--ask-become-pass)."
            ) from error
        known = hostvars.plain(hostvars.fact(variables, "dsv3_facts") or {})
        if known.get("clock"):
            clock = _intersect(known["clock"], clock)
        errors = {**known.get("errors", {}), **facts["errors"]} if arguments["only"] else facts["errors"]
        result["ansible_facts"] = {"dsv3_facts": {**known, **facts, "errors": errors, "clock": clock}}
        if not arguments["only"]:
            result["ansible_facts"] |= _managers(facts)
        return result

    def _paths(self, host: str, variables: dict[str, Any]) -> list[str]:
        """Return the paths whose disks preflight judges; they are settings of other roles."""
        try:
            settings = hostvars.settings_of(variables["hostvars"], host)
        except hostvars.SettingError as error:
            raise AnsibleActionFail(str(error)) from error
        return [settings["docker_engine_data_path"], settings["model_weights_path"]]

    def _probe(self, host: str, arguments: dict[str, Any], variables: dict[str, Any]) -> dict[str, Any]:
        """Return the facts; keeps the controller's clock before and after in `_round_trip`."""
        script = (content.playbooks() / "library" / "dsv3_probe.py").read_bytes()
        command = self._command(json.dumps(arguments), variables)
        sent = time.time()
        # Through standard input: one round trip, where a module would take several.
        answer = self._low_level_execute_command(command, in_data=script)
        received = time.time()
        lines = [line for line in answer["stdout"].splitlines() if line.startswith('{"changed"')]
        if not lines:
            said = (answer["stderr"] or answer["stdout"]).strip()[-500:] or "nothing"
            raise AnsibleActionFail(
                f"{host}: the probe gave no answer (exit {answer['rc']}); the host said: {said}. "
                "Likely cause: there is no python3, or the login user may not become root. "
                "Remedy: install python3 on the host, or give the user sudo."
            )
        facts: dict[str, Any] = json.loads(lines[-1])["dsv3_facts"]
        self._round_trip = (sent, received)
        return facts

    def _command(self, arguments: str, variables: dict[str, Any]) -> str:
        """Return the shell command that runs a Python script from standard input."""
        quoted = shlex.quote(arguments)
        configured = self._templar.template(variables.get("ansible_python_interpreter", ""))
        if str(configured).startswith("/"):
            return f"{configured} -IS - {quoted}"
        return (
            f"for python in {INTERPRETERS}; do "
            f'if command -v "$python" >/dev/null 2>&1; then exec "$python" -IS - {quoted}; fi; '
            "done; echo 'no python3 found' >&2; exit 127"
        )

    def _measure_clock(self, facts: dict[str, Any]) -> dict[str, float]:
        """Return bounds of host clock minus controller clock [seconds].

        Whatever the transport took, the probe began after the request was sent and ended before its answer
        came.
        """
        sent, received = self._round_trip
        clock = {"offset_low": facts["time_end"] - received, "offset_high": facts["time"] - sent}
        for _ in range(CLOCK_TRIES):
            if clock["offset_high"] - clock["offset_low"] <= GOOD_CLOCK_S:
                break
            sent = time.time()
            answer = self._low_level_execute_command("date +%s.%N", sudoable=False)
            received = time.time()
            try:
                there = float(answer["stdout"].strip())
            except ValueError:
                break  # a date command without nanoseconds
            clock = _intersect(clock, {"offset_low": there - received, "offset_high": there - sent})
        return clock


def _intersect(first: dict[str, float], second: dict[str, float]) -> dict[str, float]:
    """Return the bounds that satisfy both; the second alone if the clock was set in between."""
    low = max(first["offset_low"], second["offset_low"])
    high = min(first["offset_high"], second["offset_high"])
    return {"offset_low": low, "offset_high": high} if low <= high else second


def _managers(facts: dict[str, Any]) -> dict[str, str]:
    """Return the two facts without which `package` and `service` gather facts at every task."""
    system = facts.get("os", {})
    managers = {"pkg_mgr": {"Debian": "apt", "RedHat": "dnf"}.get(system.get("family", ""), "")}
    if system.get("init") == "systemd":
        managers["service_mgr"] = "systemd"
    return {name: value for name, value in managers.items() if value}
