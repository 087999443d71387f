"""Encoded updates from sites through exchanges into the reduced model, without sockets."""

from __future__ import annotations

import random
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from fedcore import _core
from fedcore._core import (
    Codec,
    Collector,
    CollectorOptions,
    Exchange,
    Layout,
    MappedFile,
    SourceRejected,
)
from fedcore.encoding import UpdateEncoder
from fedcore.errors import LayoutError, NonFiniteError, ProtocolError, StorageError

COUNT = 20_001
LAYOUT = Layout([("w", "F32", [COUNT]), ("steps", "I16", [2600])], 4096)
WEIGHTS = (3, 5, 16777215)
LOSSY = ["bf16", "fp16", "int8", "nf4", "top-k"]


def flat(seed: int, scale: float = 1.0) -> NDArray[np.uint8]:
    rng = np.random.default_rng(seed)
    values = (rng.standard_normal(COUNT) * scale).astype(np.float32)
    return np.concatenate([values.view(np.uint8), rng.integers(0, 256, 5200).astype(np.uint8)])


def moved(base: NDArray[np.uint8], seed: int) -> NDArray[np.uint8]:
    values = base[: 4 * COUNT].view(np.float32) + flat(seed, 0.01)[: 4 * COUNT].view(np.float32)
    return np.concatenate([values.view(np.uint8), base[4 * COUNT :]])


def mapped(data: NDArray[np.uint8]) -> MappedFile:
    file = MappedFile.anonymous(len(data))
    file.write(0, data)
    return file


BASE = flat(0)


def run_to_end(
    server: Exchange, sites: dict[bytes, Exchange], collector: Collector, seed: int
) -> None:
    server.start(collector)
    dice = random.Random(seed)
    waiting: list[tuple[bytes, bytes, bytes]] = []
    while not collector.done:
        while (request := server.next_out(0)) is not None:
            sites[request[0]].deliver(0, b"server", request[1], None)
        for peer, site in sites.items():
            while (reply := site.next_out(0)) is not None:
                if reply[2] is None:
                    continue  # it answers a ping
                waiting.append((peer, reply[1], bytes(reply[2])))
        server.tick(0)
        if not waiting:
            break
        server.deliver(0, *waiting.pop(dice.randrange(len(waiting))))


def reduce_encoded(encoding: str, budget: int, seed: int, threads: int = 1) -> tuple[bytes, int]:
    """Reduce three encoded updates that arrive in a random order; the bytes, and how many travelled."""
    sites, sent = {}, 0
    for number in (1, 2, 3):
        encoder = UpdateEncoder(LAYOUT, encoding, top_k=0.1)
        update = encoder.encode(1, mapped(moved(BASE, number)), 0, mapped(BASE), 0)
        sites[bytes([number])] = site = Exchange()
        site.publish_encoded(bytes([number]) * 16, update.file, update.offsets, update.encodings)
        sent += update.nbytes
    out = MappedFile.anonymous(LAYOUT.total_bytes)
    sources = [(peer, peer * 16, w) for peer, w in zip(sites, WEIGHTS, strict=True)]
    codec = Codec(LAYOUT, encoding)
    collector = Collector(
        LAYOUT,
        sources,
        out,
        0,
        (mapped(BASE), 0),
        CollectorOptions(budget, codec=codec, threads=threads),
    )
    run_to_end(Exchange(), sites, collector, seed)
    assert collector.done
    assert collector.bytes_received == sent
    return bytes(out.view()), sent


@pytest.mark.parametrize("encoding", LOSSY)
def test_the_aggregate_is_the_mean_of_base_and_decoded_difference_in_any_order(
    encoding: str,
) -> None:
    results = {
        reduce_encoded(encoding, budget, seed, threads)
        for seed in range(3)
        for budget, threads in ((1, 1), (1 << 20, 1), (1 << 20, 4))
    }
    assert len(results) == 1
    data, sent = results.pop()
    assert sent < 3 * LAYOUT.total_bytes
    updates = []
    for number in (1, 2, 3):
        codec, values = Codec(LAYOUT, encoding, top_k=0.1), moved(BASE, number)
        got = np.empty_like(values)
        for index in range(LAYOUT.chunk_count):
            at, nbytes = LAYOUT.chunk_range(index)
            part = slice(at, at + nbytes)
            codec.decode(
                index, *codec.encode(index, values[part], BASE[part]), got[part], BASE[part]
            )
        updates.append(got[: 4 * COUNT])
    expected = bytearray(4 * COUNT)
    _core.mean("F32", updates, WEIGHTS, expected)
    assert data == bytes(expected) + BASE[4 * COUNT :].tobytes()


