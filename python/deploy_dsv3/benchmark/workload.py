"""What each request asks for: its lengths, its text, its time of arrival.

Everything here is a function of the plan and the seed. Lengths, texts and arrivals are those that upstream's
`benchmark/profile_restful_api.py` draws for the same seed; source of the rules: its `compute_random_lens`,
`sample_random_requests`, `sample_sharegpt_requests` and `get_request`.
"""

from __future__ import annotations

import pkgutil
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from deploy_dsv3.benchmark.plan import Plan, Row

Lengths = NDArray[np.int_]

# Upstream's limits for a ShareGPT pair: shorter than 4 tokens or longer than these is left out.
_SHAREGPT_MIN_TOKENS = 4
_SHAREGPT_MAX_PROMPT_TOKENS = 1024
_SHAREGPT_MAX_TOTAL_TOKENS = 2048

# Synthetic text without a tokenizer: in the vocabularies of current models (DeepSeek-V3's among them) each of
# these is one token with the space before it, so N words make a prompt of N tokens and its first token.
_WORDS = (pkgutil.get_data(__package__, "words.txt") or b"").decode().split()


class Tokenizer(Protocol):
    """What the workload needs of a tokenizer."""

    def encode(self, text: str) -> list[int]:
        """Token ids of a text, with the special tokens the model's tokenizer adds."""
        ...

    def decode(self, ids: Sequence[int]) -> str:
        """The text of token ids, special tokens included."""
        ...


@dataclass(frozen=True)
class Request:
    """One request of a row, before it is sent."""

    index: int
    prompt: str
    prompt_len: int
    """Nominal [tokens]; what upstream counts as input."""
    output_len: int
    """Asked for [tokens]; with `ignore_eos` also what comes back."""


@dataclass(frozen=True, kw_only=True)
class Workload:
    """The requests of one row in the order they are sent, and when."""

    requests: tuple[Request, ...]
    arrivals: tuple[float, ...]
    """When each request is sent, seconds after the start; not decreasing."""
    text: str
    """`sharegpt`, `synthetic` (cut by the model's tokenizer) or `synthetic-words` (without a tokenizer)."""

    @property
    def total_output(self) -> int:
        """Tokens the whole row asks for."""
        return sum(request.output_len for request in self.requests)


def random_lengths(
    rng: np.random.RandomState, *, full_len: int, range_ratio: float, num: int, lowest: int = 1
) -> Lengths:
    """`num` lengths, uniform in max(lowest, full_len * range_ratio)..full_len, both ends included.

    Upstream's `compute_random_lens`: `lowest` is 1 for prompts, and for outputs since LMDeploy 0.12;
    before, and so for the guide, outputs began at 0.
    """
    return rng.randint(max(int(full_len * range_ratio), lowest), full_len + 1, size=num)


def row_lengths(rng: np.random.RandomState, plan: Plan, row: Row) -> tuple[Lengths, Lengths]:
    """Prompt and output lengths of a row [tokens]: first all prompts are drawn, then all outputs.

    `lengths: guide` draws the outputs as the guide's script did and asks for 1 token where that drew 0, since
    servers refuse `max_tokens: 0`. It gives the totals behind the published table to six digits; the tests
    show that.
    """
    inputs = random_lengths(rng, full_len=row.input_len, range_ratio=plan.range_ratio, num=row.num_prompts)
    lowest = 0 if plan.lengths == "guide" else 1
    outputs = random_lengths(
        rng, full_len=row.output_len, range_ratio=plan.range_ratio, num=row.num_prompts, lowest=lowest
    )
    return inputs, np.maximum(outputs, 1)


