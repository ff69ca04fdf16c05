"""Raw events to records, records to an outcome.

The failures in `recorded/ansible` are events of real runs of ansible-core 2.19 against OpenSSH 9.2 and sudo 1.9.13:
a wrong key, a wrong password, a server that is not there, and so on.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest

from deploy_dsv3.causes import CAUSES
from deploy_dsv3.events import (
    Finished,
    HostChanged,
    HostFailed,
    HostOk,
    HostRetried,
    HostSkipped,
    HostStarted,
    HostUnreachable,
    Outcome,
    Record,
    StageStarted,
    TaskStarted,
    Translator,
    Warned,
    failure_message,
    told,
)

RECORDED = Path(__file__).parent / "recorded" / "ansible"


def raw(kind: str, second: int = 0, stdout: str = "", **data: Any) -> dict[str, Any]:
    """An event as ansible-runner hands it over."""
    created = f"2026-01-02T03:04:{second:02d}.500000+00:00"
    return {"event": kind, "created": created, "stdout": stdout, "event_data": data}


def play(name: str, second: int = 0) -> dict[str, Any]:
    return raw("playbook_on_play_start", second, name=name)


def result(kind: str, host: str, second: int = 0, task: str = "Do it", **data: Any) -> dict[str, Any]:
    return raw(f"runner_on_{kind}", second, host=host, task=task, **data)


def stats(second: int = 0, artifact_data: Any = None, **counts: dict[str, int]) -> dict[str, Any]:
    hosts = {host for values in counts.values() for host in values}
    data: dict[str, Any] = {**counts, "processed": dict.fromkeys(hosts, 1), "artifact_data": artifact_data or {}}
    return raw("playbook_on_stats", second, **data)


def records(events: Iterable[dict[str, Any]]) -> list[Record]:
    translator = Translator()
    return [record for event in events for record in translator.translate(event)]


def outcome(*events: dict[str, Any]) -> Outcome:
    made = Outcome()
    for record in records(events):
        made.add(record)
    return made


class TestTranslator:
    def test_a_stage_is_the_part_before_the_colon(self) -> None:
        (record,) = records([play("first-token: a completion: through the endpoint")])
        assert isinstance(record, StageStarted)
        assert (record.stage, record.title) == ("first-token", "a completion: through the endpoint")

    def test_a_name_begins_with_a_capital_as_ansible_lint_wants_it(self) -> None:
        made = outcome(play("Preflight: look"), result("failed", "a", res={"msg": "no"}))
        assert made.first is not None
        assert (made.first.stage, made.exit_code) == ("preflight", 3)

    def test_a_play_of_another_name_has_no_stage(self) -> None:
        (record,) = records([play("Gather facts")])
        assert (record.stage, getattr(record, "title", "")) == ("", "Gather facts")

    def test_what_happens_on_a_host(self) -> None:
        made = records(
            [
                play("ray: form the cluster"),
                raw("playbook_on_task_start", task="engine : Start", role="engine", name="engine : Start"),
                result("start", "a"),
                result("ok", "a", res={"changed": False}),
                result("ok", "a", res={"changed": True}),
                result("skipped", "a"),
                raw("runner_retry", host="a", task="Wait", res={"attempts": 3, "retries": 10}),
            ]
        )[1:]
        kinds = [TaskStarted, HostStarted, HostOk, HostChanged, HostSkipped, HostRetried]
        assert [type(record) for record in made] == kinds
        assert {record.stage for record in made} == {"ray"}
        task, retried = made[0], made[-1]
        assert isinstance(task, TaskStarted)
        assert (task.task, task.role) == ("Start", "engine")
        assert isinstance(retried, HostRetried)
        assert (retried.attempt, retried.attempts) == (3, 10)

    def test_findings_of_a_result(self) -> None:
        finding = {"code": "rdma-none", "severity": "warning", "message": "no RDMA", "remedy": "Go on."}
        (record,) = records([result("ok", "a", res={"dsv3_findings": [finding, "junk"]})])
        assert isinstance(record, HostOk)
        assert [(f.code, f.host, f.severity) for f in record.findings] == [("rdma-none", "a", "warning")]

    @pytest.mark.parametrize(
        ("stdout", "message"),
        [
            ("[WARNING]: Something is\nodd", "Something is odd"),
            ("\x1b[1;35m[WARNING]: coloured\x1b[0m", "coloured"),
            ("[WARNING]: Could not match supplied host pattern, ignoring: dsv3", None),
        ],
    )
    def test_warnings(self, stdout: str, message: str | None) -> None:
        made = records([raw("warning", stdout=stdout)])
        assert [record.message for record in made if isinstance(record, Warned)] == ([message] if message else [])

    @pytest.mark.parametrize("event", [{}, {"event": "verbose"}, raw("runner_on_ok"), raw("debug", stdout="x")])
    def test_events_that_say_nothing(self, event: dict[str, Any]) -> None:
        assert records([event]) == []

    def test_the_end(self) -> None:
        served = {"dsv3": {"endpoint": "http://192.0.2.1:8000"}}
        (record,) = records(
            [
                stats(
                    ok={"a": 3, "b": 1},
                    changed={"a": 1},
                    failures={"b": 1},
                    dark={"c": 1},
                    artifact_data={"dsv3_report": served},
                )
            ]
        )
        assert isinstance(record, Finished)
        assert (record.hosts["a"].ok, record.hosts["a"].changed, record.hosts["a"].failed) == (3, 1, 0)
        assert (record.hosts["b"].failed, record.hosts["c"].unreachable) == (1, 1)
        assert record.report == served


@pytest.mark.parametrize(
    ("found", "detail"),
    [
        ({"progress": "3 of 8 layers"}, "3 of 8 layers"),
        ({"stdout": '{"phase": "loading", "message": "41 of 163 shards"}'}, "loading: 41 of 163 shards"),
        ({"stdout": '{"phase": "loading", "message": ""}'}, "loading"),
        (
            {"stdout": '[{"alive": true, "gpus": 8}, {"alive": false, "gpus": 8}]'},
            "1 nodes with 8 GPUs so far",
        ),
        ({"stdout": "[1]"}, ""),
        ({"stdout": "not JSON"}, ""),
        ({}, ""),
    ],
)
def test_what_a_host_waits_for(found: dict[str, Any], detail: str) -> None:
    (record,) = records([raw("runner_retry", host="a", task="Wait", res=found)])
    assert isinstance(record, HostRetried)
    assert record.detail == detail


class TestRecordedFailures:
    @pytest.mark.parametrize("path", sorted(RECORDED.glob("*.json")), ids=lambda path: path.stem)
    def test_cause_and_remedy(self, path: Path) -> None:
        expected = {"ssh-password-wrong": "ssh-authentication", "ssh-banner": "ssh-timeout"}
        made = outcome(play("preflight: look"), json.loads(path.read_text(encoding="utf-8")))
        failure = made.first
        assert failure is not None
        assert failure.code == expected.get(path.stem, path.stem)
        assert failure.host == "gpu-01"
        assert failure.message
        assert failure.cause
        assert failure.remedy
        on_a_reached_host = ("disk-full", "package-lock", "python-not-there")
        assert made.exit_code == (3 if path.stem in on_a_reached_host else 6)

    def test_every_known_cause_was_recorded(self) -> None:
        # sudo that hangs is the one that could not be provoked; its words are in TestMessages.
        recorded = {path.stem for path in RECORDED.glob("*.json")}
        assert {cause.code for cause in CAUSES} - recorded == {"sudo-no-answer"}


class TestMessages:
    @pytest.mark.parametrize(
        ("found", "message"),
        [
            ({"msg": "no such file"}, "no such file"),
            ({"msg": ["first", "second"]}, "first\nsecond"),
            ({"msg": "non-zero return code", "stderr": "boom"}, "non-zero return code\nboom"),
            ({"msg": "MODULE FAILURE\nSee stdout", "module_stderr": "trace"}, "MODULE FAILURE\nSee stdout\ntrace"),
            ({"msg": "", "stdout": "out"}, "out"),
            ({"censored": "hidden"}, "the task failed; its output is hidden because it handles secrets"),
            ({}, "the task failed and said nothing"),
            (
                {
                    "msg": "One or more items failed",
                    "results": [
                        {"failed": False, "item": "x"},
                        {"failed": True, "item": "y", "msg": "y is missing"},
                    ],
                },
                "y: y is missing",
            ),
        ],
    )
    def test_the_words_that_matter(self, found: dict[str, Any], message: str) -> None:
        assert failure_message(found) == message

    @pytest.mark.parametrize(
        ("message", "parts"),
        [
            ("plain", ("plain", "", "")),
            ("It is X. Likely cause: Y. Remedy: Do Z.", ("It is X.", "Y", "Do Z.")),
            ("It is X. Likely cause: Y, or W. Do Z. Then V.", ("It is X.", "Y, or W", "Do Z. Then V.")),
            ("It is X. Remedy: Do Z.", ("It is X.", "", "Do Z.")),
        ],
    )
    def test_parts_of_our_own_messages(self, message: str, parts: tuple[str, str, str]) -> None:
        assert told(message) == parts

    def test_sudo_that_does_not_answer(self) -> None:
        # ansible/plugins/connection/ssh.py of ansible-core 2.19
        words = "Timeout (12s) waiting for privilege escalation prompt: \n"
        made = outcome(result("failed", "a", res={"msg": words}))
        assert made.first is not None
        assert (made.first.code, made.exit_code) == ("sudo-no-answer", 6)

    def test_a_module_that_quotes_a_refused_connection_was_reached(self) -> None:
        words = "Error pulling image: dial tcp 192.0.2.9:443: connect: Connection refused"
        made = outcome(play("image: pull"), result("failed", "a", res={"msg": words}))
        assert made.exit_code == 4

    def test_a_line_of_the_engines_log(self) -> None:
        words = "the engine did not start:\nRuntimeError: The NVIDIA driver on your system is too old (found 12020)."
        made = outcome(play("engine: serve"), result("failed", "a", res={"msg": words}))
        assert made.first is not None
        assert made.first.code == "driver-too-old"
        assert made.first.page == "docs/runbooks/troubleshooting.md#driver-too-old"

    @pytest.mark.parametrize(
        ("stage", "found", "page"),
        [
            ("ray", {"msg": "nobody knows"}, "docs/runbooks/failed-runs.md#ray"),
            ("destroy", {"msg": "nobody knows"}, "docs/runbooks/failed-runs.md"),
            ("host", {"msg": "No space left on device"}, "docs/runbooks/failed-runs.md#disk-full"),
            ("preflight", {"dsv3_findings": [{"code": "memory"}]}, "docs/reference/preflight.md"),
            ("preflight", {"dsv3_findings": [{"code": "locked"}]}, "docs/reference/plan.md#one-run-at-a-time"),
        ],
    )
    def test_every_failure_names_a_page(self, stage: str, found: dict[str, Any], page: str) -> None:
        made = outcome(play(f"{stage}: x"), result("failed", "a", res=found))
        assert made.first is not None and made.first.page == page

    def test_the_first_cause_is_judged_and_not_its_echo(self) -> None:
        """A worker fails; with any_errors_fatal the others are stopped for it, and say something of their own."""
        words = "ray ended:\nNCCL WARN remote process exited or there was a network error"
        made = outcome(
            play("engine: serve"),
            result("failed", "b", res={"msg": "the engine did not start:\nCUDA out of memory. Tried to allocate"}),
            result("failed", "a", res={"msg": words}),
        )
        assert [failure.code for failure in made.failures] == ["gpu-out-of-memory", "peer-lost"]
        assert made.first is not None and made.first.host == "b"

    def test_findings_are_the_cause(self) -> None:
        finding = {"code": "memory", "severity": "error", "message": "8 GiB", "cause": "c", "remedy": "r"}
        made = outcome(play("preflight: look"), result("failed", "a", res={"msg": "no", "dsv3_findings": [finding]}))
        assert made.first is not None
        assert (made.first.code, made.first.cause, made.first.remedy) == ("memory", "c", "r")
        assert [found.code for found in made.findings] == ["memory"]


class TestOutcome:
    @pytest.mark.parametrize(
        ("stage", "kind", "code"),
        [
            ("preflight", "failed", 3),
            ("host", "failed", 4),
            ("engine", "failed", 4),
            ("verify", "failed", 5),
            ("preflight", "unreachable", 6),
            ("ray", "unreachable", 6),
        ],
    )
    def test_exit_code_by_the_stage_of_the_first_failure(self, stage: str, kind: str, code: int) -> None:
        assert outcome(play(f"{stage}: x"), result(kind, "a", res={"msg": "no"})).exit_code == code

    def test_success(self) -> None:
        made = outcome(play("host: x"), result("ok", "a", res={}), stats(ok={"a": 1}))
        assert (made.exit_code, made.first, made.finished) == (0, None, True)

    def test_the_first_failure_is_the_cause_and_not_its_echoes(self) -> None:
        made = outcome(
            play("ray: x"),
            result("failed", "b", 1, res={"msg": "cause"}),
            result("failed", "a", 2, res={"msg": "echo"}),
            stats(failures={"a": 1, "b": 1}),
        )
        assert [(f.host, f.message) for f in made.failures] == [("b", "cause"), ("a", "echo")]

    def test_an_ignored_failure_is_none(self) -> None:
        made = outcome(
            play("host: x"), result("failed", "a", res={"msg": "no"}, ignore_errors=True), stats(ok={"a": 1})
        )
        assert made.exit_code == 0

    def test_a_rescued_failure_is_none(self) -> None:
        made = outcome(
            play("host: x"),
            result("failed", "a", 1, res={"msg": "first"}),
            result("start", "a", 2, task="Clean up"),
            result("ok", "a", 3, task="Clean up", res={}),
            stats(ok={"a": 1}, rescued={"a": 1}),
        )
        assert (made.exit_code, made.failures) == (0, [])

    def test_a_rescue_that_fails_tells_its_own_message(self) -> None:
        made = outcome(
            play("host: x"),
            result("failed", "a", 1, res={"msg": "raw"}),
            result("start", "a", 2, task="Explain"),
            result("failed", "a", 3, task="Explain", res={"msg": "explained"}),
            stats(failures={"a": 1}, rescued={"a": 1}),
        )
        assert [f.message for f in made.failures] == ["explained"]

    def test_an_always_section_does_not_hide_the_failure(self) -> None:
        made = outcome(
            play("host: x"),
            result("failed", "a", 1, res={"msg": "cause"}),
            result("start", "a", 2, task="Tidy up"),
            result("ok", "a", 3, task="Tidy up", res={}),
            stats(failures={"a": 1}),
        )
        assert [f.message for f in made.failures] == ["cause"]

    def test_seconds_of_stages_add_up_over_plays(self) -> None:
        made = outcome(play("preflight: x", 0), play("host: x", 2), play("host: y", 5), play("ray: x", 9), stats(10))
        assert made.stages == {"preflight": 2.0, "host": 7.0, "ray": 1.0}

    @pytest.mark.parametrize("first", ["warning", "finding"])
    def test_a_warning_that_repeats_a_finding_is_left_out(self, first: str) -> None:
        finding = {"code": "rdma-none", "severity": "warning", "message": "a: no RDMA"}
        events = [
            raw("warning", stdout="[WARNING]: a: no RDMA"),
            result("ok", "a", res={"dsv3_findings": [finding]}),
        ]
        made = outcome(*(events if first == "warning" else reversed(events)))
        assert (len(made.findings), made.warnings) == (1, [])

    def test_a_warning_is_told_once(self) -> None:
        made = outcome(raw("warning", stdout="[WARNING]: w"), raw("warning", stdout="[WARNING]: w"))
        assert made.warnings == ["w"]


@pytest.mark.parametrize("kind", [HostFailed, HostUnreachable])
def test_a_failure_knows_where_it_was(kind: type[Record]) -> None:
    word = "failed" if kind is HostFailed else "unreachable"
    event = result(word, "a", task="engine : Start it", role="engine", res={"msg": "no"})
    _, record = records([play("container: x"), event])
    assert isinstance(record, HostFailed | HostUnreachable)
    failure = record.failure
    assert (failure.stage, failure.host, failure.role, failure.task) == ("container", "a", "engine", "Start it")
    assert json.loads(json.dumps(failure.as_dict()))["message"] == "no"
