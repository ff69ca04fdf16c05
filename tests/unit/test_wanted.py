"""What the roles are given: read from the roles themselves, so that nothing has to be listed a second time."""

from __future__ import annotations

import json
from typing import Any

import pytest
from converged_hosts import HEAD, SETTINGS, WORKER, converged, inputs, node_of

from deploy_dsv3 import content, manifest, wanted
from deploy_dsv3.facts import load_facts


@pytest.mark.parametrize(
    ("role", "setting"),
    [
        ("nvidia_driver", "nvidia_driver_branch"),
        ("docker_engine", "docker_engine_options"),
        ("engine", "engine_ulimits"),
        ("engine", "engine_stop_timeout_s"),
        ("endpoint", "endpoint_idle_timeout_s"),
        # Its template asks for the engine's port.
        ("endpoint", "lmdeploy_server_port"),
        # The playbook hands them in under another name.
        ("lmdeploy", "endpoint_api_keys"),
    ],
)
def test_a_setting_that_a_roles_files_name_is_an_input(role: str, setting: str) -> None:
    assert setting in wanted.named_by(role).settings


@pytest.mark.parametrize(
    ("role", "setting"),
    [
        ("engine", "engine_no_log"),
        ("endpoint", "endpoint_secure_logging"),
        ("docker_engine", "docker_engine_allow_restart"),
        ("engine_image", "engine_image_registry_password"),
        # Only its check and its proof name these.
        ("lmdeploy", "lmdeploy_load_timeout_s"),
        ("fabric_manager", "fabric_manager_timeout_s"),
    ],
)
def test_what_steers_a_run_is_no_input(role: str, setting: str) -> None:
    assert setting not in wanted.named_by(role).settings


def test_every_role_that_the_playbooks_run_changes_hosts_or_only_looks() -> None:
    """A new role has to be put on one of the two sides."""
    looking = {"preflight", "model_weights", "ray_cluster", "first_token", "deployment_record"}
    handed_to_others = {"package_repository"}
    known = {path.name for path in content.roles().iterdir() if path.is_dir()}
    assert known - handed_to_others - looking == set(wanted.ROLES)


def test_derived_values_are_inputs() -> None:
    assert {"node_file", "environment", "devices"} <= set(wanted.named_by("engine").node)
    assert "serve_file" in wanted.named_by("lmdeploy").node


def test_the_digest_follows_the_files_and_those_of_included_roles(monkeypatch: pytest.MonkeyPatch) -> None:
    before = wanted.named_by("nvidia_driver").digest
    changed = content.roles() / "package_repository/tasks/Debian.yml"
    read = type(changed).read_text

    def edited(path: Any, **options: Any) -> str:
        return read(path, **options) + ("# edited" if path == changed else "")

    monkeypatch.setattr(type(changed), "read_text", edited)
    wanted.named_by.cache_clear()
    try:
        assert wanted.named_by("nvidia_driver").digest != before
        assert wanted.named_by("engine").digest
    finally:
        wanted.named_by.cache_clear()


class TestInputs:
    def test_a_secret_is_recorded_as_a_keyed_hash(self) -> None:
        node = node_of(HEAD).to_json()
        given = wanted.inputs("endpoint", {**SETTINGS, "endpoint_api_keys": ["sk-1"]}, node, salt="a")
        assert "sk-1" not in json.dumps(given)
        other = wanted.inputs("endpoint", {**SETTINGS, "endpoint_api_keys": ["sk-1"]}, node, salt="b")
        keys = [one["settings"]["endpoint_api_keys"] for one in (given, other)]
        assert all(key.startswith("hmac:") for key in keys) and keys[0] != keys[1]

    def test_a_secret_that_is_not_set_is_told(self) -> None:
        given = wanted.inputs("endpoint", SETTINGS, node_of(HEAD).to_json(), salt="a")
        assert given["settings"]["endpoint_api_keys"] == []

    def test_keys_reach_the_engine_only_where_clients_do(self) -> None:
        keys = {"endpoint_api_keys": ["sk-1"]}
        behind = wanted.inputs("lmdeploy", {**SETTINGS, **keys}, node_of(HEAD, **keys).to_json(), salt="a")
        assert behind["settings"] == {}
        direct = {**keys, "endpoint_mode": "direct"}
        open_to_clients = wanted.inputs("lmdeploy", {**SETTINGS, **direct}, node_of(HEAD, **direct).to_json(), salt="a")
        assert list(open_to_clients["settings"]) == ["endpoint_api_keys"]
        worker = wanted.inputs("lmdeploy", {**SETTINGS, **direct}, node_of(WORKER, **direct).to_json(), salt="a")
        assert worker["settings"] == {}

    def test_they_come_back_from_json_as_they_are(self) -> None:
        for role in wanted.ROLES:
            given = wanted.inputs(role, SETTINGS, node_of(HEAD).to_json(), salt="a")
            assert json.loads(json.dumps(given)) == given