def make_workload(
    plan: Plan, row: Row, tokenizer: Tokenizer | None, pairs: Sequence[tuple[str, str]] | None
) -> Workload:
    """The requests of a row.

    Args:
        plan: dataset, seed and arrival rule.
        row: lengths and number.
        tokenizer: the model's; None makes synthetic text of counted words.
        pairs: first two turns of the ShareGPT conversations in the file's order; None: synthetic text.

    Raises:
        ValueError: the dataset has too few usable conversations, or needs a tokenizer that is not there.
    """
    # One stream of numbers for lengths and arrivals, seeded for each row: upstream starts a process a row.
    numbers = np.random.RandomState(plan.seed)
    if plan.dataset == "sharegpt":
        requests = tuple(_sharegpt_requests(plan, row, tokenizer, pairs))
        text = "sharegpt"
    else:
        inputs, outputs = row_lengths(numbers, plan, row)
        prompts = _random_prompts(plan, inputs, tokenizer, pairs)
        requests = tuple(
            Request(index, prompt, int(inputs[index]), int(outputs[index])) for index, prompt in enumerate(prompts)
        )
        text = "sharegpt" if pairs is not None else "synthetic" if tokenizer else "synthetic-words"
    return Workload(requests=requests, arrivals=_arrivals(numbers, plan, len(requests)), text=text)


def _arrivals(rng: np.random.RandomState, plan: Plan, num: int) -> tuple[float, ...]:
    if not plan.request_rate:
        return (0.0,) * num
    # Upstream waits an exponential interval after each request, so the first one goes at 0.
    intervals = [float(rng.exponential(1.0 / plan.request_rate)) for _ in range(num)]
    return (0.0, *np.cumsum(intervals)[:-1].tolist())


def _random_prompts(
    plan: Plan, lengths: Lengths, tokenizer: Tokenizer | None, pairs: Sequence[tuple[str, str]] | None
) -> Iterator[str]:
    shuffled = random.Random(plan.seed)
    if pairs is None:
        yield from _synthetic_prompts(shuffled, lengths, tokenizer)
        return
    if tokenizer is None:
        raise ValueError("ShareGPT text is cut to length by the model's tokenizer, and none was given")
    usable = [pair for pair in pairs if pair[0]]
    shuffled.shuffle(usable)
    if len(usable) < len(lengths):
        raise ValueError(f"the dataset has {len(usable)} usable conversations and the row needs {len(lengths)}")
    for (prompt, _), wanted in zip(usable, lengths.tolist(), strict=False):
        ids = tokenizer.encode(prompt)
        yield tokenizer.decode((ids * -(-wanted // len(ids)))[:wanted])


def _synthetic_prompts(rng: random.Random, lengths: Lengths, tokenizer: Tokenizer | None) -> Iterator[str]:
    for wanted in lengths.tolist():
        text = " " + " ".join(rng.choices(_WORDS, k=wanted))
        if tokenizer is not None:
            ids = tokenizer.encode(text)
            text = tokenizer.decode((ids * -(-wanted // len(ids)))[:wanted])
        yield text


def _sharegpt_requests(
    plan: Plan, row: Row, tokenizer: Tokenizer | None, pairs: Sequence[tuple[str, str]] | None
) -> Iterator[Request]:
    if tokenizer is None or pairs is None:
        raise ValueError("dataset sharegpt needs --dataset-path and the model's tokenizer")
    shuffled = list(pairs)
    random.Random(plan.seed).shuffle(shuffled)
    found = 0
    for prompt, completion in shuffled:
        if found == row.num_prompts:
            return
        prompt_len = len(tokenizer.encode(prompt))
        output_len = row.output_len or len(tokenizer.encode(completion))
        if min(prompt_len, output_len) < _SHAREGPT_MIN_TOKENS or prompt_len > _SHAREGPT_MAX_PROMPT_TOKENS:
            continue
        # A fixed output length is the operator's choice; upstream then drops the limit on the sum.
        if not row.output_len and prompt_len + output_len > _SHAREGPT_MAX_TOTAL_TOKENS:
            continue
        yield Request(found, prompt, prompt_len, output_len)
        found += 1
    if found < row.num_prompts:
        raise ValueError(f"the dataset has {found} usable conversations and the row needs {row.num_prompts}")
