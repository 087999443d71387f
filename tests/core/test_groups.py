"""More sites than the budget holds chunks of: the same bytes, and no more under way than the budget holds."""

from __future__ import annotations

import random

import numpy as np
import pytest

from fedcore import _core
from fedcore._core import Collector, CollectorOptions, Exchange, Layout, SourceRejected
from fedcore.model_file import create_model
from fedcore.protocol import read_header

pytestmark = pytest.mark.usefixtures("any_level")

CHUNK = 4096
LAYOUT = Layout(
    [
        ("d", "F64", [901]),
        ("f", "F32", [4001]),
        ("h", "F16", [2003]),
        ("b", "BF16", [1501]),
        ("n", "I32", [77]),
    ],
    CHUNK,
)
SITES = 12
SUMS = 4  # chunks that the sums may take


def flat(number: int, nan_at: int | None = None) -> bytes:
    """Return a site's flat bytes: of all finite values, and so many huge ones that fp64 sums overflow."""
    dice = np.random.default_rng(number)
    file = create_model(None, LAYOUT)
    doubles = dice.standard_normal(901) * 10.0 ** dice.integers(-300, 300, 901)
    doubles[:50] = 1.7e308 * (1 - number * 1e-3)
    file.view("d")[:] = doubles.tobytes()
    file.view("f")[:] = dice.standard_normal(4001).astype(np.float32).tobytes()
    file.view("h")[:] = dice.standard_normal(2003).astype(np.float16).tobytes()
    words = dice.integers(0, 1 << 16, 1501).astype(np.uint16)
    file.view("b")[:] = np.where(words & 0x7F80 == 0x7F80, 0x8000, words).astype("<u2").tobytes()
    file.view("n")[:] = dice.integers(-9, 9, 77).astype(np.int32).tobytes()
    view = file.file.view(file.data_offset)
    if nan_at is not None:
        view[nan_at : nan_at + 8] = b"\xff" * 8
    return bytes(view)


class Federation:
    """Sites whose chunks arrive in a random order."""

    def __init__(
        self, numbers: list[int], chunks: int, nan_in: dict[int, int] | None = None
    ) -> None:
        self.numbers = numbers
        self.server = Exchange()
        self.sites: dict[bytes, Exchange] = {}
        for number in numbers:
            site, file = Exchange(), create_model(None, LAYOUT)
            file.file.view(file.data_offset)[:] = flat(number, (nan_in or {}).get(number))
            set_id = bytes([number]) * 16
            site.publish(set_id, file.file, file.data_offset, LAYOUT.total_bytes, CHUNK)
            self.sites[bytes([number])] = site
        self.out = create_model(None, LAYOUT)
        self.collector = Collector(
            LAYOUT,
            [(bytes([n]), bytes([n]) * 16, 16777215 - n) for n in numbers],
            self.out.file,
            self.out.data_offset,
            None,
            CollectorOptions(chunks * CHUNK),
        )
        self.server.start(self.collector)
        self.waiting: list[tuple[bytes, bytes, bytes]] = []
        self.most = 0

    def run(self, seed: int, until: int = LAYOUT.chunk_count) -> None:
        dice = random.Random(seed)
        while not self.collector.done and self.collector.progress()[0] < until:
            self.server.tick(0)
            while (request := self.server.next_out(0)) is not None:
                self.sites[request[0]].deliver(0, b"server", request[1], None)
            for peer, site in self.sites.items():
                while (reply := site.next_out(0)) is not None:
                    if reply[2] is None:
                        continue  # it answers a ping
                    self.waiting.append((peer, reply[1], bytes(reply[2])))
            if not self.waiting:
                return
            self.most = max(self.most, len(self.waiting))
            self.server.deliver(0, *self.waiting.pop(dice.randrange(len(self.waiting))))

    def result(self) -> bytes:
        assert self.collector.done
        assert self.collector.checksums == self.out.checksums()
        return bytes(self.out.file.view(self.out.data_offset))


def direct(numbers: list[int]) -> bytes:
    federation = Federation(numbers, 1 << 20)
    federation.run(0)
    return federation.result()


@pytest.mark.parametrize("level", _core.simd_levels())
@pytest.mark.parametrize("chunks", [1, 5, 7, 11])
def test_sums_of_one_site_after_the_other_have_the_bits_of_the_direct_sum(
    level: str, chunks: int
) -> None:
    numbers = list(range(1, SITES + 1))
    _core.set_simd_level("baseline")
    expected = direct(numbers)
    _core.set_simd_level(level)
    federation = Federation(numbers, chunks)
    federation.run(chunks)
    assert federation.result() == expected
    assert federation.most <= max(1, chunks - SUMS)


@pytest.mark.parametrize(("dtype", "sums"), [("F64", 4), ("F32", 2), ("BF16", 4), ("U8", 0)])
def test_the_sums_leave_what_they_do_not_take_to_chunks_under_way(dtype: str, sums: int) -> None:
    layout = Layout(
        [("w", dtype, [3 * CHUNK // {"F64": 8, "F32": 4, "BF16": 2, "U8": 1}[dtype]])], CHUNK
    )
    server, out = Exchange(), create_model(None, layout)
    sources = [(bytes([n]), bytes([n]) * 16, 1) for n in range(SITES)]
    collector = Collector(
        layout, sources, out.file, out.data_offset, None, CollectorOptions(9 * CHUNK)
    )
    server.start(collector)
    asked = 0
    while (request := server.next_out(0)) is not None:
        asked += read_header(request[1]).count
    assert asked == 9 - sums


@pytest.mark.parametrize("seed", range(12))
def test_sites_lost_at_any_point_leave_the_sums_of_the_others(seed: int) -> None:
    dice = random.Random(seed)
    numbers = list(range(1, SITES + 1))
    federation = Federation(numbers, dice.choice([1, 6, 9]))
    left = numbers
    for _ in range(2):
        federation.run(seed, until=dice.randrange(1, LAYOUT.chunk_count))
        for _ in range(dice.randrange(30)):  # into the middle of a chunk
            if federation.waiting and not federation.collector.done:
                federation.server.deliver(0, *federation.waiting.pop(0))
        lost = dice.choice(left)
        federation.server.drop(federation.collector, numbers.index(lost))
        left = [number for number in left if number != lost]
    federation.run(seed)
    assert federation.result() == direct(left)


def test_a_site_with_nan_is_named_and_the_sums_are_made_again_without_it() -> None:
    numbers = list(range(1, SITES + 1))
    federation = Federation(numbers, 7, {5: 2 * CHUNK})
    federation.run(1)
    event = federation.server.next_event()
    assert isinstance(event, SourceRejected)
    assert (event.source, event.code) == (4, "nonfinite")
    federation.server.drop(federation.collector, 4)
    federation.run(2)
    assert federation.result() == direct([number for number in numbers if number != 5])
