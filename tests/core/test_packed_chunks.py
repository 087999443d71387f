"""Chunks that are compressed without loss, and tensors that no encoding changes."""

from __future__ import annotations

import numpy as np
import pytest

from fedcore._core import Codec, Layout

from ..support.encoding_references import (
    LOSSY,
    floats,
    mixed_bytes,
    mixed_layout,
    one_run,
    trip,
)


@pytest.mark.parametrize("lossless", [False, True])
@pytest.mark.parametrize("encoding", ["raw", *LOSSY])
def test_integers_and_booleans_travel_exactly_and_no_chunk_grows(
    encoding: str, lossless: bool
) -> None:
    layout = mixed_layout()
    flat, base = mixed_bytes(layout, 1), mixed_bytes(layout, 2)
    codec = Codec(layout, encoding, lossless)
    out = np.zeros_like(flat)
    for index in range(layout.chunk_count):
        offset, nbytes = layout.chunk_range(index)
        part = slice(offset, offset + nbytes)
        number, body = codec.encode(index, flat[part], base[part])
        assert len(body) <= nbytes
        codec.decode(index, number, body, out[part], base[part])
    for _, dtype, _, offset, nbytes in layout.tensors:
        if encoding == "raw" or dtype in ("I64", "U8", "BOOL"):
            part = slice(offset, offset + nbytes)
            np.testing.assert_array_equal(out[part], flat[part])


def test_lossless_packs_what_shrinks_and_leaves_the_rest_raw() -> None:
    count = 1 << 18
    codec = Codec(one_run(count), "raw", lossless=True)
    noise = np.random.default_rng(3).integers(0, 2**32, count, np.uint32).view(np.float32)
    number, body = codec.encode(0, noise)
    assert (number, len(body)) == (0, noise.nbytes)
    number, body, out = trip(codec, floats(count))
    assert number == 0x80
    assert len(body) <= 0.95 * out.nbytes
    np.testing.assert_array_equal(out, floats(count))


def test_a_chunk_whose_middle_alone_shrinks_stays_raw() -> None:
    count = 1 << 18
    noise = np.random.default_rng(3).integers(0, 2**32, count, np.uint32).view(np.float32)
    noise[count // 2 - 5000 : count // 2 + 5000] = 0
    number, _ = Codec(one_run(count), "raw", lossless=True).encode(0, noise)
    assert number == 0


@pytest.mark.parametrize(("zeros", "packed"), [(45, False), (80, True)])
def test_a_chunk_is_compressed_from_5_percent_on(zeros: int, packed: bool) -> None:
    lz4 = pytest.importorskip("lz4.block")
    count = 1 << 18  # bytes, of which this many in a thousand compress
    data = np.random.default_rng(4).integers(1, 256, count, np.uint8)
    data[np.arange(count) % 1000 < zeros] = 0
    saved = 1 - len(lz4.compress(data.tobytes(), store_size=False)) / count
    assert 0.06 < saved < 0.08 if packed else 0.03 < saved < 0.045
    codec = Codec(Layout([("w", "U8", [count])], 1 << 20), "raw", lossless=True)
    assert codec.encode(0, data)[0] == (0x80 if packed else 0)


def test_a_chunk_whose_middle_does_not_shrink_is_not_tried_any_further() -> None:
    count = 1 << 20
    data = np.zeros(count, np.uint8)
    middle = slice(count // 2 - (48 << 10), count // 2 + (48 << 10))
    data[middle] = np.random.default_rng(3).integers(0, 256, 96 << 10, np.uint8)
    number, _ = Codec(Layout([("w", "U8", [count])], 1 << 20), "raw", lossless=True).encode(0, data)
    assert number == 0


def test_a_packed_encoding_gives_the_values_of_the_plain_one() -> None:
    values = np.repeat(floats(2000), 40)
    plain = trip(Codec(one_run(80_000), "int8"), values)
    packed = trip(Codec(one_run(80_000), "int8", lossless=True), values)
    assert packed[0] == 0x83
    assert len(packed[1]) < len(plain[1])
    np.testing.assert_array_equal(packed[2], plain[2])
