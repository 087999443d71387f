"""Turn a Llama model in a GGUF file into an ordinary Hugging Face folder.

The rows of the query and key projections, which the format keeps in another order, are put back, and the tokenizer
is built from the file's tokens and merges.
"""

from __future__ import annotations

import fcntl
import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, Final

import numpy as np

from .assets import AssetError
from .gguf import Floats, GgufFile

__all__ = ["convert"]

_CONTROL_TOKEN: Final = 3

_LAYER: Final = MappingProxyType(
    {
        "attn_norm": "input_layernorm",
        "attn_q": "self_attn.q_proj",
        "attn_k": "self_attn.k_proj",
        "attn_v": "self_attn.v_proj",
        "attn_output": "self_attn.o_proj",
        "ffn_norm": "post_attention_layernorm",
        "ffn_gate": "mlp.gate_proj",
        "ffn_up": "mlp.up_proj",
        "ffn_down": "mlp.down_proj",
    }
)
_WHOLE: Final = MappingProxyType(
    {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
)


def _tensors(file: GgufFile) -> dict[str, Floats]:
    """The model's tensors under the names that transformers gives them."""
    heads = int(file.metadata["llama.attention.head_count"])
    key_heads = int(file.metadata["llama.attention.head_count_kv"])
    tensors: dict[str, Floats] = {}
    for name in file.names():
        part = name.removesuffix(".weight")
        tensor = file.tensor(name)
        if part.startswith("blk."):
            _, layer, part = part.split(".")
            if part in ("attn_q", "attn_k"):
                tensor = _rotate_halves(tensor, heads if part == "attn_q" else key_heads)
            target = f"model.layers.{layer}.{_LAYER[part]}"
        else:
            target = _WHOLE[part]
        tensors[f"{target}.weight"] = np.ascontiguousarray(tensor)
    return tensors


def _rotate_halves(weight: Floats, heads: int) -> Floats:
    """Put the rows of each head back: the file has the two halves that rotate together interleaved."""
    rows, columns = weight.shape
    split = weight.reshape(heads, rows // heads // 2, 2, columns)
    return split.swapaxes(1, 2).reshape(rows, columns)


def _config(metadata: Mapping[str, Any], tied: bool) -> dict[str, Any]:
    """The model's config.json."""
    if metadata["general.architecture"] != "llama":
        raise AssetError(f"a {metadata['general.architecture']} model; only llama is supported")
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "torch_dtype": "float32",
        "hidden_act": "silu",
        "vocab_size": len(metadata["tokenizer.ggml.tokens"]),
        "hidden_size": metadata["llama.embedding_length"],
        "intermediate_size": metadata["llama.feed_forward_length"],
        "num_hidden_layers": metadata["llama.block_count"],
        "num_attention_heads": metadata["llama.attention.head_count"],
        "num_key_value_heads": metadata["llama.attention.head_count_kv"],
        "max_position_embeddings": metadata["llama.context_length"],
        "rms_norm_eps": metadata["llama.attention.layer_norm_rms_epsilon"],
        "rope_theta": metadata["llama.rope.freq_base"],
        "bos_token_id": metadata["tokenizer.ggml.bos_token_id"],
        "eos_token_id": metadata["tokenizer.ggml.eos_token_id"],
        "pad_token_id": metadata["tokenizer.ggml.padding_token_id"],
        "tie_word_embeddings": tied,
    }


def save_tokenizer(metadata: Mapping[str, Any], folder: Path) -> None:
    """Build a byte-level BPE tokenizer; it splits numbers into digits, as this family of models does."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    found = metadata["tokenizer.ggml.model"], metadata["tokenizer.ggml.pre"]
    if found != ("gpt2", "smollm"):
        raise AssetError(f"a tokenizer of kind {found}; only ('gpt2', 'smollm') is supported")
    tokens: list[str] = metadata["tokenizer.ggml.tokens"]
    merges = [tuple(pair.split(" ")) for pair in metadata["tokenizer.ggml.merges"]]
    tokenizer = Tokenizer(models.BPE({token: n for n, token in enumerate(tokens)}, merges))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    types = metadata["tokenizer.ggml.token_type"]
    control = [t for t, kind in zip(tokens, types, strict=True) if kind == _CONTROL_TOKEN]
    tokenizer.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in control])
    fast = PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_object=tokenizer,
        bos_token=tokens[metadata["tokenizer.ggml.bos_token_id"]],
        eos_token=tokens[metadata["tokenizer.ggml.eos_token_id"]],
        unk_token=tokens[metadata["tokenizer.ggml.unknown_token_id"]],
        pad_token=tokens[metadata["tokenizer.ggml.padding_token_id"]],
        clean_up_tokenization_spaces=False,
    )
    fast.chat_template = metadata["tokenizer.chat_template"]
    fast.save_pretrained(folder)


def convert(source: Path, target: Path) -> Path:
    """Write ``target`` so that ``from_pretrained`` opens it; nothing is done if it is there.

    The folder gets its name only when it is complete, and one process at a time makes it.

    Args:
        source: a GGUF file.
        target: the folder to make.

    Returns:
        ``target``.

    Raises:
        AssetError: the file is damaged, or of a kind that is not supported.
    """
    if target.is_dir():
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    part = target.parent / f".{target.name}.part"
    with (target.parent / f".{target.name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if target.is_dir():  # another process has made it meanwhile
            return target
        # Whoever left a part behind is gone: it does not hold the lock.
        shutil.rmtree(part, ignore_errors=True)
        try:
            _write(GgufFile(source), part)
            part.replace(target)
        except KeyError as error:
            raise AssetError(f"{source} lacks {error}, or holds a tensor of that name") from error
        except OSError as error:
            raise AssetError(f"{target} could not be written: {error}") from error
        finally:
            shutil.rmtree(part, ignore_errors=True)
    return target


def _write(file: GgufFile, folder: Path) -> None:
    from safetensors.numpy import save_file

    tensors = _tensors(file)
    config = _config(file.metadata, tied="lm_head.weight" not in tensors)
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    save_tokenizer(file.metadata, folder)
