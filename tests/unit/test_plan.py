"""Facts and settings in, plan out: what is to be done, why, and what clients notice."""

from __future__ import annotations

import hashlib
import io
import json
from typing import Any

import pytest
from converged_hosts import (
    DEPLOYMENT,
    ENGINE,
    HEAD,
    SETTINGS,
    WORKER,
    bare,
    by_hand,
    converged,
    inputs,
    planned,
)

from deploy_dsv3 import plan, plan_text
from deploy_dsv3.comparison import Action
from deploy_dsv3.plan import Plan


def told(made: Plan) -> dict[tuple[str, str], Action]:
    """The actions by host and subject."""
    return {(action.host, action.subject): action for action in made.actions}


def text(made: Plan, *, brief: bool = False) -> str:
    stream = io.StringIO()
    plan_text.render(made, stream, brief=brief)
    return stream.getvalue()


class TestConverged:
    def test_there_is_nothing_to_do(self) -> None:
        made = planned(converged())
        assert (made.actions, made.drift, made.errors) == ((), (), ())
        assert (made.nothing_to_do, made.converged, made.exit_code) == (True, True, 0)
        assert made.replicas[0].downtime.kind == "none"
        assert text(made).count("nothing to do") == 3  # each host, and the sum

    def test_it_says_what_is_served_and_how(self) -> None:
        (replica,) = planned(converged()).replicas
        assert replica.command[:3] == ("lmdeploy", "serve", "api_server")
        assert replica.endpoint == "http://198.18.0.11:8000"
        shown = text(planned(converged()))
        assert " ".join(replica.command) in shown
        assert "NCCL_IB_HCA==mlx5_0:1," in shown

    def test_it_says_what_fits(self) -> None:
        (replica,) = planned(converged()).replicas
        assert replica.capacity and replica.capacity.fits and replica.capacity.gpus == 16
        assert "sequences of 4096" in text(planned(converged()))

    def test_a_run_under_way_or_one_that_failed_is_no_place_to_stop(self) -> None:
        documents = converged()
        documents[HEAD]["deployment"]["lock"] = {"who": "alice", "host": "desk", "verb": "deploy", "run": "r"}
        made = planned(documents)
        assert made.nothing_to_do and not made.converged
        assert "a run is under way: alice on desk: deploy" in text(made)
        documents = converged()
        documents[HEAD]["deployment"]["runs"] = [{"run": "r", "verb": "deploy", "who": "bob", "exit_code": 5}]
        made = planned(documents)
        assert made.nothing_to_do and not made.converged
        assert "did not finish" in text(made)

    def test_secrets_are_compared_and_not_told(self) -> None:
        keys = {"endpoint_api_keys": ["sk-very-secret"]}
        assert planned(converged(**keys), **keys).nothing_to_do
        made = planned(converged(**keys), endpoint_api_keys=["sk-another-secret"])
        (action,) = made.actions
        assert (action.role, action.why) == ("endpoint", "endpoint_api_keys: another value")
        told = str(made.as_dict()) + str(made.states)
        assert "very-secret" not in told and "another-secret" not in told


