#!/usr/bin/env python3
"""Write a small model of the DeepSeek-V3 architecture with random weights: 194 M parameters and a tokenizer.

It answers nonsense, in the same tokens every time, and takes the engine through everything that the real model
does: multi-head latent attention, grouped expert routing, sharded safetensors. Needs torch, safetensors,
tokenizers and transformers, as any server that can serve the model has them.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
from collections.abc import Iterator
from pathlib import Path

# torch, safetensors, tokenizers and transformers are imported where they are used: the shapes need none of them.

SEED = 0
VOCABULARY = 8192
BOS, EOS, USER, ASSISTANT = "<|begin|>", "<|end|>", "<|user|>", "<|assistant|>"
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{{ '<|assistant|>' if message['role'] == 'assistant' else '<|user|>' }}{{ message['content'] }}"
    "{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
# The keys are those of DeepSeek-V3's own config.json, which LMDeploy reads by name.
CONFIG = {
    "architectures": ["DeepseekV3ForCausalLM"],
    "model_type": "deepseek_v3",
    "torch_dtype": "bfloat16",
    "vocab_size": VOCABULARY,
    "hidden_size": 1024,
    "intermediate_size": 2048,
    "moe_intermediate_size": 512,
    "num_hidden_layers": 4,
    "first_k_dense_replace": 1,
    "moe_layer_freq": 1,
    "num_attention_heads": 16,
    "num_key_value_heads": 16,
    "q_lora_rank": 384,
    "kv_lora_rank": 512,
    "qk_nope_head_dim": 64,
    "qk_rope_head_dim": 64,
    "v_head_dim": 64,
    "n_routed_experts": 32,
    "n_shared_experts": 1,
    "num_experts_per_tok": 8,
    "n_group": 8,
    "topk_group": 4,
    "topk_method": "noaux_tc",
    "scoring_func": "sigmoid",
    "norm_topk_prob": True,
    "routed_scaling_factor": 2.5,
    "ep_size": 1,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-6,
    "attention_bias": False,
    "attention_dropout": 0.0,
    "max_position_embeddings": 32768,
    "rope_theta": 10000.0,
    "rope_scaling": None,
    "initializer_range": 0.02,
    "tie_word_embeddings": False,
    "use_cache": True,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 1,
}


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("folder", type=Path, help="written anew")
    parser.add_argument("--shards", type=int, default=2, help="files that the weights are spread over")
    options = parser.parse_args()
    options.folder.mkdir(parents=True, exist_ok=True)
    write_tokenizer(options.folder)
    parameters = write_weights(options.folder, options.shards)
    # Last: a folder with a config.json is complete.
    (options.folder / "config.json").write_text(json.dumps(CONFIG, indent=2) + "\n", encoding="utf-8")
    generation = {"bos_token_id": CONFIG["bos_token_id"], "eos_token_id": CONFIG["eos_token_id"]}
    (options.folder / "generation_config.json").write_text(json.dumps(generation) + "\n", encoding="utf-8")
    print(f"{options.folder}: {parameters / 1e6:.1f} M parameters in {options.shards} files")
    return 0


def shapes() -> Iterator[tuple[str, tuple[int, ...]]]:
    """Name and shape of every tensor of the checkpoint, as DeepSeek-V3's own files have them."""
    c = {key: value for key, value in CONFIG.items() if isinstance(value, int)}
    hidden, heads, latent = c["hidden_size"], c["num_attention_heads"], c["kv_lora_rank"]
    yield "model.embed_tokens.weight", (c["vocab_size"], hidden)
    for layer in range(c["num_hidden_layers"]):
        prefix = f"model.layers.{layer}"
        yield f"{prefix}.input_layernorm.weight", (hidden,)
        yield f"{prefix}.post_attention_layernorm.weight", (hidden,)
        attention = f"{prefix}.self_attn"
        yield f"{attention}.q_a_proj.weight", (c["q_lora_rank"], hidden)
        yield f"{attention}.q_a_layernorm.weight", (c["q_lora_rank"],)
        query = heads * (c["qk_nope_head_dim"] + c["qk_rope_head_dim"])
        yield f"{attention}.q_b_proj.weight", (query, c["q_lora_rank"])
        yield f"{attention}.kv_a_proj_with_mqa.weight", (latent + c["qk_rope_head_dim"], hidden)
        yield f"{attention}.kv_a_layernorm.weight", (latent,)
        yield f"{attention}.kv_b_proj.weight", (heads * (c["qk_nope_head_dim"] + c["v_head_dim"]), latent)
        yield f"{attention}.o_proj.weight", (hidden, heads * c["v_head_dim"])
        if layer < c["first_k_dense_replace"]:
            yield from _mlp(f"{prefix}.mlp", hidden, c["intermediate_size"])
            continue
        yield f"{prefix}.mlp.gate.weight", (c["n_routed_experts"], hidden)
        yield f"{prefix}.mlp.gate.e_score_correction_bias", (c["n_routed_experts"],)
        for expert in range(c["n_routed_experts"]):
            yield from _mlp(f"{prefix}.mlp.experts.{expert}", hidden, c["moe_intermediate_size"])
        shared = c["moe_intermediate_size"] * c["n_shared_experts"]
        yield from _mlp(f"{prefix}.mlp.shared_experts", hidden, shared)
    yield "model.norm.weight", (hidden,)
    yield "lm_head.weight", (c["vocab_size"], hidden)


