"""The benchmark on the deployed service: whatever happens to it, no row is lost, and none is made up."""

from __future__ import annotations

import csv
import json
import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import processes
import pytest
import sight
from product import Product, Run

from deploy_dsv3.lab.fleet import Lab
from deploy_dsv3.lab.hosts import Host

pytestmark = pytest.mark.usefixtures("deployed")

SMOKE = ("api_n64_in128_out64_dsv3", "api_n64_in256_out128_dsv3", "api_n32_in512_out256_dsv3")
#: As upstream's profile_restful_api.py writes them for the dataset `random`.
COLUMNS = (
    "backend,dataset_name,sharegpt_output_len,random_input_len,random_output_len,random_range_ratio,request_rate,"
    "completed,total_input_tokens,total_output_tokens,duration,request_throughput,input_throughput,"
    "output_throughput,mean_e2e_latency_ms,mean_ttft_ms,mean_tpot_ms,mean_itl_ms"
)
SMALL = ("--profile", "custom", "--num-prompts", "8", "--input-len", "64", "--output-len", "32")
SMALL_ROW = "api_n8_in64_out32_dsv3"
LOAD_GENERATOR = "deploy-dsv3-benchmark"
#: Kept connections would outlive an sshd that is gone.
FRESH_CONNECTIONS = ("--extra-vars", "ansible_ssh_timeout=4 ansible_ssh_extra_args='-o ControlPath=none'")


def record_of(folder: Path, row: str) -> dict[str, Any]:
    """A row's JSON."""
    found: dict[str, Any] = json.loads((folder / f"{row}.json").read_text())
    return found


def stored(folder: Path, row: str) -> dict[str, tuple[int, bytes]]:
    """A row's files: when each was written, and what is in it."""
    return {path.name: (path.stat().st_mtime_ns, path.read_bytes()) for path in folder.glob(f"{row}.*")}


def worker_at(folder: Path, row: str) -> int:
    """The process that measures a row; 0 while none does."""
    try:
        now = json.loads((folder / "progress.json").read_text())
    except (OSError, ValueError):
        return 0
    return int(now["pid"]) if (now.get("state"), now.get("row")) == ("running", row) else 0


def release_of(host: Host) -> dict[str, Any]:
    """What a head says that it runs."""
    found: dict[str, Any] = json.loads(host.run(["cat", "/etc/deploy-dsv3/release.json"]).stdout)
    return found


@contextmanager
def stopped(host: Host, unit: str) -> Iterator[None]:
    """A service that is not there for a while."""
    host.run(["systemctl", "stop", unit])
    try:
        yield
    finally:
        host.run(["systemctl", "start", unit])


# ---------------------------------------------------------------------- smoke, killed and cut off on the way


@dataclass(frozen=True, kw_only=True)
class Sweep:
    """`smoke`, killed in its second row, then without an endpoint in its third, then left alone."""

    folder: Path
    first_row: dict[str, tuple[int, bytes]]
    second_row: dict[str, tuple[int, bytes]]
    lost: Run
    refused: Run
    last: Run


@pytest.fixture(scope="module")
def sweep(product: Product, lab: Lab, tmp_path_factory: pytest.TempPathFactory) -> Sweep:
    folder = product.folder / "smoke"
    # The rate makes each row last for some seconds, however fast the stand-in is.
    wish = ("--profile", "smoke", "--request-rate", "12")
    command = ("benchmark", "--inventory", lab.inventory, *wish, "--output", folder)
    first, second, third = SMOKE
    log = tmp_path_factory.mktemp("sweep") / "log"

    with product.started(*command, log=log) as killed:
        sight.eventually(lambda: worker_at(folder, second), "the second row", within_s=120, seen=log.read_text)
        os.kill(worker_at(folder, second), signal.SIGKILL)
        killed.kill()
    first_row = stored(folder, first)

    with product.started(*command, log=log) as cut_off:
        sight.eventually(lambda: worker_at(folder, third), "the third row", within_s=120, seen=log.read_text)
        second_row = stored(folder, second)
        with stopped(lab.hosts[0], "dsv3-endpoint.service"):
            lost = Run(argv=(), exit_code=cut_off.wait(timeout=120), out=log.read_text(), err="", seconds=0)
            refused = product("benchmark", "--inventory", lab.inventory, *SMALL, "--output", "nobody-there", expect=6)

    last = product(*command, "--json", what="benchmark, what was missing of smoke")
    return Sweep(folder=folder, first_row=first_row, second_row=second_row, lost=lost, refused=refused, last=last)


