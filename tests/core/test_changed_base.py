"""A base that changes on disk while updates are added to it never makes a model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fedcore._core import (
    Codec,
    Collector,
    CollectorDone,
    CollectorOptions,
    Exchange,
    Layout,
    MappedFile,
    SetDamaged,
    Spill,
    crc32c,
)
from fedcore.encoding import UpdateEncoder
from fedcore.errors import LayoutError

CHUNK = 4096
COUNT = 20_001
LAYOUT = Layout([("w", "F32", [COUNT]), ("steps", "I16", [2600])], CHUNK)
WEIGHTS = {b"a": 3, b"b": 5}


def flat(seed: int) -> bytes:
    values = np.random.default_rng(seed).standard_normal(COUNT).astype(np.float32)
    return values.tobytes() + bytes(5200)


def mapped(data: bytes) -> MappedFile:
    file = MappedFile.anonymous(len(data))
    file.write(0, data)
    return file


def checksums(data: bytes) -> list[int]:
    parts = (LAYOUT.chunk_range(index) for index in range(LAYOUT.chunk_count))
    return [crc32c(data[at : at + nbytes]) for at, nbytes in parts]


def collect(
    base: MappedFile, encoding: str, *, budget: int, spill: Spill | None = None, threads: int = 1
) -> tuple[Collector, list[tuple[Any, ...]]]:
    """Reduce the updates of two sites onto ``base``, b's once all of a's are here; what is reported, too."""
    sites = {}
    for number, name in enumerate(WEIGHTS, start=1):
        sites[name] = site = Exchange()
        if encoding == "raw":
            site.publish(name * 16, mapped(flat(number)), 0, LAYOUT.total_bytes, CHUNK)
            continue
        encoder = UpdateEncoder(LAYOUT, encoding, top_k=0.1)
        update = encoder.encode(1, mapped(flat(number)), 0, mapped(flat(0)), 0)
        site.publish_encoded(name * 16, update.file, update.offsets, update.encodings)
    server, out = Exchange(), MappedFile.anonymous(LAYOUT.total_bytes)
    collector = Collector(
        LAYOUT,
        [(name, name * 16, weight) for name, weight in WEIGHTS.items()],
        out,
        0,
        (base, 0),
        CollectorOptions(
            budget,
            spill=spill,
            spill_after_ms=1,
            threads=threads,
            base_checksums=checksums(flat(0)),
            codec=None if encoding == "raw" else Codec(LAYOUT, encoding),
        ),
    )
    server.start(collector)
    late: list[tuple[bytes, bytes, bytes]] = []
    for now in range(400):
        server.tick(now)
        while (request := server.next_out(now)) is not None:
            sites[request[0]].deliver(now, b"server", request[1], None)
        for name, site in sites.items():
            while (reply := site.next_out(now)) is not None:
                if reply[2] is not None:
                    late.append((name, reply[1], bytes(reply[2])))
        ready = [frame for frame in late if frame[0] == b"a" or now > 200]
        late = [frame for frame in late if frame not in ready]
        for frame in ready:
            server.deliver(now, *frame)
    events = []
    while (event := server.next_event()) is not None:
        events.append(event)
    return collector, events


@pytest.mark.parametrize("encoding", ["int8", "top-k", "raw"])
@pytest.mark.parametrize(("budget", "threads"), [(1, 1), (1 << 20, 1), (1 << 20, 4)])
@pytest.mark.parametrize("spilled", [False, True])
def test_a_base_that_has_changed_is_named_and_makes_no_model(
    tmp_path: Path, encoding: str, budget: int, threads: int, spilled: bool
) -> None:
    path = tmp_path / "base"
    base = MappedFile.create(str(path), LAYOUT.total_bytes)
    base.write(0, flat(0))
    spill = Spill(str(tmp_path / "spill"), CHUNK, 0) if spilled else None
    budget = 16 * CHUNK if spilled and budget > 1 else budget
    collector, events = collect(base, encoding, budget=budget, spill=spill, threads=threads)
    assert collector.done
    assert [type(event) for event in events] == [CollectorDone]

    at = 4 * COUNT + 100  # where integers lie, which are taken from the base whatever is sent
    base.write(at, b"\x01")
    collector, events = collect(base, encoding, budget=budget, spill=spill, threads=threads)
    assert not collector.done
    assert [(type(event), event.set_id) for event in events] == [(SetDamaged, b"")]
    assert (
        f"{path} has changed while updates were added to it: chunk {at // CHUNK}"
        in events[0].message
    )


def test_a_chunk_that_nothing_is_taken_from_may_be_any(tmp_path: Path) -> None:
    path = tmp_path / "base"
    base = MappedFile.create(str(path), LAYOUT.total_bytes)
    base.write(0, b"\x01" + flat(0)[1:])
    collector, _ = collect(base, "raw", budget=1 << 20)
    assert collector.done
    collector, events = collect(base, "int8", budget=1 << 20)
    assert not collector.done
    assert "chunk 0" in events[0].message


def test_a_base_has_a_checksum_of_each_chunk() -> None:
    out = MappedFile.anonymous(LAYOUT.total_bytes)
    with pytest.raises(LayoutError, match="a checksum of each chunk"):
        Collector(
            LAYOUT,
            [(b"a", b"s" * 16, 1)],
            out,
            0,
            (mapped(flat(0)), 0),
            CollectorOptions(1, base_checksums=[1]),
        )
