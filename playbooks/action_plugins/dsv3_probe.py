"""Controller's side of the probe: run it in one round trip, measure the clock's offset, keep the facts."""

from __future__ import annotations

import json
import shlex
import time
from typing import Any

from ansible.errors import AnsibleActionFail, AnsibleConnectionFailure, AnsibleError
from ansible.plugins.action import ActionBase

from deploy_dsv3 import clock, content, hostvars
from deploy_dsv3.facts import Clock

# Wider bounds than this are worth another round trip: half of the usual limit between two clocks [seconds].
GOOD_CLOCK_S = 0.5
CLOCK_TRIES = 2
# Where no interpreter is configured; the second is the system's own on the Red Hat family.
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
                "model": {"type": "str", "default": ""},
                "reach": {"type": "list", "elements": "dict", "default": []},
                "only": {"type": "list", "elements": "str", "default": []},
            }
        )
        arguments = hostvars.plain(arguments)
        host = variables["inventory_hostname"]
        if not arguments["only"] and not arguments["paths"]:
            arguments |= _paths(host, variables)
        facts, measured = self._probe(host, arguments, variables)
        known = hostvars.plain(hostvars.fact(variables, "dsv3_facts") or {})
        if known.get("clock"):
            measured = clock.narrow(Clock(**known["clock"]), measured)
        for _ in range(CLOCK_TRIES):
            if clock.width(measured) <= GOOD_CLOCK_S:
                break
            # No section has this name: the host only tells its time.
            _, again = self._probe(host, {"only": ["clock"]}, variables)
            measured = clock.narrow(measured, again)
        if arguments["only"]:
            facts = {**known, **facts, "errors": {**known.get("errors", {}), **facts["errors"]}}
        result["ansible_facts"] = {"dsv3_facts": {**facts, "clock": measured.model_dump()}}
        return result

    def _probe(self, host: str, arguments: dict[str, Any], variables: dict[str, Any]) -> tuple[dict[str, Any], Clock]:
        """Return the facts, and the bounds of the clock that this round trip gives."""
        script = (content.playbooks() / "library" / "dsv3_probe.py").read_bytes()
        command = self._command(json.dumps(arguments), variables)
        sent = time.time()
        try:
            # Through standard input: one round trip, where a module takes several.
            answer = self._low_level_execute_command(command, in_data=script)
        except AnsibleConnectionFailure:
            raise
        except AnsibleError as error:
            raise AnsibleActionFail(
                f"{host}: {error}. Likely cause: the login user needs a password to become root. "
                "Remedy: pass the right one (ansible_become_password or --ask-become-pass)."
            ) from error
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
        measured = clock.measure(sent=sent, began=facts["time"], ended=facts["time_end"], received=received)
        return facts, measured

    def _command(self, arguments: str, variables: dict[str, Any]) -> str:
        """Return the shell command that runs a Python script from standard input."""
        quoted = shlex.quote(arguments)
        configured = str(self._templar.template(variables.get("ansible_python_interpreter", "")))
        if configured.startswith("/"):
            return f"{configured} -IS - {quoted}"
        return (
            f"for python in {INTERPRETERS}; do "
            f'if command -v "$python" >/dev/null 2>&1; then exec "$python" -IS - {quoted}; fi; '
            "done; echo 'no python3 found' >&2; exit 127"
        )


def _paths(host: str, variables: dict[str, Any]) -> dict[str, Any]:
    """Return the paths whose disks preflight judges, and where the model is; they are settings of other roles."""
    try:
        settings = hostvars.settings_of(variables["hostvars"], host)
    except hostvars.SettingError as error:
        raise AnsibleActionFail(str(error)) from error
    model = settings["model_weights_path"]
    return {"paths": [settings["docker_engine_data_path"], model], "model": model}
