"""The command line itself: help, options before and after the verb, exit status, what is printed where."""

from __future__ import annotations

import json
import resource
import subprocess
import sys
from pathlib import Path
from typing import Any

import click
import pytest
from converged_hosts import nobody

from deploy_dsv3 import cli, probing, runner, verbs
from deploy_dsv3.cli import run
from deploy_dsv3.errors import Interrupted
from deploy_dsv3.events import Failure, HostStats, Outcome
from deploy_dsv3.options import Options
from deploy_dsv3.verbs import Result

VERBS = cli.cli.list_commands(click.Context(cli.cli))
INI = "[dsv3_head]\na ansible_host=192.0.2.1\n[dsv3_workers]\nb ansible_host=192.0.2.2\n"


@pytest.fixture(autouse=True)
def inventory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    path = tmp_path / "hosts.ini"
    path.write_text(INI)
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    return str(path)


@pytest.fixture
def jobs(monkeypatch: pytest.MonkeyPatch) -> list[runner.Job]:
    """Jobs that would have been run; each ends well."""
    seen: list[runner.Job] = []

    def note(job: runner.Job, **_: Any) -> Outcome:
        seen.append(job)
        return Outcome(finished=True, hosts={"a": HostStats(ok=1)})

    monkeypatch.setattr(runner, "run", note)
    monkeypatch.setattr(probing, "probe", nobody)
    return seen


def captured(monkeypatch: pytest.MonkeyPatch, verb: str) -> list[Options]:
    """Options that a verb is called with."""
    seen: list[Options] = []

    def note(options: Options, **_: Any) -> Result:
        seen.append(options)
        return Result(exit_code=0, document={}, render=lambda _: None)

    monkeypatch.setattr(verbs, verb, note)
    return seen


class TestHelp:
    def test_is_quick_and_imports_nothing_heavy(self) -> None:
        program = (
            "import sys\nfrom deploy_dsv3 import cli\ncli.run(['--help'])\n"
            "heavy = {'ansible', 'ansible_runner', 'rich', 'yaml', 'httpx', 'pydantic'} & set(sys.modules)\n"
            "sys.exit(f'imported {heavy}' if heavy else 0)\n"
        )
        before = resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime
        done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        assert resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime - before < 0.5
        assert "Exit status:" in done.stdout

    def test_names_every_verb(self, capsys: pytest.CaptureFixture[str]) -> None:
        assert run(["--help"]) == 0
        told = capsys.readouterr().out
        for verb in VERBS:
            assert f"\n  {verb} " in told

    @pytest.mark.parametrize("readme", ["README.md", "README.zh-CN.md"])
    def test_every_verb_is_in_the_readme(self, readme: str) -> None:
        page = (Path(__file__).parents[2] / readme).read_text(encoding="utf-8")
        assert [verb for verb in VERBS if f"| `deploy-dsv3 {verb} " not in page] == []

    @pytest.mark.parametrize("verb", sorted(cli.cli.commands))
    def test_every_option_of_a_verb_is_explained(self, verb: str) -> None:
        command = cli.cli.commands[verb]
        assert command.help
        for parameter in command.params:
            assert isinstance(parameter, click.Option)
            assert parameter.help, parameter.name

    def test_without_anything_it_helps_and_fails(self, capsys: pytest.CaptureFixture[str]) -> None:
        assert run([]) == 2
        assert "Usage:" in capsys.readouterr().out

    def test_version(self, capsys: pytest.CaptureFixture[str]) -> None:
        assert run(["--version"]) == 0
        assert capsys.readouterr().out.startswith("deploy-dsv3, version ")