class TestBare:
    def test_everything_is_created_and_the_image_downloaded(self) -> None:
        made = planned(bare())
        assert made.exit_code == 10
        assert {action.kind for action in made.actions} == {"created", "downloaded"}
        for host in (HEAD, WORKER):
            subjects = {action.subject for action in made.actions if action.host == host}
            assert {"NVIDIA driver 580 (vendor, open modules)", "Docker (distribution)", "/etc/docker/daemon.json"} <= (
                subjects
            )
            assert {"container lmdeploy", f"{ENGINE}/node.json", f"{ENGINE}/launcher.py"} <= subjects
            assert ("HAProxy" in subjects) == (f"{ENGINE}/serve.json" in subjects) == (host == HEAD)

    def test_downloads_are_counted(self) -> None:
        made = planned(bare())
        sizes = [action.bytes for action in made.actions if action.kind == "downloaded"]
        assert sizes == [142_000_000, 142_000_000]
        assert "2 downloaded (284.0 MB)" in text(made)

    def test_a_registry_that_does_not_answer_leaves_the_size_open(self) -> None:
        documents = bare()
        documents[HEAD]["registry"] = {"registry": "", "digest": "", "bytes": 0, "error": "timed out"}
        action = told(planned(documents))[HEAD, f"image {SETTINGS['engine_image_name']}"]
        assert action.bytes is None and "timed out" in action.why

    def test_nothing_is_served_yet(self) -> None:
        made = planned(bare())
        assert made.replicas[0].downtime.kind == "start"
        assert "nothing is served yet" in text(made)

    def test_capacity_is_known_before_the_driver(self) -> None:
        (replica,) = planned(bare()).replicas
        assert replica.capacity == planned(converged()).replicas[0].capacity

    def test_capacity_of_unknown_gpus_waits_for_the_driver(self) -> None:
        documents = bare()
        for gpu in documents[WORKER]["pci_gpus"]:
            gpu["device"] = "0xffff"
        (replica,) = planned(documents).replicas
        assert replica.capacity is None and "PCI device 0xffff" in replica.capacity_unknown
        assert "capacity: before " in text(planned(documents))

    def test_what_is_preinstalled_is_left_alone(self) -> None:
        sources = dict.fromkeys(
            (
                "nvidia_driver_source",
                "docker_engine_source",
                "nvidia_container_toolkit_source",
                "fabric_manager_source",
                "rdma_source",
            ),
            "preinstalled",
        )
        made = planned(bare(), **sources, node_network_reserve_ports=False)
        roles = {action.role for action in made.actions}
        assert roles == {"engine_image", "engine", "lmdeploy", "endpoint"}


#: A setting that changes, and what comes of it: host, subject, kind, whether clients wait.
CHANGED: dict[str, tuple[dict[str, Any], list[tuple[str, str, str, bool]]]] = {
    "the serving command": (
        {"lmdeploy_session_len": 4096},
        [
            (HEAD, f"{ENGINE}/serve.json", "changed", True),
            (HEAD, "/etc/deploy-dsv3/release.json", "changed", False),
            (HEAD, "lmdeploy serve", "restarted", True),
            (WORKER, "/etc/deploy-dsv3/release.json", "changed", False),
        ],
    ),
    "the launcher's timeouts": (
        {"engine_canary_interval_s": 5},
        [
            (host, subject, kind, True)
            for host in (HEAD, WORKER)
            for subject, kind in ((f"{ENGINE}/node.json", "changed"), ("container lmdeploy", "restarted"))
        ],
    ),
    "a limit of the container": (
        {"engine_log_max_size": "50m"},
        [(host, "container lmdeploy", "changed", True) for host in (HEAD, WORKER)],
    ),
    "the engine's environment": (
        {"engine_environment": {"NCCL_DEBUG": "INFO"}},
        [(host, "container lmdeploy", "changed", True) for host in (HEAD, WORKER)],
    ),
    "the endpoint's port": (
        {"endpoint_max_connections": 9},
        [(HEAD, "configuration of the endpoint", "changed", False)],
    ),
    "a registry mirror": (
        {"docker_engine_registry_mirrors": ["http://mirror.example"]},
        [
            (host, subject, kind, False)
            for host in (HEAD, WORKER)
            for subject, kind in (("/etc/docker/daemon.json", "changed"), ("Docker", "restarted"))
        ],
    ),
    "the driver's branch": (
        {"nvidia_driver_branch": "590"},
        [
            (host, subject, kind, stops)
            for host in (HEAD, WORKER)
            for subject, kind, stops in (("NVIDIA driver packages", "changed", False), ("the host", "rebooted", True))
        ],
    ),
    "how a run goes about it": (
        {
            "engine_image_pull_timeout_s": 9,
            "lmdeploy_no_log": False,
            "docker_engine_allow_restart": True,
            "first_token_timeout_s": 9,
            "preflight_max_clock_skew_s": 2.0,
        },
        [],
    ),
}


