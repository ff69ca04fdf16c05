"""A deploy begins with a plan: it is shown and asked about, may have been kept, and may be all there is to do."""

from __future__ import annotations

import io
import json
import os
import signal
import time
from pathlib import Path
from typing import Any

import click
import pytest
import yaml
from converged_hosts import HEAD, SETTINGS, WORKER, Documents, bare, converged, inputs, nobody

from deploy_dsv3 import cli, content, lock, observation, probing, runner, verbs, verification, wanted
from deploy_dsv3.errors import Interrupted, PreflightError, UnreachableError, UsageError
from deploy_dsv3.events import Failure, HostOk, Outcome
from deploy_dsv3.observation import Observation
from deploy_dsv3.options import Options
from deploy_dsv3.probing import Fleet
from deploy_dsv3.verification import Check, VerificationReport

KEY = "sk-very-secret-key"


class Stage:
    """Everything outside of the verbs: the hosts, the playbook, the heads' locks."""

    def __init__(self) -> None:
        self.documents: Documents = converged()
        self.jobs: list[runner.Job] = []
        self.outcome = Outcome(finished=True)
        self.stopped = 0
        self.asked: list[dict[str, Any]] = []
        self.questions: list[str] = []
        self.answer = True
        self.facts: Any = None

    def probe(self, settings: Any, connections: Any) -> Fleet:
        hosts = inputs(self.documents)
        return Fleet(hosts={host: hosts[host] for host in connections}, documents=self.documents)

    def run(self, job: runner.Job, *, log: Any, on_record: Any) -> Outcome:
        self.jobs.append(job)
        on_record(HostOk(time=0, stage="preflight", host=HEAD, task=lock.TASK))
        if self.stopped:
            raise Interrupted(self.stopped)
        return self.outcome

    def ask(self, connections: Any, request: Any) -> dict[str, Observation]:
        self.asked.append(dict(request))
        return {host: Observation(host=host, seen={"done": True}) for host in connections}

    def confirm(self, question: str, **_: Any) -> bool:
        self.questions.append(question)
        return self.answer

    @property
    def line(self) -> dict[str, Any]:
        """The line of history that was left."""
        (request,) = [one for one in self.asked if one["do"] == "release"]
        entry: dict[str, Any] = request["entry"]
        return entry


