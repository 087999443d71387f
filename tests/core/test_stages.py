"""Stages change an update's differences before they are encoded, and what they take away does not come back."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray

from fedcore._core import Codec, Layout, MappedFile, same_bytes
from fedcore.encoding import EncodedUpdate, UpdateEncoder
from fedcore.errors import ConfigError, NonFiniteError

COUNT, LIMIT = 40_003, 1e-3
LAYOUT = Layout([("w", "F32", [COUNT])], 1 << 16)
STAGES = [("limit", {"most": LIMIT})]
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


def decoded(encoding: str, update: EncodedUpdate, layout: Layout, base: F32) -> F32:
    """Return what the receiver makes of an update."""
    codec, out = Codec(layout, encoding), np.empty(len(base), np.float32)
    for index, number in enumerate(update.encodings):
        at, nbytes = layout.chunk_range(index)
        part = slice(at // 4, (at + nbytes) // 4)
        begin, end = update.offsets[index : index + 2]
        body = update.file.view(begin, end - begin)
        codec.decode(index, number, body, out[part], base[part])
    return out


def norm(values: F32) -> float:
    return float(np.sqrt(np.square(values.astype(np.float64)).sum()))


@pytest.mark.parametrize("encoding", ["raw", "bf16", "fp16", "int8", "nf4", "top-k"])
def test_what_the_receiver_decodes_of_a_clipped_update_is_within_its_norm(encoding: str) -> None:
    most = 0.5 * norm(VALUES - BASE) if encoding != "top-k" else 0.05 * norm(VALUES - BASE)
    encoder = UpdateEncoder(LAYOUT, encoding, stages=[("clip", {"norm": most})])
    update = encoder.encode(1, in_memory(VALUES), 0, in_memory(BASE), 0)
    change = decoded(encoding, update, LAYOUT, BASE).astype(np.float64) - BASE
    assert norm(change) <= most
    assert update.decoded[0] == pytest.approx(norm(change), rel=1e-6)
    assert update.found[0] == pytest.approx(norm(VALUES - BASE), rel=1e-6)
    if encoding not in ("nf4", "top-k"):  # which keep less of an update
        assert norm(change) > 0.999 * most


def test_an_update_within_its_norm_is_encoded_as_without_the_clip() -> None:
    stages = [("clip", {"norm": 1.1 * norm(VALUES - BASE)})]
    clipped, plain = (
        UpdateEncoder(LAYOUT, "int8", stages=those).encode(
            1, in_memory(VALUES), 0, in_memory(BASE), 0
        )
        for those in (stages, [])
    )
    assert same_bytes(clipped.file.view(0, clipped.nbytes), plain.file.view(0, plain.nbytes))


def test_a_clipped_update_has_the_same_bytes_with_any_number_of_threads() -> None:
    stages = [("clip", {"norm": 0.3})]
    found = set()
    for threads in (1, 2, 3):
        encoder = UpdateEncoder(LAYOUT, "nf4", stages=stages, threads=threads)
        update = encoder.encode(1, in_memory(VALUES), 0, in_memory(BASE), 0)
        found.add((bytes(update.file.view(0, update.nbytes)), update.found[0], update.decoded[0]))
    assert len(found) == 1


def test_rounding_to_the_dtype_of_the_model_does_not_break_the_norm() -> None:
    """A bf16 model has steps of a whole unit in the last place, which rounding may lengthen a lot."""
    base = np.full(COUNT, 1.0, np.float32)
    values = base + np.float32(0.0048)  # a little more than half a unit, 2**-8 above 1
    words = [(array.view(np.uint32) >> 16).astype(np.uint16) for array in (base, values)]
    words[1] += 1
    layout = Layout([("w", "BF16", [COUNT])], 1 << 16)
    files = [MappedFile.anonymous(2 * COUNT) for _ in words]
    for file, array in zip(files, words, strict=True):
        file.write(0, array)
    most = 0.7 * norm((words[1].astype(np.uint32) << 16).view(np.float32) - base)
    encoder = UpdateEncoder(layout, "raw", stages=[("clip", {"norm": most})])
    update = encoder.encode(1, files[1], 0, files[0], 0)
    got = np.frombuffer(update.file.view(0, update.nbytes), np.uint16).astype(np.uint32) << 16
    assert norm(got.view(np.float32) - base) <= most


def test_an_update_of_few_steps_of_its_dtype_is_shortened_and_not_lost() -> None:
    """Most values of a bf16 model change by a step or two; a little less rounds to the same values."""
    words = [((array.view(np.uint32) + 0x8000) >> 16).astype(np.uint16) for array in
             (BASE, BASE + numbers(1, 1e-4))]  # fmt: skip
    base, values = ((array.astype(np.uint32) << 16).view(np.float32) for array in words)
    files = [MappedFile.anonymous(2 * COUNT) for _ in words]
    for file, array in zip(files, words, strict=True):
        file.write(0, array)
    most = 0.98 * norm(values - base)
    for encoding in ("raw", "int8", "nf4"):
        encoder = UpdateEncoder(
            Layout([("w", "BF16", [COUNT])], 1 << 16), encoding, stages=[("clip", {"norm": most})]
        )
        update = encoder.encode(1, files[1], 0, files[0], 0)
        assert 0.9 * most < update.decoded[0] <= most


def test_the_residual_does_not_bring_back_what_a_clip_took_away() -> None:
    files: dict[str, MappedFile] = {}

    def make(name: str, nbytes: int) -> MappedFile:
        return files.setdefault(name, MappedFile.anonymous(nbytes))

    most = 0.1 * norm(VALUES - BASE)
    encoder = UpdateEncoder(LAYOUT, "int8", stages=[("clip", {"norm": most})], make_file=make)
    for round_ in range(1, 4):
        update = encoder.encode(round_, in_memory(VALUES), 0, in_memory(BASE), 0)
        encoder.settle(round_, included=True)
        assert norm(decoded("int8", update, LAYOUT, BASE).astype(np.float64) - BASE) <= most
        lost = np.frombuffer(files[f"residual-{encoder.state.now}"].view(), np.float32)
        assert 0 < norm(lost) < 0.02 * most


def test_a_stage_that_needs_the_whole_update_is_refused_a_single_chunk() -> None:
    codec = Codec(LAYOUT, "int8", stages=[("clip", {"norm": 1.0})])
    with pytest.raises(ConfigError, match="needs the whole update"):
        codec.encode(0, VALUES[: LAYOUT.chunk_range(0)[1] // 4])


def test_of_a_first_pass_that_fails_the_first_element_is_named() -> None:
    values = VALUES.copy()
    values[[3, COUNT - 1]] = np.nan
    encoder = UpdateEncoder(LAYOUT, "int8", stages=[("clip", {"norm": 1.0})], threads=2)
    with pytest.raises(NonFiniteError, match="tensor 'w', element 3"):
        encoder.encode(1, in_memory(values), 0, in_memory(BASE), 0)


@pytest.mark.parametrize(("stages", "why"), [([("lift", {"most": 1.0})], r"expected one of .*limit"),
                                             ([("limit", {"most": 0.0})], "limit is 0.0"),
                                             ([("limit", {"most": float("nan")})], "limit is nan"),
                                             ([("clip", {"norm": -1.0})], "norm of clip is -1.0"),
                                             ([("clip", {"most": 1.0})], "no others: norm"),
                                             ([("clip", {})], "no others: norm")])  # fmt: skip
def test_an_unknown_stage_and_options_that_are_not_its_own_are_refused(
    stages: list[tuple[str, dict[str, float]]], why: str
) -> None:
    with pytest.raises(ConfigError, match=why):
        UpdateEncoder(LAYOUT, "int8", stages=stages)
