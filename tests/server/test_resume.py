"""A server killed in the middle of a collection, without sockets: its files are copied as they are at that moment,
and another server goes on with the copy."""

from __future__ import annotations

import random
import shutil
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from fedcore._core import Codec, Exchange, Layout, Record, Spill, crc32c
from fedcore.encoding import EncodedUpdate, UpdateEncoder
from fedcore.model_file import ModelFile, create_model
from fedcore.protocol import read_header
from fedcore.server.collection import Collection, CollectionSetting
from fedcore.server.rounds.actions import Participant
from fedcore.server.storage.scratch import Scratch

from ..support.offering import offer

CHUNK = 4096
LAYOUT = Layout([("w", "F32", [30_001]), ("h", "BF16", [777])], CHUNK)
CHUNKS = LAYOUT.chunk_count
OF: dict[str, object] = {"run": "a", "version": 3}
WEIGHTS = {
    "a": 3,
    "b": 5,
    "c": 7,
    "d": 1,
    "e": 2,
    "f": 4,
}  # of one magnitude: a spoiled bit of any shows


def participants(names: str, weights: dict[str, int] | None = None) -> tuple[Participant, ...]:
    weights = weights or WEIGHTS
    return tuple(Participant(name, name.encode().hex() * 16, weights[name]) for name in names)


def values(name: str) -> ModelFile:
    file = create_model(None, LAYOUT)
    dice = np.random.default_rng(list(name.encode()))
    file.view("w")[:] = dice.standard_normal(30_001).astype(np.float32).tobytes()
    return file


class Sites:
    """The sites, which outlive the servers, and how often each chunk was sent; encoded with ``encoding``."""

    def __init__(self, names: str, encoding: str = "raw") -> None:
        self.sent: Counter[tuple[str, int]] = Counter()
        self.exchanges: dict[str, Exchange] = {}
        self.encoding = encoding
        self.base = values("base")
        for name in names:
            self.exchanges[name] = site = Exchange()
            file, set_id = values(name), name.encode() * 16
            if encoding == "raw":
                offer(site, name, set_id, EncodedUpdate.raw(file))
                continue
            at = file.file, file.data_offset, self.base.file, self.base.data_offset
            offer(site, name, set_id, UpdateEncoder(LAYOUT, encoding).encode(1, *at))

    def sent_again(self, name: str) -> int:
        return sum(times - 1 for (site, _), times in self.sent.items() if site == name)


class Server:
    """A server's data plane on a folder; a test decides whose chunks arrive."""

    def __init__(
        self,
        folder: Path,
        sites: Sites,
        names: str,
        window: int = 4,
        *,
        of: dict[str, object] = OF,
        spilling: bool = True,
        weights: dict[str, int] | None = None,
    ) -> None:
        folder.mkdir(exist_ok=True)
        self.folder, self.sites, self.names = folder, sites, names
        self.exchange = Exchange()
        self.spill = (
            Spill(str(folder / "spill"), CHUNK, extent_bytes=16 * CHUNK) if spilling else None
        )
        setting = CollectionSetting(
            self.exchange,
            LAYOUT,
            Scratch(folder / "model", folder / "record", of, {}),
            base=None if sites.encoding == "raw" else sites.base,
            codec=None if sites.encoding == "raw" else Codec(LAYOUT, sites.encoding),
            memory=window * len(names) * CHUNK,
            spill=self.spill,
        )
        self.running = Collection.of(
            setting, participants(names, weights), {name: name.encode() for name in names}
        )
        assert self.running.collector.window <= min(window, CHUNKS)
        self.now = 0
        self.waiting: dict[str, list[tuple[bytes, bytes]]] = {name: [] for name in names}

    @property
    def reduced(self) -> int:
        return self.running.collector.progress()[0]

    def step(self, dice: random.Random, awake: str) -> bool:
        """Send what is asked for and deliver one chunk of a site that is awake; False if there is none."""
        self.now += 10
        self.exchange.tick(self.now)
        while (request := self.exchange.next_out(self.now)) is not None:
            self.sites.exchanges[request[0].decode()].deliver(0, b"server", request[1], None)
        for name in self.names:
            while (reply := self.sites.exchanges[name].next_out(0)) is not None:
                if reply[2] is None:
                    continue  # it answers a ping
                self.waiting[name].append((reply[1], bytes(reply[2])))
                self.sites.sent[name, read_header(reply[1]).index] += 1
        ready = [name for name in awake if self.waiting.get(name)]
        if not ready:
            return False
        name = dice.choice(ready)
        queue = self.waiting[name]
        self.exchange.deliver(
            self.now, name.encode(), *queue.pop(dice.randrange(min(3, len(queue))))
        )
        return True

    def run(self, dice: random.Random, awake: str | None = None, chunks: int = 10_000) -> None:
        """Let chunks of the sites that are awake arrive until there is nothing more to do."""
        idle = 0
        while idle < 40 and chunks and not self.running.collector.done:
            moved = self.step(dice, self.names if awake is None else awake)
            idle, chunks = (0, chunks - 1) if moved else (idle + 1, chunks)

    def killed(self) -> Path:
        """Return a copy of the folder as a process that is killed now leaves it."""
        copy = self.folder.with_name(self.folder.name + "'")
        shutil.copytree(self.folder, copy)
        return copy

    def result(self) -> bytes:
        assert self.running.collector.done
        model, checksums = self.running.finish()
        assert checksums == model.checksums()
        return (self.folder / "model").read_bytes()