@pytest.mark.parametrize(("settings", "expected"), CHANGED.values(), ids=list(CHANGED))
def test_a_changed_setting(settings: dict[str, Any], expected: list[tuple[str, str, str, bool]]) -> None:
    made = planned(converged(), **settings)
    found = [(action.host, action.subject, action.kind, action.stops) for action in made.actions]
    assert sorted(found) == sorted(expected)
    assert made.drift == ()
    assert made.replicas[0].downtime.kind == ("restart" if any(stops for *_, stops in expected) else "none")


def test_the_reason_names_the_setting_and_both_values() -> None:
    made = told(planned(converged(), lmdeploy_session_len=4096, engine_log_max_size="50m"))
    assert made[HEAD, f"{ENGINE}/serve.json"].why == "argv: --session-len 4096 more"
    assert made[HEAD, "container lmdeploy"].why == "engine_log_max_size: 100m → 50m"


def test_a_variable_that_is_not_wanted_any_more_goes() -> None:
    made = planned(converged(engine_environment={"NCCL_DEBUG": "INFO"}))
    assert {action.why for action in made.actions} == {"NCCL_DEBUG: not wanted any more"}


def test_a_variable_whose_value_may_be_secret_is_compared_by_its_hash() -> None:
    settings = {"engine_environment": {"S3_KEY": "very-secret"}}
    documents = converged(**settings)
    digest = f"sha256:{hashlib.sha256(b'very-secret').hexdigest()}"
    for document in documents.values():
        document["docker"]["containers"][0]["config"]["environment"]["S3_KEY"] = digest
        document["deployment"]["manifest"]["state"]["container environment S3_KEY"] = digest
    assert planned(documents, **settings).nothing_to_do
    made = planned(documents, engine_environment={"S3_KEY": "another-secret"})
    assert [action.why for action in made.actions] == ["S3_KEY: another value"] * 2


def test_another_image() -> None:
    digest = f"sha256:{'e' * 64}"
    made = planned(converged(), engine_image_digest=digest)
    kinds = [(action.host, action.role, action.kind) for action in made.actions]
    assert kinds == [
        (host, role, kind)
        for host in (HEAD, WORKER)
        for role, kind in (("engine_image", "downloaded"), ("engine", "changed"))
    ]
    assert made.replicas[0].downtime.kind == "restart"


def test_the_last_start_tells_how_long_a_restart_takes() -> None:
    documents = converged()
    documents[HEAD]["deployment"]["status"]["phases"] = [{"name": "a", "seconds": 70}, {"name": "b", "seconds": 20}]
    made = planned(documents, lmdeploy_session_len=4096)
    assert made.replicas[0].downtime.seconds == 90
    assert "clients wait while the engine restarts (about 1m30s" in text(made)


