"""A server's exchange and its sites without sockets: a test decides whose chunks arrive."""

from __future__ import annotations

import random
from collections import Counter
from pathlib import Path

import numpy as np

from fedcore._core import Collector, CollectorOptions, Exchange, Layout, Spill
from fedcore.model_file import ModelFile, create_model
from fedcore.protocol import read_header
from fedcore.rules.registry import CoreRule

CHUNK = 4096
LAYOUT = Layout([("w", "F32", [30_001]), ("d", "F64", [700]), ("h", "BF16", [777])], CHUNK)
WEIGHTS = {"a": 3, "b": 5, "c": 16777215, "d": 2, "e": 9, "f": 77, "g": 1, "h": 4}
CHUNKS = LAYOUT.chunk_count


def update(name: str) -> ModelFile:
    """Return a site's tensors: random, and different for each name."""
    dice = np.random.default_rng(list(name.encode()))
    file = create_model(None, LAYOUT)
    file.view("w")[:] = dice.standard_normal(30_001).astype(np.float32).tobytes()
    file.view("d")[:] = dice.standard_normal(700).tobytes()
    return file


class Federation:
    """A server's exchange that pulls from sites; a test decides whose chunks arrive."""

    def __init__(
        self,
        names: str,
        budget: int,
        spill: Spill | None = None,
        *,
        rule: CoreRule = "mean",
        threads: int = 1,
        aside: bool = False,
        **spoiled: int,
    ) -> None:
        self.names = names
        self.server = Exchange()
        self.sites: dict[bytes, Exchange] = {}
        for name in names:
            site, file = Exchange(), update(name)
            if name in spoiled:
                flat = file.file.view(file.data_offset)
                at = spoiled[name] * CHUNK
                flat[at : at + 8] = np.float64(np.nan).tobytes()
            site.publish(name.encode() * 16, file.file, file.data_offset, LAYOUT.total_bytes, CHUNK)
            self.sites[name.encode()] = site
        self.out = create_model(None, LAYOUT)
        sources = [(n.encode(), n.encode() * 16, WEIGHTS[n]) for n in names]
        self.collector = Collector(
            LAYOUT,
            sources,
            self.out.file,
            self.out.data_offset,
            None,
            CollectorOptions(
                budget, spill=spill, spill_after_ms=100, rule=rule, threads=threads, aside=aside
            ),
        )
        self.server.start(self.collector)
        self.now = 0
        self.asked: Counter[tuple[str, int]] = Counter()
        self.waiting: dict[str, list[tuple[bytes, bytes]]] = {name: [] for name in names}
        self.most = 0

    def step(self, dice: random.Random, awake: str) -> bool:
        """Send what is asked for and deliver one chunk of a site that is awake; False if there is none."""
        self.now += 10
        self.server.tick(self.now)
        while (request := self.server.next_out(self.now)) is not None:
            self.sites[request[0]].deliver(0, b"server", request[1], None)
        for peer, site in self.sites.items():
            while (reply := site.next_out(0)) is not None:
                if reply[2] is None:
                    continue  # it answers a ping
                self.waiting[peer.decode()].append((reply[1], bytes(reply[2])))
                self.asked[peer.decode(), read_header(reply[1]).index] += 1
        self.most = max(self.most, *(len(queue) for queue in self.waiting.values()))
        ready = [name for name in awake if self.waiting[name]]
        if not ready:
            return False
        name = dice.choice(ready)
        queue = self.waiting[name]
        head, body = queue.pop(dice.randrange(len(queue)))
        self.server.deliver(self.now, name.encode(), head, body)
        return True

    def run(self, awake: str, seed: int = 0, until: int | None = None) -> None:
        """Let chunks of the sites that are awake arrive until there is nothing more to do."""
        dice = random.Random(seed)
        idle = 0
        while idle < 40 and not self.collector.done:
            if until is not None and self.collector.progress()[0] >= until:
                return
            idle = 0 if self.step(dice, awake) else idle + 1

    def lose(self, name: str) -> None:
        self.server.drop(self.collector, self.names.index(name))

    def result(self) -> bytes:
        assert self.collector.done
        return bytes(self.out.file.view(self.out.data_offset))

    def events(self) -> list[object]:
        return list(iter(self.server.next_event, None))


def alone(names: str) -> bytes:
    """Return the aggregate of these sites and no others."""
    federation = Federation(names, 1 << 30)
    federation.run(names)
    return federation.result()


def spill_file(folder: Path, keep_free: int = 0) -> Spill:
    return Spill(str(folder / "spill"), CHUNK, keep_free)
