"""The action plugins inside of Ansible, as a role calls them, over local connections."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from recorded_hosts import RECORDED

from deploy_dsv3 import content

INVENTORY = """\
[dsv3_head]
gpu1 recorded=h800-ib-1
[dsv3_workers]
gpu2 recorded=h800-ib-2 rail=ens7np0 node_network_interface="{{ rail }}"
[dsv3:children]
dsv3_head
dsv3_workers
[dsv3:vars]
ansible_connection=local
lmdeploy_tp=16
engine_environment={"NCCL_DEBUG": "INFO"}
"""
RECORDED_FACTS = """
    - ansible.builtin.set_fact:
        dsv3_facts: "{{ lookup('file', folder ~ '/' ~ recorded ~ '.json') | from_json }}"
    - dsv3_derive:
"""
PROBED_FACTS = """
    - dsv3_probe:
    - dsv3_derive:
    - dsv3_probe:
        only: [reach]
        reach: "{{ (dsv3_node | default(ansible_facts.dsv3_node)).reach | default([]) }}"
"""
PLAYBOOK = """
- hosts: dsv3
  gather_facts: false
  tasks:{facts}
    - dsv3_preflight:
      register: judged
      ignore_errors: true
    - ansible.builtin.copy:
        content: "{{{{ {{'facts': facts, 'node': node, 'judged': judged}} | to_json }}}}"
        dest: "{{{{ out }}}}/{{{{ inventory_hostname }}}}.json"
        mode: "0600"
      check_mode: false
      vars:
        facts: "{{{{ dsv3_facts | default(ansible_facts.dsv3_facts) }}}}"
        node: "{{{{ dsv3_node | default(ansible_facts.dsv3_node) }}}}"
        ansible_python_interpreter: "{{{{ ansible_playbook_python }}}}"
"""


def play(folder: Path, facts: str, *options: str, inventory: str = INVENTORY, **environ: str) -> dict[str, Any]:
    """What each host has after the plugins ran: {"facts", "node", "judged"}."""
    (folder / "prod.ini").write_text(inventory)
    (folder / "play.yml").write_text(PLAYBOOK.format(facts=facts))
    command = [Path(sys.executable).parent / "ansible-playbook", "-i", "prod.ini", "play.yml"]
    variables = ["-e", json.dumps({"folder": str(RECORDED), "out": str(folder)})]
    plugins = {
        "ANSIBLE_LIBRARY": str(content.playbooks() / "library"),
        "ANSIBLE_ACTION_PLUGINS": str(content.playbooks() / "action_plugins"),
        "ANSIBLE_LOCALHOST_WARNING": "false",
    }
    done = subprocess.run(
        [*command, *variables, *options],
        cwd=folder,
        env={**os.environ, **plugins, **environ},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return {path.stem: json.loads(path.read_text()) for path in folder.glob("gpu*.json")}


@pytest.fixture(scope="module")
def hosts(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return play(tmp_path_factory.mktemp("recorded"), RECORDED_FACTS)


def test_derive_reads_facts_and_settings_of_every_host(hosts: dict[str, Any]) -> None:
    head, worker = hosts["gpu1"]["node"], hosts["gpu2"]["node"]
    assert (head["role"], worker["role"]) == ("head", "worker")
    assert worker["environment"]["RAY_ADDRESS"] == "192.0.2.11:6379"
    assert worker["expected"] == {"nodes": 2, "gpus": 16}
    assert head["peers"] == [{"host": "gpu2", "address": "198.51.100.12"}]


def test_settings_of_a_host_are_templated_in_its_own_context(hosts: dict[str, Any]) -> None:
    assert hosts["gpu2"]["node"]["interface"] == "ens7np0"
    assert hosts["gpu2"]["node"]["environment"]["NCCL_DEBUG"] == "INFO"


def test_a_good_fleet_passes(hosts: dict[str, Any]) -> None:
    for host in hosts.values():
        assert host["judged"]["failed"] is False
        assert host["judged"]["dsv3_findings"] == []


def test_extra_variables_are_strings_and_still_count(tmp_path: Path) -> None:
    hosts = play(tmp_path, RECORDED_FACTS, "-e", "lmdeploy_tp=8", "-e", "preflight_max_clock_skew_s=0.5")
    judged = hosts["gpu2"]["judged"]
    assert judged["failed"] is True
    assert [finding["code"] for finding in judged["dsv3_findings"]] == ["tp-gpus"]
    assert "lmdeploy_tp is 8" in judged["msg"] and "remedy:" in judged["msg"]


# The host's clock is a stub: a wrapper of the interpreter that is five seconds ahead.
LATE_PYTHON = """\
#!/bin/sh
shift 2
exec {python} -IS -c '
import sys, time
real = time.time
time.time = lambda: real() + 5
exec(sys.stdin.read(), {{"__name__": "__main__"}})
' "$@"
"""


@pytest.fixture(scope="module")
def probed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """This machine under two names, one with a clock that is ahead; check mode, facts not injected."""
    folder = tmp_path_factory.mktemp("probed")
    wrapper = folder / "late-python"
    wrapper.write_text(LATE_PYTHON.format(python=sys.executable))
    wrapper.chmod(0o755)
    inventory = INVENTORY.replace("gpu1 ", f"gpu1 ansible_python_interpreter={wrapper} ")
    inventory = inventory.replace('node_network_interface="{{ rail }}"', "").replace("lmdeploy_tp=16", "")
    return play(folder, PROBED_FACTS, "--check", inventory=inventory, ANSIBLE_INJECT_FACT_VARS="false")


def test_the_probe_reads_the_host(probed: dict[str, Any]) -> None:
    facts = probed["gpu2"]["facts"]
    assert facts["errors"] == {} and facts["os"]["kernel"] == os.uname().release
    assert facts["clock"]["offset_low"] <= 0 <= facts["clock"]["offset_high"]
    # The paths that preflight judges, though the task names none.
    assert [disk["path"] for disk in facts["disks"]] == ["/var/lib/docker", "/data/models/DeepSeek-V3"]


def test_a_second_probe_adds_to_the_facts(probed: dict[str, Any]) -> None:
    for host in probed.values():
        assert [reach["reachable"] for reach in host["facts"]["reach"]] == [True]
        assert host["facts"]["memory"]["total_bytes"] > 0


def test_a_clock_that_is_ahead_is_refused(probed: dict[str, Any]) -> None:
    ahead = probed["gpu1"]["facts"]["clock"]
    assert ahead["offset_low"] <= 5 <= ahead["offset_high"]
    messages = {finding["code"]: finding["message"] for finding in probed["gpu1"]["judged"]["dsv3_findings"]}
    assert "ahead of gpu2" in messages["clock"]


def test_one_machine_under_two_names_is_refused(probed: dict[str, Any]) -> None:
    assert "same-machine" in {finding["code"] for finding in probed["gpu2"]["judged"]["dsv3_findings"]}
