"""The head's part: the bundle that runs there, and the playbooks that carry it."""

from __future__ import annotations

import ast
import json
import os
import subprocess
import sys
import zipfile
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import pytest
from counterpart import Server

from deploy_dsv3 import verbs
from deploy_dsv3.benchmark import head as head_module
from deploy_dsv3.benchmark.head import Head, build_bundle
from deploy_dsv3.benchmark.profiles import Wishes, find_profile, make_plan
from deploy_dsv3.benchmark.runs import RunFolder
from deploy_dsv3.benchmark.target import Target
from deploy_dsv3.benchmark.worker import Job
from deploy_dsv3.errors import HostError
from deploy_dsv3.options import Options

Serve = Callable[..., Server]
PLAYBOOKS = Path(head_module.__file__).with_name("playbooks")


def prepared(folder: Path, url: str) -> RunFolder:
    plan = make_plan(find_profile("custom"), Wishes(num_prompts=6, input_len=8, output_len=8))
    run = RunFolder(folder)
    run.create(plan, {"base_url": url})
    rows = tuple(row.name for row in plan.rows)
    run.write_state("job.json", asdict(Job(rows=rows, base_url=url, where="head", environment={})))
    return run


def test_the_bundle_measures_by_itself(serve: Serve, tmp_path: Path) -> None:
    server = serve(api_key="sk-head")
    run = prepared(tmp_path / "run", server.url)
    key = tmp_path / "key"
    key.write_text("sk-head")
    bundle = build_bundle(tmp_path)
    done = subprocess.run([sys.executable, "-I", str(bundle), str(run.path), str(key)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (result,) = run.results()
    assert (result.figures.completed, result.record["where"]) == (6, "head")
    assert server.seen.authorization == {"Bearer sk-head"}
    assert not key.exists()


def test_the_bundle_has_all_that_it_imports_of_ours(tmp_path: Path) -> None:
    bundle = build_bundle(tmp_path)
    code = (
        f"import sys, json; sys.path.insert(0, {str(bundle)!r}); import deploy_dsv3.benchmark.worker;"
        "print(json.dumps([m.__file__ for n, m in sys.modules.items() if n.split('.')[0] == 'deploy_dsv3']))"
    )
    done = subprocess.run([sys.executable, "-I", "-c", code], capture_output=True, text=True, check=True)
    files = json.loads(done.stdout)
    assert len(files) > len(head_module.WORKER_MODULES)
    assert all(file.startswith(str(bundle)) for file in files)


def test_the_bundle_is_written_for_the_oldest_python_of_an_engine_image(tmp_path: Path) -> None:
    """LMDeploy's images had Python 3.10 until 0.12; newer syntax and `datetime.UTC` and its like would fail there."""
    newer = ("from datetime import UTC", "asyncio.TaskGroup", "asyncio.timeout", "import tomllib", "StrEnum", "Self")
    with zipfile.ZipFile(build_bundle(tmp_path)) as bundle:
        for name in bundle.namelist():
            if name.endswith(".py"):
                source = bundle.read(name).decode()
                ast.parse(source, filename=name, feature_version=(3, 10))
                assert not [word for word in newer if word in source], name


def test_an_image_without_what_it_needs_is_told(tmp_path: Path) -> None:
    bundle = build_bundle(tmp_path)
    folder, key = tmp_path / "run", tmp_path / "key"
    folder.mkdir()
    key.write_text("sk")
    # -S leaves out site-packages: the plain Python of an image without numpy and aiohttp.
    done = subprocess.run([sys.executable, "-I", "-S", str(bundle), str(folder), str(key)], check=False)
    assert done.returncode == 2
    error = RunFolder(folder).state("progress.json")["error"]
    assert error["message"].startswith("the engine's image cannot make the load: No module named")
    assert "--from control" in error["remedy"]
    assert not key.exists()


@pytest.fixture
def head(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Head:
    """This machine as the head, over Ansible's local connection."""
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    inventory = tmp_path / "here.ini"
    python = f"ansible_python_interpreter={sys.executable}"
    inventory.write_text(f"[dsv3_head]\nhere ansible_connection=local ansible_become=false {python}\n")
    options = Options(inventories=(inventory,))
    weights = tmp_path / "weights"
    weights.mkdir()
    target = Target(base_url="http://127.0.0.1:9", replica="dsv3", head="here", weights_path=str(weights))
    return Head(verbs.load(options, whole_replicas=True), options, target)


def test_the_tokenizer_comes_from_the_deployed_weights(head: Head, tmp_path: Path, model_folder: Path) -> None:
    assert head.fetch_tokenizer() is None
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / "weights" / name).write_bytes((model_folder / name).read_bytes())
    folder = head.fetch_tokenizer()
    assert folder is not None
    assert (folder / "tokenizer.json").read_bytes() == (model_folder / "tokenizer.json").read_bytes()
    assert (folder / "tokenizer_config.json").is_file()


def test_a_task_that_fails_is_told_with_its_host(head: Head, tmp_path: Path) -> None:
    variables = {"benchmark_folder": str(tmp_path / "there"), "benchmark_bundle": str(tmp_path / "absent.pyz")}
    with pytest.raises(HostError, match=r"here: Carry over the load generator: .*absent.pyz") as failed:
        head.play("start", {**variables, "benchmark_api_key": "sk-canary"}, secret="sk-canary")
    assert failed.value.remedy
    kept = [path for path in (tmp_path / "state").rglob("*") if path.is_file()]
    assert kept
    assert not [path for path in kept if b"sk-canary" in path.read_bytes()]


def test_the_playbooks_are_sound() -> None:
    books = sorted(str(path) for path in PLAYBOOKS.glob("*.yml"))
    assert len(books) == 5
    done = subprocess.run(
        ["ansible-playbook", "--syntax-check", "-i", "here,", "-e", "benchmark_head=here", *books],
        capture_output=True,
        text=True,
        env={**os.environ, "LC_ALL": "C.UTF-8", "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"},
    )
    assert done.returncode == 0, done.stderr