def undisturbed(folder: Path, names: str, encoding: str = "raw") -> bytes:
    """Return the file of a collection in which nothing happens."""
    server = Server(folder / f"undisturbed-{names}", Sites(names, encoding), names)
    server.run(random.Random(0))
    return server.result()


@pytest.mark.parametrize("spilling", [True, False], ids=["spilled", "held back"])
@pytest.mark.parametrize("seed", range(12))
def test_a_server_killed_at_any_chunk_goes_on_and_each_site_sends_at_most_a_window_again(
    tmp_path: Path, seed: int, spilling: bool
) -> None:
    dice = random.Random(seed)
    window = dice.choice([1, 2, 4, 9])
    sites = Sites("abc")
    server = Server(tmp_path / "run", sites, "abc", window, spilling=spilling)
    for kills in range(1, 5):
        awake = dice.choice(["abc", "abc", "ab", "c", "bc"])
        server.run(dice, awake, dice.randrange(1, 2 * CHUNKS))
        before, done = server.reduced, server.running.collector.done
        server = Server(server.killed(), sites, "abc", window, spilling=spilling)
        assert server.reduced >= before
        if not done:
            assert max(sites.sent_again(name) for name in "abc") <= kills * window
    server.run(dice)
    assert server.result() == undisturbed(tmp_path, "abc")
    assert max(sites.sent_again(name) for name in "abc") <= kills * window


@pytest.mark.parametrize("encoding", ["raw", "nf4", "top-k"])
def test_what_a_site_was_ahead_with_is_not_sent_again(tmp_path: Path, encoding: str) -> None:
    sites, dice = Sites("abc", encoding), random.Random(1)
    first = Server(tmp_path / "run", sites, "abc")
    first.run(
        dice, "ac"
    )  # all of these two, but for what is held in memory, lies in the spill file
    again = Server(first.killed(), sites, "abc")
    assert min(again.running.collector.progress()[2][0::2]) >= CHUNKS - 4
    again.run(dice)
    assert again.result() == undisturbed(tmp_path, "abc", encoding)
    assert {name: sites.sent_again(name) <= 4 for name in "abc"} == dict.fromkeys("abc", True)
    assert again.spill is not None
    assert again.spill.used == 0


def test_all_is_reduced_and_nothing_is_sent_again_where_the_commit_was_cut_off(
    tmp_path: Path,
) -> None:
    sites, dice = Sites("ab"), random.Random(2)
    first = Server(tmp_path / "run", sites, "ab")
    first.run(dice)
    again = Server(first.killed(), sites, "ab")
    again.run(dice)
    assert again.result() == undisturbed(tmp_path, "ab")
    assert sites.sent_again("a") == sites.sent_again("b") == 0


@pytest.mark.parametrize("after", ["the loss", "the restart"])
@pytest.mark.parametrize("seed", range(4))
def test_nothing_that_holds_a_lost_sites_values_outlives_it(
    tmp_path: Path, seed: int, after: str
) -> None:
    dice, sites = random.Random(seed), Sites("abc")
    server = Server(tmp_path / "run", sites, "abc")
    server.run(dice, dice.choice(["abc", "ac"]), 2 * CHUNKS)
    if after == "the loss":
        peers = {name: name.encode() for name in "abc"}
        assert server.running.narrow(participants("ac"), peers)
        server.run(dice, "ac", dice.randrange(CHUNKS))
        copy = server.killed()
        record = Record.open(str(copy / "record"))
        assert record is not None
        assert [site for site, _, _ in record.sources] == ["a", "c"]
    else:
        copy = server.killed()
    again = Server(copy, sites, "ac", 6)
    again.run(dice)
    assert again.result() == undisturbed(tmp_path, "ac")


