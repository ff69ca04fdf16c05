"""The stand-in engine: deterministic, and as fragile as the real one; the recipe of its image."""

from __future__ import annotations

import asyncio
import importlib.metadata
import json
import sys
from pathlib import Path
from typing import Any

import prometheus_client
import pytest

from deploy_dsv3.lab.engine import recipe, standin
from deploy_dsv3.lab.engine.standin import cli, executors, ranks
from deploy_dsv3.lab.engine.standin.engine import (
    Engine,
    EngineDead,
    Sampling,
    context_length,
    tokenize,
    tokenize_chat,
)
from deploy_dsv3.lab.engine.standin.metrics import Metrics


class Ranks:
    """Ranks that can be told to die."""

    def __init__(self) -> None:
        self.steps, self.dead = 0, False

    def load(self) -> None:
        pass

    async def forward(self) -> None:
        self.steps += 1
        if self.dead:
            raise ConnectionError("a rank is gone")

    def close(self) -> None:
        pass


def run_engine(work: Any, ranks_: Ranks | None = None, *, context: int = 1000, max_batch: int = 8) -> Any:
    """Run `await work(engine)` with a started engine."""

    async def main() -> Any:
        metrics = Metrics("m", prometheus_client.CollectorRegistry())
        engine = Engine(ranks_ or Ranks(), context=context, max_batch=max_batch, metrics=metrics)
        engine.start()
        try:
            return await work(engine)
        finally:
            await engine.stop()

    return asyncio.run(main())


async def generate(engine: Engine, prompt: str, **sampling: Any) -> tuple[list[int], str]:
    tokens, reason = [], ""
    async for step in engine.generate(tokenize(prompt), Sampling(**sampling)):
        if step.token is not None:
            tokens.append(step.token)
        reason = step.finish_reason or reason
    return tokens, reason


def test_the_same_prompt_at_temperature_0_gives_the_same_tokens() -> None:
    async def twice(engine: Engine) -> list[Any]:
        return [await generate(engine, "hello", temperature=0) for _ in range(2)]

    first, second = run_engine(twice)
    assert first == second == run_engine(twice)[0]
    assert first[1] == "stop"


def test_another_prompt_or_a_temperature_gives_others() -> None:
    async def four(engine: Engine) -> list[Any]:
        return [
            await generate(engine, "hello", temperature=0, max_tokens=8, ignore_eos=True),
            await generate(engine, "hallo", temperature=0, max_tokens=8, ignore_eos=True),
            await generate(engine, "hello", temperature=1, max_tokens=8, seed=1, ignore_eos=True),
            await generate(engine, "hello", temperature=1, max_tokens=8, seed=2, ignore_eos=True),
        ]

    tokens = [tuple(tokens) for tokens, _ in run_engine(four)]
    assert len(set(tokens)) == 4


@pytest.mark.parametrize(
    ("sampling", "count", "reason"),
    [
        ({"max_tokens": 3}, 3, "length"),
        ({"max_tokens": 200, "ignore_eos": True}, 200, "length"),
        ({"ignore_eos": True}, 999, "length"),
    ],
)
def test_the_number_of_tokens_is_what_was_asked_for(sampling: dict[str, Any], count: int, reason: str) -> None:
    found = run_engine(lambda engine: generate(engine, "hello", temperature=0, **sampling))
    assert (len(found[0]), found[1]) == (count, reason)


def test_requests_beyond_a_batch_wait_and_are_served() -> None:
    async def many(engine: Engine) -> list[Any]:
        return await asyncio.gather(*[generate(engine, str(n), max_tokens=4) for n in range(20)])

    assert [len(tokens) for tokens, _ in run_engine(many, max_batch=2)] == [4] * 20


def test_a_lost_rank_ends_every_request_and_the_health() -> None:
    ranks_ = Ranks()

    async def lose(engine: Engine) -> tuple[str, str]:
        assert engine.health()[0] == "healthy"
        await generate(engine, "hello", max_tokens=1)
        ranks_.dead = True
        # Idle, nothing is noticed: as with the real engine.
        await asyncio.sleep(0.05)
        assert engine.health()[0] == "healthy"
        for _ in range(2):
            with pytest.raises(EngineDead, match="a rank is gone"):
                await generate(engine, "hello", max_tokens=1)
        return engine.health()

    assert run_engine(lose, ranks_) == ("unhealthy", "PyTorch engine main loop has stopped.")