def write_weights(folder: Path, shards: int) -> int:
    """Write random weights and their index; returns the number of parameters."""
    import torch
    from safetensors.torch import save_file

    generator = torch.Generator().manual_seed(SEED)
    tensors = {}
    for name, shape in shapes():
        if name.endswith("e_score_correction_bias"):
            tensors[name] = torch.zeros(shape, dtype=torch.float32)
        elif len(shape) == 1:
            tensors[name] = torch.ones(shape, dtype=torch.bfloat16)
        else:
            noise = torch.randn(shape, generator=generator) * CONFIG["initializer_range"]
            tensors[name] = noise.to(torch.bfloat16)
    weight_map: dict[str, str] = {}
    names = list(tensors)
    for shard in range(shards):
        file = f"model-{shard + 1:05d}-of-{shards:05d}.safetensors"
        part = names[shard * len(names) // shards : (shard + 1) * len(names) // shards]
        save_file({name: tensors[name] for name in part}, str(folder / file), metadata={"format": "pt"})
        (folder / file).chmod(0o644)  # safetensors writes for the owner alone
        weight_map |= dict.fromkeys(part, file)
    total = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index) + "\n", encoding="utf-8")
    return sum(tensor.numel() for tensor in tensors.values())


def write_tokenizer(folder: Path) -> None:
    """Train a byte-level BPE tokenizer on made-up words, so that every token of the vocabulary is text."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    draw = random.Random(SEED)
    syllables = [a + b + c for a in "bcdfglmnprstv" for b in "aeiou" for c in ("", "n", "r", "s")]
    words = ["".join(draw.choices(syllables, k=draw.randint(1, 4))) for _ in range(20_000)]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[BOS, EOS, USER, ASSISTANT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator((" ".join(words[i : i + 20]) for i in range(0, len(words), 20)), trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=BOS, eos_token=EOS, pad_token=EOS)
    fast.chat_template = CHAT_TEMPLATE
    fast.save_pretrained(str(folder))
    if len(fast) != VOCABULARY:
        raise SystemExit(f"the tokenizer has {len(fast)} tokens, {VOCABULARY} were asked for")


def _mlp(prefix: str, hidden: int, columns: int) -> Iterator[tuple[str, tuple[int, ...]]]:
    yield f"{prefix}.gate_proj.weight", (columns, hidden)
    yield f"{prefix}.up_proj.weight", (columns, hidden)
    yield f"{prefix}.down_proj.weight", (hidden, columns)


if __name__ == "__main__":
    sys.exit(main())