class TestByHand:
    def test_what_a_role_makes_is_put_back(self) -> None:
        def change(facts: dict[str, Any]) -> None:
            facts["docker"]["containers"][0]["config"]["restart_policy"] = "no"

        made = by_hand(WORKER, change)
        (action,) = made.actions
        assert (action.host, action.role, action.subject) == (WORKER, "engine", "container lmdeploy")
        assert action.why == "changed by hand: container restart_policy was unless-stopped, is no"
        assert not action.stops, "Docker changes it in place"
        assert text(made).count("restart_policy") == 1

    def test_what_no_role_makes_is_told(self) -> None:
        made = by_hand(HEAD, lambda facts: facts["state"]["sysctls"].update({"vm.swappiness": "1"}))
        assert made.actions == () and made.exit_code == 10
        assert "sysctl vm.swappiness" in text(made) and "no role changes it back" in text(made)

    @pytest.mark.parametrize(
        ("key", "value", "put_back"),
        [("live-restore", False, True), ("registry-mirrors", [], True), ("debug", True, False)],
    )
    def test_of_daemon_json_what_the_role_wants(self, key: str, value: Any, put_back: bool) -> None:
        made = by_hand(HEAD, lambda facts: facts["docker"]["daemon_json"].update({key: value}))
        assert [one.key for one in made.drift] == [f"daemon.json {key}"]
        assert ("/etc/docker/daemon.json" in {action.subject for action in made.actions}) is put_back

    def test_a_daemon_that_would_stop_its_containers_is_told(self) -> None:
        made = by_hand(HEAD, lambda facts: facts["docker"]["daemon_json"].update({"live-restore": False}))
        restart = told(made)[HEAD, "Docker"]
        assert restart.stops and "docker_engine_allow_restart" in restart.why

    def test_the_heads_token_is_taken_as_it_is_and_a_workers_is_put_back(self) -> None:
        def change(facts: dict[str, Any]) -> None:
            facts["state"]["files"][f"{ENGINE}/secrets/ray_token"]["sha256"] = "ab" * 32

        assert by_hand(HEAD, change).actions == ()
        subjects = [action.subject for action in by_hand(WORKER, change).actions]
        assert subjects == [f"{ENGINE}/secrets/ray_token", "container lmdeploy"]

    @pytest.mark.parametrize("host", [HEAD, WORKER])
    @pytest.mark.parametrize("name", ["secrets/ray_token", "launcher.py", "node.json"])
    @pytest.mark.parametrize(("field", "value"), [("mode", "0666"), ("owner", "1000:1000")])
    def test_rights_of_the_engines_files_are_put_back_without_a_restart(
        self, host: str, name: str, field: str, value: str
    ) -> None:
        made = by_hand(host, lambda facts: facts["state"]["files"][f"{ENGINE}/{name}"].update({field: value}))
        assert [(action.role, action.kind, action.subject) for action in made.actions] == [
            ("engine", "changed", f"{ENGINE}/{name}")
        ]
        assert not made.actions[0].stops and made.replicas[0].downtime.kind == "none"

    def test_rights_of_the_serving_command_restart_nothing(self) -> None:
        path = f"{ENGINE}/serve.json"
        made = by_hand(HEAD, lambda facts: facts["state"]["files"][path].update(mode="0600"))
        assert [action.subject for action in made.actions] == [path]
        assert made.replicas[0].downtime.kind == "none"
        made = by_hand(HEAD, lambda facts: facts["state"]["files"][path].update(sha256="ab" * 32))
        assert [action.subject for action in made.actions] == [path, "lmdeploy serve"]
        assert made.replicas[0].downtime.kind == "restart"

    def test_an_owner_that_no_role_sets_is_told(self) -> None:
        made = by_hand(HEAD, lambda facts: facts["state"]["files"]["/etc/cdi/nvidia.yaml"].update(owner="7:7"))
        assert made.actions == () and len(made.drift) == 1

    def test_packages_come_back_but_keep_their_version(self) -> None:
        gone = by_hand(HEAD, lambda facts: facts["state"]["packages"].pop("haproxy"))
        assert [(action.kind, action.subject) for action in gone.actions] == [("created", "HAProxy")]
        newer = by_hand(HEAD, lambda facts: facts["state"]["packages"].update(haproxy="9"))
        assert newer.actions == () and len(newer.drift) == 1

    @pytest.mark.parametrize(("field", "value"), [("cpus", "0-3"), ("memory_bytes", 1 << 30)])
    def test_limits_that_the_role_does_not_set_stay(self, field: str, value: Any) -> None:
        made = by_hand(HEAD, lambda facts: facts["docker"]["containers"][0]["config"].update({field: value}))
        assert made.actions == () and [one.key for one in made.drift] == [f"container {field}"]


def test_an_endpoint_that_runs_with_older_files_is_reloaded() -> None:
    made = by_hand(HEAD, lambda facts: facts["state"]["units"]["dsv3-endpoint.service"].update(reload_due=True))
    (action,) = made.actions
    assert (action.role, action.kind, action.stops) == ("endpoint", "restarted", False)
    assert made.drift == ()