def test_every_row_is_measured(sweep: Sweep) -> None:
    assert [row["name"] for row in sweep.last.document["rows"]] == list(SMOKE)
    assert [row["figures"]["completed"] for row in sweep.last.document["rows"]] == [64, 64, 32]
    assert [row["figures"]["failed"] for row in sweep.last.document["rows"]] == [0, 0, 0]


def test_what_was_measured_before_a_kill_stays_as_it_was(sweep: Sweep) -> None:
    assert set(sweep.first_row) == {f"{SMOKE[0]}.{kind}" for kind in ("csv", "json", "requests.jsonl")}
    assert stored(sweep.folder, SMOKE[0]) == sweep.first_row
    assert stored(sweep.folder, SMOKE[1]) == sweep.second_row


def test_what_was_cut_off_is_kept_and_not_counted(sweep: Sweep) -> None:
    kept = {path.name for path in (sweep.folder / "attempts").iterdir()}
    assert kept == {
        f"{SMOKE[1]}.1.requests.partial.jsonl",
        f"{SMOKE[2]}.1.json",
        f"{SMOKE[2]}.1.requests.jsonl",
    }


def test_an_endpoint_that_is_lost_is_told(sweep: Sweep) -> None:
    assert sweep.lost.exit_code == 6, sweep.lost.told
    assert f"{SMOKE[2]}: the endpoint was lost" in sweep.lost.told
    assert "the sweep goes on at this row" in sweep.lost.told


def test_an_endpoint_that_is_down_is_told_and_nothing_is_measured(sweep: Sweep, product: Product) -> None:
    assert "cannot connect" in sweep.refused.err
    assert "deploy-dsv3 status" in sweep.refused.err
    assert not list((product.folder / "nobody-there").glob("api_n*"))


def test_the_csv_is_upstreams(sweep: Sweep) -> None:
    for row in SMOKE:
        text = (sweep.folder / f"{row}.csv").read_text()
        assert text.splitlines()[0] == COLUMNS
        (line,) = csv.DictReader(text.splitlines())
        record = record_of(sweep.folder, row)
        assert (line["backend"], line["dataset_name"]) == ("lmdeploy", "random-synthetic")
        assert int(line["completed"]) == record["row"]["num_prompts"]
        assert float(line["output_throughput"]) == record["figures"]["output_throughput"] > 0
        requests = [json.loads(each) for each in (sweep.folder / f"{row}.requests.jsonl").read_text().splitlines()]
        assert int(line["total_input_tokens"]) == sum(each["prompt_len"] for each in requests)
        assert int(line["total_output_tokens"]) == sum(each["output_len"] for each in requests)
        # With ignore_eos the engine gives exactly what was asked for, and counts so.
        assert [each["counted"] for each in requests] == [[each["prompt_len"], each["output_len"]] for each in requests]


def test_the_json_has_everything(sweep: Sweep, lab: Lab, endpoint: str) -> None:
    release = release_of(lab.hosts[0])
    record = record_of(sweep.folder, SMOKE[0])
    about = record["environment"]
    assert (about["image"], about["versions"]) == (release["image"], release["versions"])
    assert about["image"]["digest"].startswith("sha256:")
    assert about["serve_argv"] == release["serve"]["argv"]
    assert (about["layout"], about["nodes"]) == ("TP16 on 2 nodes", ["gpu-01", "gpu-02"])
    assert about["gpus"]["per_node"] == {"gpu-01": 8, "gpu-02": 8}
    assert "H800" in about["gpus"]["name"]
    assert about["driver"] == lab.hosts[0].run(["cat", "/sys/module/nvidia/version"]).stdout.strip()
    assert about["nccl_transport"].startswith("RDMA over mlx5_0:1")
    assert about["max_batch_size"] == 1024
    assert (record["base_url"], record["model"], record["where"]) == (endpoint, sight.MODEL, "control")
    assert record["started"] < record["ended"]
    for latency in ("ttft_ms", "tpot_ms", "itl_ms", "e2e_ms"):
        spread = record["figures"][latency]
        # Tokens that arrive in one read have no time between them.
        assert spread["p50"] > 0 or latency == "itl_ms"
        assert 0 <= spread["p50"] <= spread["p90"] <= spread["p99"]
    assert record["errors"] == []


def test_the_pages_tell_of_every_row(sweep: Sweep, lab: Lab) -> None:
    digest = release_of(lab.hosts[0])["image"]["digest"]
    for name in ("report.html", "report.md"):
        text = (sweep.folder / name).read_text()
        for told in ("3 of 3 rows measured", "TP16 on 2 nodes", "SYNTHETIC", digest, "1 earlier attempt kept"):
            assert told in text, (name, told)


# ---------------------------------------------------------------------- refusals


