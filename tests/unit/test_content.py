"""Where the content is: in a checkout, and in a package without one."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from deploy_dsv3 import content
from deploy_dsv3.errors import InternalError


@pytest.fixture(autouse=True)
def _fresh() -> Iterator[None]:
    content.root.cache_clear()
    yield
    content.root.cache_clear()


@pytest.mark.usefixtures("_fresh")
def test_everything_of_this_checkout_is_there() -> None:
    assert content.playbook("deploy").is_file()
    assert (content.roles() / "engine" / "meta" / "argument_specs.yml").is_file()
    assert (content.example_inventory() / "prod.ini").is_file()
    assert content.testinfra().is_dir()


def test_a_wheel_carries_the_same_tree(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "site-packages" / "deploy_dsv3"
    for name in ("playbooks", "roles", "inventory/example", "tests/testinfra"):
        (package / "_content" / name).mkdir(parents=True)
    (package / "_content" / "playbooks" / "deploy.yml").touch()
    monkeypatch.setattr(content, "_PACKAGE", package)
    monkeypatch.chdir("/")
    assert content.playbook("deploy") == package / "_content" / "playbooks" / "deploy.yml"
    assert content.testinfra() == package / "_content" / "tests" / "testinfra"


def test_an_incomplete_installation_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(content, "_PACKAGE", tmp_path / "a" / "b" / "deploy_dsv3")
    with pytest.raises(InternalError, match="missing") as caught:
        content.root()
    assert "Install" in caught.value.remedy


def test_an_unknown_playbook_says_so() -> None:
    with pytest.raises(InternalError, match=r"nothing\.yml"):
        content.playbook("nothing")
