"""`deploy-dsv3 benchmark` from the command line, against a real server: results, resume, refusals, verdicts."""

from __future__ import annotations

import csv
import io
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from counterpart import Server

from deploy_dsv3 import cli
from deploy_dsv3.benchmark.runs import RunFolder

Serve = Callable[..., Server]
ROW = "api_n12_in32_out16_dsv3"
SMALL = ("--profile", "custom", "--num-prompts", "12", "--input-len", "32", "--output-len", "16")


class Done(NamedTuple):
    returncode: int
    stdout: str
    stderr: str


class Command:
    """Runs the command in a folder of its own: in this process, or as one where signals are sent to it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def start(self, *arguments: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [sys.executable, "-m", "deploy_dsv3", "benchmark", *arguments],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def run(self, *arguments: str) -> Done:
        out, err = io.StringIO(), io.StringIO()
        with redirect_stdout(out), redirect_stderr(err):
            status = cli.run(["benchmark", *arguments])
        return Done(status, out.getvalue(), err.getvalue())

    def json(self, *arguments: str) -> dict[str, Any]:
        done = self.run(*arguments, "--json")
        document: dict[str, Any] = json.loads(done.stdout)
        assert document["exit_code"] == done.returncode
        return document


@pytest.fixture
def command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Command:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    return Command(tmp_path)


def wait_for(condition: Callable[[], Any], seconds: float = 30) -> Any:
    deadline = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < deadline, "did not happen in time"
        time.sleep(0.05)
    return found


def state(folder: Path) -> dict[str, Any]:
    return RunFolder(folder).state("progress.json")


def at_work(folder: Path, row: str) -> int:
    """The worker's process once it measures the row; 0 before."""
    now = state(folder)
    return int(now["pid"]) if (now.get("state"), now.get("row")) == ("running", row) else 0


def test_a_sweep_from_end_to_end(serve: Serve, command: Command) -> None:
    server = serve(step_s=0.001)
    document = command.json("--base-url", server.url, "--profile", "smoke")
    folder = command.folder / document["folder"]
    assert [row["name"] for row in document["rows"]] == [
        "api_n64_in128_out64_dsv3",
        "api_n64_in256_out128_dsv3",
        "api_n32_in512_out256_dsv3",
    ]
    for row in document["rows"]:
        with (folder / f"{row['name']}.csv").open(newline="") as file:
            (line,) = csv.DictReader(file)
        assert float(line["output_throughput"]) == pytest.approx(row["figures"]["output_throughput"])
        assert line["dataset_name"] == "random-synthetic"
        requests = (folder / f"{row['name']}.requests.jsonl").read_text().splitlines()
        assert len(requests) == int(line["completed"])
        assert sum(json.loads(each)["output_len"] for each in requests) == int(line["total_output_tokens"])
        record = json.loads((folder / f"{row['name']}.json").read_text())
        assert record["client"]["peak_memory_mib"] > 0
        assert record["figures"]["ttft_ms"].keys() >= {"p50", "p90", "p99"}
    assert (folder / "report.html").is_file()
    assert "| any | 64 | 128 | 64 |" in (folder / "report.md").read_text()
    # One warm-up a row, as upstream.
    assert server.seen.completions == 64 + 64 + 32 + 3
    again = command.json("--base-url", server.url, "--profile", "smoke", "--output", str(folder))
    assert again["rows"] == document["rows"]
    assert server.seen.completions == 163


