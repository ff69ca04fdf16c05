"""Where prompt text comes from: the ShareGPT file and the model's tokenizer."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from deploy_dsv3.errors import UsageError


def load_sharegpt(path: Path) -> list[tuple[str, str]]:
    """First two turns of each conversation that has two, in the file's order.

    The file is ShareGPT's: a JSON list of `{"conversations": [{"value": str}, ...]}`.

    Raises:
        UsageError: the file cannot be read, is not JSON, or an entry (named by its place) has another form.
    """
    remedy = "Give ShareGPT_V3_unfiltered_cleaned_split.json, or leave --dataset-path out for synthetic text."
    try:
        entries = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UsageError(f"dataset {path}: {error.strerror or error}", remedy=remedy) from error
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UsageError(f"dataset {path} is not JSON: {error}", remedy=remedy) from error
    if not isinstance(entries, list):
        raise UsageError(f"dataset {path}: found a {type(entries).__name__}, expected a list", remedy=remedy)
    pairs = []
    for place, entry in enumerate(entries):
        try:
            turns = entry["conversations"]
            if len(turns) >= 2:
                prompt, completion = turns[0]["value"], turns[1]["value"]
                if not (isinstance(prompt, str) and isinstance(completion, str)):
                    raise TypeError("a turn's value is not a string")
                pairs.append((prompt, completion))
        except (KeyError, TypeError, IndexError) as error:
            raise UsageError(
                f"dataset {path}, entry {place}: not a conversation ({type(error).__name__}: {error})",
                remedy=remedy,
            ) from error
    return pairs


class ModelTokenizer:
    """The model's own tokenizer, from `tokenizer.json` of its weights.

    Adds the leading begin-of-sentence token as `transformers` does for the same folder: its `tokenizer.json`
    does not say so for DeepSeek-V3, `add_bos_token` in `tokenizer_config.json` does.
    """

    def __init__(self, tokenizer: Any, bos_id: int | None) -> None:
        self._tokenizer = tokenizer
        self._bos_id = bos_id

    def encode(self, text: str) -> list[int]:
        ids: list[int] = self._tokenizer.encode(text).ids
        if self._bos_id is not None and ids[:1] != [self._bos_id]:
            return [self._bos_id, *ids]
        return ids

    def decode(self, ids: Sequence[int]) -> str:
        text: str = self._tokenizer.decode(list(ids), skip_special_tokens=False)
        return text


def load_tokenizer(path: Path) -> ModelTokenizer:
    """The tokenizer of a model folder, or of its `tokenizer.json`.

    Raises:
        UsageError: no such file, a file that is not a tokenizer, or the `tokenizers` library is missing.
    """
    folder, file = (path, path / "tokenizer.json") if path.is_dir() else (path.parent, path)
    remedy = "Name the model's folder or its tokenizer.json; without --tokenizer, prompts are counted words."
    if not file.is_file():
        raise UsageError(f"no tokenizer at {file}", remedy=remedy)
    try:
        from tokenizers import Tokenizer
    except ImportError as error:
        raise UsageError(
            "the `tokenizers` library is not installed", remedy="pip install 'deploy-dsv3[benchmark]'"
        ) from error
    try:
        tokenizer = Tokenizer.from_file(str(file))
        # A vocabulary of a few words loads, and fails at the first word it lacks.
        tokenizer.encode(" the quick brown fox, 42 文")
    except Exception as error:  # the library raises plain Exception
        raise UsageError(f"{file} is not a tokenizer for text: {error}", remedy=remedy) from error
    return ModelTokenizer(tokenizer, _leading_token(tokenizer, folder / "tokenizer_config.json"))


def _leading_token(tokenizer: Any, config_file: Path) -> int | None:
    if not config_file.is_file():
        return None
    try:
        config = json.loads(config_file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UsageError(f"{config_file} is not JSON: {error}", remedy="Compare it with the model's own.") from error
    if not config.get("add_bos_token"):
        return None
    token = config.get("bos_token")
    content = token.get("content") if isinstance(token, dict) else token
    found: int | None = tokenizer.token_to_id(content) if content else None
    return found
