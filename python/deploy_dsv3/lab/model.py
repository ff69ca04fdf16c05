"""A model directory of DeepSeek-V3's shape and a few KB: real formats, no weights."""

from __future__ import annotations

import json
import struct

SHARDS = 8
_TENSOR_BYTES = 256

#: Published values of DeepSeek-V3's config.json that tools look at.
_CONFIG = {
    "architectures": ["DeepseekV3ForCausalLM"],
    "model_type": "deepseek_v3",
    "bos_token_id": 0,
    "eos_token_id": 1,
    "first_k_dense_replace": 3,
    "hidden_size": 7168,
    "intermediate_size": 18432,
    "kv_lora_rank": 512,
    "max_position_embeddings": 163840,
    "moe_intermediate_size": 2048,
    "n_routed_experts": 256,
    "n_shared_experts": 1,
    "num_attention_heads": 128,
    "num_experts_per_tok": 8,
    "num_hidden_layers": 61,
    "num_key_value_heads": 128,
    "num_nextn_predict_layers": 1,
    "q_lora_rank": 1536,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "quantization_config": {
        "activation_scheme": "dynamic",
        "fmt": "e4m3",
        "quant_method": "fp8",
        "weight_block_size": [128, 128],
    },
    "torch_dtype": "bfloat16",
    "v_head_dim": 128,
    "vocab_size": 129280,
}


def files() -> dict[str, bytes]:
    """File name to content: config, safetensors index and shards whose sizes agree, a tokenizer."""
    shards, weight_map, total = {}, {}, 0
    for number in range(1, SHARDS + 1):
        name = f"model-{number:05d}-of-{SHARDS:06d}.safetensors"
        tensor = f"model.layers.{number - 1}.self_attn.o_proj.weight"
        shards[name] = safetensors(tensor, bytes(_TENSOR_BYTES))
        weight_map[tensor] = name
        total += _TENSOR_BYTES
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    tokenizer = {
        "version": "1.0",
        "added_tokens": [],
        "model": {
            "type": "WordLevel",
            "vocab": {"<|begin▁of▁sentence|>": 0, "<|end▁of▁sentence|>": 1},
            "unk_token": "",
        },
    }
    documents = {
        "config.json": _CONFIG,
        "generation_config.json": {"bos_token_id": 0, "eos_token_id": 1, "temperature": 0.6, "top_p": 0.95},
        "model.safetensors.index.json": index,
        "tokenizer.json": tokenizer,
        "tokenizer_config.json": {"tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": 16384},
    }
    return {
        **{name: json.dumps(value, indent=2).encode() + b"\n" for name, value in documents.items()},
        **shards,
    }


def safetensors(name: str, data: bytes) -> bytes:
    """A safetensors file with one tensor of bytes: header length, header, data (as the format says)."""
    header = json.dumps({name: {"dtype": "U8", "shape": [len(data)], "data_offsets": [0, len(data)]}}).encode()
    header += b" " * (-len(header) % 8)
    return struct.pack("<Q", len(header)) + header + data