def test_resume_after_a_kill_measures_only_what_is_missing(serve: Serve, command: Command) -> None:
    server = serve(step_s=0.001)
    sweep = ("--base-url", server.url, "--profile", "smoke", "--output", "run")
    folder = command.folder / "run"
    process = command.start(*sweep)
    first = folder / "api_n64_in128_out64_dsv3.json"
    wait_for(first.exists)
    server.behaviour.step_s = 0.2  # so that the second row is caught at work
    pid = wait_for(lambda: at_work(folder, "api_n64_in256_out128_dsv3"))
    os.kill(pid, signal.SIGKILL)
    out, err = process.communicate(timeout=30)
    assert process.returncode == 4, out + err
    assert "ended without a word" in err
    before = {path.name: (path.stat().st_mtime_ns, path.read_bytes()) for path in folder.glob("api_n64_in128*")}
    server.behaviour.step_s = 0.001
    done = command.run(*sweep)
    assert done.returncode == 0, done.stdout + done.stderr
    after = {path.name: (path.stat().st_mtime_ns, path.read_bytes()) for path in folder.glob("api_n64_in128*")}
    assert after == before
    assert len(RunFolder(folder).results()) == 3
    assert [path.name for path in (folder / "attempts").iterdir()] == [
        "api_n64_in256_out128_dsv3.1.requests.partial.jsonl"
    ]


def test_a_run_that_was_stopped_is_found_again_without_naming_it(serve: Serve, command: Command) -> None:
    server = serve(step_s=0.05)
    process = command.start("--base-url", server.url, *SMALL)
    (folder,) = wait_for(lambda: list((command.folder / "benchmark-results").glob("endpoint-custom-*")))
    wait_for(lambda: at_work(folder, ROW))
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=30)
    assert process.returncode == 130, out + err
    assert "rows that are measured are kept" in err
    server.behaviour.step_s = 0.0
    document = command.json("--base-url", server.url, *SMALL)
    assert command.folder / document["folder"] == folder
    # All done: the next one is a new run.
    assert command.folder / command.json("--base-url", server.url, *SMALL)["folder"] != folder


def test_the_sweep_goes_on_when_the_terminal_goes_away(serve: Serve, command: Command) -> None:
    server = serve(step_s=0.6)
    sweep = ("--base-url", server.url, *SMALL, "--output", "run")
    folder = command.folder / "run"
    process = command.start(*sweep)
    wait_for(lambda: at_work(folder, ROW))
    process.send_signal(signal.SIGHUP)
    process.communicate(timeout=30)
    assert process.returncode == -signal.SIGHUP
    followed = command.run(*sweep)
    assert followed.returncode == 0, followed.stdout + followed.stderr
    assert "following it" in followed.stdout
    # It was measured once: nothing began anew.
    assert server.seen.completions == 12 + 1
    assert not (folder / "attempts").exists()


def test_detach_returns_at_once(serve: Serve, command: Command) -> None:
    server = serve(step_s=0.02)
    sweep = ("--base-url", server.url, *SMALL, "--output", "run")
    assert command.json(*sweep, "--detach")["detached"] is True
    wait_for((command.folder / "run" / f"{ROW}.json").exists)
    assert command.run(*sweep).returncode == 0


def test_half_of_the_requests_failing_does_not_count_and_is_kept(serve: Serve, command: Command) -> None:
    server = serve(fail_every=2)
    sweep = ("--base-url", server.url, *SMALL, "--output", "run")
    done = command.run(*sweep)
    folder = command.folder / "run"
    assert done.returncode == 5
    assert "6 of 12 requests failed, most often (6 times): HTTP 500 engine error" in done.stderr
    assert not (folder / f"{ROW}.csv").exists()
    record = json.loads((folder / "attempts" / f"{ROW}.1.json").read_text())
    assert record["errors"] == [{"error": "HTTP 500 engine error", "count": 6}]
    assert "NOT COUNTED: 6 of 12 requests failed" in (folder / "report.md").read_text()
    server.behaviour.fail_every = 0
    again = command.run(*sweep)
    assert again.returncode == 0
    assert "1 earlier attempt kept" in (folder / "report.md").read_text()


