"""Whether a model fits a fleet, and how much it can serve there: LMDeploy's own memory arithmetic, offline.

The rules are those of LMDeploy 0.18.0's PyTorch engine; each function names the file and function it follows.
What no source code can tell (the CUDA context, NCCL's buffers) is `Serving.overhead_mib`; docs/capacity.md
says how it was found and how far the result may be off.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

from rich.table import Table

from deploy_dsv3.errors import ConfigError, ConfigErrors, config_error

WeightFormat = Literal["fp8", "bf16"]

MIB = 1 << 20
GIB = 1 << 30

_BF16 = 2
_FP32 = 4
_FP8_BLOCK = 128
# One process on one GPU: what the driver keeps back plus the CUDA context. Derived from one recorded run.
_OVERHEAD_ALONE_MIB = 1200
# With NCCL's communicators and buffers. An estimate: no recorded run of several GPUs yet.
_OVERHEAD_DISTRIBUTED_MIB = 3072
# Below this many blocks LMDeploy halves the prefill budget and tries again; at two it gives up.
_WANTED_BLOCKS = 16
_FATAL_BLOCKS = 2
_DSA_SCORE_WORKSPACE = 512 * MIB
_NO_FP8 = re.compile(r"\b(A100|A800|A30|A40|A10|V100|T4|L4|L40S?)\b", re.IGNORECASE)


@dataclass(frozen=True, kw_only=True)
class ModelShape:
    """The dimensions of a multi-head-latent-attention MoE model, named as in its config.json.

    Counts are elements, not bytes. `q_lora_rank` 0 means that the query projection is not factored;
    `index_head_dim` 0 means that there is no sparse-attention indexer (all but V3.2).
    """

    name: str
    weight_format: WeightFormat
    num_hidden_layers: int
    first_k_dense_replace: int
    moe_layer_freq: int = 1
    hidden_size: int
    intermediate_size: int
    moe_intermediate_size: int
    n_routed_experts: int
    n_shared_experts: int
    num_attention_heads: int
    q_lora_rank: int
    kv_lora_rank: int
    qk_rope_head_dim: int
    qk_nope_head_dim: int
    v_head_dim: int
    vocab_size: int
    max_position_embeddings: int
    tie_word_embeddings: bool = False
    index_n_heads: int = 0
    index_head_dim: int = 0

    @property
    def moe_layers(self) -> int:
        """Layers with experts (lmdeploy/pytorch/models/deepseek_v2.py, DeepseekV2DecoderLayer)."""
        return sum(
            index >= self.first_k_dense_replace and index % self.moe_layer_freq == 0
            for index in range(self.num_hidden_layers)
        )

    @property
    def sparse(self) -> bool:
        """Whether it has V3.2's sparse-attention indexer."""
        return self.index_head_dim > 0


_V3 = ModelShape(
    name="deepseek-ai/DeepSeek-V3",
    weight_format="fp8",
    num_hidden_layers=61,
    first_k_dense_replace=3,
    hidden_size=7168,
    intermediate_size=18432,
    moe_intermediate_size=2048,
    n_routed_experts=256,
    n_shared_experts=1,
    num_attention_heads=128,
    q_lora_rank=1536,
    kv_lora_rank=512,
    qk_rope_head_dim=64,
    qk_nope_head_dim=128,
    v_head_dim=128,
    vocab_size=129280,
    max_position_embeddings=163840,
)

MODELS: Mapping[str, ModelShape] = {
    shape.name: shape
    for shape in (
        _V3,
        replace(_V3, name="deepseek-ai/DeepSeek-V3-0324"),
        replace(_V3, name="deepseek-ai/DeepSeek-R1"),
        replace(_V3, name="deepseek-ai/DeepSeek-R1-0528"),
        replace(_V3, name="deepseek-ai/DeepSeek-V3.1"),
        replace(_V3, name="deepseek-ai/DeepSeek-V3.2-Exp", index_n_heads=64, index_head_dim=128),
        replace(_V3, name="deepseek-ai/DeepSeek-V3.2", index_n_heads=64, index_head_dim=128),
    )
}


