"""The GGUF reader and the conversion to a Hugging Face folder."""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fedcore.demo import conversion
from fedcore.demo.assets import AssetError
from fedcore.demo.conversion import convert
from fedcore.demo.gguf import GgufFile

from .tiny_gguf import F16, F32, Q4_1, Q8_0, SPECIAL, llama_weights, write_gguf, write_llama


def test_every_type_of_tensor_is_widened_to_the_values_it_stands_for(tmp_path: Path) -> None:
    rng = np.random.default_rng(1)
    packed = rng.integers(0, 256, (4, 16), dtype=np.uint8)
    signed = rng.integers(-128, 128, (2, 32), dtype=np.int8)
    q4 = b"".join(struct.pack("<ee", 0.5 + n, -n) + packed[n].tobytes() for n in range(4))
    q8 = b"".join(struct.pack("<e", 0.25 * (n + 1)) + signed[n].tobytes() for n in range(2))
    path = write_gguf(
        tmp_path / "a.gguf",
        {"name": "x", "count": 7, "list": ["a", "ß"]},
        {
            "four": ((2, 64), Q4_1, q4),
            "eight": ((2, 32), Q8_0, q8),
            "half": ((3,), F16, struct.pack("<3e", 1.5, -2, 0.125)),
            "whole": ((2, 1), F32, struct.pack("<2f", 3.25, -1e-30)),
        },
    )
    file = GgufFile(path)
    assert file.metadata == {"name": "x", "count": 7, "list": ["a", "ß"]}
    assert file.names() == ["four", "eight", "half", "whole"]
    four = file.tensor("four").reshape(4, 32)
    for block in range(4):
        for place in range(16):
            byte = int(packed[block, place])
            assert four[block, place] == (0.5 + block) * (byte % 16) - block
            assert four[block, place + 16] == (0.5 + block) * (byte // 16) - block
    assert (file.tensor("eight") == signed * np.array([[0.25], [0.5]])).all()
    assert file.tensor("half").tolist() == [1.5, -2, 0.125]
    assert file.tensor("whole").tolist() == [[3.25], [float(np.float32(-1e-30))]]
    assert {file.tensor(name).dtype for name in file.names()} == {np.dtype(np.float32)}


def test_a_converted_model_opens_with_the_weights_it_was_written_from(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    folder = convert(write_llama(tmp_path / "a.gguf"), tmp_path / "cache" / "model")
    model = AutoModelForCausalLM.from_pretrained(folder)
    found = model.state_dict()
    expected = llama_weights()
    for name, weight in expected.items():
        assert np.array_equal(found[name].numpy(), weight), name
    assert found.keys() - expected.keys() == {"lm_head.weight"}
    assert model.lm_head.weight.data_ptr() == model.model.embed_tokens.weight.data_ptr()
    assert model.config.num_key_value_heads == 2
    assert model.config.rms_norm_eps == pytest.approx(1e-5)


def test_a_converted_tokenizer_gives_every_text_back(tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(
        convert(write_llama(tmp_path / "a.gguf"), tmp_path / "m")
    )
    for text in ("the sum of 12  and 3\n\n", "naïve “日本” 🙂", "it's\ta <b>", ""):
        assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    assert tokenizer.tokenize("so the 12") == ["s", "o", "Ġthe", "Ġ", "1", "2"]
    assert tokenizer("<|im_start|>the<|im_end|>")["input_ids"] == [
        SPECIAL.index("<|im_start|>"),
        tokenizer.convert_tokens_to_ids("the"),
        SPECIAL.index("<|im_end|>"),
    ]
    assert (tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token) == (
        "<|im_start|>",
        "<|im_end|>",
        "<|im_end|>",
    )
    said = [{"role": "user", "content": "the"}]
    assert tokenizer.apply_chat_template(said, tokenize=False) == "the"


def test_a_conversion_that_fails_leaves_nothing_and_the_next_one_starts_afresh(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, target = write_llama(tmp_path / "a.gguf"), tmp_path / "cache" / "model"
    left = target.parent / ".model.part"
    left.mkdir(parents=True)
    (left / "model.safetensors").write_bytes(b"cut off")

    def full(*_: Any) -> None:
        raise OSError("no space left")

    with monkeypatch.context() as patch:
        patch.setattr(conversion, "save_tokenizer", full)
        with pytest.raises(AssetError, match="no space left"):
            convert(source, target)
    assert not target.exists()
    assert not left.exists()
    convert(source, target)
    made = (target / "config.json").stat().st_mtime_ns
    convert(tmp_path / "not there", target)
    assert (target / "config.json").stat().st_mtime_ns == made
    assert sorted(path.name for path in target.parent.iterdir()) == [".model.lock", "model"]


def test_what_is_not_supported_is_named(tmp_path: Path) -> None:
    def refused(match: str, path: Path) -> None:
        with pytest.raises(AssetError, match=match):
            convert(path, tmp_path / "model")
        assert not (tmp_path / "model").exists()

    refused("a gemma model", write_llama(tmp_path / "a.gguf", architecture="gemma"))
    refused("no-such-split", write_llama(tmp_path / "b.gguf", pre="no-such-split"))
    meta = {"general.architecture": "llama"}
    refused(
        "head_count",
        write_gguf(tmp_path / "c.gguf", meta, {"output_norm.weight": ((1,), F32, bytes(4))}),
    )
    whole = write_llama(tmp_path / "d.gguf").read_bytes()
    for name, cut in (("magic", b"GGML" + whole[4:]), ("head", whole[:200]), ("end", whole[:-400])):
        (tmp_path / name).write_bytes(cut)
        refused("no GGUF file" if name == "magic" else "cut short", tmp_path / name)
    path = write_gguf(tmp_path / "e.gguf", {}, {"a": ((32,), 14, bytes(64))})
    with pytest.raises(AssetError, match="a has type 14"):
        GgufFile(path).tensor("a")
