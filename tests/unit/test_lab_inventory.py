"""The inventory that the lab writes."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from deploy_dsv3 import content
from deploy_dsv3.lab import hosts, inventory


def site(**changes: object) -> inventory.Site:
    values: dict = {
        "hosts": [hosts.record(number, "198.18.0.0/24", "h800-ib", None) for number in (1, 2, 3)],
        "key": Path("/state/ssh/id"),
        "known_hosts": Path("/state/ssh/known_hosts"),
        "packages_url": "http://198.18.0.2",
        "registry": "198.18.0.3:5000",
        "distributions": dict.fromkeys(("gpu-01", "gpu-02", "gpu-03"), "debian13"),
        "can_raise_limits": True,
    }
    return inventory.Site(**(values | changes))


def variables(**changes: object) -> dict:
    return yaml.safe_load(inventory.render(site(**changes))["group_vars/all.yml"])


def test_first_host_is_the_head_and_the_others_are_workers() -> None:
    lines = [line for line in inventory.render(site())["hosts.ini"].splitlines() if line and line[0] != "#"]
    assert lines == [
        "[dsv3_head]",
        "gpu-01 ansible_host=198.18.0.11",
        "[dsv3_workers]",
        "gpu-02 ansible_host=198.18.0.12",
        "gpu-03 ansible_host=198.18.0.13",
    ]


def test_a_host_of_another_release_has_its_own_repository_and_a_docker_without_cdi() -> None:
    mixed = site(distributions={"gpu-01": "debian13", "gpu-02": "debian13", "gpu-03": "debian12"})
    (line,) = [line for line in inventory.render(mixed)["hosts.ini"].splitlines() if line.startswith("gpu-03")]
    assert line.split()[2:] == [
        "nvidia_driver_repository_url=http://198.18.0.2/nvidia/debian12/x86_64/",
        "engine_gpu_mode=legacy",
    ]


def test_host_keys_are_checked_against_the_labs_own_file() -> None:
    arguments = variables()["ansible_ssh_common_args"]
    assert "UserKnownHostsFile=/state/ssh/known_hosts" in arguments
    assert "StrictHostKeyChecking=yes" in arguments


def test_only_settings_that_a_real_site_could_set() -> None:
    known: set[str] = set()
    for path in content.roles().glob("*/meta/argument_specs.yml"):
        known |= set(yaml.safe_load(path.read_text())["argument_specs"]["main"]["options"])
    ours = {name for name in variables(can_raise_limits=False) if not name.startswith("ansible_")}
    assert ours <= known


@pytest.mark.parametrize("can_raise_limits", [True, False])
def test_limits_are_given_up_only_where_they_cannot_be_raised(can_raise_limits: bool) -> None:
    found = variables(can_raise_limits=can_raise_limits).get("engine_ulimits")
    if can_raise_limits:
        assert found is None
    else:
        assert found and not any(limit.startswith(("memlock", "nofile")) for limit in found)


@pytest.mark.parametrize(
    ("count", "gpus", "profile", "fits"),
    [(2, None, "h800-ib", True), (1, None, "h800-ib", False), (2, 1, "h800-ib", False), (1, 0, "h20-roce", False)],
)
def test_too_few_gpus_for_the_real_model_are_served_on_all_the_same(
    count: int, gpus: int | None, profile: str, fits: bool
) -> None:
    records = [hosts.record(number, "198.18.0.0/24", profile, gpus) for number in range(1, count + 1)]
    assert variables(hosts=records).get("preflight_require_capacity") is (None if fits else False)


def test_sudo_password_stays_in_its_file() -> None:
    assert "ansible_become_password" not in variables()
    found = variables(password_file=Path("/state/ssh/sudo_password"))["ansible_become_password"]
    assert found == "{{ lookup('ansible.builtin.file', '/state/ssh/sudo_password') }}"


def test_removal_keeps_what_a_person_added(tmp_path: Path) -> None:
    folder = tmp_path / "lab"
    inventory.write(folder, inventory.render(site()))
    (folder / "host_vars").mkdir()
    inventory.remove(folder)
    assert sorted(path.name for path in folder.rglob("*")) == ["host_vars"]
    (folder / "host_vars").rmdir()
    inventory.write(folder, inventory.render(site()))
    inventory.remove(folder)
    assert not folder.exists()
