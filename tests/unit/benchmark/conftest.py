from __future__ import annotations

import json
import random
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

# The server that stands in for an engine is the one that benchmarks/ measures the generator against.
sys.path.insert(0, str(Path(__file__).parents[3] / "benchmarks"))

from counterpart import Behaviour, Server, running

_WORDS = ("model", "token", "prefill", "decode", "expert", "router", "latent", "cache", "the", "of", "and", "is")


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "browser: looks at a page in headless Chromium (./dev installs it)")


@pytest.fixture
def serve() -> Iterator[Callable[..., Server]]:
    """Starts servers; `serve(step_s=0.01)` takes what `counterpart.Behaviour` takes."""
    with ExitStack() as stack:

        def start(**behaviour: object) -> Server:
            tls = behaviour.pop("tls", None)
            return stack.enter_context(running(Behaviour(**behaviour), tls=tls))  # type: ignore[arg-type]

        yield start


@pytest.fixture(scope="session")
def conversations() -> list[tuple[str, str]]:
    """Pairs of turns as ShareGPT has them: 3 to 300 words each."""
    rng = random.Random(7)
    texts = [" ".join(rng.choices(_WORDS, k=rng.randint(3, 300))) for _ in range(400)]
    return list(zip(texts[::2], texts[1::2], strict=True))


@pytest.fixture(scope="session")
def sharegpt(tmp_path_factory: pytest.TempPathFactory, conversations: list[tuple[str, str]]) -> Path:
    """A small file of ShareGPT's form, with what upstream leaves out: one turn, and an empty prompt."""
    entries = [{"conversations": [{"value": text} for text in pair]} for pair in conversations]
    entries[3:3] = [{"conversations": [{"value": "alone"}]}, {"conversations": [{"value": ""}, {"value": "x"}]}]
    path = tmp_path_factory.mktemp("sharegpt") / "sharegpt.json"
    path.write_text(json.dumps(entries), encoding="utf-8")
    return path


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory: pytest.TempPathFactory, conversations: list[tuple[str, str]]) -> Path:
    """A folder with a byte-level BPE tokenizer, as DeepSeek-V3's is, that starts every text with `<s>`."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=500, special_tokens=["<s>", "</s>"], initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    tokenizer.train_from_iterator([text for pair in conversations for text in pair], trainer)
    folder = tmp_path_factory.mktemp("model")
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {"add_bos_token": True, "bos_token": {"content": "<s>", "__type": "AddedToken"}}
    (folder / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
    return folder
