"""Verbs from options to result: what deploy does after its playbook, and what the others are given."""

from __future__ import annotations

import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from converged_hosts import nobody

from deploy_dsv3 import probing, runner, status, verbs, verification
from deploy_dsv3.errors import ConfigErrors
from deploy_dsv3.events import Failure, Outcome
from deploy_dsv3.options import Options
from deploy_dsv3.topology import Deployment
from deploy_dsv3.verification import REACHED, Check, VerificationReport

KEY = "0123456789abcdef0123"


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    (tmp_path / "hosts.ini").write_text(
        "[dsv3_head]\na ansible_host=192.0.2.1 ansible_user=op\n[dsv3_workers]\nb ansible_host=192.0.2.2\n"
    )
    (tmp_path / "group_vars").mkdir()
    (tmp_path / "group_vars" / "all.yml").write_text(f"endpoint_api_keys: ['{KEY}']\nendpoint_port: 9000\n")
    return tmp_path


@pytest.fixture
def options(folder: Path) -> Options:
    return Options(inventories=(folder / "hosts.ini",), json=True)


def check(host: str, outcome: verification.Outcome, sentence: str = "The driver answers") -> Check:
    return Check(host=host, suite="host", check=sentence, outcome=outcome, seconds=0.1, message="why")


class Verifier:
    """Stands where the suites are run; keeps what it was given."""

    def __init__(self, *checks: Check) -> None:
        self.checks = checks
        self.given: list[tuple[Deployment, Mapping[str, Any], Mapping[str, Any]]] = []

    def __call__(
        self, deployment: Deployment, settings: Mapping[str, Any], connections: Mapping[str, Any], **_: Any
    ) -> VerificationReport:
        self.given.append((deployment, settings, connections))
        return VerificationReport(checks=self.checks, seconds=1.0)


def prepare(monkeypatch: pytest.MonkeyPatch, outcome: Outcome, *checks: Check) -> Verifier:
    verifier = Verifier(*checks)
    monkeypatch.setattr(runner, "run", lambda *_, **__: outcome)
    monkeypatch.setattr(verification, "verify", verifier)
    monkeypatch.setattr(probing, "probe", nobody)
    return verifier


class TestDeploy:
    def test_ends_verified(self, monkeypatch: pytest.MonkeyPatch, options: Options) -> None:
        verifier = prepare(monkeypatch, Outcome(finished=True), check("a", "passed"), check("b", "passed"))
        result = verbs.deploy(options)
        assert result.exit_code == 0
        assert result.document["verification"]["passed"] is True
        assert "verify" in [stage["name"] for stage in result.document["stages"]]
        ((deployment, settings, connections),) = verifier.given
        assert deployment.hosts == ("a", "b")
        assert settings["b"]["endpoint_port"] == 9000
        assert settings["a"]["lmdeploy_tp"] == 0
        assert connections["a"]["ansible_user"] == "op"

    def test_a_failed_verification_is_5(self, monkeypatch: pytest.MonkeyPatch, options: Options) -> None:
        prepare(monkeypatch, Outcome(finished=True), check("a", "passed"), check("b", "failed"))
        result = verbs.deploy(options)
        assert result.exit_code == 5
        (failure,) = result.document["failures"]
        assert (failure["host"], failure["stage"]) == ("b", "verify")
        assert "The driver answers: why" in failure["message"]
        stream = io.StringIO()
        result.render(stream)
        assert "exit status 5" in stream.getvalue()
        assert stream.getvalue().count("why") == 1

    def test_a_host_lost_before_verification_is_6(self, monkeypatch: pytest.MonkeyPatch, options: Options) -> None:
        prepare(monkeypatch, Outcome(finished=True), check("a", "passed"), check("b", "error", REACHED))
        assert verbs.deploy(options).exit_code == 6

    @pytest.mark.parametrize("more", [{"check": True}, {"skip_tags": "verify"}, {"tags": "preflight,host"}], ids=str)
    def test_verifies_only_what_was_deployed(
        self, monkeypatch: pytest.MonkeyPatch, folder: Path, more: dict[str, Any]
    ) -> None:
        verifier = prepare(monkeypatch, Outcome(finished=True))
        result = verbs.deploy(Options(inventories=(folder / "hosts.ini",), json=True, **more))
        assert (result.exit_code, verifier.given) == (0, [])
        assert result.document["verification"] is None

    def test_does_not_verify_what_failed(self, monkeypatch: pytest.MonkeyPatch, options: Options) -> None:
        failure = Failure(host="a", stage="ray", task="t", message="m")
        verifier = prepare(monkeypatch, Outcome(failures=[failure]))
        assert (verbs.deploy(options).exit_code, verifier.given) == (4, [])

    def test_part_of_a_replica_is_refused(self, monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
        prepare(monkeypatch, Outcome(finished=True))
        with pytest.raises(ConfigErrors, match="cuts replica"):
            verbs.deploy(Options(inventories=(folder / "hosts.ini",), limit="b"))


class TestTarget:
    def test_knows_all_secrets(self, folder: Path) -> None:
        options = Options(inventories=(folder / "hosts.ini",), become_password="typed-word")
        target = verbs.load(options, whole_replicas=True)
        assert target.secrets == {KEY, "typed-word"}
        assert target.connections(options)["a"]["ansible_become_password"] == "typed-word"
        assert "typed-word" not in repr(options)

    def test_repr_shows_no_secret(self, options: Options) -> None:
        assert KEY not in repr(verbs.load(options, whole_replicas=True))


def test_verify(monkeypatch: pytest.MonkeyPatch, options: Options) -> None:
    prepare(monkeypatch, Outcome(), check("a", "passed"), check("b", "failed"))
    result = verbs.verify(options)
    assert (result.exit_code, result.document["verb"]) == (5, "verify")
    assert any("moving tag" in warning for warning in result.document["warnings"])
    stream = io.StringIO()
    result.render(stream)
    assert "b: The driver answers" in stream.getvalue()


def test_status(monkeypatch: pytest.MonkeyPatch, options: Options) -> None:
    asked: list[bool] = []

    def collect(deployment: Deployment, *_: Any, canary: bool) -> status.StatusReport:
        asked.append(canary)
        return status.StatusReport(time=0.0, replicas=())

    monkeypatch.setattr(status, "collect", collect)
    result = verbs.status(options, canary=True)
    assert (result.exit_code, result.document["verb"], asked) == (0, "status", [True])
