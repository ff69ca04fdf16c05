"""Before the first deploy: what is only looked at or refused leaves a host as it was."""

from __future__ import annotations

import shlex
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import sight
from product import Product, Run

from deploy_dsv3.lab.fleet import Lab
from deploy_dsv3.lab.hosts import MODEL_PATH

pytestmark = pytest.mark.usefixtures("_unchanged")


@pytest.fixture(scope="module", autouse=True)
def _unchanged(lab: Lab, bare: dict[str, sight.State]) -> Iterator[None]:
    """Nothing in this file may change a host."""
    yield
    for host in lab:
        assert sight.changes(bare[host.name], sight.state(host)) == {}, host.name


@pytest.fixture(scope="module")
def refused(product: Product, lab: Lab) -> Run:
    """A deploy with one thing wrong on each host and one with the replica."""
    head, worker = lab.hosts
    with sight.listener(head, 8000), sight.listener(worker, 6380):
        return product(
            *("--inventory", lab.inventory, "--json", "--extra-vars", "lmdeploy_tp=8"),
            expect=3,
            what="deploy that preflight refuses",
        )


def _errors(run: Run) -> list[dict[str, Any]]:
    return [finding for finding in run.document["findings"] if finding["severity"] == "error"]


def test_check_mode_ends_cleanly_and_changes_nothing(product: Product, lab: Lab, bare: dict[str, sight.State]) -> None:
    run = product("--inventory", lab.inventory, "--check", "--json", what="--check on bare hosts")
    assert run.document["check"] is True
    assert run.document["failures"] == []
    assert all(stats["changed"] > 0 for stats in run.document["hosts"].values()), "it says what it would do"
    for host in lab:
        assert sight.changes(bare[host.name], sight.state(host)) == {}, host.name


def test_status_of_nothing(product: Product, lab: Lab) -> None:
    run = product("status", "--inventory", lab.inventory, "--json", expect=5)
    (replica,) = run.document["replicas"]
    assert (replica["serving"], replica["whole"], replica["gpus_expected"]) == (False, False, None)
    assert [node["container"] for node in replica["nodes"]] == ["absent", "absent"]
    text = product("status", "--inventory", lab.inventory, expect=5).out
    assert "dsv3: NOT serving" in text
    assert text.count("absent") == 2


def test_all_findings_of_all_hosts_come_at_once(refused: Run, lab: Lab) -> None:
    head, worker = lab.hosts
    found = {(finding["code"], finding["host"]) for finding in _errors(refused)}
    assert {("port-taken", head.name), ("port-taken", worker.name)} <= found
    assert "tp-gpus" in {code for code, _ in found}
    assert all(finding["remedy"] for finding in _errors(refused))
    assert [stage["name"] for stage in refused.document["stages"]] == ["preflight"]


def test_a_port_in_use_names_the_process_that_has_it(refused: Run, lab: Lab) -> None:
    taken = {finding["host"]: finding["message"] for finding in _errors(refused) if finding["code"] == "port-taken"}
    for host, port in zip(lab.hosts, ("8000", "6380"), strict=True):
        assert port in taken[host.name]
        assert "python3" in taken[host.name]


def test_tp_that_is_not_the_number_of_gpus(refused: Run) -> None:
    told = {finding["message"] for finding in _errors(refused) if finding["code"] == "tp-gpus"}
    assert all("8" in message and "16" in message for message in told) and told


