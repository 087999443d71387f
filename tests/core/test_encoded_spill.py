"""Encoded chunks of sites that are ahead, are lost, or are many: the bits of what the chunks stand for."""

from __future__ import annotations

import itertools
import random
import resource
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from fedcore._core import (
    Codec,
    Collector,
    CollectorOptions,
    Exchange,
    Layout,
    MappedFile,
    Spill,
    crc32c,
)
from fedcore.encoding import EncodedUpdate, UpdateEncoder
from fedcore.model_file import ModelFile, create_model

from ..support.spilling import CHUNK, CHUNKS, LAYOUT, WEIGHTS, Federation, spill_file, update

LOSSY = ["bf16", "int8", "nf4", "top-k"]


def base() -> ModelFile:
    return update("base")


def decoded(name: str, encoding: str) -> bytes:
    """Return what a site's encoded update stands for."""
    codec, out = Codec(LAYOUT, encoding, top_k=0.1), bytearray(LAYOUT.total_bytes)
    local, under = update(name), base()
    for index in range(CHUNKS):
        at, nbytes = LAYOUT.chunk_range(index)
        values = local.file.view(local.data_offset + at, nbytes)
        below = under.file.view(under.data_offset + at, nbytes)
        body = codec.encode(index, values, below)
        codec.decode(index, *body, memoryview(out)[at : at + nbytes], below)
    return bytes(out)


class Encoded(Federation):
    """Sites that publish encoded updates; without an encoding, what those stand for as it is."""

    def __init__(
        self,
        names: str,
        encoding: str,
        budget: int,
        spill: Spill | None = None,
        *,
        raw: bool = False,
    ) -> None:
        self.names = names
        self.server = Exchange()
        self.sites = {}
        for name in names:
            self.sites[name.encode()] = site = Exchange()
            set_id = name.encode() * 16
            if raw:
                file = create_model(None, LAYOUT)
                file.file.view(file.data_offset)[:] = decoded(name, encoding)
                site.publish(set_id, file.file, file.data_offset, LAYOUT.total_bytes, CHUNK)
                continue
            encoder = UpdateEncoder(LAYOUT, encoding, top_k=0.1)
            local, under = update(name), base()
            sent = encoder.encode(1, local.file, local.data_offset, under.file, under.data_offset)
            assert sent.nbytes < LAYOUT.total_bytes
            site.publish_encoded(set_id, sent.file, sent.offsets, sent.encodings, sent.checksums)
        self.out, under = create_model(None, LAYOUT), base()
        sources = [(n.encode(), n.encode() * 16, WEIGHTS[n]) for n in names]
        self.collector = Collector(
            LAYOUT,
            sources,
            self.out.file,
            self.out.data_offset,
            (under.file, under.data_offset),
            CollectorOptions(
                budget,
                spill=spill,
                spill_after_ms=100,
                codec=None if raw else Codec(LAYOUT, encoding),
            ),
        )
        self.server.start(self.collector)
        self.now = 0
        self.asked = Counter()
        self.waiting = {name: [] for name in names}
        self.most = 0


def expected(names: str, encoding: str) -> bytes:
    federation = Encoded(names, encoding, 1 << 30, raw=True)
    federation.run(names)
    return federation.result()


@pytest.mark.parametrize("encoding", LOSSY)
def test_chunks_of_a_site_that_is_ahead_are_spilled_as_they_travelled(
    tmp_path: Path, encoding: str
) -> None:
    spill = spill_file(tmp_path)
    federation = Encoded("abc", encoding, 4 * 4 * CHUNK, spill)
    federation.run("a")
    assert federation.collector.progress()[2][0] == CHUNKS
    assert spill.used > CHUNKS // 2
    federation.run("abc", seed=1)
    assert federation.result() == expected("abc", encoding)


