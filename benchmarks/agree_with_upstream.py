"""Runs LMDeploy's own benchmark and ours on one server, and compares every column of their CSVs.

    python benchmarks/agree_with_upstream.py PATH/TO/profile_restful_api.py --upstream-python PYTHON

PYTHON has what the script imports (aiohttp, numpy, pybase64, pillow, requests, tqdm, transformers). Both get
the same small tokenizer and the same ShareGPT-like file, made here, so nothing is fetched. The server
(counterpart.py) takes a fixed time a token, as an engine with a full batch does. Ends with exit status 1 where
a figure differs by more than 3 %, or the requests themselves differ at all.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import random
import subprocess
import sys
import tempfile
from pathlib import Path

_MOST = 0.03
_EXACT = ("completed", "total_input_tokens", "total_output_tokens")
_FIGURES = (
    "duration",
    "request_throughput",
    "input_throughput",
    "output_throughput",
    "mean_e2e_latency_ms",
    "mean_ttft_ms",
    "mean_tpot_ms",
    "mean_itl_ms",
)
_WORDS = ("model", "token", "prefill", "decode", "expert", "router", "latent", "cache", "the", "a", "of", "and")


def make_inputs(folder: Path, conversations: int) -> tuple[Path, Path]:
    """A tokenizer's folder and a ShareGPT-like file; the first as `transformers` and `tokenizers` read it."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    rng = random.Random(0)
    texts = [" ".join(rng.choices(_WORDS, k=rng.randint(3, 400))) for _ in range(2 * conversations)]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=600, initial_alphabet=alphabet, special_tokens=["<s>", "</s>"])
    tokenizer.train_from_iterator(texts, trainer)
    model = folder / "model"
    model.mkdir()
    tokenizer.save(str(model / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": "</s>"}
    (model / "tokenizer_config.json").write_text(json.dumps({**config, "chat_template": "{{ messages }}"}))
    (model / "config.json").write_text(json.dumps({"model_type": "llama"}))
    dataset = folder / "sharegpt.json"
    pairs = zip(texts[::2], texts[1::2], strict=True)
    dataset.write_text(json.dumps([{"conversations": [{"value": a}, {"value": b}]} for a, b in pairs]))
    return model, dataset


def main() -> int:
    """Run both and compare; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("upstream", type=Path)
    parser.add_argument("--upstream-python", default=sys.executable)
    parser.add_argument("--num-prompts", type=int, default=200)
    parser.add_argument("--input-len", type=int, default=512)
    parser.add_argument("--output-len", type=int, default=256)
    parser.add_argument("--request-rate", type=float, default=0.0, help="0: all at once")
    parser.add_argument("--step-ms", type=float, default=20)
    parser.add_argument("--max-batch", type=int, default=64)
    arguments = parser.parse_args()
    counterpart = Path(__file__).with_name("counterpart.py")
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        model, dataset = make_inputs(folder, max(2 * arguments.num_prompts, 100))
        pace = f"--step-ms {arguments.step_ms} --max-batch {arguments.max_batch}"
        server = subprocess.Popen(
            [sys.executable, str(counterpart), *pace.split()],
            stdout=subprocess.PIPE,
            text=True,
        )
        try:
            assert server.stdout is not None
            url = server.stdout.readline().strip()
            theirs = _upstream(arguments, url, model, dataset, folder / "upstream.csv")
            ours = _ours(arguments, url, model, dataset, folder / "ours")
        finally:
            server.terminate()
            server.wait()
    return _compare(theirs, ours)


def _upstream(arguments: argparse.Namespace, url: str, model: Path, dataset: Path, output: Path) -> dict[str, str]:
    rate = f"--request-rate {arguments.request_rate}" if arguments.request_rate else ""
    options = f"""
        --backend lmdeploy --base-url {url} --tokenizer {model} --model-path {model}
        --dataset-name random --dataset-path {dataset} --num-prompts {arguments.num_prompts}
        --random-input-len {arguments.input_len} --random-output-len {arguments.output_len}
        --output-file {output} --disable-tqdm {rate}
    """
    subprocess.run(
        [arguments.upstream_python, str(arguments.upstream), *options.split()],
        check=True,
        stdout=subprocess.DEVNULL,
        env={**os.environ, "HF_HUB_OFFLINE": "1", "OPENAI_API_KEY": "none"},
    )
    return _only_row(output)


def _ours(arguments: argparse.Namespace, url: str, model: Path, dataset: Path, output: Path) -> dict[str, str]:
    options = f"""
        --base-url {url} --tokenizer {model} --profile custom --dataset-path {dataset} --output {output}
        --num-prompts {arguments.num_prompts} --request-rate {arguments.request_rate}
        --input-len {arguments.input_len} --output-len {arguments.output_len}
    """
    subprocess.run(
        [sys.executable, "-m", "deploy_dsv3", "benchmark", *options.split()],
        check=True,
        stdout=subprocess.DEVNULL,
    )
    return _only_row(next(output.glob("*.csv")))


def _only_row(path: Path) -> dict[str, str]:
    with path.open(newline="", encoding="utf-8") as file:
        (row,) = csv.DictReader(file)
    return row


def _compare(theirs: dict[str, str], ours: dict[str, str]) -> int:
    bad = [] if list(theirs) == list(ours) else ["columns"]
    print(f"{'column':24}{'upstream':>16}{'deploy-dsv3':>16}{'difference':>12}")
    for name in (*_EXACT, *_FIGURES):
        a, b = float(theirs[name]), float(ours[name])
        difference = b / a - 1
        print(f"{name:24}{a:>16,.3f}{b:>16,.3f}{difference:>+12.2%}")
        if (name in _EXACT and a != b) or abs(difference) > _MOST:
            bad.append(name)
    print(f"DIFFERENT: {', '.join(bad)}" if bad else f"agree within {_MOST:.0%}")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