class TestDaemonJson:
    def merged(self, found: Any, **settings: Any) -> dict[str, Any]:
        facts = load_facts({"schema": 1, "docker": {"daemon_json": found}})
        return wanted.daemon_json({**SETTINGS, **settings}, facts)

    def test_it_is_what_the_role_writes(self) -> None:
        assert self.merged(None, docker_engine_registry_mirrors=["http://m.example"]) == {
            "features": {"cdi": True},
            "live-restore": True,
            "registry-mirrors": ["http://m.example"],
            "insecure-registries": ["198.18.0.3:5000"],
        }

    def test_what_is_there_stays(self) -> None:
        found = {"debug": True, "features": {"buildkit": True}, "live-restore": False}
        merged = self.merged(found, docker_engine_options={"log-level": "warn"})
        assert merged["debug"] and merged["features"] == {"buildkit": True, "cdi": True}
        assert merged["live-restore"] is True and merged["log-level"] == "warn"


@pytest.mark.parametrize(
    ("recorded", "registry", "settings", "digest"),
    [
        (None, None, {"engine_image_digest": "sha256:set"}, "sha256:set"),
        (None, None, {"engine_image_name": "a/b@sha256:named"}, "sha256:named"),
        ({"name": "a/b:1", "digest": "sha256:kept"}, None, {"engine_image_name": "a/b:1"}, "sha256:kept"),
        ({"name": "a/b:1", "digest": "sha256:kept"}, "sha256:asked", {"engine_image_name": "a/b:2"}, "sha256:asked"),
        (
            {"name": "a/b:1", "digest": "sha256:kept"},
            "sha256:asked",
            {"engine_image_name": "a/b:1", "engine_image_refresh": True},
            "sha256:asked",
        ),
        (None, None, {}, ""),
    ],
)
def test_the_digest_of_the_image(recorded: Any, registry: str | None, settings: dict[str, Any], digest: str) -> None:
    facts = load_facts(
        {
            "schema": 1,
            "deployment": {"image": recorded},
            "registry": {"digest": registry} if registry else None,
        }
    )
    assert wanted.image_digest({**SETTINGS, **settings}, facts) == digest


class TestManifest:
    def test_the_same_host_and_settings_give_the_same_record(self) -> None:
        known = inputs(converged())[HEAD]
        assert known.facts
        assert manifest.make(known.facts, known.settings, node_of(HEAD).to_json()) == known.facts.deployment.manifest

    def test_it_has_the_roles_that_ran_here(self) -> None:
        records = {host: manifest.load(known.facts) for host, known in inputs(converged()).items() if known.facts}
        head, worker = records[HEAD], records[WORKER]
        assert head and worker and set(head.inputs) - set(worker.inputs) == {"endpoint"}

    def test_a_first_record_draws_a_salt(self) -> None:
        known = inputs(converged())[HEAD]
        assert known.facts
        facts = known.facts.model_copy(
            update={"deployment": known.facts.deployment.model_copy(update={"manifest": None})}
        )
        made = [manifest.make(facts, known.settings, node_of(HEAD).to_json())["salt"] for _ in range(2)]
        assert made[0] != made[1] and all(len(salt) == 32 for salt in made)


def test_gpus_in_the_old_way_need_a_docker_that_manages_cgroups_itself() -> None:
    """Else systemd's next daemon-reload takes them from the container. What else is in the file stays."""
    facts = load_facts(converged()[HEAD])
    found = {**(facts.docker.daemon_json or {}), "exec-opts": ["native.umask=normal", "native.cgroupdriver=systemd"]}
    facts = facts.model_copy(update={"docker": facts.docker.model_copy(update={"daemon_json": found})})
    made = wanted.daemon_json({**SETTINGS, "engine_gpu_mode": "legacy"}, facts)
    assert made["exec-opts"] == ["native.umask=normal", "native.cgroupdriver=cgroupfs"]
    assert wanted.daemon_json(SETTINGS, facts)["exec-opts"] == found["exec-opts"]
