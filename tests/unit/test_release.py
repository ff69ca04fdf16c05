"""A release file: what it may hold, what it wins over, and where it shows."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest
from converged_hosts import HEAD, converged, planned

from deploy_dsv3 import cli, release, runner, settings, status
from deploy_dsv3.events import Outcome
from deploy_dsv3.options import Options
from deploy_dsv3.verbs import load

ROOT = Path(__file__).parents[2]
INI = "[dsv3_head]\na ansible_host=192.0.2.1\n[dsv3_workers]\nb ansible_host=192.0.2.2\n[all:vars]\n"


@pytest.fixture
def site(tmp_path: Path) -> Path:
    (tmp_path / "hosts.ini").write_text(f"{INI}lmdeploy_session_len=1000\nlmdeploy_max_batch_size=1\n")
    (tmp_path / "release.yml").write_text(
        "lmdeploy_release_name: r-1\nlmdeploy_session_len: 2000\nlmdeploy_max_batch_size: 2\n"
    )
    return tmp_path


def values(site: Path, *arguments: str, capsys: pytest.CaptureFixture[str]) -> dict[str, tuple[object, str]]:
    """What `settings` tells of each: value and source."""
    assert cli.run(["settings", "-i", str(site / "hosts.ini"), "--json", *arguments]) == 0
    listed = json.loads(capsys.readouterr().out)["settings"]
    return {one["name"]: (one["values"][0]["value"], one["values"][0]["source"]) for one in listed}


def test_it_wins_over_the_inventory_and_e_wins_over_it(site: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = site / "release.yml"
    found = values(site, "--release", str(file), "-e", "lmdeploy_max_batch_size=3", capsys=capsys)
    assert found["lmdeploy_session_len"] == (2000, f"{file}:2")
    assert found["lmdeploy_max_batch_size"] == (3, "-e on the command line")
    assert found["lmdeploy_release_name"] == ("r-1", f"{file}:1")
    assert found["endpoint_port"] == (8000, "default")
    assert values(site, capsys=capsys)["lmdeploy_session_len"] == (1000, f"{site}/hosts.ini:6")


def test_the_playbook_is_given_it_first(site: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    jobs: list[runner.Job] = []

    def run(job: runner.Job, **_: object) -> Outcome:
        jobs.append(job)
        return Outcome(finished=True)

    monkeypatch.setattr(runner, "run", run)
    monkeypatch.setenv("XDG_STATE_HOME", str(site / "state"))
    file = site / "release.yml"
    arguments = ["-i", str(site / "hosts.ini"), "-e", "lmdeploy_tp=16", "--release", str(file), "--check"]
    assert cli.run(arguments) == 0
    assert jobs[0].user_extra_vars == (f"@{file}", "lmdeploy_tp=16")


def test_mistakes_of_the_release_and_the_inventory_come_together(
    site: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (site / "release.yml").write_text("endpoint_port: 1\nlmdeploy_session_len: x\n")
    (site / "hosts.ini").write_text(f"{INI}lmdeploy_tpp=16\n")
    assert cli.run(["plan", "-i", str(site / "hosts.ini"), "--release", str(site / "release.yml"), "--json"]) == 2
    errors = json.loads(capsys.readouterr().out)["error"]["errors"]
    assert {error["key"] for error in errors} == {
        "endpoint_port",
        "lmdeploy_release_name",
        "lmdeploy_session_len",
        "lmdeploy_tpp",
    }


def test_the_releases_of_the_repository_are_good(tmp_path: Path) -> None:
    (tmp_path / "hosts.ini").write_text(INI)
    files = list((ROOT / "inventory/releases").glob("*.yml"))
    assert files
    for file in files:
        checked = load(Options(inventories=(tmp_path / "hosts.ini",), release=file), whole_replicas=True).settings
        assert checked.of("a")[release.NAME] == file.stem


def test_what_belongs_to_a_host_or_a_site_or_is_secret_does_not_belong_to_a_release() -> None:
    known = settings.catalogue()
    may = {name for name, setting in known.items() if release.belongs(setting)}
    assert {"engine_image_digest", "nvidia_driver_branch", "lmdeploy_options", "model_weights_name"} <= may
    assert not any(known[name].secret for name in may)
    assert not any(name.endswith(("_port", "_address", "_interface", "_url", "_source", "_no_log")) for name in may)
    assert not any(name.startswith(("endpoint_", "node_network_", "rdma_", "preflight_")) for name in may)


def test_the_reference_lists_what_a_release_may_hold() -> None:
    page = (ROOT / "docs/reference/settings.md").read_text(encoding="utf-8")
    section = page.partition("## A release file")[2].partition("\n## ")[0]
    listed = {
        word.strip("`") for line in section.splitlines() if line.startswith("- ") for word in line[2:].split(", ")
    }
    assert listed == {name for name, setting in settings.catalogue().items() if release.belongs(setting)}


class TestItShows:
    def test_a_new_name_is_planned_and_restarts_nothing(self) -> None:
        made = planned(converged(), lmdeploy_release_name="r-2")
        assert {(action.role, action.subject) for action in made.actions} == {
            ("lmdeploy", "/etc/deploy-dsv3/release.json")
        }
        assert "release without a name → r-2" in made.actions[0].why
        assert made.replicas[0].downtime.kind == "none"

    def test_the_name_that_is_there_already_is_nothing_to_do(self) -> None:
        named = {"lmdeploy_release_name": "r-2"}
        documents = converged(**named)
        for document in documents.values():
            document["deployment"]["release"]["name"] = "r-2"
        assert planned(documents, **named).nothing_to_do

    def test_status_names_the_release_that_runs(self) -> None:
        replica = status.ReplicaStatus(
            name="dsv3",
            nodes=(status.NodeStatus(host=HEAD, role="head"),),
            engine=status.EngineStatus(),
            endpoint=status.EndpointStatus(),
            model="m",
            release={"name": "r-2", "image": {"name": "x/y:1", "digest": "sha256:0"}, "versions": {"ray": "2.60"}},
            gpus_expected=None,
            gpus_alive=None,
        )
        stream = io.StringIO()
        status.render(status.StatusReport(time=0, replicas=(replica,)), stream)
        assert "release   r-2: x/y:1 sha256:0 ray 2.60" in stream.getvalue()
