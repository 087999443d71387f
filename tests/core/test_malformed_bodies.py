"""Bodies of chunks that are malformed: refused by name, and nothing is changed."""

from __future__ import annotations

import random
import struct

import numpy as np
import pytest

from fedcore._core import Codec
from fedcore.errors import ProtocolError

from ..support.encoding_references import (
    LOSSY,
    NUMBER,
    mixed_bytes,
    mixed_layout,
    one_run,
    span,
)


def refused(codec: Codec, number: int, body: bytes, nbytes: int) -> str:
    """Decode what must be refused; the output must be as it was."""
    out = bytearray(b"\xa5" * nbytes)
    with pytest.raises(ProtocolError) as caught:
        codec.decode(0, number, body, out)
    assert out == b"\xa5" * nbytes
    return str(caught.value)


def top_k(count: int, gaps: bytes, values: bytes) -> bytes:
    return struct.pack("<II", count, len(gaps)) + values + gaps


ONE = struct.pack("<f", 1)


@pytest.mark.parametrize(
    ("encoding", "body", "said"),
    [
        ("bf16", b"\x00\x00" * 99, "too short"),
        ("bf16", b"\x00\x00" * 101, "too long"),
        ("bf16", b"\x80\x7f" * 100, "NaN or infinite"),
        ("fp16", b"\x01\xfc" * 100, "NaN or infinite"),
        ("int8", struct.pack("<f", np.nan) + bytes(100), "scale"),
        ("int8", struct.pack("<f", np.inf) + bytes(100), "scale"),
        ("int8", struct.pack("<f", -1) + bytes(100), "scale"),
        ("int8", struct.pack("<f", 2.0**122) + bytes(100), "scale"),
        ("int8", ONE + b"\x80" * 100, "-128"),
        ("nf4", struct.pack("<f", np.nan) + bytes(52), "scale"),
        ("nf4", struct.pack("<f", 3e38) + bytes(52), "scale"),
        ("nf4", bytes(55), "too short"),
        ("nf4", bytes(57), "too long"),
        ("top-k", top_k(101, bytes(101), ONE * 60), "more values than there are"),
        ("top-k", top_k(2**32 - 1, b"", b""), "more values than there are"),
        ("top-k", top_k(1, b"", ONE), "length of its indices"),
        ("top-k", top_k(1, bytes(6), ONE), "length of its indices"),
        ("top-k", top_k(2, bytes(2), ONE), "too short"),
        ("top-k", top_k(1, b"\x64", ONE), "out of range"),
        ("top-k", top_k(2, b"\x63\x00", ONE * 2), "out of range"),
        ("top-k", top_k(1, b"\xff\xff\xff\xff\x0f", ONE), "out of range"),
        ("top-k", top_k(1, b"\xff\xff\xff\xff\x1f", ONE), "malformed"),
        ("top-k", top_k(1, b"\x80\x00", ONE), "malformed"),
        ("top-k", top_k(1, b"\x80", ONE), "malformed"),
        ("top-k", top_k(1, b"\x00\x00", ONE), "more indices than values"),
        ("top-k", top_k(1, b"\x00", struct.pack("<f", -np.inf)), "NaN or infinite"),
        ("top-k", top_k(1, b"\x00", ONE) + b"\x00", "too long"),
        ("top-k", b"\x00" * 7, "too short"),
    ],
)
def test_a_malformed_body_is_refused_and_changes_nothing(
    encoding: str, body: bytes, said: str
) -> None:
    assert said in refused(Codec(one_run(100), encoding), NUMBER[encoding], body, 400)


def test_a_half_byte_behind_the_last_value_must_be_zero() -> None:
    body = ONE + b"\xff\xff" + bytes(50) + b"\x10"
    assert "half byte" in refused(Codec(one_run(101), "nf4"), 4, body, 404)


def test_an_encoding_that_was_not_agreed_on_is_refused() -> None:
    for encoding, number in [("raw", 3), ("int8", 4), ("int8", 0x83), ("raw", 0x80), ("raw", 6)]:
        assert "not agreed on" in refused(Codec(one_run(100), encoding), number, bytes(104), 400)
    packed = Codec(one_run(100), "top-k", lossless=True)
    assert "not agreed on" in refused(packed, 0x85, bytes(104), 400)


def test_a_packed_body_can_not_grow_beyond_its_chunk() -> None:
    import lz4.block

    codec = Codec(one_run(5000), "raw", lossless=True)
    for size in (0, 19_999, 20_001, 50_000_000):
        bomb = lz4.block.compress(bytes(size), store_size=False)
        said = refused(codec, 0x80, bomb, 20_000)
        assert "unpacked" in said or "too long" in said


@pytest.mark.parametrize("lossless", [False, True])
@pytest.mark.parametrize("encoding", ["raw", *LOSSY])
def test_thousands_of_mutated_bodies_end_no_process(encoding: str, lossless: bool) -> None:
    layout = mixed_layout()
    flat = np.repeat(mixed_bytes(layout, 1)[::8], 8)[: layout.total_bytes]
    flat = mixed_bytes(layout, 1) if encoding != "raw" else flat
    codec = Codec(layout, encoding, lossless, top_k=0.2)
    dice = random.Random(f"{encoding} {lossless}")
    good = [codec.encode(i, flat[slice(*span(layout, i))]) for i in range(layout.chunk_count)]
    outcomes = {"taken": 0, "refused": 0}
    for _ in range(3000):
        index = dice.randrange(layout.chunk_count)
        number, body = good[dice.randrange(len(good)) if dice.random() < 0.1 else index]
        hostile = bytearray(body)
        for _ in range(dice.randrange(1, 4)):
            move = dice.random()
            at = dice.randrange(len(hostile) + 1)
            if move < 0.6 and hostile:
                hostile[at - 1] = dice.choice([0, 0x7F, 0x80, 0xFF, dice.randrange(256)])
            elif move < 0.8:
                del hostile[at : at + dice.randrange(1, 40)]
            else:
                hostile[at:at] = dice.randbytes(dice.randrange(1, 40))
        if dice.random() < 0.1:
            number = dice.randrange(256)
        out = bytearray(layout.chunk_range(index)[1])
        try:
            codec.decode(index, number, bytes(hostile), out)
            outcomes["taken"] += 1
        except ProtocolError:
            outcomes["refused"] += 1
            assert not any(out)
    assert outcomes["taken"] > 0
    assert outcomes["refused"] > 300