def test_a_few_failures_are_allowed_if_asked_for_and_always_told(serve: Serve, command: Command) -> None:
    # The warm-up is the first completion, so the seventh fails in the row.
    server = serve(fail_every=7)
    sweep = ("--base-url", server.url, *SMALL, "--output", "run")
    document = command.json(*sweep, "--max-failed", "0.2")
    assert document["exit_code"] == 0
    (row,) = document["rows"]
    assert (row["figures"]["completed"], row["figures"]["failed"]) == (11, 1)
    assert row["errors"] == [{"error": "HTTP 500 engine error", "count": 1}]
    assert "1 of 12 requests FAILED" in (command.folder / "run" / "report.md").read_text()


def test_an_endpoint_that_vanishes_ends_the_sweep_and_loses_nothing(serve: Serve, command: Command) -> None:
    server = serve(step_s=0.001, vanish_after=85)
    sweep = ("--profile", "smoke", "--output", "run", "--concurrency", "4")
    done = command.run("--base-url", server.url, *sweep)
    assert done.returncode == 6
    assert "api_n64_in256_out128_dsv3: the endpoint was lost" in done.stderr
    assert "What is measured so far: run/report.html" in done.stderr
    folder = command.folder / "run"
    assert [result.row.name for result in RunFolder(folder).results()] == ["api_n64_in128_out64_dsv3"]
    assert len(list((folder / "attempts").glob("api_n64_in256_out128_dsv3.1.*"))) == 2
    back = serve(step_s=0.001)
    assert command.run("--base-url", back.url, *sweep).returncode == 0
    assert len(RunFolder(folder).results()) == 3


def test_wrong_key_and_endpoint_down_measure_nothing(serve: Serve, command: Command) -> None:
    server = serve(api_key="sk-right-key")
    key_file = command.folder / "key"
    key_file.touch(mode=0o600)
    key_file.write_text("sk-wrong-key\n")
    wrong = command.run("--base-url", server.url, "--api-key-file", str(key_file), *SMALL)
    assert (wrong.returncode, "the API key is wrong" in wrong.stderr) == (2, True)
    down = command.run("--base-url", "http://127.0.0.1:9", *SMALL)
    assert (down.returncode, "cannot connect" in down.stderr) == (6, True)
    assert "remedy: The port opens only after the weights are loaded" in down.stderr
    assert server.seen.completions == 0


def test_the_key_shows_nowhere(serve: Serve, command: Command) -> None:
    server = serve(api_key="sk-canary-0451", step_s=0.03)
    key_file = command.folder / "key"
    key_file.touch(mode=0o600)
    key_file.write_text("sk-canary-0451\n")
    process = command.start("--base-url", server.url, "--api-key-file", str(key_file), *SMALL, "--output", "run")
    folder = command.folder / "run"
    pid = wait_for(lambda: at_work(folder, ROW))
    for place in ("cmdline", "environ"):
        assert b"sk-canary" not in Path(f"/proc/{pid}/{place}").read_bytes()
    out, err = process.communicate(timeout=60)
    assert process.returncode == 0, out + err
    assert server.seen.authorization == {"Bearer sk-canary-0451"}
    for path in folder.rglob("*"):
        assert path.is_dir() or b"sk-canary" not in path.read_bytes()
    assert "sk-canary" not in out + err


def test_a_key_file_that_others_can_read_is_refused(serve: Serve, command: Command) -> None:
    key_file = command.folder / "key"
    key_file.write_text("sk-open")
    key_file.chmod(0o644)
    done = command.run("--base-url", serve().url, "--api-key-file", str(key_file), *SMALL)
    assert done.returncode == 2
    assert "can be read by other users" in done.stderr


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (("--profile", "smoky"), "Did you mean smoke?"),
        (("--profile", "smoke", "--rows", "9"), "is no row of smoke"),
        (("--profile", "smoke", "--output", "/sys/kernel/benchmark"), "cannot write the results"),
        (("--profile", "smoke", "--fail-below", "0.9"), "nothing is published for api_n64_in128_out64_dsv3"),
        (("--profile", "smoke", "--against", "."), "Add --fail-below"),
        (("--profile", "smoke", "--fail-below", "0.9", "--against", "."), "no benchmark run in"),
        (("--profile", "smoke", "--from", "head"), "--from head needs an inventory"),
        (("--profile", "smoke", "--inventory", "x.ini"), "name two endpoints"),
        ((*SMALL, "--dataset-path", "absent.json"), "dataset .*absent.json: No such file"),
        ((*SMALL, "--tokenizer", "absent"), "no tokenizer at"),
    ],
)
def test_refusals_exit_2_and_send_nothing(
    serve: Serve, command: Command, arguments: tuple[str, ...], told: str
) -> None:
    server = serve()
    done = command.run("--base-url", server.url, *arguments)
    assert done.returncode == 2, done.stdout + done.stderr
    assert re.search(told, done.stderr), done.stderr
    assert server.seen.completions == 0
    assert not list(command.folder.glob("benchmark-results/*/*.csv"))