def test_tokens_are_counted_as_the_recorded_server_counted_them() -> None:
    assert len(tokenize("hello world")) == 2
    assert len(tokenize("word " * 60000)) == 60001
    assert len(tokenize_chat([{"role": "user", "content": "hello"}])) == 4
    parts = [{"type": "text", "text": "hello"}, {"type": "text", "text": "world"}]
    assert len(tokenize_chat([{"role": "user", "content": parts}])) == 5


def test_a_model_must_be_whole_on_every_rank(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="is no folder"):
        ranks.check_model(str(tmp_path / "absent"))
    with pytest.raises(OSError, match=r"config\.json"):
        ranks.check_model(str(tmp_path))
    (tmp_path / "config.json").write_text('{"max_position_embeddings": 163840}')
    index = {"weight_map": {"a": "model-1.safetensors", "b": "model-2.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    (tmp_path / "model-1.safetensors").touch()
    with pytest.raises(OSError, match=r"model-2\.safetensors is missing"):
        ranks.check_model(str(tmp_path))
    (tmp_path / "model-2.safetensors").touch()
    ranks.check_model(str(tmp_path))
    assert context_length(str(tmp_path), None) == 163840
    assert context_length(str(tmp_path), 4096) == 4096


def test_ranks_meet_at_the_first_ones_port() -> None:
    port = executors._free_port()
    first, second = ranks.RayWorkerWrapper("m"), ranks.RayWorkerWrapper("m")
    first.init_process_group(0, "127.0.0.1", port)
    second.init_process_group(1, "127.0.0.1", port)
    with pytest.raises(OSError, match="in use"):
        ranks.RayWorkerWrapper("m").init_process_group(0, "127.0.0.1", port)


@pytest.mark.parametrize(
    ("tp", "option", "variable", "expected"),
    [
        (1, None, "", "LocalExecutor"),
        (16, None, "", "RayExecutor"),
        (1, "ray", "", "RayExecutor"),
        (1, None, "ray", "RayExecutor"),
        (16, "uni", "ray", "LocalExecutor"),
    ],
)
def test_ray_is_used_when_the_real_one_uses_it(
    monkeypatch: pytest.MonkeyPatch, tp: int, option: str | None, variable: str, expected: str
) -> None:
    monkeypatch.setattr(executors, "RayExecutor", lambda path, tp: type("RayExecutor", (), {})())
    monkeypatch.setenv("LMDEPLOY_EXECUTOR_BACKEND", variable)
    assert type(executors.choose("/m", tp, option)).__name__ == expected


def test_it_says_what_it_is(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        cli.run(["--version"])
    assert ended.value.code == 0
    assert capsys.readouterr().out.strip() == f"{standin.IMITATES}+standin"


def test_an_empty_boolean_in_the_environment_stops_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LMDEPLOY_SKIP_WARMUP", "")
    with pytest.raises(ValueError, match="'LMDEPLOY_SKIP_WARMUP=' to boolean"):
        cli.run(["serve", "api_server", "/absent"])


# -- the image


def test_the_fingerprint_changes_with_every_input(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = recipe.fingerprint()
    assert len(before) == 12
    assert before == recipe.fingerprint()
    lock = tmp_path / "requirements.lock"
    lock.write_text("ray==9\n")
    monkeypatch.setattr(recipe, "_LOCK", lock)
    assert recipe.fingerprint() != before


def test_the_image_finds_the_stand_in_under_the_name_of_the_real_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe._install_standin(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    entry = next(iter(importlib.metadata.entry_points(group="console_scripts", name="lmdeploy")))
    for name in [name for name in sys.modules if name.partition(".")[0] == "lmdeploy"]:
        monkeypatch.delitem(sys.modules, name)
    assert importlib.metadata.version("lmdeploy") == standin.__version__
    assert Path(entry.load().__code__.co_filename).is_relative_to(tmp_path)


def test_what_ray_needs_at_run_time_is_kept(tmp_path: Path) -> None:
    for name in ("ray/rllib/a.py", "ray/jars/a.jar", "ray/core/src/gcs_server", "ray/util/a.pyi", "ray/b.py"):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    recipe._strip(tmp_path)
    kept = {str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*") if path.is_file()}
    assert kept == {"ray/core/src/gcs_server", "ray/b.py"}


def test_the_image_is_pinned_and_holds_the_ray_that_is_claimed() -> None:
    lock = recipe._LOCK.read_text()
    assert "\nray==2.60.0 \\\n    --hash=sha256:" in f"\n{lock}"
    assert all("==" in line or line.lstrip().startswith(("--hash", "#")) for line in lock.splitlines())
