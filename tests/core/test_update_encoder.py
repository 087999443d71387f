"""A whole update in one call of the core has the bytes of its chunks one by one, as in every release before."""

from __future__ import annotations

import hashlib
import signal
from collections.abc import Iterator
from dataclasses import replace
from typing import Final

import numpy as np
import pytest
from numpy.typing import NDArray

from fedcore._core import (
    Codec,
    Layout,
    MappedFile,
    crc32c,
    set_simd_level,
    simd_level,
    simd_levels,
)
from fedcore.encoding import EncodedUpdate, UpdateEncoder
from fedcore.errors import NonFiniteError, StorageError

Flat = NDArray[np.uint8]

ENCODINGS: Final = ("raw", "bf16", "fp16", "int8", "nf4", "top-k")
COUNTS: Final = {
    "F64": 9001,
    "F32": 70_003,
    "F16": 20_001,
    "BF16": 20_011,
    "I32": 77,
    "U8": 33,
    "BOOL": 13,
}
SIZES: Final = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I32": 4, "U8": 1, "BOOL": 1}
EXPONENTS: Final = {"F64": 0x7FF0 << 48, "F32": 0x7F80 << 16, "F16": 0x7C00, "BF16": 0x7F80}
LAYOUT: Final = Layout([(dtype, dtype, [n]) for dtype, n in COUNTS.items()], 1 << 16)
TOP_K: Final = 0.03
ROUNDS: Final = ((1, True), (2, False), (3, True), (4, False))
"""Rounds, and whether the update counted."""

GOLDEN: Final = {
    "raw": "52a7c66d012a4b8afb02ea77082c665a31c8658913ccdd05414f6e8025ddb385",
    "bf16": "976efbcd70ec2b0d35ecb520cd59c29e3547eb080ea2542533b57a333fc3aaf2",
    "fp16": "80e277e34bdb5cad65da3ae0d757ed78ebefdd2928efb7bf0c5d06b749293753",
    "int8": "c340ccdf27a7ca3df91dcc8c5463d4687421f777b6360f0c5c47b88ff6e24678",
    "nf4": "db4d1fb7a57503a6b25a07c8ce7e66b69cd5728ffef70dc11d52770db5f4881e",
    "top-k": "7034448166557278bcdc4a50e321387d31f6f43139fc66e5b6f8aa6bc56dbb01",
}
"""SHA-256 of what each encoding makes of the updates below, as the first release with residuals made it."""


def bits(count: int, seed: str) -> Flat:
    return np.frombuffer(hashlib.shake_128(seed.encode()).digest(count), np.uint8)


def numbers(dtype: str, seed: str, near: Flat | None = None) -> Flat:
    """Return elements of a dtype: numbers of usual sizes, or near others, and any finite bits at all."""
    count, width = COUNTS[dtype], SIZES[dtype]
    anything = bits(count * width, seed + dtype)
    if dtype not in EXPONENTS:
        return anything & 1 if dtype == "BOOL" else anything
    words = anything.view(f"u{width}").copy()
    exponent = np.array(EXPONENTS[dtype], words.dtype)
    words[(words & exponent) == exponent] ^= np.array(1 << (8 * width - 2), words.dtype)
    step = bits(2 * count, seed + dtype + "step").view(np.int16) * 2.0**-22
    if near is not None:
        step = step * 0.01 + to_double(dtype, near)
    usual = from_double(dtype, step)
    picked = np.arange(count) // 700 % 3 == 0  # stretches, so that whole blocks are of usual sizes
    return np.where(picked, words, usual).astype(words.dtype).view(np.uint8)


def to_double(dtype: str, flat: Flat) -> NDArray[np.float64]:
    if dtype == "BF16":
        return (flat.view(np.uint16).astype(np.uint32) << 16).view(np.float32).astype(np.float64)
    return flat.view(f"f{SIZES[dtype]}").astype(np.float64)


