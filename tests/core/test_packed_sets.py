"""A published model whose chunks are compressed when first asked for: once, and the same bytes for all."""

from __future__ import annotations

import resource
from pathlib import Path

import numpy as np
import pytest

from fedcore._core import Codec, Exchange, Layout, MappedFile
from fedcore.errors import ConfigError, StorageError
from fedcore.protocol import frame_header as header
from fedcore.protocol import read_header

CHUNK = 4096
CHUNKS = 40
LAYOUT = Layout([("w", "F32", [CHUNKS * CHUNK // 4 - 9])], CHUNK)
SET = b"m" * 16
PACKED = 0x80


def mapped(data: bytes) -> MappedFile:
    file = MappedFile.anonymous(len(data))
    file.write(0, data)
    return file


def weights() -> bytes:
    """Floats of few exponents: their highest bytes compress."""
    dice = np.random.default_rng(0)
    return (1 + dice.random(LAYOUT.total_bytes // 4, np.float32) / 4).tobytes()


def noise() -> bytes:
    return np.random.default_rng(0).bytes(LAYOUT.total_bytes)


def get(exchange: Exchange, peer: bytes, first: int, count: int) -> list[tuple[int, int, bytes]]:
    """Ask for chunks as a collector would; (index, encoding, body) of each."""
    exchange.deliver(0, peer, header(1, SET, first, count), None)
    came = []
    while (frame := exchange.next_out(0)) is not None:
        assert frame[2] is not None
        head = read_header(frame[1])
        came.append((head.index, head.encoding, bytes(frame[2])))
    return came


def published(data: bytes, packed: MappedFile | None = None) -> Exchange:
    exchange = Exchange()
    room = packed or MappedFile.anonymous(LAYOUT.total_bytes)
    exchange.publish_packed(SET, mapped(data), 0, Codec(LAYOUT, "raw", True), room)
    return exchange


def test_all_get_the_same_compressed_chunks_and_each_is_compressed_once() -> None:
    packed, data = MappedFile.anonymous(LAYOUT.total_bytes), weights()
    exchange = published(data, packed)
    first = get(exchange, b"a", 0, CHUNKS)
    assert [index for index, _, _ in first] == list(range(CHUNKS))
    assert {encoding for _, encoding, _ in first} == {PACKED}
    before = bytes(packed.view())
    assert get(exchange, b"b", 0, CHUNKS) == first
    assert bytes(packed.view()) == before
    assert b"".join(body.ljust(CHUNK, b"\0") for _, _, body in first) == before.ljust(
        CHUNKS * CHUNK, b"\0"
    )
    codec, out = Codec(LAYOUT, "raw", True), bytearray(LAYOUT.total_bytes)
    for index, encoding, body in first:
        at, nbytes = LAYOUT.chunk_range(index)
        codec.decode(index, encoding, body, memoryview(out)[at : at + nbytes])
    assert bytes(out) == data


def test_what_does_not_compress_is_sent_raw_and_soon_hardly_looked_at() -> None:
    """One that would compress, among many that do not, shows where it was tried: at each sixteenth."""
    data = bytearray(noise())
    for index in (17, 32):
        data[index * CHUNK : (index + 1) * CHUNK] = bytes(CHUNK)
    came = get(published(bytes(data)), b"a", 0, CHUNKS)
    assert [index for index, encoding, _ in came if encoding == PACKED] == [32]
    raw = [body for index, _, body in came if index != 32]
    assert raw == [bytes(data[i * CHUNK : (i + 1) * CHUNK])[: len(raw[k])] for k, i in
                   enumerate(i for i in range(CHUNKS) if i != 32)]  # fmt: skip


def test_a_disk_that_is_full_ends_the_compressing_and_nothing_else(tmp_path: Path) -> None:
    packed, data = MappedFile.create(str(tmp_path / "p"), LAYOUT.total_bytes), weights()
    exchange = published(data, packed)
    assert get(exchange, b"a", 0, 2)[0][1] == PACKED
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, limit[1]))
    try:
        with pytest.raises(StorageError, match="too large"):
            packed.write(0, b"x")
        came = get(exchange, b"a", 0, CHUNKS)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    assert [index for index, encoding, _ in came if encoding == PACKED] == [0, 1]
    assert came[2][2] == data[2 * CHUNK : 3 * CHUNK]


def test_only_a_lossless_codec_and_room_for_the_whole_set_will_do() -> None:
    room, small = MappedFile.anonymous(LAYOUT.total_bytes), MappedFile.anonymous(CHUNK)
    for codec, packed, error in [
        (Codec(LAYOUT, "raw"), room, ConfigError),
        (Codec(LAYOUT, "int8", True), room, ConfigError),
        (Codec(LAYOUT, "raw", True), small, StorageError),
    ]:
        with pytest.raises(error):
            Exchange().publish_packed(SET, mapped(noise()), 0, codec, packed)
    with pytest.raises(StorageError):
        Exchange().publish_packed(SET, small, 0, Codec(LAYOUT, "raw", True), room)