def test_what_was_spilled_of_a_site_counts_without_another_one(tmp_path: Path) -> None:
    dice, sites = random.Random(3), Sites("abc")
    first = Server(tmp_path / "run", sites, "abc")
    first.run(dice, "ac")
    again = Server(first.killed(), sites, "ac", 6)
    again.run(dice)
    assert again.result() == undisturbed(tmp_path, "ac")
    assert max(sites.sent_again("a"), sites.sent_again("c")) <= 4


def half_way(folder: Path, sites: Sites) -> Path:
    """A folder with reduced and with spilled chunks, of a server that was killed."""
    server, dice = Server(folder / "run", sites, "abc"), random.Random(4)
    server.run(dice, "abc", CHUNKS)
    server.run(dice, "ab")
    assert 0 < server.reduced < CHUNKS
    assert server.spill is not None
    assert server.spill.used > CHUNKS // 2
    return server.killed()


def flip(path: Path, at: int) -> None:
    data = bytearray(path.read_bytes())
    data[at] ^= 0x10
    path.write_bytes(data)


def number(value: int) -> bytes:
    return value.to_bytes(4, "little")


def forge(folder: Path, change: Callable[[bytearray, bytes], object]) -> None:
    """Change entries of the spill index, each with the bytes of its slot, and keep all checksums right."""
    index, slots = bytearray((folder / "spill-index").read_bytes()), (folder / "spill").read_bytes()
    seed = int.from_bytes(index[96:100], "little")
    for slot in range((len(index) - 128) // 32):
        entry = index[128 + 32 * slot :][:32]
        if any(entry):
            change(entry, slots[slot * CHUNK :][:CHUNK])
            entry[28:] = number(max(1, crc32c(number(slot), crc32c(entry[:28], seed))))
            index[128 + 32 * slot : 160 + 32 * slot] = entry
    (folder / "spill-index").write_bytes(index)


def cut_short(entry: bytearray, body: bytes) -> None:
    size = int.from_bytes(entry[20:23], "little") - 1
    entry[20:23] = size.to_bytes(3, "little")
    entry[24:28] = number(crc32c(body[:size]))


def of_another_encoding(entry: bytearray, _: bytes) -> None:
    entry[23] = 3


def older_format(folder: Path) -> None:
    index = bytearray((folder / "spill-index").read_bytes())
    index[:8] = b"FCSPILL1"
    index[96:100] = number(crc32c(index[:96]))
    (folder / "spill-index").write_bytes(index)


HEAD = 4096  # of the record, whose entries begin on a page
DAMAGE: dict[str, Callable[[Path], object]] = {
    "the record is empty": lambda f: (f / "record").write_bytes(b""),
    "the record is gone": lambda f: (f / "record").unlink(),
    "the record is cut in its head": lambda f: (f / "record").write_bytes(
        (f / "record").read_bytes()[:100]
    ),
    "the record is cut in its entries": lambda f: (f / "record").write_bytes(
        (f / "record").read_bytes()[: HEAD + 20]
    ),
    "the record's magic number": lambda f: flip(f / "record", 0),
    "the record's chunk count": lambda f: flip(f / "record", 16),
    "the record's key": lambda f: flip(f / "record", 40),
    "a recorded weight": lambda f: flip(f / "record", 96 + 16),
    "a recorded set id": lambda f: flip(f / "record", 96 + 88 + 3),
    "a recorded name's length": lambda f: flip(f / "record", 96 + 20),
    "a recorded checksum": lambda f: flip(f / "record", HEAD + 8),
    "an entry's tag": lambda f: flip(f / "record", HEAD + 5),
    "the model file is gone": lambda f: (f / "model").unlink(),
    "the model file is shorter": lambda f: (f / "model").write_bytes(
        (f / "model").read_bytes()[:-1]
    ),
    "the model file's header": lambda f: flip(f / "model", 20),
    "the first reduced chunk": lambda f: flip(f / "model", HEAD),
    "a byte of a reduced chunk": lambda f: flip(f / "model", HEAD + 2 * CHUNK + 77),
    "the spill file is gone": lambda f: (f / "spill").unlink(),
    "the spill index is gone": lambda f: (f / "spill-index").unlink(),
    "the spill index is cut": lambda f: (f / "spill-index").write_bytes(
        (f / "spill-index").read_bytes()[:777]
    ),
    "the spill index's key": lambda f: flip(f / "spill-index", 20),
    "the set of a spilled chunk": lambda f: flip(f / "spill-index", 128 + 32 + 1),
    "the place of a spilled chunk": lambda f: flip(f / "spill-index", 128 + 16),
    "the length of a spilled chunk": lambda f: flip(f / "spill-index", 128 + 20),
    "the encoding of a spilled chunk": lambda f: flip(f / "spill-index", 128 + 23),
    "the spill index has an older format": older_format,
    "a byte of each spilled chunk": lambda f: [flip(f / "spill", i * CHUNK + 5) for i in range(16)],
}


@pytest.mark.parametrize("what", DAMAGE)
def test_what_is_torn_or_spoiled_is_never_used(tmp_path: Path, what: str) -> None:
    sites = Sites("abc")
    left = half_way(tmp_path, sites)
    DAMAGE[what](left)
    again = Server(left, sites, "abc")
    again.run(random.Random(5))
    assert again.result() == undisturbed(tmp_path, "abc")


@pytest.mark.parametrize("forged", [cut_short, of_another_encoding])
@pytest.mark.parametrize("encoding", ["raw", "nf4", "top-k"])
def test_a_spilled_body_with_right_checksums_that_is_none_of_its_chunk_comes_again(
    tmp_path: Path, encoding: str, forged: Callable[[bytearray, bytes], object]
) -> None:
    sites = Sites("abc", encoding)
    first = Server(tmp_path / "run", sites, "abc")
    first.run(random.Random(1), "ac")
    left = first.killed()
    forge(left, forged)
    again = Server(left, sites, "abc")
    again.run(random.Random(5))
    assert again.result() == undisturbed(tmp_path, "abc", encoding)
    assert min(sites.sent_again(name) for name in "ac") >= CHUNKS - 8


def test_a_spoiled_slot_is_noticed_where_many_sites_are_added_one_by_one(tmp_path: Path) -> None:
    sites, dice = Sites("abcdef"), random.Random(6)
    first = Server(tmp_path / "run", sites, "abcdef")
    first.run(dice, "abcde")
    left = first.killed()
    slots = (left / "spill").stat().st_size // CHUNK
    for slot in range(0, slots, 7):
        flip(left / "spill", slot * CHUNK + slot)
    again = Server(left, sites, "abcdef")
    again.run(dice)
    assert again.result() == undisturbed(tmp_path, "abcdef")
    assert max(sites.sent_again(name) for name in "abcde") > 4  # what was spoiled came again


def test_every_byte_of_the_head_counts(tmp_path: Path) -> None:
    left = half_way(tmp_path, Sites("abc"))
    whole = (left / "record").read_bytes()
    assert Record.open(str(left / "record")) is not None
    for at in range(96 + 3 * 88):
        (left / "record").write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :])
        assert Record.open(str(left / "record")) is None, at


