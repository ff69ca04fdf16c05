"""Hosts are probed in one pass; one that is away takes nothing from the others."""

from __future__ import annotations

import socket
from typing import Any

from deploy_dsv3 import probing
from deploy_dsv3.hostvars import role_defaults

SETTINGS = {**role_defaults(), "engine_image_archive_path": "/x.tar"}
LOCAL = {"ansible_connection": "local"}
AWAY = {"ansible_host": "127.0.0.1", "ansible_port": 1}


def test_this_machine_and_one_that_is_away() -> None:
    fleet = probing.probe({"here": SETTINGS, "away": SETTINGS}, {"here": LOCAL, "away": AWAY})
    facts = fleet.hosts["here"].facts
    assert facts and facts.hostname == socket.gethostname() and facts.state
    assert [disk.path for disk in facts.disks] == ["/var/lib/docker", "/data/models/DeepSeek-V3"]
    assert fleet.hosts["away"].facts is None
    assert list(fleet.unreachable) == ["away"] and "refused" in fleet.unreachable["away"].lower()
    # Known without having been there.
    assert fleet.hosts["away"].connect_address == "127.0.0.1"


def asked(**settings: Any) -> dict[str, Any]:
    return probing.arguments({**role_defaults(), **settings})


def test_the_image_is_asked_for_where_the_host_lacks_it() -> None:
    image = asked(docker_engine_registry_mirrors=["http://m.example"], engine_image_name="a/b:1")["image"]
    assert image == {"name": "a/b:1", "digest": "", "mirrors": ["http://m.example"], "insecure": [], "ask": False}


def test_a_digest_that_is_set_is_the_one_asked_for() -> None:
    assert asked(engine_image_digest="sha256:a")["image"]["digest"] == "sha256:a"
    assert asked(engine_image_name="a/b:1@sha256:b")["image"]["digest"] == "sha256:b"
    assert asked(engine_image_refresh=True)["image"]["ask"] is True


def test_an_archive_has_no_registry() -> None:
    assert "image" not in asked(engine_image_archive_path="/images/engine.tar")


def test_no_secret_is_in_the_probes_arguments() -> None:
    secret = {"endpoint_api_keys": ["sk-very-secret"], "engine_image_registry_password": "sk-very-secret"}
    assert "sk-very-secret" not in str(asked(**secret))
