"""The collector between two exchanges, without sockets: the budget changes the window and nothing else."""

from __future__ import annotations

import random
import resource
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from fedcore._core import (
    Collector,
    CollectorDone,
    CollectorOptions,
    Exchange,
    Layout,
    OutputBroken,
    crc32c,
)
from fedcore.model_file import create_model, open_model

LAYOUT = Layout([("w", "F32", [60_001]), ("h", "BF16", [777])], 4096)


def collect(budget: int, seed: int) -> tuple[bytes, int]:
    """Reduce three sites whose answers arrive in a random order; return the bytes and the window."""
    server, sites = Exchange(), {}
    for number in (1, 2, 3):
        site, file = Exchange(), create_model(None, LAYOUT)
        values = np.random.default_rng(number).standard_normal(60_001).astype(np.float32)
        file.view("w")[:] = values.tobytes()
        site.publish(bytes([number]) * 16, file.file, file.data_offset, LAYOUT.total_bytes, 4096)
        sites[bytes([number])] = site
    out = create_model(None, LAYOUT)
    sources = [
        (peer, peer * 16, weight) for peer, weight in zip(sites, (3, 5, 16777215), strict=True)
    ]
    collector = Collector(
        LAYOUT, sources, out.file, out.data_offset, None, CollectorOptions(budget)
    )
    server.start(collector)
    dice = random.Random(seed)
    waiting: list[tuple[bytes, bytes, bytes]] = []
    for _ in range(100_000):
        if collector.done:
            break
        while (request := server.next_out(0)) is not None:
            sites[request[0]].deliver(0, b"server", request[1], None)
        for peer, site in sites.items():
            while (reply := site.next_out(0)) is not None:
                if reply[2] is None:
                    continue  # it answers a ping
                waiting.append((peer, reply[1], bytes(reply[2])))
        assert len(waiting) <= 3 * collector.window, "more was asked for than the budget holds"
        if waiting:
            server.deliver(0, *waiting.pop(dice.randrange(len(waiting))))
        server.tick(0)
    assert collector.done
    return bytes(out.file.view(out.data_offset)), collector.window


@pytest.mark.parametrize("seed", range(5))
def test_neither_the_budget_nor_the_order_of_arrival_changes_a_bit(seed: int) -> None:
    results = [collect(budget, seed) for budget in (1, 3 * 4096, 9 * 4096, 1 << 30)]
    assert [window for _, window in results] == [1, 1, 3, LAYOUT.chunk_count]
    assert len({data for data, _ in results} | {collect(1 << 20, 99)[0]}) == 1


def one_site(
    path: Path, before: Callable[[], None] = lambda: None
) -> tuple[Exchange, Collector, bytes]:
    """Collect one site's ramp up to its end, or until the collector gives up; return its bytes too.

    ``before`` runs once the output's space is reserved.
    """
    server, site, file = Exchange(), Exchange(), create_model(None, LAYOUT)
    file.view("w")[:] = np.arange(60_001, dtype=np.float32).tobytes()
    site.publish(b"u" * 16, file.file, file.data_offset, LAYOUT.total_bytes, 4096)
    out = create_model(path, LAYOUT)
    source = (b"a", b"u" * 16, 1)
    collector = Collector(
        LAYOUT, [source], out.file, out.data_offset, None, CollectorOptions(1 << 20)
    )
    server.start(collector)
    before()
    while (request := server.next_out(0)) is not None:
        site.deliver(0, b"server", request[1], None)
        while (reply := site.next_out(0)) is not None:
            if reply[2] is None:
                continue  # it answers a ping
            server.deliver(0, b"a", reply[1], bytes(reply[2]))
    return server, collector, bytes(file.file.view(file.data_offset))


def test_the_checksums_of_the_output_are_those_of_its_file(tmp_path: Path) -> None:
    server, collector, sent = one_site(tmp_path / "m.safetensors")
    assert server.next_event() == CollectorDone(collector.id)
    written = open_model(tmp_path / "m.safetensors", 4096)
    assert bytes(written.file.view(written.data_offset)) == sent
    chunks = [sent[at : at + 4096] for at in range(0, len(sent), 4096)]
    assert collector.checksums == written.checksums() == [crc32c(chunk) for chunk in chunks]


def test_an_output_that_cannot_be_written_ends_the_collection_and_blames_no_site(
    tmp_path: Path,
) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)

    def fill_the_disk() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))

    try:
        server, collector, _ = one_site(tmp_path / "m.safetensors", fill_the_disk)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    event = server.next_event()
    assert isinstance(event, OutputBroken)
    assert event.collector == collector.id
    assert "cannot write" in event.message
    assert not collector.done