def from_double(dtype: str, values: NDArray[np.float64]) -> NDArray[np.unsignedinteger]:
    with np.errstate(over="ignore"):
        if dtype == "BF16":
            return (values.astype(np.float32).view(np.uint32) >> 16).astype(np.uint16)
        most = float(np.finfo(f"f{SIZES[dtype]}").max)
        return np.clip(values, -most, most).astype(f"f{SIZES[dtype]}").view(f"u{SIZES[dtype]}")


def flat_bytes(seed: str, near: Flat | None = None) -> Flat:
    parts = []
    for _, dtype, _, offset, nbytes in LAYOUT.tensors:
        parts.append(numbers(dtype, seed, None if near is None else near[offset:][:nbytes]))
    return np.concatenate(parts)


def in_memory(flat: Flat, before: int = 0) -> MappedFile:
    file = MappedFile.anonymous(before + len(flat))
    file.write(before, flat)
    return file


BASE: Final = flat_bytes("base")
UPDATES: Final = [flat_bytes(f"round {round_}", BASE) for round_, _ in ROUNDS]


class Loop:
    """What an update's bytes are, chunk by chunk."""

    def __init__(self, layout: Layout, encoding: str, lossless: bool = False) -> None:
        self.layout, self.codec = layout, Codec(layout, encoding, lossless, TOP_K)
        self.residual: Flat | None = None
        if encoding != "raw":
            self.residual = np.zeros(layout.total_bytes, np.uint8)
        self.following = np.zeros(layout.total_bytes, np.uint8)

    def encode(self, values: Flat, base: Flat) -> tuple[bytes, list[bytes], list[int]]:
        encodings, bodies = bytearray(), []
        for index in range(self.layout.chunk_count):
            at, nbytes = self.layout.chunk_range(index)
            local, under = (flat[at : at + nbytes].data for flat in (values, base))
            carried = None if self.residual is None else self.residual[at : at + nbytes].data
            number, body = self.codec.encode(index, local, under, carried)
            encodings.append(number)
            bodies.append(body)
            if carried is not None:
                decoded = np.empty(nbytes, np.uint8)
                self.codec.decode(index, number, body, decoded.data, under)
                lost = self.following[at : at + nbytes]
                self.codec.carry(index, local, carried, decoded.data, lost.data)
        return bytes(encodings), bodies, [crc32c(body) for body in bodies]

    def settle(self, included: bool) -> None:
        if included and self.residual is not None:
            self.residual, self.following = self.following, self.residual


class Files:
    """The files that an encoder makes, by their names."""

    def __init__(self) -> None:
        self.made: dict[str, MappedFile] = {}

    def __call__(self, name: str, nbytes: int) -> MappedFile:
        self.made[name] = MappedFile.anonymous(nbytes)
        return self.made[name]


def bodies_of(update: EncodedUpdate) -> list[bytes]:
    ends = zip(update.offsets, update.offsets[1:], strict=False)
    return [bytes(update.file.view(begin, end - begin)) for begin, end in ends]


@pytest.fixture(params=simd_levels())
def _level(request: pytest.FixtureRequest) -> Iterator[None]:
    before = simd_level()
    set_simd_level(request.param)
    yield
    set_simd_level(before)


@pytest.mark.usefixtures("_level")
@pytest.mark.parametrize("encoding", ENCODINGS)
def test_an_update_has_the_bytes_of_every_release_before(encoding: str) -> None:
    found = hashlib.sha256()
    files = Files()
    encoder = UpdateEncoder(LAYOUT, encoding, top_k=TOP_K, make_file=files)
    for (round_, included), values in zip(ROUNDS, UPDATES, strict=True):
        update = encoder.encode(round_, in_memory(values, 24), 24, in_memory(BASE, 8), 8)
        found.update(update.encodings + b"".join(bodies_of(update)))
        found.update(np.array(update.offsets, "<u8").tobytes())
        found.update(np.array(update.checksums, "<u4").tobytes())
        for name in ("residual-0", "residual-1"):
            if name in files.made:
                found.update(bytes(files.made[name].view()))
        found.update(repr(encoder.state).encode())
        encoder.settle(round_, included=included)
    assert found.hexdigest() == GOLDEN[encoding]


