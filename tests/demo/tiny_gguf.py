"""Writes GGUF files, and a Llama of 4 layers in one."""

from __future__ import annotations

import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

F32, F16, Q4_1, Q8_0 = 0, 1, 3, 8
HIDDEN, HEADS, KEY_HEADS, LAYERS, INNER = 32, 4, 2, 4, 48
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
MERGES = ["t h", "th e", "Ġ the", "1 2"]


def text(value: str) -> bytes:
    raw = value.encode()
    return struct.pack("<Q", len(raw)) + raw


def value(item: Any) -> bytes:
    """A value with its type in front: u32, f32, text, or a list of texts or i32."""
    if isinstance(item, int):
        return struct.pack("<II", 4, item)
    if isinstance(item, float):
        return struct.pack("<If", 6, item)
    if isinstance(item, str):
        return struct.pack("<I", 8) + text(item)
    if isinstance(item[0], str):
        return struct.pack("<IIQ", 9, 8, len(item)) + b"".join(text(part) for part in item)
    return struct.pack("<IIQ", 9, 5, len(item)) + struct.pack(f"<{len(item)}i", *item)


def write_gguf(
    path: Path,
    metadata: Mapping[str, Any],
    tensors: Mapping[str, tuple[tuple[int, ...], int, bytes]],
) -> Path:
    """Write tensors given as shape (outermost dimension first), type and bytes."""
    head = b"GGUF" + struct.pack("<IQQ", 3, len(tensors), len(metadata))
    head += b"".join(text(key) + value(item) for key, item in metadata.items())
    offset, body = 0, b""
    for name, (shape, kind, raw) in tensors.items():
        head += text(name) + struct.pack("<I", len(shape))
        head += b"".join(struct.pack("<Q", size) for size in reversed(shape))
        head += struct.pack("<IQ", kind, offset)
        body += raw + bytes(-len(raw) % 32)
        offset = len(body)
    path.write_bytes(head + bytes(-len(head) % 32) + body)
    return path


def byte_tokens() -> list[str]:
    """One printable character for every byte, as byte-level BPE has them."""
    from tokenizers.pre_tokenizers import ByteLevel

    return sorted(ByteLevel.alphabet())


def llama_metadata() -> dict[str, Any]:
    tokens = [*SPECIAL, *byte_tokens(), *(merge.replace(" ", "") for merge in MERGES)]
    return {
        "general.architecture": "llama",
        "llama.block_count": LAYERS,
        "llama.context_length": 128,
        "llama.embedding_length": HIDDEN,
        "llama.feed_forward_length": INNER,
        "llama.attention.head_count": HEADS,
        "llama.attention.head_count_kv": KEY_HEADS,
        "llama.attention.layer_norm_rms_epsilon": 1e-5,
        "llama.rope.freq_base": 10000.0,
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "smollm",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [3] * len(SPECIAL) + [1] * (len(tokens) - len(SPECIAL)),
        "tokenizer.ggml.merges": MERGES,
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.unknown_token_id": 0,
        "tokenizer.ggml.padding_token_id": 2,
        "tokenizer.chat_template": "{{ messages[0]['content'] }}",
    }


def llama_weights(seed: int = 0) -> dict[str, np.ndarray]:
    """Random weights under the names of transformers."""
    rng = np.random.default_rng(seed)

    def draw(*shape: int) -> np.ndarray:
        return rng.normal(0, 0.2, shape).astype(np.float32)

    words = len(llama_metadata()["tokenizer.ggml.tokens"])
    weights = {
        "model.embed_tokens.weight": draw(words, HIDDEN),
        "model.norm.weight": 1 + draw(HIDDEN),
    }
    keys = HIDDEN // HEADS * KEY_HEADS
    for layer in range(LAYERS):
        name = f"model.layers.{layer}."
        weights |= {
            name + "input_layernorm.weight": 1 + draw(HIDDEN),
            name + "post_attention_layernorm.weight": 1 + draw(HIDDEN),
            name + "self_attn.q_proj.weight": draw(HIDDEN, HIDDEN),
            name + "self_attn.k_proj.weight": draw(keys, HIDDEN),
            name + "self_attn.v_proj.weight": draw(keys, HIDDEN),
            name + "self_attn.o_proj.weight": draw(HIDDEN, HIDDEN),
            name + "mlp.gate_proj.weight": draw(INNER, HIDDEN),
            name + "mlp.up_proj.weight": draw(INNER, HIDDEN),
            name + "mlp.down_proj.weight": draw(HIDDEN, INNER),
        }
    return weights


_NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "model.layers": "blk",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def interleave(weight: np.ndarray, heads: int) -> np.ndarray:
    """Order the rows as the format has them: row i of a head's first half, then row i of its second half."""
    size = len(weight) // heads
    order = [
        head * size + half * size // 2 + row
        for head in range(heads)
        for row in range(size // 2)
        for half in (0, 1)
    ]
    return weight[order]


def write_llama(path: Path, seed: int = 0, **changed: Any) -> Path:
    """Write the random model; ``changed`` replaces metadata by the last part of its key."""
    metadata = {k: changed.get(k.rpartition(".")[2], v) for k, v in llama_metadata().items()}
    tensors = {}
    for name, weight in llama_weights(seed).items():
        stored = name
        for theirs, ours in _NAMES.items():
            stored = stored.replace(theirs, ours)
        if "q_proj" in name or "k_proj" in name:
            rows = interleave(weight, HEADS if "q_proj" in name else KEY_HEADS)
        else:
            rows = weight
        tensors[stored] = (rows.shape, F32, rows.tobytes())
    return write_gguf(path, metadata, tensors)
