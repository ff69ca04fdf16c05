"""Running the suites: what they found is reported as it is, and not having run is never taken for a pass."""

import ast
import io
import json
import os
import shutil
import signal
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

from deploy_dsv3 import content, hostvars, verification
from deploy_dsv3.errors import InternalError
from deploy_dsv3.interruption import Terminated, terminable
from deploy_dsv3.topology import Deployment, Replica
from deploy_dsv3.verification import Check, Expectations, Outcome, VerificationReport

SETTINGS = {**hostvars.role_defaults(), "engine_container_name": "no-such-container"}
LOCAL = {"ansible_connection": "local"}
NOWHERE = {"ansible_host": "127.0.0.1", "ansible_port": 1}

Verify = Callable[..., VerificationReport]


def deployment(*hosts: str) -> Deployment:
    return Deployment(replicas=(Replica(name="dsv3", head=hosts[0], workers=hosts[1:]),))


@pytest.fixture
def verify(tmp_path: Path) -> Verify:
    """Runs a suite of the test's own with the product's machinery, on this machine."""

    def run(source: str, connections: dict[str, dict[str, Any]] | None = None, **options: Any) -> VerificationReport:
        folder = tmp_path / "suites"
        folder.mkdir()
        for name in ("conftest.py", "fleet.py"):
            shutil.copy(content.testinfra() / name, folder)
        (folder / "test_own.py").write_text(source)
        hosts = connections or {"here": LOCAL}
        return verification.verify(deployment(*hosts), dict.fromkeys(hosts, SETTINGS), hosts, suites=folder, **options)

    return run


def test_each_outcome_is_told_as_it_is(verify: Verify) -> None:
    report = verify(
        """
import pytest

@pytest.fixture
def broken():
    raise ValueError("no such thing")

def test_good(node, record_property):
    '''Good things are good.'''
    record_property("answer", "42")

def test_bad(node):
    '''Bad things are bad.'''
    assert 1 == 2, "one is not two"

def test_skip(node):
    '''This does not apply.'''
    pytest.skip("not today")

def test_error(node, broken):
    '''This cannot be checked.'''

def test_surprise(node):
    '''This goes wrong.'''
    {}["key"]
"""
    )
    told = {check.check: (check.outcome, check.message) for check in report.checks}
    assert told == {
        "Good things are good": ("passed", ""),
        "Bad things are bad": ("failed", "one is not two"),
        "This does not apply": ("skipped", "not today"),
        "This cannot be checked": ("error", "ValueError: no such thing"),
        "This goes wrong": ("failed", "KeyError: 'key'"),
    }
    assert {(check.host, check.suite) for check in report.checks} == {("here", "own")}
    assert [check.details for check in report.checks if check.details] == [{"answer": "42"}]
    assert not report.passed and report.exit_code == 5


def test_all_good_is_exit_0(verify: Verify) -> None:
    report = verify("def test_good(node):\n    '''Good.'''\n")
    assert report.passed and report.exit_code == 0


def test_the_suites_see_the_host(verify: Verify) -> None:
    report = verify(
        "def test_os(node, facts):\n    '''Kernel.'''\n"
        f"    assert facts.os.kernel == {Path('/proc/sys/kernel/osrelease').read_text().strip()!r}\n"
    )
    assert report.passed, report.failures


def test_a_host_that_cannot_be_reached_is_one_failure_and_exit_6(verify: Verify) -> None:
    source = (content.testinfra() / "test_host.py").read_text()
    report = verify(source, {"here": LOCAL, "away": NOWHERE})
    away = [check for check in report.checks if check.host == "away"]
    [failed] = [check for check in away if not check.good]
    assert failed.check == verification.REACHED
    assert "Connection refused" in failed.message
    assert {check.outcome for check in away if check is not failed} == {"skipped"}
    assert report.unreachable == ("away",) and report.exit_code == 6


@pytest.mark.parametrize(
    "source",
    [
        "",
        "def test_it(node:\n",
        "import no_such_module\n",
        "import os\n\ndef test_it(node):\n    '''Ends.'''\n    os._exit(0)\n",
        "import os\n\ndef test_it(node):\n    '''Dies.'''\n    os.kill(os.getpid(), 9)\n",
        "import pytest\n\ndef test_it(node):\n    '''Stops.'''\n    pytest.exit('enough', 0)\n",
        "import pytest\n\n@pytest.fixture\ndef f():\n    yield\n    1 / 0\n\n"
        "def test_it(node, f):\n    '''Tidies badly.'''\n",
        "def test_it(node):\n    pass\n",
    ],
    ids=["no tests", "syntax", "import", "exit 0", "killed", "pytest.exit", "teardown", "no sentence"],
)
def test_suites_that_did_not_run_to_the_end_are_an_error(verify: Verify, source: str) -> None:
    with pytest.raises(InternalError) as raised:
        verify(source)
    assert "verif" in raised.value.message


