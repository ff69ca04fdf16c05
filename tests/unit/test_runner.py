"""Playbooks run for real, on this machine: results, secrets, stopping."""

from __future__ import annotations

import json
import os
import signal
import stat
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path

import pytest

from deploy_dsv3 import runner
from deploy_dsv3.errors import InternalError, Interrupted
from deploy_dsv3.events import HostChanged, Record, StageStarted
from deploy_dsv3.runner import Job, Passwords, RunLog

SECRET = "s3cr3t-value-of-this-test"


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with an inventory of two local hosts; state and temporary files stay in it."""
    (tmp_path / "hosts.ini").write_text(
        "[dsv3_head]\na\n[dsv3_workers]\nb\n[all:vars]\nansible_connection=local\n"
        f"ansible_python_interpreter={sys.executable}\n"
    )
    (tmp_path / "tmp").mkdir()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path / "tmp"))
    return tmp_path


def job(folder: Path, tasks: str, **options: object) -> Job:
    """A job of one play; `tasks` is indented by itself."""
    playbook = folder / "play.yml"
    playbook.write_text(
        '- name: "host: prepare"\n  hosts: dsv3:dsv3_head:dsv3_workers\n  gather_facts: false\n  tasks:\n'
        + textwrap.indent(textwrap.dedent(tasks), "    ")
    )
    return Job(playbook=playbook, inventories=(folder / "hosts.ini",), hosts=2, **options)  # type: ignore[arg-type]


TASKS = """\
- name: Write
  ansible.builtin.copy:
    content: "{{ word }} {{ typed.n + 1 }} {{ theirs }}"
    dest: "{{ inventory_dir }}/{{ inventory_hostname }}.txt"
    mode: "0600"
- name: Refuse
  ansible.builtin.fail:
    msg: "no room for {{ word }}"
  when: inventory_hostname == 'b'
"""


class TestRun:
    def test_outcome_records_and_log(self, folder: Path) -> None:
        records: list[Record] = []
        wanted = job(
            folder,
            TASKS,
            extra_vars={"word": SECRET, "typed": {"n": 1}},
            user_extra_vars=("theirs='{{ 1 + 1 }}'", "word=overruled"),
        )
        with RunLog("deploy", hidden=[SECRET]) as log:
            outcome = runner.run(wanted, log=log, on_record=records.append)

        assert (folder / "a.txt").read_text() == f"{SECRET} 2 2"
        assert outcome.exit_code == 4
        assert [(f.host, f.stage, f.message) for f in outcome.failures] == [("b", "host", f"no room for {SECRET}")]
        assert (outcome.hosts["a"].changed, outcome.hosts["b"].failed) == (1, 1)
        assert isinstance(records[0], StageStarted)
        assert {r.host for r in records if isinstance(r, HostChanged)} == {"a", "b"}
        assert not outcome.warnings

        kept = {path.name: path for path in log.directory.iterdir()}
        assert set(kept) == {"events.jsonl", "ansible.log"}
        assert stat.S_IMODE(log.directory.stat().st_mode) == 0o700
        for path in kept.values():
            assert stat.S_IMODE(path.stat().st_mode) == 0o600
            assert SECRET not in path.read_text()
        events = [json.loads(line) for line in kept["events.jsonl"].read_text().splitlines()]
        assert "playbook_on_stats" in {event["event"] for event in events}
        assert "no room for ********" in kept["ansible.log"].read_text()
        assert not list((folder / "tmp").iterdir())

    def test_check_mode_and_limit(self, folder: Path) -> None:
        wanted = job(
            folder, TASKS, check=True, limit="a", user_extra_vars=('{"word": "w", "theirs": 1, "typed": {"n": 1}}',)
        )
        with RunLog("deploy") as log:
            outcome = runner.run(wanted, log=log, on_record=lambda _: None)
        assert outcome.exit_code == 0
        assert set(outcome.hosts) == {"a"}
        assert not (folder / "a.txt").exists()

    def test_a_playbook_that_does_not_parse(self, folder: Path) -> None:
        wanted = job(folder, "- name: Broken\n  no_such_module_at_all: {}\n")
        with RunLog("deploy") as log, pytest.raises(InternalError, match="no_such_module_at_all") as caught:
            runner.run(wanted, log=log, on_record=lambda _: None)
        assert str(log.directory) in caught.value.remedy

    def test_an_error_while_showing_ends_ansible(self, folder: Path) -> None:
        def show(record: Record) -> None:
            if isinstance(record, StageStarted):
                raise RuntimeError("cannot draw")

        wanted = job(folder, "- name: Sleep\n  ansible.builtin.command: sleep 60\n")
        started = time.monotonic()
        with RunLog("deploy") as log, pytest.raises(RuntimeError, match="cannot draw"):
            runner.run(wanted, log=log, on_record=show)
        assert time.monotonic() - started < 20


SLOW = """\
- name: First
  ansible.builtin.shell: touch {{ inventory_dir }}/began; sleep 2; touch {{ inventory_dir }}/first