def test_no_endpoint_at_all_is_refused(command: Command) -> None:
    done = command.run("--profile", "smoke")
    assert done.returncode == 2
    assert "no inventory given" in done.stderr


def test_a_malformed_dataset_is_refused_and_the_run_can_go_on(
    serve: Serve, command: Command, sharegpt: Path, model_folder: Path
) -> None:
    server = serve()
    dataset = command.folder / "dataset.json"
    dataset.write_text('[{"conversations": [{"value": "a"}, {"from": "gpt"}]}]')
    sweep = ("--base-url", server.url, *SMALL, "--dataset-path", str(dataset), "--tokenizer", str(model_folder))
    done = command.run(*sweep)
    assert done.returncode == 2
    assert "entry 0: not a conversation" in done.stderr
    assert server.seen.completions == 0
    dataset.write_bytes(sharegpt.read_bytes())
    document = command.json(*sweep)
    assert document["rows"][0]["text"] == "sharegpt"


def test_the_floor_decides_the_exit_status(serve: Serve, command: Command) -> None:
    server = serve(step_s=0.02)
    base = ("--base-url", server.url, *SMALL)
    earlier = command.json(*base, "--output", "earlier")
    assert command.run(*base, "--output", "a", "--fail-below", "0.5", "--against", "earlier").returncode == 0
    server.behaviour.step_s = 0.1
    slow = command.json(*base, "--output", "b", "--fail-below", "0.9", "--against", "earlier")
    assert slow["exit_code"] == 5
    share = slow["rows"][0]["share"]
    rates = [run["rows"][0]["figures"]["output_throughput"] for run in (slow, earlier)]
    assert share == pytest.approx(rates[0] / rates[1])
    assert f"below 90% of the earlier run: {ROW} with {share:.1%}" in slow["error"]["message"]


def test_the_floor_against_the_published_figures(serve: Serve, command: Command) -> None:
    server = serve()
    one = ("--base-url", server.url, "--profile", "published", "--rows", "1", "--num-prompts", "8")
    assert command.run(*one, "--output", "a", "--fail-below", "0.001").returncode == 0
    below = command.run(*one, "--output", "a", "--fail-below", "99999")
    assert below.returncode == 5
    assert "FAILED, below 9999900% of the published output throughput" in below.stdout


def test_compare_and_report(serve: Serve, command: Command) -> None:
    server = serve(step_s=0.005)
    base = ("--base-url", server.url, *SMALL)
    command.json(*base, "--output", "before")
    server.behaviour.step_s = 0.03
    command.json(*base, "--output", "after")
    compared = command.run("compare", "before", "after", "--json")
    assert compared.returncode == 0
    (row,) = json.loads(compared.stdout)["rows"]
    assert row["verdict"] == "slower"
    assert row["ratio"] < 0.5
    assert "slower (too short to tell noise from change" in command.run("compare", "before", "after").stdout
    missing = command.run("compare", "before", "nowhere")
    assert (missing.returncode, "no benchmark run in nowhere" in missing.stderr) == (2, True)
    (command.folder / "after" / "report.html").unlink()
    assert command.run("report", "after").returncode == 0
    assert (command.folder / "after" / "report.html").is_file()