@pytest.fixture
def stage(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Stage:
    """Two hosts as the last deploy left them, and nobody at a terminal."""
    found = Stage()
    checks = [Check(host=host, suite="host", check="x", outcome="passed", seconds=0) for host in (HEAD, WORKER)]

    def verify(*_: Any, facts: Any, **__: Any) -> VerificationReport:
        found.facts = facts
        return VerificationReport(checks=tuple(checks), seconds=1)

    monkeypatch.setattr(probing, "probe", found.probe)
    monkeypatch.setattr(runner, "run", found.run)
    monkeypatch.setattr(lock, "ask", found.ask)
    monkeypatch.setattr(click, "confirm", found.confirm)
    monkeypatch.setattr(verification, "verify", verify)
    monkeypatch.setattr(verbs, "_somebody_is_there", lambda: False)
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    return found


@pytest.fixture
def inventory(tmp_path: Path) -> Path:
    path = tmp_path / "hosts.json.yml"
    hosts = {HEAD: {"ansible_host": "192.0.2.1"}, WORKER: {"ansible_host": "192.0.2.2"}}
    changed = {name: SETTINGS[name] for name in ("preflight_min_memory_gib", "preflight_min_disk_gib")}
    groups = {"dsv3_head": {"hosts": {HEAD: hosts[HEAD]}}, "dsv3_workers": {"hosts": {WORKER: hosts[WORKER]}}}
    path.write_text(json.dumps({"all": {"children": groups, "vars": {**changed, "endpoint_api_keys": [KEY]}}}))
    return path


def deploy(inventory: Path, **how: Any) -> verbs.Result:
    own = {name: how.pop(name) for name in ("full", "planned") if name in how}
    return verbs.deploy(Options(inventories=(inventory,), json=True, **how), **own)


class TestNothingToDo:
    def test_no_role_is_walked_and_all_is_verified(self, stage: Stage, inventory: Path) -> None:
        result = deploy(inventory)
        assert (result.exit_code, stage.jobs) == (0, [])
        assert result.document["verification"]["passed"] is True
        assert {host: stats["changed"] for host, stats in result.document["hosts"].items()} == {HEAD: 0, WORKER: 0}
        assert result.document["replicas"][0]["endpoint"] == "http://198.18.0.11:8000"

    def test_what_the_plan_has_read_is_not_read_again(self, stage: Stage, inventory: Path) -> None:
        deploy(inventory)
        assert stage.facts == stage.documents
        deploy(inventory, full=True)
        assert stage.facts == {}, "roles have run since"

    def test_the_run_is_remembered(self, stage: Stage, inventory: Path) -> None:
        deploy(inventory)
        assert (stage.line["result"], stage.line["plan"]) == ("done", "plan: nothing to do")

    def test_nobody_is_asked(self, stage: Stage, inventory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(verbs, "_somebody_is_there", lambda: True)
        assert deploy(inventory).exit_code == 0 and stage.questions == []

    @pytest.mark.parametrize("how", [{"full": True}, {"tags": "engine"}, {"skip_tags": "host"}, {"check": True}])
    def test_all_is_walked_where_somebody_wants_it(self, stage: Stage, inventory: Path, how: dict[str, Any]) -> None:
        deploy(inventory, **how)
        assert len(stage.jobs) == 1

    def test_all_is_walked_after_a_run_that_failed(self, stage: Stage, inventory: Path) -> None:
        stage.documents[HEAD]["deployment"]["runs"] = [{"run": "r", "exit_code": 5}]
        deploy(inventory)
        assert len(stage.jobs) == 1

    def test_hosts_that_cannot_be_reached_are_left_to_the_playbook(
        self, stage: Stage, inventory: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(probing, "probe", nobody)
        deploy(inventory)
        assert len(stage.jobs) == 1


class TestSelection:
    def test_only_the_roles_that_differ_are_run(self, stage: Stage, inventory: Path) -> None:
        stage.documents[HEAD]["state"]["units"]["dsv3-endpoint.service"]["active"] = "inactive"
        stage.documents[WORKER]["docker"]["containers"][0]["config"]["restart_policy"] = "no"
        deploy(inventory)
        (job,) = stage.jobs
        assert (job.tags, job.limit) == ("role_endpoint,role_engine", f"{HEAD},{WORKER}")
        assert job.extra_vars["dsv3_selected"] is True

    def test_what_no_role_makes_is_only_recorded(self, stage: Stage, inventory: Path) -> None:
        stage.documents[HEAD]["state"]["sysctls"]["vm.swappiness"] = "1"
        deploy(inventory)
        assert stage.jobs[0].tags == "role_none"

    def test_without_a_record_everywhere_all_is_run(self, stage: Stage, inventory: Path) -> None:
        del stage.documents[WORKER]["deployment"]["manifest"]
        deploy(inventory)
        (job,) = stage.jobs
        assert (job.tags, job.limit) == ("", "") and "dsv3_selected" not in job.extra_vars

    @pytest.mark.parametrize("how", [{"full": True}, {"tags": "engine"}, {"skip_tags": "host"}])
    def test_what_somebody_asks_for_is_run(self, stage: Stage, inventory: Path, how: dict[str, Any]) -> None:
        stage.documents[HEAD]["state"]["sysctls"]["vm.swappiness"] = "1"
        deploy(inventory, **how)
        (job,) = stage.jobs
        assert (job.tags, job.skip_tags) == (how.get("tags", ""), how.get("skip_tags", ""))
        assert "dsv3_selected" not in job.extra_vars

    def test_every_role_that_changes_hosts_can_be_selected(self) -> None:
        tags: set[str] = set()
        for path in content.playbooks().glob("*.yml"):
            for play in yaml.safe_load(path.read_text()):
                for role in play.get("roles", []):
                    found = set(role.get("tags", []))
                    assert role["role"] not in wanted.ROLES or f"role_{role['role']}" in found
                    tags |= found
        assert tags == {f"role_{role}" for role in wanted.ROLES}

    def test_the_record_is_written_whatever_is_selected(self) -> None:
        record = yaml.safe_load(content.playbook("record").read_text())[0]
        assert record["tags"] == ["always"]


class TestAgreement:
    @pytest.fixture(autouse=True)
    def at_a_terminal(self, stage: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(verbs, "_somebody_is_there", lambda: True)
        stage.documents = bare()

    def test_the_plan_is_shown_before_it_is_asked(
        self, stage: Stage, inventory: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        deploy(inventory)
        assert stage.questions == ["Do it?"] and len(stage.jobs) == 1
        told = capsys.readouterr()
        assert "NVIDIA driver 580" in told.err and told.out == ""

    def test_no_means_no(self, stage: Stage, inventory: Path) -> None:
        stage.answer = False
        with pytest.raises(UsageError, match="nothing was changed"):
            deploy(inventory)
        assert (stage.jobs, stage.asked) == ([], [])

    def test_yes_may_be_said_beforehand(self, stage: Stage, inventory: Path) -> None:
        deploy(inventory, yes=True)
        assert stage.questions == [] and len(stage.jobs) == 1


def test_without_a_terminal_nobody_is_asked(stage: Stage, inventory: Path) -> None:
    stage.documents = bare()
    deploy(inventory)
    assert stage.questions == [] and len(stage.jobs) == 1


class TestKeptPlan:
    def kept(self, inventory: Path, tmp_path: Path) -> Path:
        path = tmp_path / "plan.json"
        verbs.plan(Options(inventories=(inventory,)), out=path)
        return path

    def test_it_is_applied_without_a_question(
        self, stage: Stage, inventory: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        stage.documents = bare()
        planned = self.kept(inventory, tmp_path)
        monkeypatch.setattr(verbs, "_somebody_is_there", lambda: True)
        deploy(inventory, planned=planned)
        assert stage.questions == [] and len(stage.jobs) == 1

    def test_it_is_refused_on_hosts_that_changed(self, stage: Stage, inventory: Path, tmp_path: Path) -> None:
        planned = self.kept(inventory, tmp_path)
        stage.documents[WORKER]["os"]["kernel"] = "6.99"
        with pytest.raises(PreflightError, match="gpu-02: kernel was"):
            deploy(inventory, planned=planned)
        assert stage.jobs == []


class TestAFailingDeploy:
    """What the engine's log says on any host of the replica is the first failure's cause."""

    LINE = f"ValueError: Attempted to load weight (torch.Size([8])) into parameter, key {KEY}"

    @pytest.fixture
    def logs(self, monkeypatch: pytest.MonkeyPatch) -> list[set[str]]:
        """The hosts that were looked at; the worker's log has a cause, the head's its echo."""
        asked: list[set[str]] = []
        lines = {HEAD: "NCCL WARN remote process exited or there was a network error", WORKER: self.LINE}

        def look(connections: Any, settings: Any, *, deep: bool) -> dict[str, Observation]:
            asked.append(set(connections))
            return {host: Observation(host=host, seen={"log": {"lines": [[7, lines[host]]]}}) for host in connections}

        monkeypatch.setattr(observation, "look", look)
        return asked

    @pytest.mark.parametrize("stage_name", ["container", "ray", "engine", "first-token"])
    def test_is_told_the_first_cause(
        self, stage: Stage, inventory: Path, logs: list[set[str]], stage_name: str
    ) -> None:
        failure = Failure(host=HEAD, stage=stage_name, task="Wait", message="it did not come up", cause="a guess")
        stage.outcome = Outcome(failures=[failure], finished=True)
        result = deploy(inventory, full=True)
        (told,) = result.document["failures"]
        assert result.exit_code == 4 and logs == [{HEAD, WORKER}]
        assert (told["host"], told["code"]) == (HEAD, "missing-shards")
        assert told["page"] == "docs/runbooks/troubleshooting.md#missing-shards"
        assert f"The engine's log on {WORKER}: line 7: ValueError: Attempted to load weight" in told["message"]
        assert KEY not in json.dumps(result.document)
        assert stage.line["failure"]["page"] == told["page"]
        stream = io.StringIO()
        result.render(stream)
        assert "missing-shards" in stream.getvalue() and "a guess" not in stream.getvalue()

    def test_its_log_shows_the_first_cause_and_no_secret(
        self, stage: Stage, inventory: Path, logs: list[set[str]]
    ) -> None:
        failures = [
            Failure(host=HEAD, stage="engine", task="Wait", message="the engine does not serve"),
            Failure(host=WORKER, stage="engine", task="Wait", message="stopped: another host failed"),
        ]
        stage.outcome = Outcome(failures=failures, finished=True)
        kept = (Path(deploy(inventory, full=True).document["log"]) / "report.txt").read_text()
        assert kept.index("FAILED stage engine, host gpu-01") < kept.index("also gpu-02")
        assert kept.index("The engine's log on gpu-02: line 7") < kept.index("stopped: another host failed")
        assert "#missing-shards" in kept and KEY not in kept

    @pytest.mark.parametrize(("stage_name", "unreachable"), [("host", False), ("preflight", False), ("engine", True)])
    def test_hosts_are_not_asked_for_what_the_engine_has_no_part_in(
        self, stage: Stage, inventory: Path, logs: list[set[str]], stage_name: str, unreachable: bool
    ) -> None:
        failure = Failure(host=HEAD, stage=stage_name, task="x", message="no", unreachable=unreachable)
        stage.outcome = Outcome(failures=[failure], finished=True)
        deploy(inventory, full=True)
        assert logs == []

    def test_a_check_that_quotes_the_log_is_recognised(
        self, stage: Stage, inventory: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        bad = Check(host=WORKER, suite="container", check="x", outcome="failed", seconds=0, message=self.LINE)
        monkeypatch.setattr(verification, "verify", lambda *_, **__: VerificationReport(checks=(bad,), seconds=1))
        (told,) = deploy(inventory).document["failures"]
        assert (told["code"], told["stage"]) == ("verification", "verify")
        assert told["page"].endswith("#missing-shards") and told["cause"]


class TestLock:
    def test_the_playbook_is_told_who_takes_it(self, stage: Stage, inventory: Path) -> None:
        deploy(inventory, full=True)
        (job,) = stage.jobs
        mine = job.extra_vars["dsv3_run"]
        assert mine["verb"] == "deploy" and mine["expires_s"] == lock.EXPIRES_S
        (release,) = stage.asked
        assert (release["do"], release["holder"]) == ("release", mine)
        assert stage.line["run"] == mine["run"]

    def test_a_stopped_run_gives_it_back(self, stage: Stage, inventory: Path) -> None:
        stage.stopped = 15
        with pytest.raises(Interrupted):
            deploy(inventory, full=True)
        assert (stage.line["result"], stage.line["exit_code"]) == ("stopped", 143)

    @pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
    def test_a_run_that_is_stopped_while_it_verifies_gives_it_back(
        self,
        stage: Stage,
        inventory: Path,
        monkeypatch: pytest.MonkeyPatch,
        capsys: pytest.CaptureFixture[str],
        number: int,
        code: int,
    ) -> None:
        def stopped(*_: Any, **__: Any) -> VerificationReport:
            os.kill(os.getpid(), number)
            time.sleep(30)
            raise AssertionError("it went on")

        monkeypatch.setattr(verification, "verify", stopped)
        assert cli.run(["-i", str(inventory), "--json"]) == code
        assert (stage.line["result"], stage.line["exit_code"]) == ("stopped", code)
        assert "The log is in" in json.loads(capsys.readouterr().out)["error"]["remedy"]

    def test_a_run_that_met_a_defect_gives_it_back(
        self, stage: Stage, inventory: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def broken(*_: Any, **__: Any) -> None:
            raise RuntimeError("a defect")

        monkeypatch.setattr(verification, "verify", broken)
        with pytest.raises(RuntimeError):
            deploy(inventory, full=True)
        assert (stage.line["result"], stage.line["exit_code"]) == ("failed", 1)

    def test_teardown_forgets_the_history_when_it_ends_well(self, stage: Stage, inventory: Path) -> None:
        verbs.destroy(Options(inventories=(inventory,), json=True, yes=True), drivers=False, weights=False)
        assert stage.asked[-1]["forget"] is True

    def test_no_secret_gets_into_the_history(self, stage: Stage, inventory: Path) -> None:
        failure = Failure(host=HEAD, stage="engine", task="x", message=f"it said {KEY}")
        stage.outcome = Outcome(failures=[failure], finished=True)
        deploy(inventory, full=True)
        assert stage.line["failure"]["message"] == "it said ********"


class TestVerbs:
    def test_plan(self, stage: Stage, inventory: Path) -> None:
        assert verbs.plan(Options(inventories=(inventory,))).exit_code == 0
        stage.documents = bare()
        assert verbs.plan(Options(inventories=(inventory,))).exit_code == 10

    def test_history_and_unlock_ask_the_heads_only(
        self, stage: Stage, inventory: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        asked: list[tuple[str, list[str]]] = []

        def ask(connections: Any, request: Any) -> dict[str, Observation]:
            asked.append((request["do"], list(connections)))
            holder = {"run": "r", "who": "alice", "silent_s": 5.0, "expires_s": 300}
            seen = {"done": True, "holder": holder, "runs": [{"run": "r", "started": 1}]}
            return {host: Observation(host=host, seen=seen) for host in connections}

        monkeypatch.setattr(lock, "ask", ask)
        options = Options(inventories=(inventory,), yes=True)
        assert [run["run"] for run in verbs.history(options).document["runs"]] == ["r"]
        assert verbs.unlock(options).document["broken"][HEAD]["who"] == "alice"
        assert asked == [("read", [HEAD]), ("read", [HEAD]), ("break", [HEAD])]

    def test_unlock_needs_a_yes(self, stage: Stage, inventory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        seen = {"done": True, "holder": {"run": "r", "who": "alice"}, "runs": []}
        monkeypatch.setattr(lock, "ask", lambda heads, _: {host: Observation(host=host, seen=seen) for host in heads})
        with pytest.raises(UsageError, match="Nobody is there to ask"):
            verbs.unlock(Options(inventories=(inventory,)))

    def test_a_head_that_is_away_is_6(self, stage: Stage, inventory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        away = {HEAD: Observation(host=HEAD, error="no route")}
        monkeypatch.setattr(lock, "ask", lambda *_: away)
        with pytest.raises(UnreachableError, match="gpu-01: no route"):
            verbs.history(Options(inventories=(inventory,)))