- name: Second
  ansible.builtin.command: touch {{ inventory_dir }}/second
"""


def wait_for(path: Path) -> None:
    deadline = time.monotonic() + 30
    while not path.exists():
        assert time.monotonic() < deadline, f"{path} did not appear"
        time.sleep(0.05)


class TestStopping:
    @pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
    def test_the_running_task_is_finished_and_the_next_one_not_begun(
        self, folder: Path, number: signal.Signals, code: int
    ) -> None:
        def stop() -> None:
            wait_for(folder / "began")
            os.kill(os.getpid(), number)

        before = signal.getsignal(number)
        thread = threading.Thread(target=stop)
        thread.start()
        with RunLog("deploy") as log, pytest.raises(Interrupted) as caught:
            runner.run(job(folder, SLOW), log=log, on_record=lambda _: None)
        thread.join()
        assert caught.value.exit_code == code
        assert (folder / "first").exists()
        assert not (folder / "second").exists()
        assert signal.getsignal(number) is before

    def test_killed_it_leaves_nothing_that_goes_on(self, folder: Path) -> None:
        wanted = job(folder, SLOW)
        program = (
            "from pathlib import Path\nfrom deploy_dsv3 import runner\n"
            f"job = runner.Job(playbook=Path({str(wanted.playbook)!r}), inventories=(Path('hosts.ini'),))\n"
            "with runner.RunLog('deploy') as log:\n    runner.run(job, log=log, on_record=print)\n"
        )
        with subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.DEVNULL) as child:
            wait_for(folder / "began")
            child.kill()
        time.sleep(3)
        assert not (folder / "second").exists()
        assert list((folder / "tmp").iterdir())

        # The next run removes what the killed one left, which may hold secrets.
        with RunLog("deploy") as log:
            assert runner.run(wanted, log=log, on_record=lambda _: None).exit_code == 0
        assert not list((folder / "tmp").iterdir())


class TestSecrets:
    def test_reach_ansible_as_files_of_mode_0600(self, folder: Path) -> None:
        wanted = job(
            folder,
            "",
            extra_vars={"key": SECRET},
            user_extra_vars=(f"key={SECRET}", f'{{"key": "{SECRET}"}}', "@more.yml"),
            passwords=Passwords(become=SECRET, vault=SECRET, vault_files=("~/vault", "prod@other")),
        )
        private = folder / "private"
        private.mkdir()
        arguments = runner._arguments(wanted, private)
        assert SECRET not in " ".join(arguments)
        assert SECRET not in repr(wanted)
        files = list(private.iterdir())
        assert len(files) == 5
        for path in files:
            assert stat.S_IMODE(path.stat().st_mode) == 0o600
            assert SECRET in path.read_text()
        assert f"@{folder}/more.yml" in arguments
        assert f"prod@{folder}/other" in arguments
        assert str(Path.home() / "vault") in arguments

    def test_a_secret_with_quotes_is_struck_out_of_json(self) -> None:
        log = RunLog("deploy", hidden=['a"b\\c', "x"])
        assert log.strike_out(json.dumps({"key": 'a"b\\c', "x": 1})) == '{"key": "********", "x": 1}'


class TestEnvironment:
    def test_host_keys_are_checked(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        from ansible import constants

        monkeypatch.setattr(constants, "CONFIG_FILE", None)
        made = runner._environment(folder)
        assert made["ANSIBLE_HOST_KEY_CHECKING"] == "True"
        assert made["ANSIBLE_PIPELINING"] == "1"
        assert "ControlPersist" in made["ANSIBLE_SSH_ARGS"]
        assert made["PATH"].startswith(str(Path(sys.executable).parent))

    def test_preferences_of_the_operator_win(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("ANSIBLE_TIMEOUT", "99")
        monkeypatch.setenv("ANSIBLE_SSH_ARGS", "-J jump")
        made = runner._environment(folder)
        assert made["ANSIBLE_TIMEOUT"] == "99"
        assert "ANSIBLE_SSH_ARGS" not in made

    def test_ssh_arguments_of_ansible_cfg_win(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        from ansible import constants

        (folder / "ansible.cfg").write_text("[ssh_connection]\nssh_args = -J jump\n")
        monkeypatch.setattr(constants, "CONFIG_FILE", str(folder / "ansible.cfg"))
        assert "ANSIBLE_SSH_ARGS" not in runner._environment(folder)


def test_state_is_kept_where_xdg_says(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert runner.state_directory() == tmp_path / "state" / "deploy-dsv3"
    monkeypatch.setenv("XDG_STATE_HOME", "relative")  # the specification says to ignore it
    assert runner.state_directory() == Path.home() / ".local" / "state" / "deploy-dsv3"