def test_half_of_the_requests_failing_is_reported_and_in_no_figure(product: Product, lab: Lab) -> None:
    """Prompts of up to twice the model's context: with this seed four of eight are too long for it."""
    folder = product.folder / "half"
    row = "api_n8_in327680_out4_dsv3"
    wish = ("--profile", "custom", "--num-prompts", "8", "--input-len", "327680", "--output-len", "4", "--seed", "32")
    run = product("benchmark", "--inventory", lab.inventory, *wish, "--output", folder, expect=5)
    assert f"{row}: 4 of 8 requests failed" in run.err
    assert "must be smaller than the model context length (163840)" in run.err
    assert not (folder / f"{row}.csv").exists()
    kept = json.loads((folder / "attempts" / f"{row}.1.json").read_text())
    assert (kept["figures"]["completed"], kept["figures"]["failed"]) == (4, 4)
    assert sum(error["count"] for error in kept["errors"]) == 4
    assert "NOT COUNTED: 4 of 8 requests failed" in (folder / "report.md").read_text()


def test_what_is_wrong_beforehand_is_told_and_sends_nothing(product: Product, lab: Lab, tmp_path: Path) -> None:
    dataset = tmp_path / "sharegpt.json"
    dataset.write_text('[{"conversations": [{"value": "Hello"}, {"from": "gpt"}]}]')
    asked_before = _requests_of(lab.hosts[0])
    for options, told in (
        (("--profile", "smok"), "Did you mean smoke?"),
        ((*SMALL, "--dataset-path", dataset, "--output", tmp_path / "malformed"), "entry 0: not a conversation"),
        # sysfs refuses even root a new folder.
        ((*SMALL, "--output", "/sys/kernel/benchmark"), "cannot write the results into /sys/kernel/benchmark"),
        (("--profile", "smoke", "--fail-below", "0.9"), "nothing is published for"),
    ):
        run = product("benchmark", "--inventory", lab.inventory, *options, expect=2)
        assert told in run.err
        assert "remedy: " in run.err
    assert _requests_of(lab.hosts[0]) == asked_before


def _requests_of(host: Host) -> list[str]:
    """What the proxy noted of completions that were asked for by others than the launcher on the host."""
    log = host.run(["journalctl", "--unit=dsv3-endpoint.service", "--output=cat"]).stdout
    return [line for line in log.splitlines() if "POST /v1/completions" in line]


# ---------------------------------------------------------------------- floor, comparison, report


@pytest.fixture(scope="module")
def pair(product: Product, lab: Lab) -> tuple[Path, Path]:
    """Two runs of the same."""
    folders = (product.folder / "before", product.folder / "after")
    for folder in folders:
        product("benchmark", "--inventory", lab.inventory, *SMALL, "--output", folder)
    return folders


def test_a_floor_decides_the_exit_status(product: Product, lab: Lab, pair: tuple[Path, Path]) -> None:
    before, after = pair
    judged = ("benchmark", "--inventory", lab.inventory, *SMALL, "--output", after, "--against", before, "--json")
    assert product(*judged, "--fail-below", "0.01").exit_code == 0
    run = product(*judged, "--fail-below", "100", expect=5)
    rates = [record_of(folder, SMALL_ROW)["figures"]["output_throughput"] for folder in (after, before)]
    (row,) = run.document["rows"]
    assert row["share"] == pytest.approx(rates[0] / rates[1])
    assert f"below 10000% of the earlier run: {SMALL_ROW}" in run.document["error"]["message"]


def test_two_runs_are_compared(product: Product, pair: tuple[Path, Path]) -> None:
    before, after = pair
    (row,) = product("benchmark", "compare", before, after, "--json").document["rows"]
    assert row["name"] == SMALL_ROW
    assert row["before"] == record_of(before, SMALL_ROW)["figures"]["output_throughput"]
    assert row["after"] == record_of(after, SMALL_ROW)["figures"]["output_throughput"]
    assert row["verdict"] in ("faster", "slower", "within noise")
    assert SMALL_ROW in product("benchmark", "compare", before, after).out


def test_the_pages_are_made_again(product: Product, pair: tuple[Path, Path]) -> None:
    folder = pair[0]
    made = {path: path.read_text() for path in (folder / "report.html", folder / "report.md")}
    for path in made:
        path.unlink()
    product("benchmark", "report", folder)
    assert {path: path.read_text() for path in made} == made


# ---------------------------------------------------------------------- from the head


