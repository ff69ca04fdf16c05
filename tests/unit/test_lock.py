"""One run at a time: who gets the lock, who keeps it, and when it is taken from somebody who is gone."""

from __future__ import annotations

import json
import multiprocessing
import os
import subprocess
import sys
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import modules
import pytest
import yaml

from deploy_dsv3 import content, lock
from deploy_dsv3.events import Failure, HostChanged, HostFailed, HostOk, Outcome
from deploy_dsv3.observation import Observation

module = modules.load("dsv3_lock")
ALICE = {"run": "r1", "verb": "deploy", "who": "alice", "host": "desk", "expires_s": 300}
BOB = {"run": "r2", "verb": "deploy", "who": "bob", "host": "laptop", "expires_s": 300}


class Head:
    """A head with a clock that can be turned."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.now = 1000.0

    def __call__(self, do: str, **request: Any) -> dict[str, Any]:
        answer: dict[str, Any] = module.apply({"do": do, **request}, str(self.root), lambda: self.now)
        return answer

    @property
    def left(self) -> list[str]:
        folder = self.root / "var/lib/deploy-dsv3"
        return sorted(path.name for path in folder.iterdir()) if folder.exists() else []


@pytest.fixture
def head(tmp_path: Path) -> Head:
    return Head(tmp_path)


class TestModule:
    def test_the_first_gets_it_and_the_second_is_told_who(self, head: Head) -> None:
        assert head("take", holder=ALICE)["done"]
        head.now += 20
        answer = head("take", holder=BOB)
        assert not answer["done"]
        assert (answer["holder"]["who"], answer["holder"]["silent_s"]) == ("alice", 20.0)

    def test_the_same_run_may_take_it_again(self, head: Head) -> None:
        assert head("take", holder=ALICE)["done"] and head("take", holder=ALICE)["done"]

    def test_a_released_lock_is_free_and_leaves_nothing(self, head: Head) -> None:
        head("take", holder=ALICE)
        assert head("release", holder=ALICE)["done"]
        assert head.left == []
        assert head("take", holder=BOB)["done"]

    def test_nobody_releases_or_refreshes_anothers(self, head: Head) -> None:
        head("take", holder=ALICE)
        assert not head("release", holder=BOB)["done"]
        assert not head("refresh", holder=BOB)["done"]
        assert not head("take", holder=BOB)["done"]

    def test_signs_of_life_keep_it(self, head: Head) -> None:
        head("take", holder=ALICE)
        for _ in range(3):
            head.now += 299
            assert head("refresh", holder=ALICE)["done"]
        head.now += 299
        assert not head("take", holder=BOB)["done"]

    @pytest.mark.parametrize("step", [301.0, -301.0])
    def test_without_signs_of_life_it_is_stale_also_where_the_clock_was_set_back(self, head: Head, step: float) -> None:
        head("take", holder=ALICE)
        head.now += step
        assert head("take", holder=BOB)["done"]
        assert not head("refresh", holder=ALICE)["done"], "the sleeper notices that it was lost"
        assert head("read")["holder"]["who"] == "bob"

    def test_proof_of_death_counts_for_the_run_that_is_dead_only(self, head: Head) -> None:
        head("take", holder=ALICE)
        assert not head("take", holder=BOB, replace="another")["done"]
        assert head("take", holder=BOB, replace="r1")["done"]

    def test_a_run_that_lost_its_lock_is_remembered(self, head: Head) -> None:
        head("take", holder=ALICE)
        head.now += 30
        head("refresh", holder=ALICE)
        head("take", holder=BOB, replace="r1")
        (run,) = head("read")["runs"]
        assert (run["run"], run["result"], run["exit_code"], run["seconds"]) == ("r1", "died", 137, 30.0)

    def test_somebody_may_break_it(self, head: Head) -> None:
        assert not head("break")["done"]
        head("take", holder=ALICE)
        assert head("break")["done"] and head("take", holder=BOB)["done"]

    def test_a_broken_lock_file_is_a_lock_until_it_is_old(self, head: Head) -> None:
        folder = head.root / "var/lib/deploy-dsv3"
        folder.mkdir(parents=True)
        (folder / "lock.json").write_text('{"run": "r1"')
        head.now = (folder / "lock.json").stat().st_mtime
        assert head("read")["holder"]["run"] == ""
        head.now += 1
        assert head("take", holder=BOB)["done"]

    def test_history_is_added_and_read(self, head: Head) -> None:
        head("take", holder=ALICE)
        head("release", holder=ALICE, entry={"run": "r1"}, keep=True)
        head("release", holder=BOB, entry={"run": "r2"})
        with (head.root / "var/lib/deploy-dsv3/history.jsonl").open("a") as file:
            file.write('{"run": "cut o')
        assert [run["run"] for run in head("read")["runs"]] == ["r1", "r2"]

    def test_a_bare_host_keeps_no_trace_of_a_run_that_changed_nothing(self, head: Head) -> None:
        head("take", holder=ALICE)
        head("release", holder=ALICE, entry={"run": "r1"})
        assert not (head.root / "var/lib/deploy-dsv3").exists()
        (head.root / "etc/deploy-dsv3").mkdir(parents=True)
        head("release", holder=ALICE, entry={"run": "r2"})
        assert [run["run"] for run in head("read")["runs"]] == ["r2"]

    def test_the_history_may_go_with_the_deployment(self, head: Head) -> None:
        head("release", holder=ALICE, entry={"run": "r0"}, keep=True)
        head("take", holder=ALICE)
        head("release", holder=ALICE, entry={"run": "r1"}, forget=True)
        assert not (head.root / "var/lib/deploy-dsv3").exists()

    def test_what_others_keep_there_stays(self, head: Head) -> None:
        head("take", holder=ALICE)
        (head.root / "var/lib/deploy-dsv3/image-pulled").write_text("x")
        head("release", holder=ALICE, forget=True)
        assert head.left == ["image-pulled"]

    def test_reading_changes_nothing(self, head: Head) -> None:
        assert head("read") == {"done": True, "holder": None, "runs": []}
        assert not (head.root / "var").exists()

    def test_of_many_at_once_one_gets_it(self, head: Head) -> None:
        """Each in a process of its own; the folder comes and goes meanwhile."""
        context = multiprocessing.get_context("fork")
        with context.Pool(8) as pool:
            answers = pool.map(_take, [(str(head.root), number) for number in range(40)])
        assert sum(answers) == 1

    def test_ansible_hands_it_a_file_of_arguments(self, tmp_path: Path) -> None:
        arguments = tmp_path / "arguments"
        arguments.write_text(json.dumps({"do": "read", "_ansible_check_mode": True}))
        done = subprocess.run(
            [sys.executable, modules.LIBRARY / "dsv3_lock.py", arguments], capture_output=True, check=True
        )
        assert json.loads(done.stdout)["changed"] is False
        assert "WANT_JSON" in (modules.LIBRARY / "dsv3_lock.py").read_text()


def _take(request: tuple[str, int]) -> bool:
    root, number = request
    return bool(module.apply({"do": "take", "holder": {"run": str(number), "expires_s": 300}}, root)["done"])


class TestHolder:
    def test_this_process_lives(self) -> None:
        mine = lock.holder("r", "deploy")
        assert (mine.pid, mine.run, mine.expires_s) == (os.getpid(), "r", lock.EXPIRES_S)
        assert mine.boot and mine.namespace and mine.started
        assert not lock.is_dead(mine.as_dict())

    def test_a_process_that_ended_is_dead(self) -> None:
        child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
        known = lock.holder("r", "deploy", pid=child.pid).as_dict()
        assert not lock.is_dead(known)
        child.communicate()
        assert lock.is_dead(known)

    def test_a_killed_process_that_nobody_waited_for_is_dead(self) -> None:
        child = subprocess.Popen(["sleep", "60"])
        known = lock.holder("r", "deploy", pid=child.pid).as_dict()
        child.kill()
        os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)
        assert lock.is_dead(known)
        child.wait()

    def test_a_pid_that_is_used_again_is_another_process(self) -> None:
        assert lock.is_dead({**lock.holder("r", "deploy").as_dict(), "started": 1})

    @pytest.mark.parametrize(
        "change",
        [
            {"boot": "another"},
            {"boot": ""},
            {"namespace": "pid:[1]"},
            {"pid": None},
            {"pid": "1"},
            {"started": 0},
            {"started": None},
        ],
    )
    def test_of_another_machine_nothing_is_certain(self, change: dict[str, Any]) -> None:
        assert not lock.is_dead({**lock.holder("r", "deploy").as_dict(), "started": 1, **change})

    def test_the_refusal_names_who_and_how_long(self) -> None:
        finding = lock.refusal("gpu-01", {**ALICE, "pid": 77, "silent_s": 20.0})
        assert finding.code == "locked" and finding.host == "gpu-01"
        for part in ("gpu-01", "alice on desk", "deploy r1", "process 77", "20 s ago"):
            assert part in finding.message
        assert "280 s" in finding.remedy and "deploy-dsv3 unlock" in finding.remedy

    def test_a_holder_that_says_nothing_of_itself_can_be_told(self) -> None:
        assert "somebody on an unknown machine" in lock.refusal("gpu-01", {"run": ""}).message


class Heads:
    """Heads that answer at once; `lost` ones have another holder by now, `away` ones do not answer."""

    def __init__(self) -> None:
        self.asked: list[tuple[str, tuple[str, ...], Any]] = []
        self.kept: list[Any] = []
        self.lost: set[str] = set()
        self.away: set[str] = set()
        self.beaten = threading.Event()

    def ask(self, connections: Mapping[str, Any], request: Mapping[str, Any]) -> dict[str, Observation]:
        self.asked.append((request["do"], tuple(connections), request.get("entry")))
        self.kept.append(request.get("keep"))
        if request["do"] == "refresh":
            self.beaten.set()
        return {
            host: Observation(host=host, error="no route")
            if host in self.away
            else Observation(host=host, seen={"done": host not in self.lost})
            for host in connections
        }


@pytest.fixture
def heads(monkeypatch: pytest.MonkeyPatch) -> Iterator[Heads]:
    found = Heads()
    monkeypatch.setattr(lock, "ask", found.ask)
    monkeypatch.setattr(lock, "HEARTBEAT_S", 0.01)
    yield found


def taken(host: str) -> HostOk:
    return HostOk(time=0, stage="preflight", host=host, task=lock.TASK)


class TestKeeper:
    def test_it_gives_signs_of_life_and_gives_back_with_a_line_of_history(self, heads: Heads) -> None:
        with lock.Keeper(lock.holder("r", "deploy"), {"a": {}, "b": {}}) as keeper:
            keeper.watch(taken("a"))
            assert heads.beaten.wait(5)
            keeper.entry = {"run": "r"}
        assert heads.asked[0] == ("refresh", ("a",), None)
        assert heads.asked[-1] == ("release", ("a",), {"run": "r"})
        assert keeper.problems == []

    def test_a_run_that_never_took_it_leaves_the_heads_alone(self, heads: Heads) -> None:
        with lock.Keeper(lock.holder("r", "deploy"), {"a": {}}) as keeper:
            keeper.watch(HostOk(time=0, stage="preflight", host="a", task="Read the host"))
            failure = Failure(host="a", stage="preflight", task=lock.TASK, message="locked")
            keeper.watch(HostFailed(time=0, stage="preflight", host="a", task=lock.TASK, failure=failure))
            keeper.entry = {"run": "r"}
        assert heads.asked == []

    def test_a_run_that_only_looks_leaves_its_line(self, heads: Heads) -> None:
        with lock.Keeper(lock.holder("r", "deploy"), {"a": {}, "b": {}}, locks=False) as keeper:
            keeper.entry = {"run": "r"}
        assert heads.asked == [("release", ("a", "b"), {"run": "r"})]
        assert keeper.problems == []

    @pytest.mark.parametrize("changed", [True, False])
    def test_it_says_whether_the_run_changed_anything(self, heads: Heads, changed: bool) -> None:
        with lock.Keeper(lock.holder("r", "deploy"), {"a": {}}) as keeper:
            keeper.watch(taken("a"))
            record = HostChanged if changed else HostOk
            keeper.watch(record(time=0, stage="host", host="a", task="Install"))
        assert heads.kept[-1] is changed

    def test_it_is_given_back_when_the_run_breaks_off(self, heads: Heads) -> None:
        with pytest.raises(KeyboardInterrupt), lock.Keeper(lock.holder("r", "deploy"), {"a": {}}) as keeper:
            keeper.watch(taken("a"))
            raise KeyboardInterrupt
        assert heads.asked[-1][0] == "release"

    def test_a_lost_lock_and_a_head_that_is_away_are_told_once(self, heads: Heads) -> None:
        heads.lost, heads.away = {"a"}, {"b"}
        with lock.Keeper(lock.holder("r", "deploy"), {"a": {}, "b": {}}) as keeper:
            keeper.watch(taken("a"))
            keeper.watch(taken("b"))
            for _ in range(2):
                heads.beaten.clear()
                assert heads.beaten.wait(5)
        assert [problem for problem in keeper.problems if "lost during" in problem] == [
            "a: the lock was lost during the run",
            "b: the lock was lost during the run (no route)",
        ]
        assert any("could not be given back" in problem for problem in keeper.problems)


def test_the_play_takes_it_before_anything_changes() -> None:
    imported = [play["ansible.builtin.import_playbook"] for play in _plays("deploy.yml")]
    assert imported.index("preflight.yml") < imported.index("lock.yml") < imported.index("prepare.yml")
    (play,) = _plays("lock.yml")
    (task,) = play["tasks"]
    assert task["name"] == lock.TASK and task["when"] == "not ansible_check_mode"
    assert play["name"].startswith("Preflight:"), "nothing was changed yet"
    assert "lock.yml" in str(_plays("destroy.yml"))


def _plays(name: str) -> list[dict[str, Any]]:
    loaded: list[dict[str, Any]] = yaml.safe_load(content.playbook(Path(name).stem).read_text())
    return loaded


def test_a_lock_that_another_holds_ends_the_run_with_7() -> None:
    outcome = Outcome()
    failure = Failure(host="a", stage="preflight", task=lock.TASK, code="locked", message="locked by alice")
    outcome.add(HostFailed(time=0, stage="preflight", host="a", task=lock.TASK, failure=failure))
    assert outcome.exit_code == 7