class TestWithoutRecord:
    def test_roles_are_walked(self) -> None:
        documents = converged()
        del documents[WORKER]["deployment"]["manifest"]
        made = planned(documents)
        assert {(action.host, action.kind) for action in made.actions} == {(WORKER, "checked")}
        assert made.exit_code == 10
        assert text(made).count("no finished deploy is on record") == 1

    @pytest.mark.parametrize("record", [{"schema": 99}, {"schema": 1, "state": []}, {"error": "line 1"}])
    def test_a_record_that_cannot_be_read_is_none(self, record: dict[str, Any]) -> None:
        documents = converged()
        documents[WORKER]["deployment"]["manifest"] = record
        assert {action.kind for action in planned(documents).actions} == {"checked"}

    def test_a_role_of_another_version_is_walked(self) -> None:
        documents = converged()
        documents[HEAD]["deployment"]["manifest"]["inputs"]["endpoint"]["digest"] = "older"
        (action,) = planned(documents).actions
        assert (action.kind, action.role) == ("checked", "endpoint")


class TestRefused:
    def test_a_host_that_is_away(self) -> None:
        known = inputs(converged())
        gone = {**known, WORKER: inputs(converged())[WORKER]}
        gone[WORKER] = type(gone[WORKER])(host=WORKER, facts=None, settings=SETTINGS, connect_address="198.18.0.12")
        made = plan.make(DEPLOYMENT, gone, unreachable={WORKER: "no route"})
        assert made.exit_code == 6 and not made.nothing_to_do
        assert "not reached gpu-02: no route" in text(made)

    def test_what_preflight_would_refuse(self) -> None:
        documents = converged()
        documents[HEAD]["os"]["id"], documents[HEAD]["os"]["family"] = "plan9", "other"
        made = planned(documents)
        assert made.exit_code == 3
        assert "preflight would refuse" in text(made)

    def test_an_endpoint_that_is_not_wanted_any_more(self) -> None:
        made = planned(converged(), endpoint_mode="direct")
        assert ("removed", "the endpoint") in {(action.kind, action.subject) for action in made.actions}

    @pytest.mark.parametrize(
        ("driver", "why"),
        [
            ({"loaded_version": "580.95.05", "installed_version": "580.105.08"}, "580.95.05 is loaded, 580.105.08 is"),
            ({"nouveau_loaded": True}, "nouveau holds the GPUs"),
        ],
    )
    def test_a_driver_that_needs_a_reboot(self, driver: dict[str, Any], why: str) -> None:
        documents = bare()
        documents[HEAD]["driver"] = driver
        refused = planned(documents)
        action = told(refused)[HEAD, "the host"]
        assert action.kind == "rebooted" and why in action.why and "nvidia_driver_allow_reboot" in action.why
        assert [finding.code for finding in refused.errors] == ["driver-reboot"]
        agreed = planned(documents, nvidia_driver_allow_reboot=True)
        assert agreed.errors == () and "allow_reboot" not in told(agreed)[HEAD, "the host"].why

    def test_a_fabric_manager_of_another_version(self) -> None:
        documents = converged()
        documents[HEAD]["state"]["packages"]["nvidia-fabricmanager"] = "580.95.05-1"
        made = planned(documents)
        action = told(made)[HEAD, "fabric manager of the driver's version"]
        assert action.kind == "changed" and "580.95.05" in action.why and "580.105.08" in action.why
        assert [(one.code, one.severity) for one in made.findings] == [("fabric-mismatch", "warning")]


def test_brief_leaves_out_what_is_served() -> None:
    assert "lmdeploy serve api_server" not in text(planned(bare()), brief=True)
    assert "container lmdeploy" in text(planned(bare()), brief=True)


def test_as_data_it_is_json() -> None:
    document = json.loads(json.dumps(planned(bare()).as_dict()))
    assert document["exit_code"] == 10
    assert document["replicas"][0]["hosts"][0]["actions"][0]["why"]
    assert document["replicas"][0]["hosts"][1]["environment"]["NCCL_IB_HCA"]