@dataclass(frozen=True, kw_only=True)
class Layout:
    """How one replica spreads the model, in LMDeploy's words: `--tp`, `--dp`, `--ep`."""

    tp: int = 1
    dp: int = 1
    ep: int = 1

    @property
    def gpus(self) -> int:
        """GPUs that the layout uses (lmdeploy/pytorch/config.py, DistConfig.__post_init__: world_size)."""
        return self.ep if self.ep > 1 else self.tp

    @property
    def attention_tp(self) -> int:
        return max(1, self.gpus // self.dp)

    @property
    def expert_tp(self) -> int:
        return 1 if self.ep > 1 else self.tp

    def __str__(self) -> str:
        parts = [f"{key}{value}" for key, value in asdict(self).items() if value > 1]
        return " ".join(parts) or "tp1"


@dataclass(frozen=True, kw_only=True)
class Serving:
    """The fleet and the serving flags that memory depends on.

    `gpu_memory_mib` is what nvidia-smi calls memory.total. `max_batch_size` 0 and `session_len` 0 mean
    LMDeploy's own defaults (by GPU name; by the model). `sequence_len` is the length [tokens] that a typical
    conversation reaches, prompt and answer together: the largest sensible batch depends on it.
    `flash_mla` is true in LMDeploy's images on Hopper and later. `overhead_mib` 0 means the estimate.
    """

    gpus: int
    gpu_memory_mib: int
    gpu_name: str = ""
    layout: Layout
    cache_max_entry_count: float = 0.8
    session_len: int = 0
    max_batch_size: int = 0
    max_prefill_token_num: int = 8192
    sequence_len: int = 4096
    flash_mla: bool = True
    fp8_cache: bool = False
    overhead_mib: int = 0


@dataclass(frozen=True, kw_only=True)
class Capacity:
    """The answer. Sizes are bytes on one GPU; counts are for one attention replica (`replicas` of them run).

    With `fits` false, `reasons` say why and what to do, and the cache figures are zero.
    """

    model: str
    weight_format: WeightFormat
    layout: str
    gpus: int
    fits: bool
    reasons: tuple[str, ...]
    warnings: tuple[str, ...]
    memory: int
    weights: int
    overhead: int
    expert_buffers: int
    runtime_reserve: int
    block_size: int
    block_bytes: int
    blocks: int
    replicas: int
    max_batch_size: int
    max_prefill_token_num: int
    sequence_len: int
    sensible_max_batch_size: int

    @property
    def tokens(self) -> int:
        """Tokens that one attention replica's cache holds."""
        return self.blocks * self.block_size

    @property
    def longest_session(self) -> int:
        """Longest prompt and answer [tokens] (lmdeploy/pytorch/engine/engine.py, _get_max_session_len)."""
        return max(0, (self.blocks - 2) * self.block_size)

    def sequences(self, length: int) -> int:
        """Sequences of `length` tokens that one replica holds at once. More wait or are computed again.

        One block is LMDeploy's own (lmdeploy/pytorch/engine/config_builder.py, build_cache_config).
        Raises ValueError for a length below 1.
        """
        if length < 1:
            raise ValueError(f"a sequence has at least one token, not {length}")
        return min(self.max_batch_size, _sequences(self.blocks, self.block_size, length))


def load_model(source: str | Path, *, weight_format: WeightFormat | None = None) -> ModelShape:
    """Find a built-in model by name, or read the config.json at a path (or in the folder) `source`.

    `weight_format` overrides what the model says of itself (a BF16 conversion of V3 keeps V3's name).
    Raises ConfigErrors for an unknown name, an unreadable file, a missing key or another architecture.
    """
    shape = MODELS.get(str(source)) or _read_config(Path(source))
    return replace(shape, weight_format=weight_format) if weight_format else shape


def estimate(model: ModelShape, serving: Serving) -> Capacity:
    """Work out whether `model` fits and what its cache then holds.

    Follows lmdeploy/pytorch/engine/executor/base.py: _get_runtime_size and _update_num_gpu_blocks.
    Raises ConfigErrors for numbers out of range; a model that does not fit is an answer, not an error.
    """
    _check_ranges(serving)
    batch = serving.max_batch_size or default_max_batch_size(serving.gpu_name)
    fixed = _memory(model, serving, batch)
    reasons = [*_layout_problems(model, serving), *_weight_problems(model, serving, fixed)]
    prefill, blocks = (0, 0) if reasons else _count_blocks(fixed, serving)
    if not reasons and blocks <= _FATAL_BLOCKS:
        reasons.append(
            f"{_gib(fixed.free)} stay free on each GPU after weights and buffers, and the runtime reserve "
            f"needs {_gib(fixed.reserve)}: nothing is left for the cache. Use more or larger GPUs, or lower "
            "lmdeploy_max_batch_size and lmdeploy_max_prefill_token_num."
        )
    if reasons:
        prefill, blocks = serving.max_prefill_token_num, 0
    answer = Capacity(
        model=model.name,
        weight_format=model.weight_format,
        layout=str(serving.layout),
        gpus=serving.gpus,
        fits=not reasons,
        reasons=tuple(reasons),
        warnings=(),
        memory=serving.gpu_memory_mib * MIB,
        weights=fixed.weights,
        overhead=fixed.overhead,
        expert_buffers=fixed.expert_buffers,
        runtime_reserve=_runtime_reserve(model, batch, prefill),
        block_size=fixed.block_size,
        block_bytes=fixed.block_bytes,
        blocks=blocks,
        replicas=serving.layout.dp,
        max_batch_size=batch,
        max_prefill_token_num=prefill,
        sequence_len=serving.sequence_len,
        sensible_max_batch_size=0 if reasons else _sensible_batch(model, serving),
    )
    return answer if reasons else replace(answer, warnings=tuple(_warnings(model, serving, answer)))


def default_max_batch_size(gpu_name: str) -> int:
    """LMDeploy's own `--max-batch-size` for a GPU (lmdeploy/utils.py, get_max_batch_size)."""
    table = {"a100": 384, "a800": 384, "h100": 1024, "h800": 1024, "l20y": 1024, "h200": 1024}
    return next((size for name, size in table.items() if name in gpu_name.lower()), 128)


def weights_bytes(model: ModelShape, layout: Layout) -> int:
    """Bytes of weights on the fullest GPU.

    Follows the modules that lmdeploy/pytorch/models/deepseek_v2.py and deepseek_v32.py build: the latent
    projections are on every rank; heads, dense MLP and experts are split; the key and value halves of
    kv_b_proj are held a second time in 16 bit (DeepseekV2BMM); embeddings and head stay 16 bit.
    """
    quantised = model.weight_format == "fp8"
    heads = model.num_attention_heads // layout.attention_tp
    hidden = model.hidden_size

    def linear(outputs: int, inputs: int) -> int:
        """lmdeploy/pytorch/nn/linear/blocked_fp8.py, create_weights: one scale for each 128 x 128 block."""
        if not quantised:
            return outputs * inputs * _BF16
        return outputs * inputs + _FP32 * math.ceil(outputs / _FP8_BLOCK) * math.ceil(inputs / _FP8_BLOCK)

    def mlp(columns: int) -> int:
        return linear(2 * columns, hidden) + linear(hidden, columns)

    query = heads * (model.qk_nope_head_dim + model.qk_rope_head_dim)
    attention = (
        linear(model.kv_lora_rank + model.qk_rope_head_dim, hidden)
        + linear(heads * (model.qk_nope_head_dim + model.v_head_dim), model.kv_lora_rank)
        + heads * (model.qk_nope_head_dim + model.v_head_dim) * model.kv_lora_rank * _BF16
        + linear(hidden, heads * model.v_head_dim)
    )
    if model.q_lora_rank:
        attention += linear(model.q_lora_rank, hidden) + linear(query, model.q_lora_rank)
    else:
        attention += linear(query, hidden)
    if model.sparse:
        attention += linear(model.index_n_heads * model.index_head_dim, model.q_lora_rank or hidden)
        attention += (model.index_head_dim + model.index_n_heads) * hidden * _BF16

    dense = mlp(math.ceil(model.intermediate_size / layout.tp))
    experts = math.ceil(model.n_routed_experts / layout.ep)
    shared_tp = layout.tp if layout.dp == 1 else 1
    sparse_mlp = (
        experts * mlp(math.ceil(model.moe_intermediate_size / layout.expert_tp))
        + mlp(math.ceil(model.moe_intermediate_size * model.n_shared_experts / shared_tp))
        + model.n_routed_experts * (hidden * _BF16 + _FP32)
    )
    vocabulary_shard = math.ceil(model.vocab_size / layout.attention_tp) * hidden * _BF16
    embedding = model.vocab_size * hidden * _BF16 if model.sparse else vocabulary_shard
    norms = (2 * model.num_hidden_layers + 1) * hidden * _BF16
    moe_layers = model.moe_layers
    return (
        model.num_hidden_layers * attention
        + (model.num_hidden_layers - moe_layers) * dense
        + moe_layers * sparse_mlp
        + embedding
        + (0 if model.tie_word_embeddings else vocabulary_shard)
        + norms
    )


def block_size_tokens(model: ModelShape, *, flash_mla: bool) -> int:
    """Tokens in a cache block (lmdeploy/pytorch/engine/executor/base.py, _adjust_block_size).

    FlashMLA takes 64; LMDeploy's own kernel lowers it to 32 for latent heads of 512 and more.
    """
    wide = model.kv_lora_rank + model.qk_rope_head_dim >= 512
    return 32 if wide and not flash_mla else 64


def block_bytes(model: ModelShape, *, block_size: int, fp8_cache: bool = False) -> int:
    """Bytes of one cache block on one GPU. The latent cache is not split: every TP rank holds all of it.

    lmdeploy/pytorch/engine/cache_engine/schema.py (build_k_cache_desc, build_v_cache_desc: a latent model's
    value cache is empty) and layout.py (each tensor aligned to 256 bytes); backends/cuda/nsa.py for the
    indexer's own cache.
    """
    entry = 656 if fp8_cache else (model.kv_lora_rank + model.qk_rope_head_dim) * _BF16
    layer = _align(block_size * entry)
    if model.sparse:
        layer += _align(block_size * (model.index_head_dim + _FP32))
    return model.num_hidden_layers * layer


def expert_buffer_bytes(model: ModelShape, layout: Layout, max_batch_size: int) -> int:
    """Bytes that DeepEP takes on each GPU while the model is built, so before the cache is sized.

    lmdeploy/pytorch/backends/cuda/token_dispatcher.py (get_buffer_common) with DeepEP's csrc/config.hpp
    (LowLatencyLayout, get_nvl_buffer_size_hint); NVSHMEM rounds its heap to 512 MiB.
    """
    if layout.ep == 1:
        return 0
    hidden = model.hidden_size
    scales = hidden // _FP8_BLOCK
    message = max(16 + 2 * hidden, 2 * hidden + 4 * scales)
    low_latency = 4 * model.n_routed_experts * max_batch_size * message
    tokens = 256 if layout.ep <= 8 else 288
    channels = 10  # DEEPEP_BUFFER_NUM_SMS is 20, two SMs a channel
    nvlink = channels * min(layout.ep, 8) * tokens * (2 * hidden + 128 * 16 + 8)
    return nvlink + math.ceil(low_latency / (512 * MIB)) * 512 * MIB


def to_dict(capacity: Capacity, lengths: tuple[int, ...] = (4096, 32768)) -> dict[str, Any]:
    """The answer for `--json`: every field, the derived figures and the sequences for each of `lengths`."""
    return {
        **asdict(capacity),
        "tokens": capacity.tokens,
        "longest_session": capacity.longest_session,
        "sequences": {str(length): capacity.sequences(length) for length in lengths},
    }


def rows(capacity: Capacity, lengths: tuple[int, ...] = (4096, 32768)) -> list[tuple[str, str]]:
    """Label and value of each line that a person wants to see, in order."""
    each = f" in each of {capacity.replicas} replicas" if capacity.replicas > 1 else ""
    lines = [
        ("model", f"{capacity.model} ({capacity.weight_format}), {capacity.layout}, {capacity.gpus} GPUs"),
        ("memory a GPU", _gib(capacity.memory)),
        ("weights a GPU", _gib(capacity.weights)),
        ("driver, context, NCCL", f"{_gib(capacity.overhead)} (estimate)"),
    ]
    if capacity.expert_buffers:
        lines.append(("expert buffers", _gib(capacity.expert_buffers)))
    if not capacity.fits:
        return [*lines, ("fits", "no"), *(("reason", reason) for reason in capacity.reasons)]
    lines += [
        ("runtime reserve", _gib(capacity.runtime_reserve)),
        ("fits", "yes"),
        (
            "cache",
            f"{capacity.blocks} blocks of {capacity.block_size} tokens = {capacity.tokens} tokens{each}",
        ),
        ("longest sequence", f"{capacity.longest_session} tokens"),
        *((f"sequences of {length}", f"{capacity.sequences(length)} at once{each}") for length in lengths),
        (
            "largest sensible batch",
            f"{capacity.sensible_max_batch_size} for sequences of {capacity.sequence_len} tokens "
            f"(now {capacity.max_batch_size})",
        ),
    ]
    return [*lines, *(("warning", warning) for warning in capacity.warnings)]


def table(capacity: Capacity, lengths: tuple[int, ...] = (4096, 32768)) -> Table:
    """The answer for a terminal."""
    grid = Table(title="Capacity (estimate)", show_header=False, title_justify="left")
    for label, value in rows(capacity, lengths):
        grid.add_row(label, value)
    return grid


def markdown(capacity: Capacity, lengths: tuple[int, ...] = (4096, 32768)) -> str:
    """The answer for a report."""
    body = "\n".join(f"| {label} | {value} |" for label, value in rows(capacity, lengths))
    return f"| | |\n| --- | --- |\n{body}\n"


@dataclass(frozen=True, kw_only=True)
class _Memory:
    weights: int
    overhead: int
    expert_buffers: int
    free: int
    reserve: int
    block_size: int
    block_bytes: int
    model: ModelShape
    batch: int


def _memory(model: ModelShape, serving: Serving, batch: int) -> _Memory:
    weights = weights_bytes(model, serving.layout)
    buffers = expert_buffer_bytes(model, serving.layout, batch)
    estimated = _OVERHEAD_ALONE_MIB if serving.layout.gpus == 1 else _OVERHEAD_DISTRIBUTED_MIB
    overhead = (serving.overhead_mib or estimated) * MIB
    block_size = block_size_tokens(model, flash_mla=serving.flash_mla)
    return _Memory(
        weights=weights,
        overhead=overhead,
        expert_buffers=buffers,
        free=serving.gpu_memory_mib * MIB - weights - overhead - buffers,
        reserve=_runtime_reserve(model, batch, serving.max_prefill_token_num),
        block_size=block_size,
        block_bytes=block_bytes(model, block_size=block_size, fp8_cache=serving.fp8_cache),
        model=model,
        batch=batch,
    )


def _runtime_reserve(model: ModelShape, batch: int, prefill: int) -> int:
    reserve = (prefill + 2 * batch) * model.vocab_size * 2
    return reserve + (_DSA_SCORE_WORKSPACE if model.sparse else 0)


def _count_blocks(memory: _Memory, serving: Serving) -> tuple[int, int]:
    """The prefill budget that LMDeploy settles on, and the blocks that follow from it."""
    prefill = serving.max_prefill_token_num
    while prefill > 0:
        reserve = _runtime_reserve(memory.model, memory.batch, prefill)
        blocks = int((memory.free - reserve) * serving.cache_max_entry_count) // memory.block_bytes
        if blocks >= _WANTED_BLOCKS or blocks <= _FATAL_BLOCKS:
            return prefill, blocks
        prefill //= 2
    return 0, 0


def _sensible_batch(model: ModelShape, serving: Serving) -> int:
    """The largest batch whose sequences of the typical length all fit the cache that this batch leaves."""

    def held(batch: int) -> int:
        memory = _memory(model, serving, batch)
        _, blocks = _count_blocks(memory, serving)
        return _sequences(blocks, memory.block_size, serving.sequence_len)

    low, high = 0, held(1)
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if held(middle) >= middle else (low, middle - 1)
    return low


def _sequences(blocks: int, block_size: int, length: int) -> int:
    return max(0, (blocks - 1) // math.ceil(length / block_size))


def _check_ranges(serving: Serving) -> None:
    layout = serving.layout
    positive = {
        "gpus": serving.gpus,
        "gpu_memory_mib": serving.gpu_memory_mib,
        "max_prefill_token_num": serving.max_prefill_token_num,
        "sequence_len": serving.sequence_len,
        "tp": layout.tp,
        "dp": layout.dp,
        "ep": layout.ep,
    }
    not_negative = {
        "session_len": serving.session_len,
        "max_batch_size": serving.max_batch_size,
        "overhead_mib": serving.overhead_mib,
    }
    wrong = [(key, value, "1 or more") for key, value in positive.items() if value < 1]
    wrong += [(key, value, "0 or more") for key, value in not_negative.items() if value < 0]
    errors = [
        ConfigError(message=f"{key} is out of range", key=key, found=str(value), expected=expected)
        for key, value, expected in wrong
    ]
    if not 0 < serving.cache_max_entry_count < 1:
        errors.append(
            ConfigError(
                message="cache_max_entry_count is out of range",
                key="cache_max_entry_count",
                found=str(serving.cache_max_entry_count),
                expected="a share between 0 and 1",
            )
        )
    if errors:
        raise ConfigErrors(errors)


def _layout_problems(model: ModelShape, serving: Serving) -> list[str]:
    layout = serving.layout
    found = []
    if layout.gpus != serving.gpus:
        found.append(
            f"layout {layout} uses {layout.gpus} GPUs, the replica has {serving.gpus}. "
            "Set lmdeploy_tp to the number of GPUs of the replica."
        )
    if layout.dp > 1 and layout.tp == 1 and layout.ep == 1:
        found.append(f"LMDeploy resets dp={layout.dp} to 1 when tp and ep are both 1. Set ep or tp as well.")
    if layout.gpus % layout.dp:
        found.append(f"{layout.gpus} GPUs cannot be divided among dp={layout.dp} replicas.")
    elif model.num_attention_heads % layout.attention_tp:
        found.append(f"{model.num_attention_heads} attention heads cannot be split over {layout.attention_tp} GPUs.")
    if model.n_routed_experts % layout.ep:
        found.append(f"{model.n_routed_experts} experts cannot be split over ep={layout.ep}.")
    found += _split_problems(model, layout)
    if model.weight_format == "fp8" and _NO_FP8.search(serving.gpu_name):
        found.append(
            f"FP8 weights need compute capability 9.0 (Hopper) or later, and {serving.gpu_name} has less. "
            "Use H100/H800/H200/H20 or later, or a BF16 conversion on enough GPUs."
        )
    if serving.fp8_cache and not model.sparse:
        found.append("an FP8 cache exists for V3.2's sparse attention only. Leave out quant-policy for this model.")
    return found


def _split_problems(model: ModelShape, layout: Layout) -> list[str]:
    """FP8 weights are split in whole blocks of 128 (lmdeploy/pytorch/nn/moe/blocked_fp8.py, _update_args)."""
    unit = _FP8_BLOCK if model.weight_format == "fp8" else 1
    sides = {
        "experts": (model.moe_intermediate_size, layout.expert_tp),
        "dense layers": (model.intermediate_size, layout.tp),
    }
    return [
        f"the {what} have {columns} columns, {columns // unit} blocks of {unit}, which cannot be split over "
        f"{parts} GPUs. Use a tp that divides {columns // unit}."
        for what, (columns, parts) in sides.items()
        if (columns // unit) % parts
    ]


def _weight_problems(model: ModelShape, serving: Serving, memory: _Memory) -> list[str]:
    if memory.free > 0:
        return []
    taken = memory.weights + memory.overhead + memory.expert_buffers
    return [
        f"{model.name} in {model.weight_format} needs {_gib(memory.weights)} of weights and "
        f"{_gib(memory.overhead + memory.expert_buffers)} for driver, context and communication on each "
        f"of {serving.layout.gpus} GPUs, {_gib(taken)} together; "
        f"a GPU has {_gib(serving.gpu_memory_mib * MIB)}. "
        "Use more GPUs (two nodes with tp 16) or larger ones."
    ]


def _warnings(model: ModelShape, serving: Serving, answer: Capacity) -> list[str]:
    found = []
    if answer.max_prefill_token_num != serving.max_prefill_token_num:
        found.append(
            f"memory is so short that LMDeploy lowers max_prefill_token_num from "
            f"{serving.max_prefill_token_num} to {answer.max_prefill_token_num}."
        )
    wanted = serving.session_len or model.max_position_embeddings
    if wanted > answer.longest_session:
        found.append(
            f"sequences of up to {wanted} tokens are allowed, but the cache ends them at "
            f"{answer.longest_session}. Set lmdeploy_session_len accordingly."
        )
    if answer.max_batch_size > answer.sensible_max_batch_size:
        found.append(
            f"max_batch_size {answer.max_batch_size} is more than the cache holds at "
            f"{answer.sequence_len} tokens each ({answer.sensible_max_batch_size}): LMDeploy then evicts "
            "sequences and computes them again."
        )
    return found


# What LMDeploy builds as DeepseekV2ForCausalLM or a child of it (lmdeploy/pytorch/configurations).
_MODEL_TYPES = {"deepseek_v2", "deepseek_v3", "deepseek_v32", "kimi_k2"}


def _read_config(path: Path) -> ModelShape:
    file = path / "config.json" if path.is_dir() else path
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise config_error(
            f"no such model: {error.strerror}",
            file=str(file),
            expected=f"the folder of a model, its config.json, or one of {', '.join(MODELS)}",
        ) from error
    except (ValueError, RecursionError) as error:
        raise config_error(f"not JSON: {error}", file=str(file)) from error
    if not isinstance(config, dict):
        raise config_error("not a model's config.json", file=str(file), found=type(config).__name__)
    return model_from(config, name=file.resolve().parent.name, source=str(file))


def model_from(config: Mapping[str, Any], *, name: str, source: str) -> ModelShape:
    """Read a config.json that is loaded already.

    Args:
        config: its content, or at least what of it is a number, a name or `quantization_config`.
        name: what to call the model.
        source: where it was read, for messages.

    Raises:
        ConfigErrors: a missing key or another architecture.
    """
    if config.get("model_type") not in _MODEL_TYPES:
        raise config_error(
            "the memory arithmetic of this architecture is not known here",
            file=source,
            key="model_type",
            found=repr(config.get("model_type")),
            expected=", ".join(sorted(_MODEL_TYPES)),
        )
    return _shape(config, name, source)


def _shape(config: Mapping[str, Any], name: str, file: str) -> ModelShape:
    errors = []

    def number(key: str, default: int | None = None, *, least: int = 1) -> int:
        value = config.get(key)
        if value is None and default is not None:
            return default
        if isinstance(value, int) and not isinstance(value, bool) and value >= least:
            return value
        errors.append(
            ConfigError(
                message=f"{key} is missing or wrong",
                file=file,
                key=key,
                found=repr(value),
                expected=f"a whole number from {least}",
            )
        )
        return 1

    sparse = config["model_type"] == "deepseek_v32"
    shape = ModelShape(
        name=name,
        weight_format=_weight_format(config, file),
        num_hidden_layers=number("num_hidden_layers"),
        first_k_dense_replace=number("first_k_dense_replace", 0, least=0),
        moe_layer_freq=number("moe_layer_freq", 1),
        hidden_size=number("hidden_size"),
        intermediate_size=number("intermediate_size"),
        moe_intermediate_size=number("moe_intermediate_size"),
        n_routed_experts=number("n_routed_experts"),
        n_shared_experts=number("n_shared_experts", 0, least=0),
        num_attention_heads=number("num_attention_heads"),
        q_lora_rank=number("q_lora_rank", 0),
        kv_lora_rank=number("kv_lora_rank"),
        qk_rope_head_dim=number("qk_rope_head_dim"),
        qk_nope_head_dim=number("qk_nope_head_dim"),
        v_head_dim=number("v_head_dim"),
        vocab_size=number("vocab_size"),
        max_position_embeddings=number("max_position_embeddings"),
        tie_word_embeddings=config.get("tie_word_embeddings") is True,
        index_n_heads=number("index_n_heads") if sparse else 0,
        index_head_dim=number("index_head_dim") if sparse else 0,
    )
    if errors:
        raise ConfigErrors(errors)
    return shape


def _weight_format(config: Mapping[str, Any], file: str) -> WeightFormat:
    quantization = config.get("quantization_config") or {}
    method = quantization.get("quant_method") if isinstance(quantization, dict) else quantization
    if method is None:
        return "bf16"
    if method != "fp8":
        raise config_error(
            "the memory arithmetic of this weight format is not known here",
            file=file,
            key="quantization_config",
            found=repr(method),
            expected="fp8, or no quantization (bf16)",
        )
    return "fp8"


def _align(size: int) -> int:
    return math.ceil(size / 256) * 256


def _gib(size: int) -> str:
    return f"{size / GIB:.1f} GiB"