def test_a_hang_is_an_error(verify: Verify, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(verification, "TIMEOUT_S", 3)
    with pytest.raises(InternalError, match="did not end within 3 s"):
        verify("import time\n\ndef test_it(node):\n    '''Hangs.'''\n    time.sleep(60)\n")


def test_whoever_is_stopped_leaves_nothing_running(verify: Verify, tmp_path: Path) -> None:
    started = tmp_path / "started"

    def stop() -> None:
        while not started.exists() or not started.read_text():
            time.sleep(0.05)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=stop, daemon=True).start()
    with terminable(), pytest.raises(Terminated):
        verify(
            "import pathlib, subprocess\n\n"
            "def test_it(node):\n    '''Waits for a host.'''\n"
            "    waiting = subprocess.Popen(['sleep', '120'])\n"
            f"    pathlib.Path({str(started)!r}).write_text(str(waiting.pid))\n"
            "    waiting.wait()\n"
        )
    stat = Path(f"/proc/{started.read_text()}/stat")
    assert not stat.exists() or stat.read_text().rpartition(")")[2].split()[0] == "Z"


def test_pytest_options_of_the_operator_have_no_part_in_it(verify: Verify, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTEST_ADDOPTS", "-k nothing --collect-only")
    assert len(verify("def test_good(node):\n    '''Good.'''\n").checks) == 1


def test_secrets_are_in_a_file_that_only_its_owner_reads(tmp_path: Path) -> None:
    path = tmp_path / "expectations.json"
    written = Expectations(
        deployment=deployment("a", "b"),
        settings={"a": {"endpoint_api_keys": ["sk-secret"]}, "b": {}},
        connections={"a": {"ansible_become_password": "secret"}, "b": {}},
    )
    written.write(path)
    assert path.stat().st_mode & 0o777 == 0o600
    assert Expectations.read(path) == written
    assert "secret" not in repr(written)
    with pytest.raises(FileExistsError):
        written.write(path)


def report_of(*checks: tuple[str, str, Outcome]) -> VerificationReport:
    return VerificationReport(
        checks=tuple(
            Check(
                host=host,
                suite="host",
                check=sentence,
                outcome=outcome,
                seconds=0.5,
                message=f"why {outcome}",
            )
            for host, sentence, outcome in checks
        ),
        seconds=1.0,
    )


def test_junit_has_a_suite_for_each_host(tmp_path: Path) -> None:
    report = report_of(
        ("a", "One & two", "passed"),
        ("a", "<Three>", "failed"),
        ("b", "Four", "error"),
        ("b", "Five", "skipped"),
    )
    verification.write_junit(report, tmp_path / "new" / "verify.xml")
    root = ElementTree.parse(tmp_path / "new" / "verify.xml").getroot()
    suites = {suite.get("name"): suite for suite in root.findall("testsuite")}
    counted = ("tests", "failures", "errors", "skipped")
    counts = {name: [suite.get(key) for key in counted] for name, suite in suites.items()}
    assert counts == {
        "a": ["2", "1", "0", "0"],
        "b": ["2", "0", "1", "1"],
    }
    [failure] = root.iter("failure")
    assert failure.get("message") == "why failed"
    assert [case.get("name") for case in root.iter("testcase")] == ["One & two", "<Three>", "Four", "Five"]


def test_the_table_names_what_did_not_pass() -> None:
    stream = io.StringIO()
    verification.render(report_of(("a", "One holds", "passed"), ("b", "One holds", "failed")), stream)
    lines = stream.getvalue().splitlines()
    [row] = [line for line in lines if "One holds" in line and "✓" in line]
    assert row.split() == ["One", "holds", "✓", "✗"]
    assert "b: One holds" in lines and "  why failed" in lines
    assert lines[-1] == "2 checks on 2 hosts in 1.0 s: 1 did not pass"


def test_a_large_fleet_is_counted() -> None:
    stream = io.StringIO()
    report = report_of(*[(f"gpu-{number:02}", "One holds", "passed") for number in range(40)])
    bad = replace(report.checks[7], outcome="failed")
    verification.render(replace(report, checks=(*report.checks[:7], bad, *report.checks[8:])), stream)
    assert "  One holds  39/40 gpu-07" in stream.getvalue()


def test_json_has_everything() -> None:
    document = json.loads(json.dumps(report_of(("a", "One", "passed"), ("a", "Two", "failed")).as_dict()))
    assert document["counts"] == {"passed": 1, "failed": 1, "error": 0, "skipped": 0}
    assert document["passed"] is False and document["exit_code"] == 5
    assert document["checks"][1]["message"] == "why failed"


def test_every_check_of_the_product_has_a_sentence_of_its_own() -> None:
    for path in content.testinfra().glob("test_*.py"):
        tests = [
            node
            for node in ast.parse(path.read_text()).body
            if isinstance(node, ast.FunctionDef) and node.name.startswith("test_")
        ]
        sentences = [ast.get_docstring(test) or "" for test in tests]
        assert tests and len(set(sentences)) == len(sentences), path.name
        for sentence in sentences:
            assert sentence.endswith(".") and "\n" not in sentence, f"{path.name}: {sentence!r}"


def test_a_bare_host_fails_verification_and_does_not_break_it() -> None:
    report = verification.verify(deployment("here"), {"here": SETTINGS}, {"here": LOCAL})
    told = {(check.suite, check.check): check for check in report.checks}
    assert told["host", verification.REACHED].outcome == "passed"
    assert told["container", "The engine container runs"].message == "there is no container 'no-such-container'"
    assert report.exit_code == 5
    # A check that stumbles over what is missing says nothing to an operator.
    stumbled = [check for check in report.failures if "Error: " in check.message or check.outcome == "error"]
    assert not stumbled, stumbled