@pytest.mark.parametrize("encoding", LOSSY)
@pytest.mark.parametrize("budget", [1, 6, 40])
@pytest.mark.parametrize("use_spill", [False, True])
def test_a_site_lost_at_any_point_leaves_the_mean_of_what_the_others_sent(
    tmp_path: Path, encoding: str, budget: int, use_spill: bool
) -> None:
    survivors = expected("acd", encoding)
    for seed, until in itertools.product(range(2), (0, CHUNKS // 2, CHUNKS - 1)):
        folder = tmp_path / f"{seed}-{until}"
        folder.mkdir()
        spill = spill_file(folder) if use_spill else None
        federation = Encoded("abcd", encoding, budget * CHUNK, spill)
        federation.run("abcd", seed, until)
        federation.lose("b")
        federation.run("acd", seed)
        assert federation.result() == survivors


@pytest.mark.parametrize("encoding", LOSSY)
def test_the_window_leaves_room_for_a_chunk_of_the_base(encoding: str) -> None:
    raw = Encoded("abc", encoding, 12 * CHUNK, raw=True)
    assert (raw.collector.window, Encoded("abc", encoding, 12 * CHUNK).collector.window) == (4, 3)
    federation = Encoded("abc", encoding, 12 * CHUNK)
    federation.run("ab")
    most = federation.collector.progress()[2]
    assert most == [4, 3, 0]
    assert sum(most) + most[1] + 1 <= 12
    federation.run("abc", random.Random(encoding).randrange(100))
    assert federation.result() == expected("abc", encoding)


def test_what_is_expected_is_not_what_the_sites_have() -> None:
    assert len({decoded("a", encoding) for encoding in LOSSY}) == len(LOSSY)
    near = np.frombuffer(decoded("a", "int8")[8 * 700 : 8 * 700 + 4 * 30_001], np.float32)
    exact = np.frombuffer(update("a").view("w"), np.float32)
    assert 0 < np.abs(near - exact).max() < 0.05


MIB = 1 << 20


def resident() -> int:
    """Return the bytes of this process that are in memory, those of mapped files included."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


class Big:
    """Two sites with the same 64 MiB update in 4 bits, the server's files, and what is resident."""

    def __init__(self, folder: Path, budget: int, spill: Spill | None = None) -> None:
        self.layout = Layout([("w", "F32", [16 * MIB])], MIB)
        values = np.random.default_rng(0).standard_normal(MIB // 4).astype(np.float32).tobytes()

        def file(name: str) -> MappedFile:
            made = MappedFile.create(str(folder / name), self.layout.total_bytes)
            for at in range(0, self.layout.total_bytes, MIB):
                made.write(at, values if name == "local" else bytes(MIB))
            return made

        local, under, self.out = file("local"), file("base"), file("out")
        encoder = UpdateEncoder(self.layout, "nf4", make_file=lambda name, _: file(name))
        idle = resident()
        self.sent = sent = encoder.encode(1, local, 0, under, 0)
        assert resident() - idle < 8 * MIB
        assert sent.nbytes < self.layout.total_bytes / 7.5
        self.server, self.site = Exchange(), Exchange()
        for name in (b"a", b"b"):
            self.site.publish_encoded(
                name * 16, sent.file, sent.offsets, sent.encodings, sent.checksums
            )
        self.collector = Collector(
            self.layout,
            [(name, name * 16, 1) for name in (b"a", b"b")],
            self.out,
            0,
            (under, 0),
            CollectorOptions(
                budget, spill=spill, spill_after_ms=1, codec=Codec(self.layout, "nf4")
            ),
        )
        self.server.start(self.collector)
        self.held: list[tuple[bytes, bytes, bytes]] = []
        self.idle = self.peak = resident()

    def run(self, ahead: int) -> None:
        """Keep b's chunks back until ``ahead`` of a's are here, or all are."""
        for now in range(1000):
            self.server.tick(now)
            while (request := self.server.next_out(now)) is not None:
                self.site.deliver(now, request[0], request[1], None)
            while (reply := self.site.next_out(now)) is not None:
                if reply[2] is None:
                    continue  # it answers a ping
                if reply[0] == b"b" and self.here < ahead:
                    self.held.append((b"b", reply[1], bytes(reply[2])))
                else:
                    self.server.deliver(now, reply[0], reply[1], bytes(reply[2]))
            while self.held and self.here >= ahead:
                self.server.deliver(now, *self.held.pop(0))
            self.sent.file.release(0, self.sent.file.size)  # the sites' part
            self.peak = max(self.peak, resident())
            if self.collector.done or self.here == 64 < ahead:
                break

    @property
    def here(self) -> int:
        return self.collector.progress()[2][0]

    def check(self) -> None:
        assert self.collector.done
        assert crc32c(self.out.view()) == crc32c(spread(self.sent, self.layout))


@pytest.mark.parametrize("use_spill", [False, True])
def test_neither_the_server_nor_a_site_holds_more_than_some_chunks_of_an_encoded_update(
    tmp_path: Path, use_spill: bool
) -> None:
    spill = Spill(str(tmp_path / "spill"), MIB, 0) if use_spill else None
    big = Big(tmp_path, 9 * MIB, spill)
    big.run(64 if use_spill else 3)
    assert big.peak - big.idle < (9 + 4) * MIB
    big.check()


def test_a_spilled_chunk_takes_room_on_the_disk_for_its_encoded_body_alone(tmp_path: Path) -> None:
    spill = Spill(str(tmp_path / "spill"), MIB, 0)
    big = Big(tmp_path, 9 * MIB, spill)
    big.run(64)
    assert spill.used > 32
    of_disk = (tmp_path / "spill").stat().st_blocks * 512
    assert of_disk < spill.used * MIB / 4  # a body has 2/15 of a chunk's bytes
    assert spill.file_bytes >= spill.used * MIB
    big.run(0)
    big.check()


def test_chunks_that_wait_are_kept_as_they_travelled_and_decoded_only_when_they_are_summed(
    tmp_path: Path,
) -> None:
    big = Big(tmp_path, 1 << 30)
    big.run(ahead=65)  # b sends nothing
    assert (big.here, big.collector.progress()[0]) == (64, 0)
    assert big.peak - big.idle < big.sent.nbytes + 4 * MIB
    big.run(ahead=0)
    big.check()


def spread(sent: EncodedUpdate, layout: Layout) -> bytes:
    """Return the flat bytes that encoded chunks on a base of zeros stand for."""
    codec, out = Codec(layout, "nf4"), bytearray(layout.total_bytes)
    for index in range(layout.chunk_count):
        at, nbytes = layout.chunk_range(index)
        begin, end = sent.offsets[index : index + 2]
        body = sent.file.view(begin, end - begin)
        codec.decode(index, sent.encodings[index], body, memoryview(out)[at : at + nbytes])
    return bytes(out)