def test_a_model_that_does_not_fit_is_refused(product: Product, lab: Lab, tmp_path: Path) -> None:
    """DeepSeek-V3 in FP8 on one server of eight GPUs with 80 GB."""
    head = lab.hosts[0]
    shutil.copytree(lab.inventory / "group_vars", tmp_path / "group_vars")
    alone = tmp_path / "hosts.ini"
    alone.write_text(f"[dsv3_head]\n{head.name} ansible_host={head.address}\n")
    run = product("--inventory", alone, "--json", expect=3)
    (found,) = _errors(run)
    assert (found["code"], found["host"]) == ("capacity", head.name)
    assert "79.5 GiB of weights" in found["message"] and "a GPU has 79.6 GiB" in found["message"]
    planned = product("plan", "--inventory", alone, "--json", expect=3).document["replicas"][0]["capacity"]
    assert planned["fits"] is False and planned["reasons"]
    fits = product("plan", "--inventory", lab.inventory, "--json", expect=10).document["replicas"][0]["capacity"]
    assert fits["fits"] is True and fits["blocks"] > 6000


def test_hosts_without_hcas_get_a_loud_warning(product: Product, lab: Lab) -> None:
    for host in lab:
        host.change_hardware({**host.description(), "hcas": []})
    try:
        told = product("--inventory", lab.inventory, "--tags", "preflight").out
        run = product("--inventory", lab.inventory, "--tags", "preflight", "--json")
    finally:
        for host in lab:
            host.change_hardware(host.description())
    loud = [finding for finding in run.document["findings"] if finding["severity"] == "warning"]
    assert {finding["host"] for finding in loud if finding["code"] == "rdma-none"} == {"gpu-01", "gpu-02"}
    assert "WARNING" in told


def test_a_missing_shard_names_host_and_file(product: Product, lab: Lab) -> None:
    """One shard is gone on the worker, another is cut short on the head."""
    head, worker = lab.hosts
    gone, short = (f"{MODEL_PATH}/model-0000{number}-of-000008.safetensors" for number in (3, 5))
    kept = f"cp --archive {MODEL_PATH} /run/kept-model"
    for host, damage in ((worker, f"rm {gone}"), (head, f"truncate --size=-1 {short}")):
        host.run(["sh", "-euc", f"{kept}; {damage}"])
    try:
        run = product("--inventory", lab.inventory, "--json", "--tags", "weights", expect=4)
    finally:
        for host in lab:
            host.run(["sh", "-euc", f"cp --archive /run/kept-model/. {MODEL_PATH}; rm -r /run/kept-model"])
    told = {failure["host"]: failure["message"] for failure in run.document["failures"]}
    assert Path(gone).name in told[worker.name]
    assert Path(short).name in told[head.name]


def test_a_host_that_is_cut_off(product: Product, lab: Lab) -> None:
    worker = lab.hosts[1]
    worker.cut_off()
    try:
        run = product(
            *("--inventory", lab.inventory, "--json"),
            # A connection that was kept from an earlier run would be asked first, and given up much later.
            *("--extra-vars", "ansible_ssh_timeout=4 ansible_ssh_extra_args='-o ControlPath=none'"),
            expect=6,
            what="deploy with a host that is cut off",
        )
    finally:
        worker.reconnect()
        worker.wait_until_ready()
    (failure,) = run.document["failures"]
    assert (failure["host"], failure["code"]) == (worker.name, "ssh-timeout")
    assert failure["remedy"]


def test_a_changed_host_key(product: Product, lab: Lab, tmp_path: Path) -> None:
    """A host that presents another key than the one known for it is not talked to."""
    head, worker = lab.hosts
    lines = lab.known_hosts.read_text().splitlines()
    keys = {line.split()[0]: line.split(maxsplit=1)[1] for line in lines}
    swapped = tmp_path / "known_hosts"
    swapped.write_text(f"{head.address} {keys[head.address]}\n{worker.address} {keys[head.address]}\n")
    options = f"-o UserKnownHostsFile={swapped} -o StrictHostKeyChecking=yes -o ControlPath=none"
    run = product(
        *("--inventory", lab.inventory, "--json"),
        *("--extra-vars", f"ansible_ssh_common_args={shlex.quote(options)}"),
        expect=6,
    )
    (failure,) = run.document["failures"]
    assert (failure["host"], failure["code"]) == (worker.name, "ssh-host-key-changed")
