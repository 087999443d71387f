"""Turn a Llama model in a GGUF file into an ordinary Hugging Face folder.

Reads version 2 and 3 files (https://github.com/ggml-org/ggml/blob/master/docs/gguf.md): a header of typed
key-value pairs, a table of tensors, then the tensors' bytes. Quantised tensors are widened to float32; the rows of
the query and key projections, which the format keeps in another order, are put back.
"""

from __future__ import annotations

import fcntl
import json
import shutil
import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, BinaryIO, Final

import numpy as np
from numpy.typing import NDArray

from .assets import AssetError

__all__ = ["GgufFile", "convert"]

Floats = NDArray[np.float32]

_MAGIC: Final = b"GGUF"
_STRING: Final = 8
_ARRAY: Final = 9
_SCALARS: Final = MappingProxyType(
    {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
)
_CONTROL_TOKEN: Final = 3
_BLOCK: Final = 32


def _halves(blocks: NDArray[np.uint8], start: int) -> Floats:
    """The half-precision number at a byte of every block, as a column."""
    return np.ascontiguousarray(blocks[:, start : start + 2]).view("<f2").astype(np.float32)


def _q4_1(blocks: NDArray[np.uint8]) -> Floats:
    """Scale, minimum, 16 bytes: the low halves are the block's first 16 values, the high ones the rest."""
    packed = blocks[:, 4:]
    values = np.concatenate([packed & 0x0F, packed >> 4], axis=1).astype(np.float32)
    return values * _halves(blocks, 0) + _halves(blocks, 2)


def _q8_0(blocks: NDArray[np.uint8]) -> Floats:
    """Scale, 32 signed bytes."""
    return blocks[:, 2:].view(np.int8).astype(np.float32) * _halves(blocks, 0)


@dataclass(frozen=True)
class _Kind:
    """How one type of tensor is stored."""

    values: int
    size: int
    widen: Callable[[NDArray[np.uint8]], Floats]


#: By the number that stands for the type in the file.
_KINDS: Final = MappingProxyType(
    {
        0: _Kind(1, 4, lambda blocks: blocks.view("<f4").astype(np.float32)),
        1: _Kind(1, 2, lambda blocks: blocks.view("<f2").astype(np.float32)),
        3: _Kind(_BLOCK, 20, _q4_1),
        8: _Kind(_BLOCK, 34, _q8_0),
    }
)


class GgufFile:
    """The metadata and the tensors of a GGUF file.

    Raises:
        AssetError: it is no GGUF file, or it is cut short.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.metadata: dict[str, Any] = {}
        self._table: dict[str, tuple[tuple[int, ...], int, int]] = {}
        try:
            with path.open("rb") as file:
                self._read_header(file)
        except (struct.error, UnicodeDecodeError) as error:
            raise AssetError(f"{path} is cut short or damaged: {error}") from error

    def _read_header(self, file: BinaryIO) -> None:
        magic, version = file.read(4), _number(file, "I")
        if magic != _MAGIC or version not in (2, 3):
            raise AssetError(f"{self.path} is no GGUF file of version 2 or 3")
        tensors, pairs = _number(file, "Q"), _number(file, "Q")
        for _ in range(pairs):
            key = _text(file)
            self.metadata[key] = _value(file, _number(file, "I"))
        for _ in range(tensors):
            name = _text(file)
            # The format counts dimensions from the innermost one.
            shape = tuple(_number(file, "Q") for _ in range(_number(file, "I")))[::-1]
            self._table[name] = (shape, _number(file, "I"), _number(file, "Q"))
        alignment = int(self.metadata.get("general.alignment", 32))
        self._start = -(-file.tell() // alignment) * alignment

    def names(self) -> list[str]:
        """Every tensor's name, in the file's order."""
        return list(self._table)

    def tensor(self, name: str) -> Floats:
        """Return one tensor, widened to float32.

        Raises:
            AssetError: the tensor is of a type that this reader does not know, or its bytes are missing.
        """
        shape, number, offset = self._table[name]
        kind = _KINDS.get(number)
        if kind is None:
            raise AssetError(f"{self.path}: {name} has type {number}, which is not supported")
        count = int(np.prod(shape)) // kind.values
        start = self._start + offset
        if start + count * kind.size > self.path.stat().st_size:
            raise AssetError(f"{self.path} is cut short: {name} lies beyond its end")
        blocks = np.fromfile(self.path, np.uint8, count * kind.size, offset=start)
        return kind.widen(blocks.reshape(count, kind.size)).reshape(shape)


def _number(file: BinaryIO, code: str) -> Any:
    layout = struct.Struct("<" + code)
    return layout.unpack(file.read(layout.size))[0]


def _text(file: BinaryIO) -> str:
    length = _number(file, "Q")
    return file.read(length).decode("utf-8")


def _value(file: BinaryIO, kind: int) -> Any:
    if kind == _STRING:
        return _text(file)
    if kind == _ARRAY:
        inner, count = _number(file, "I"), _number(file, "Q")
        return [_value(file, inner) for _ in range(count)]
    if kind not in _SCALARS:
        raise AssetError(f"a value of type {kind}, which no GGUF file has")
    return _number(file, _SCALARS[kind])


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


def _save_tokenizer(metadata: Mapping[str, Any], folder: Path) -> None:
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
    _save_tokenizer(file.metadata, folder)