def test_a_model_that_is_encoded_once_is_served_losslessly_to_all() -> None:
    model = np.repeat(BASE[: 4 * (COUNT // 8)], 8)
    model = np.concatenate([model, np.zeros(LAYOUT.total_bytes - len(model), np.uint8)])
    encoder = UpdateEncoder(LAYOUT, "raw", lossless=True)
    encoded = encoder.encode(0, mapped(model), 0, mapped(model), 0)
    assert encoded.nbytes < len(model) / 2
    server = Exchange()
    server.publish_encoded(b"m" * 16, encoded.file, encoded.offsets, encoded.encodings)
    for _ in range(2):
        out = MappedFile.anonymous(LAYOUT.total_bytes)
        codec = Codec(LAYOUT, "raw", lossless=True)
        collector = Collector(
            LAYOUT,
            [(b"", b"m" * 16, 1)],
            out,
            0,
            None,
            CollectorOptions(1 << 20, rule="copy", codec=codec),
        )
        run_to_end(Exchange(), {b"": server}, collector, 0)
        assert collector.done
        assert bytes(out.view()) == model.tobytes()


@pytest.mark.parametrize("in_memory", [True, False])
def test_the_residual_changes_only_when_the_update_was_included(
    tmp_path: Path, in_memory: bool
) -> None:
    def on_disk(name: str, nbytes: int) -> MappedFile:
        return MappedFile.create(str(tmp_path / name), nbytes)

    encoder = UpdateEncoder(LAYOUT, "int8", make_file=None if in_memory else on_disk)
    assert len(list(tmp_path.iterdir())) == (0 if in_memory else 3)
    local, base = mapped(moved(BASE, 1)), mapped(BASE)

    def bodies(round_: int) -> bytes:
        update = encoder.encode(round_, local, 0, base, 0)
        return bytes(update.file.view(0, update.nbytes))

    first = bodies(1)
    encoder.settle(1, included=False)
    assert bodies(2) == first
    encoder.settle(1, included=True)  # not the round that is at stake
    assert bodies(3) == first
    encoder.settle(3, included=True)
    second = bodies(4)
    assert second != first
    assert bodies(5) == second
    encoder.settle(5, included=True)
    encoder.settle(5, included=True)
    assert bodies(6) not in (first, second)


def test_a_non_finite_update_is_named_and_the_residual_stays() -> None:
    encoder = UpdateEncoder(LAYOUT, "int8")
    good, bad = moved(BASE, 1), moved(BASE, 1)
    bad[: 4 * COUNT].view(np.float32)[777] = np.nan
    before = bytes(encoder.encode(1, mapped(good), 0, mapped(BASE), 0).file.view())
    with pytest.raises(NonFiniteError, match="tensor 'w', element 777"):
        encoder.encode(2, mapped(bad), 0, mapped(BASE), 0)
    encoder.settle(1, included=True)  # what it left was written over in part
    encoder.settle(2, included=True)
    assert bytes(encoder.encode(3, mapped(good), 0, mapped(BASE), 0).file.view()) == before


def hostile(body: bytes, encoding: int, codec: Codec | None) -> object:
    """Send one encoded chunk with a right checksum to a collector of its own; its last event."""
    site, server = Exchange(), Exchange()
    file = mapped(np.frombuffer(body, np.uint8))
    chunks = LAYOUT.chunk_count
    padded = MappedFile.anonymous(len(body) + chunks)
    padded.write(0, file.view())
    offsets = [0, *(len(body) + i for i in range(chunks))]
    site.publish_encoded(b"s" * 16, padded, offsets, bytes([encoding]) * chunks)
    out = MappedFile.anonymous(LAYOUT.total_bytes)
    collector = Collector(
        LAYOUT, [(b"a", b"s" * 16, 1)], out, 0, (mapped(BASE), 0), CollectorOptions(1, codec=codec)
    )
    run_to_end(server, {b"a": site}, collector, 0)
    assert not any(out.view())
    return server.next_event()


def test_a_chunk_that_can_not_be_decoded_ends_the_pull_with_the_reason() -> None:
    good = bytes([0, 0, 0, 63]) * 8 + bytes(1024)
    for body, encoding, codec, said in [
        (good, 3, None, "not agreed on"),
        (good, 3, Codec(LAYOUT, "nf4"), "not agreed on"),
        (good[:-1], 3, Codec(LAYOUT, "int8"), "too short"),
        (good + b"\0", 3, Codec(LAYOUT, "int8"), "too long"),
        (good[:32] + b"\x80" * 1024, 3, Codec(LAYOUT, "int8"), "-128"),
    ]:
        event = hostile(body, encoding, codec)
        assert event is not None
        assert isinstance(event, SourceRejected)
        assert (event.source, event.code) == (0, "encoding")
        assert said in event.message


def test_differences_without_a_base_and_impossible_offsets_are_refused() -> None:
    out = MappedFile.anonymous(LAYOUT.total_bytes)
    with pytest.raises(LayoutError, match="without the base"):
        Collector(
            LAYOUT,
            [(b"a", b"s" * 16, 1)],
            out,
            0,
            None,
            CollectorOptions(1 << 20, codec=Codec(LAYOUT, "int8")),
        )
    exchange = Exchange()
    for offsets, encodings in [
        ([0], b""),
        ([0, 5], b"\0\0"),
        ([0, 5, 5], b"\0\0"),
        ([7, 5, 9], b"\0\0"),
        ([0, 5 << 20], b"\0"),
    ]:
        with pytest.raises(LayoutError):
            exchange.publish_encoded(b"s" * 16, out, offsets, encodings)
    with pytest.raises(StorageError):
        exchange.publish_encoded(b"s" * 16, out, [0, LAYOUT.total_bytes + 1], b"\0")
    exchange.publish_encoded(b"s" * 16, out, [0, 9], b"\0")
    with pytest.raises(ProtocolError, match="published already"):
        exchange.publish_encoded(b"s" * 16, out, [0, 9], b"\0")