def test_the_head_goes_on_while_nobody_follows_and_ssh_is_down(product: Product, lab: Lab, tmp_path: Path) -> None:
    """One row of 45 seconds: its follower is killed; the next one takes over and loses the connection for a while."""
    head, folder, row = lab.hosts[0], product.folder / "from-head", "api_n20_in16_out16_dsv3"
    wish = ("--profile", "custom", "--num-prompts", "20", "--input-len", "16", "--output-len", "16")
    command = ("benchmark", "--inventory", lab.inventory, *wish, "--request-rate", "0.5", "--from", "head")
    command = (*command, "--output", folder, *FRESH_CONNECTIONS)
    log = tmp_path / "log"

    with product.started(*command, log=log) as killed:
        sight.eventually(lambda: _load_is_made(head), "the load is made", within_s=120, seen=log.read_text)
        family = processes.below(killed.pid)
        killed.kill()
    for pid in processes.left_of(family, within_s=10):
        os.kill(pid, signal.SIGKILL)

    with product.started(*command, log=log) as follower:
        sight.eventually(lambda: "following it" in log.read_text(), "it is followed", within_s=60, seen=log.read_text)
        with stopped(head, "ssh.service"):
            sight.eventually(
                lambda: "not reached, trying again" in log.read_text(), "it is lost", within_s=120, seen=log.read_text
            )
        assert follower.wait(timeout=300) == 0, log.read_text()

    record = record_of(folder, row)
    assert (record["where"], record["figures"]["completed"], record["figures"]["failed"]) == ("head", 20, 0)
    assert record["client"]["host"] == head.name
    assert not (folder / "attempts").exists(), "it was measured once"
    (line,) = csv.DictReader((folder / f"{row}.csv").read_text().splitlines())
    assert (line["completed"], line["request_rate"]) == ("20", "0.5")
    assert (folder / "report.html").is_file()
    assert head.run(["docker", "inspect", LOAD_GENERATOR], check=False).returncode != 0, "nothing is left there"
    assert head.run(["find", "/var/lib/deploy-dsv3/benchmark", "-mindepth", "1"]).stdout == ""


def _load_is_made(head: Host) -> bool:
    said = head.run(["sh", "-c", "cat /var/lib/deploy-dsv3/benchmark/*/progress.json"], check=False).stdout
    return '"running"' in said


# ---------------------------------------------------------------------- batch size and release


def test_a_row_for_another_batch_size_is_refused_with_the_choices(product: Product, lab: Lab) -> None:
    row = ("--profile", "published", "--rows", "4-5", "--num-prompts", "2")
    told = product("benchmark", "--inventory", lab.inventory, *row, "--output", "refused", expect=2).err
    assert "the engine runs with max batch size 1024 (LMDeploy" in told
    assert "api_n2_in2048_out16384_dsv3 needs 128" in told
    for choice in ("Nothing was measured", "--change-release", "--rows 4", "--any-batch-size"):
        assert choice in told
    assert not (product.folder / "refused").exists()


def test_hosts_that_differ_from_the_inventory_are_not_changed_for_a_row(product: Product, lab: Lab) -> None:
    row = ("--profile", "published", "--rows", "5", "--num-prompts", "2", "--change-release")
    other = ("--extra-vars", "lmdeploy_session_len=8192")
    before = sight.started_at(lab.hosts[0])
    told = product("benchmark", "--inventory", lab.inventory, *row, *other, "--output", "refused", expect=2).err
    assert "the hosts are not as the inventory says" in told
    assert sight.started_at(lab.hosts[0]) == before
    assert not (product.folder / "refused").exists()


def test_the_release_is_changed_for_a_row_and_put_back(product: Product, lab: Lab, endpoint: str) -> None:
    head, folder, row = lab.hosts[0], product.folder / "changed", "api_n2_in2048_out16384_dsv3"
    before = release_of(head)
    # With this seed the two ask for 705 and 815 tokens.
    wish = ("--profile", "published", "--rows", "5", "--num-prompts", "2", "--seed", "656", "--change-release")
    run = product(
        *("benchmark", "--inventory", lab.inventory, *wish, "--output", folder), what="benchmark, release changed"
    )
    assert "Changing the release: max batch size 128." in run.told
    assert "Putting the release back to the inventory's." in run.told
    record = record_of(folder, row)
    assert record["environment"]["max_batch_size"] == 128
    argv = record["environment"]["serve_argv"]
    assert argv[argv.index("--max-batch-size") + 1] == "128"
    report = (folder / "report.md").read_text()
    assert "the release was changed to max batch size 128 for it" in report
    assert "the row calls for" not in report
    after = release_of(head)
    assert (after["serve"], after["image"]) == (before["serve"], before["image"])
    assert product("plan", "--inventory", lab.inventory).out.endswith("nothing to do\n")
    assert sight.serves(endpoint)
