"""The weights module says what is missing and damaged, by file, and nothing of a complete folder."""

from __future__ import annotations

import json
import struct
from pathlib import Path

import modules
import pytest

NAMES = ["model-00001-of-000002.safetensors", "model-00002-of-000002.safetensors"]


def write_shard(path: Path, tensor_bytes: int) -> None:
    """A shard of one uint8 tensor, laid out as the safetensors format says."""
    header = json.dumps({"w": {"dtype": "U8", "shape": [tensor_bytes], "data_offsets": [0, tensor_bytes]}}).encode()
    path.write_bytes(struct.pack("<Q", len(header)) + header + b"\0" * tensor_bytes)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "config.json").write_text("{}")
    for name in NAMES:
        write_shard(tmp_path / name, 1000)
    weight_map = {"a": NAMES[0], "b": NAMES[1], "c": NAMES[1]}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return tmp_path


def check(folder: Path, capsys: pytest.CaptureFixture[str]) -> dict:
    return modules.run("dsv3_weights", capsys, {"path": str(folder)})


def test_complete(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    result = check(folder, capsys)
    assert "failed" not in result
    assert result["shards"] == 2
    assert result["bytes"] == sum((folder / name).stat().st_size for name in NAMES)


def test_missing_shard_is_named(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / NAMES[1]).unlink()
    result = check(folder, capsys)
    assert result["failed"]
    assert result["missing"] == [NAMES[1]]
    assert f"1 of 2 shards are missing: {NAMES[1]}" in result["msg"]


def test_truncated_shard_is_named_with_both_sizes(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    whole = (folder / NAMES[0]).read_bytes()
    (folder / NAMES[0]).write_bytes(whole[:-7])
    result = check(folder, capsys)
    assert result["truncated"] == [{"shard": NAMES[0], "found": len(whole) - 7, "expected": len(whole)}]
    assert f"{NAMES[0]} (has {len(whole) - 7} bytes, its header asks for {len(whole)})" in result["msg"]


@pytest.mark.parametrize("content", [b"", b"\x05\0\0\0\0\0\0\0{", b"<html>404 not found, says the proxy</html>"])
def test_what_is_no_safetensors_is_named(folder: Path, capsys: pytest.CaptureFixture[str], content: bytes) -> None:
    (folder / NAMES[0]).write_bytes(content)
    result = check(folder, capsys)
    assert result["failed"]
    assert [entry["shard"] for entry in result["truncated"]] == [NAMES[0]]


def test_single_file_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "config.json").write_text("{}")
    write_shard(tmp_path / "model.safetensors", 64)
    assert check(tmp_path, capsys)["shards"] == 1


def test_missing_config(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "config.json").unlink()
    assert "config.json is missing" in check(folder, capsys)["msg"]


def test_no_index(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "model.safetensors.index.json").unlink()
    assert "neither model.safetensors.index.json nor model.safetensors" in check(folder, capsys)["msg"]


def test_no_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    result = check(tmp_path / "absent", capsys)
    assert "does not exist on this host" in result["msg"]
