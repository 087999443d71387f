"""Stages change an update's differences before they are encoded, and what they take away does not come back."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray

from fedcore._core import Codec, Layout, MappedFile, same_bytes
from fedcore.encoding import UpdateEncoder
from fedcore.errors import ConfigError

COUNT, LIMIT = 40_003, 1e-3
LAYOUT = Layout([("w", "F32", [COUNT])], 1 << 16)
STAGES = [("limit", LIMIT)]
F32 = NDArray[np.float32]


def numbers(seed: int, scale: float) -> F32:
    return (np.random.default_rng(seed).standard_normal(COUNT) * scale).astype(np.float32)


BASE = numbers(0, 0.02)
VALUES = BASE + numbers(1, 1e-3)


def in_memory(values: F32) -> MappedFile:
    file = MappedFile.anonymous(values.nbytes)
    file.write(0, values)
    return file


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("encoding", ["bf16", "int8", "nf4", "top-k"])
def test_what_is_encoded_is_what_the_last_stage_gives(encoding: str, threads: int) -> None:
    encoder = UpdateEncoder(LAYOUT, encoding, stages=STAGES, threads=threads)
    update = encoder.encode(1, in_memory(VALUES), 0, in_memory(BASE), 0)
    limited = np.clip(VALUES - BASE, -np.float32(LIMIT), np.float32(LIMIT))
    plain = Codec(LAYOUT, encoding)
    for index in range(LAYOUT.chunk_count):
        at, nbytes = LAYOUT.chunk_range(index)
        _, body = plain.encode(index, limited[at // 4 : (at + nbytes) // 4])
        begin, end = update.offsets[index : index + 2]
        assert same_bytes(update.file.view(begin, end - begin), body)


@pytest.mark.parametrize("encoding", ["bf16", "int8", "nf4"])
def test_the_residual_holds_nothing_that_a_stage_took_away(encoding: str) -> None:
    files: dict[str, MappedFile] = {}

    def make(name: str, nbytes: int) -> MappedFile:
        return files.setdefault(name, MappedFile.anonymous(nbytes))

    encoder = UpdateEncoder(LAYOUT, encoding, stages=STAGES, make_file=make)
    update = encoder.encode(1, in_memory(VALUES), 0, in_memory(BASE), 0)
    limited = np.clip(VALUES - BASE, -np.float32(LIMIT), np.float32(LIMIT))
    codec, decoded = Codec(LAYOUT, encoding), np.empty(COUNT, np.float32)
    for index, number in enumerate(update.encodings):
        at, nbytes = LAYOUT.chunk_range(index)
        part = slice(at // 4, (at + nbytes) // 4)
        begin, end = update.offsets[index : index + 2]
        body = update.file.view(begin, end - begin)
        codec.decode(index, number, body, decoded[part], BASE[part])
    lost = np.frombuffer(files["residual-1"].view(), np.float32)
    assert (lost == ((BASE.astype(np.float64) - decoded) + limited).astype(np.float32)).all()
    assert np.abs(lost).max() < 0.2 * LIMIT < np.abs(VALUES - BASE - limited).max()


def test_a_raw_update_is_the_base_and_what_the_last_stage_gives() -> None:
    encoder = UpdateEncoder(LAYOUT, "raw", stages=STAGES)
    update = encoder.encode(1, in_memory(VALUES), 0, in_memory(BASE), 0)
    limited = np.clip(VALUES - BASE, -np.float32(LIMIT), np.float32(LIMIT))
    assert same_bytes(update.file.view(0, update.nbytes), BASE + limited)


@pytest.mark.parametrize(("stages", "why"), [([("lift", 1.0)], "expected one of limit"),
                                             ([("limit", 0.0)], "limit is 0.0"),
                                             ([("limit", float("nan"))], "limit is nan")])  # fmt: skip
def test_an_unknown_stage_and_a_number_out_of_range_are_refused(
    stages: list[tuple[str, float]], why: str
) -> None:
    with pytest.raises(ConfigError, match=why):
        UpdateEncoder(LAYOUT, "int8", stages=stages)