class TestOptions:
    @pytest.mark.parametrize(
        "args",
        [
            ["status", "-i", "X", "-l", "a", "-e", "p=1", "-e", "q=2", "--json"],
            ["-i", "X", "--limit", "a", "--extra-vars", "p=1", "-e", "q=2", "--json", "status"],
            ["-i", "X", "-l", "b", "-e", "p=1", "status", "-l", "a", "-e", "q=2", "--json"],
        ],
    )
    def test_before_and_after_the_verb(self, monkeypatch: pytest.MonkeyPatch, args: list[str]) -> None:
        seen = captured(monkeypatch, "status")
        assert run(args) == 0
        assert seen == [Options(inventories=(Path("X"),), limit="a", extra_vars=("p=1", "q=2"), json=True)]

    def test_everything_that_ansible_takes(self, inventory: str, jobs: list[runner.Job]) -> None:
        args = ["-t", "ray,engine", "--skip-tags", "verify", "-e", "lmdeploy_tp=16", "--limit", "a,b"]
        assert run(["-i", inventory, "--check", "--diff", "-vv", *args]) == 0
        (job,) = jobs
        assert job.playbook.name == "deploy.yml"
        assert (job.check, job.diff, job.tags, job.skip_tags) == (True, True, "ray,engine", "verify")
        assert (job.verbosity, job.limit, job.hosts) == (2, "a,b", 2)
        assert job.user_extra_vars == ("lmdeploy_tp=16",)
        assert job.extra_vars.keys() == {"lmdeploy_tp", "dsv3_run"} and job.extra_vars["lmdeploy_tp"] == 16

    def test_passwords_are_asked_for(
        self, inventory: str, jobs: list[runner.Job], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(click, "prompt", lambda what, **_: f"answer to {what}")
        assert run(["-i", inventory, "-K", "-J", "-C"]) == 0
        assert jobs[0].passwords.become == "answer to sudo password of the hosts"
        assert jobs[0].passwords.vault == "answer to Vault password"

    def test_an_inventory_is_needed(self, capsys: pytest.CaptureFixture[str]) -> None:
        assert run(["status"]) == 2
        assert "no inventory given" in capsys.readouterr().err


class TestDestroy:
    def test_flags_become_variables(self, inventory: str, jobs: list[runner.Job]) -> None:
        assert run(["destroy", "-i", inventory, "--yes", "--remove-drivers"]) == 0
        assert jobs[0].playbook.name == "destroy.yml"
        wanted = {"dsv3_destroy_drivers": True, "dsv3_destroy_weights": False}
        assert jobs[0].extra_vars.items() >= wanted.items()

    def test_part_of_a_replica_may_go(self, inventory: str, jobs: list[runner.Job]) -> None:
        assert run(["destroy", "-i", inventory, "-y", "-l", "b"]) == 0
        assert (jobs[0].limit, jobs[0].hosts) == ("b", 1)

    def test_check_mode_needs_no_word(self, inventory: str, jobs: list[runner.Job]) -> None:
        assert run(["destroy", "-i", inventory, "--check"]) == 0
        assert jobs

    @pytest.mark.parametrize(("answer", "count"), [(True, 1), (False, 0)])
    def test_a_terminal_is_asked(
        self,
        inventory: str,
        jobs: list[runner.Job],
        monkeypatch: pytest.MonkeyPatch,
        answer: bool,
        count: int,
    ) -> None:
        asked: list[str] = []

        def confirm(text: str, **_: Any) -> bool:
            asked.append(text)
            return answer

        monkeypatch.setattr(sys.stdin, "isatty", lambda: True, raising=False)
        monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
        monkeypatch.setattr(click, "confirm", confirm)
        assert run(["destroy", "-i", inventory, "--remove-weights"]) == (0 if answer else 2)
        assert len(jobs) == count
        assert "the model weights from a, b?" in asked[0]


class TestEnd:
    def test_json_is_one_document_and_nothing_else(
        self, inventory: str, jobs: list[runner.Job], capsys: pytest.CaptureFixture[str]
    ) -> None:
        assert run(["-i", inventory, "--check", "--json"]) == 0
        document = json.loads(capsys.readouterr().out)
        assert (document["verb"], document["exit_code"], document["check"]) == ("deploy", 0, True)
        assert Path(document["log"]).is_dir()

    @pytest.mark.parametrize(
        ("stage", "unreachable", "code"), [("preflight", False, 3), ("ray", False, 4), ("host", True, 6)]
    )
    def test_a_failed_run_has_the_code_of_its_first_failure(
        self,
        inventory: str,
        monkeypatch: pytest.MonkeyPatch,
        capsys: pytest.CaptureFixture[str],
        stage: str,
        unreachable: bool,
        code: int,
    ) -> None:
        failure = Failure(host="a", stage=stage, task="t", message="m", unreachable=unreachable)
        monkeypatch.setattr(runner, "run", lambda *_, **__: Outcome(failures=[failure]))
        assert run(["-i", inventory]) == code
        assert f"exit status {code}" in capsys.readouterr().out

    def test_a_stopped_run(
        self, inventory: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        def stop(*_: object, **__: object) -> None:
            raise Interrupted(15)

        monkeypatch.setattr(runner, "run", stop)
        assert run(["-i", inventory, "--json"]) == 143
        error = json.loads(capsys.readouterr().out)["error"]
        assert "continues" in error["remedy"]
        assert "The log is in" in error["remedy"]

    def test_ctrl_c_while_loading(self, inventory: str, monkeypatch: pytest.MonkeyPatch) -> None:
        def stop(*_: object, **__: object) -> None:
            raise KeyboardInterrupt

        monkeypatch.setattr(verbs, "load", stop)
        assert run(["-i", inventory]) == 130

    def test_a_defect_of_ours_is_short_and_its_trace_in_a_file(
        self,
        inventory: str,
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
        capsys: pytest.CaptureFixture[str],
    ) -> None:
        def fail(*_: object, **__: object) -> None:
            raise ZeroDivisionError("of ours")

        monkeypatch.setattr(verbs, "load", fail)
        assert run(["-i", inventory]) == 1
        told = capsys.readouterr().err
        assert "ZeroDivisionError: of ours" in told
        assert "Traceback" not in told
        (trace,) = (tmp_path / "state" / "deploy-dsv3" / "defects").iterdir()
        assert str(trace) in told
        assert "in fail" in trace.read_text()
        assert trace.stat().st_mode & 0o077 == 0

    def test_usage_as_json(self, capsys: pytest.CaptureFixture[str]) -> None:
        assert run(["--json", "stauts"]) == 2
        assert "Did you mean 'status'" in json.loads(capsys.readouterr().out)["error"]["message"]


class TestSettings:
    def test_defaults_need_no_inventory(self, capsys: pytest.CaptureFixture[str]) -> None:
        assert run(["settings"]) == 0
        assert "lmdeploy_tp = 0  default" in capsys.readouterr().out

    def test_values_and_where_they_are_from(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        (tmp_path / "hosts.ini").write_text(INI + "[all:vars]\nlmdeploy_tp=16\n")
        assert run(["settings", "-i", str(tmp_path / "hosts.ini"), "--json"]) == 0
        listed = {entry["name"]: entry for entry in json.loads(capsys.readouterr().out)["settings"]}
        (value,) = listed["lmdeploy_tp"]["values"]
        assert value == {"hosts": ["a", "b"], "value": 16, "source": f"{tmp_path}/hosts.ini:6"}
        assert listed["endpoint_api_keys"]["values"][0]["value"] == "unset"

    def test_schema(self, capsys: pytest.CaptureFixture[str]) -> None:
        assert run(["settings", "--schema"]) == 0
        assert json.loads(capsys.readouterr().out)["properties"]["endpoint_port"]["maximum"] == 65535


def test_the_module_runs_as_the_command() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "deploy_dsv3", "--version"], capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stderr) == (0, "")