@pytest.mark.parametrize("lossless", [False, True])
@pytest.mark.parametrize("encoding", ENCODINGS)
def test_an_update_has_the_bytes_of_its_chunks_one_by_one(encoding: str, lossless: bool) -> None:
    files = Files()
    encoder = UpdateEncoder(LAYOUT, encoding, lossless=lossless, top_k=TOP_K, make_file=files)
    loop = Loop(LAYOUT, encoding, lossless)
    for (round_, included), values in zip(ROUNDS, UPDATES, strict=True):
        update = encoder.encode(round_, in_memory(values), 0, in_memory(BASE), 0)
        encodings, bodies, checksums = loop.encode(values, BASE)
        assert (update.encodings, bodies_of(update)) == (encodings, bodies)
        assert update.checksums == checksums
        encoder.settle(round_, included=included)
        loop.settle(included)
        if loop.residual is not None:
            kept = bytes(files.made[f"residual-{encoder.state.now}"].view())
            assert kept == loop.residual.tobytes()
            assert encoder.is_whole() or not included


@pytest.mark.parametrize("lossless", [False, True])
@pytest.mark.parametrize("encoding", ENCODINGS)
def test_any_number_of_threads_gives_the_same_bytes(encoding: str, lossless: bool) -> None:
    made = []
    for threads in (1, 3):
        files = Files()
        encoder = UpdateEncoder(
            LAYOUT, encoding, lossless=lossless, top_k=TOP_K, make_file=files, threads=threads
        )
        for (round_, included), values in zip(ROUNDS, UPDATES, strict=True):
            update = encoder.encode(round_, in_memory(values), 0, in_memory(BASE), 0)
            made.append((update.offsets, update.encodings, bodies_of(update), update.checksums))
            made.append((encoder.state, [bytes(file.view()) for file in files.made.values()]))
            encoder.settle(round_, included=included)
    assert made[: len(made) // 2] == made[len(made) // 2 :]


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("encoding", ["int8", "nf4", "top-k", "bf16"])
def test_nan_and_infinity_are_named_from_the_lowest_on(encoding: str, threads: int) -> None:
    spoiled = UPDATES[0].copy()
    _, _, _, offset, nbytes = next(t for t in LAYOUT.tensors if t[0] == "F32")
    spoiled[offset : offset + nbytes].view(np.float32)[[69_000, 40_000, 1234]] = np.nan, 1, np.inf
    encoder = UpdateEncoder(LAYOUT, encoding, threads=threads)
    encoder.encode(1, in_memory(UPDATES[1]), 0, in_memory(BASE), 0)
    before = encoder.state
    with pytest.raises(NonFiniteError, match="tensor 'F32', element 1234$"):
        encoder.encode(2, in_memory(spoiled), 0, in_memory(BASE), 0)
    assert encoder.state == replace(before, at_stake=None)


def test_a_file_that_is_too_short_is_refused_before_anything_is_written() -> None:
    encoder = UpdateEncoder(LAYOUT, "int8")
    with pytest.raises(StorageError, match="lie outside"):
        encoder.encode(1, in_memory(UPDATES[0]), 4, in_memory(BASE), 0)
    assert encoder.state.at_stake is None


@pytest.mark.parametrize("threads", [1, 2])
def test_ctrl_c_ends_the_call(threads: int) -> None:
    layout = Layout([("w", "F32", [4 << 20])], 4096)  # of small chunks top-k is slow
    files = Files()
    encoder = UpdateEncoder(layout, "top-k", make_file=files, threads=threads)
    values, base = (MappedFile.anonymous(layout.total_bytes) for _ in range(2))
    values.write(0, np.ones(4 << 20, np.float32))
    handler = signal.signal(signal.SIGALRM, signal.default_int_handler)
    try:
        signal.setitimer(signal.ITIMER_REAL, 0.02)
        with pytest.raises(KeyboardInterrupt):
            encoder.encode(1, values, 0, base, 0)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, handler)
    assert encoder.state.at_stake is None
    assert not any(files.made["residual-1"].view()[-4096:])  # where it had not come yet