def test_what_another_run_round_or_set_of_weights_left_is_never_used(tmp_path: Path) -> None:
    sites = Sites("abc")
    left = half_way(tmp_path, sites)
    for number, of in enumerate(({**OF, "run": "b"}, {**OF, "version": 4})):
        copy = tmp_path / f"other-{number}"
        shutil.copytree(left, copy)
        again = Server(copy, sites, "abc", of=of)
        assert again.running.collector.progress() == (0, CHUNKS, [0, 0, 0])
        assert again.spill is not None
        assert again.spill.used == 0
        again.run(random.Random(5))
        assert again.result() == undisturbed(tmp_path, "abc")
        shutil.rmtree(tmp_path / "undisturbed-abc")
    again = Server(left, sites, "abc", weights={**WEIGHTS, "b": 6})
    assert again.reduced == 0
    assert again.running.collector.progress()[2][0] > CHUNKS // 2  # a spilled chunk has no weight


def test_who_took_part_is_known_from_the_record_alone(tmp_path: Path) -> None:
    left = half_way(tmp_path, Sites("abc"))
    scratch = Scratch(left / "model", left / "record", OF, {})
    assert scratch.decided() == participants("abc")
    assert Scratch(left / "model", left / "record", {**OF, "version": 4}, {}).decided() == ()
    flip(left / "record", 96 + 16)
    assert scratch.decided() == ()
    scratch.remove()
    assert scratch.decided() == ()
