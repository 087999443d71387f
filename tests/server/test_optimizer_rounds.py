"""Collections with a server optimizer, without sockets: the same bytes however they come, and after kills."""

from __future__ import annotations

import random
import select
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fedcore._core import (
    Codec,
    Exchange,
    Finisher,
    Layout,
    MappedFile,
    PythonRule,
    SetDamaged,
    WeighedRule,
    finish_mean,
)
from fedcore.encoding import UpdateEncoder
from fedcore.errors import LayoutError, StorageError
from fedcore.model_file import ModelFile, create_model
from fedcore.rules.python import load_rule
from fedcore.server.collection import Collection, CollectionSetting
from fedcore.server.rounds.actions import Participant
from fedcore.server.storage.scratch import Scratch

from ..support.python_rules import Median, named

CHUNK = 4096
# The chunk in which `w` ends and `h` begins is the only one that reads the first chunk of a state.
LAYOUT = Layout([("h", "BF16", [9_001]), ("n", "I32", [40]), ("w", "F32", [19_901])], CHUNK)
OPTIONS = {"learning_rate": 0.1, "momentum": 0.9}
WEIGHTS = {"a": 3, "b": 5, "c": 7, "d": 1, "e": 2}
STATES = ("momentum", "master", "ema")
Files = dict[str, bytes]


def model_of(seed: int) -> ModelFile:
    dice, file = np.random.default_rng(seed), create_model(None, LAYOUT)
    file.view("w")[:] = dice.standard_normal(19_901).astype(np.float32).tobytes()
    halves = dice.standard_normal(9_001).astype(np.float32).view(np.uint32) >> 16
    file.view("h")[:] = halves.astype(np.uint16).tobytes()
    return file


BASE = model_of(0)


def states_before(folder: Path | None = None) -> dict[str, ModelFile]:
    dice, made = np.random.default_rng(9), {}
    for name, layout in Finisher(LAYOUT, "momentum", OPTIONS, ema=0.9).states:
        made[name] = create_model(None if folder is None else folder / f"old-{name}", layout)
        count = layout.total_bytes // 4
        data = dice.standard_normal(count).astype(np.float32).tobytes()
        made[name].file.view(made[name].data_offset, len(data))[:] = data
    return made


BEFORE = states_before()


def finisher(*, fresh: bool = False, states: dict[str, ModelFile] = BEFORE) -> Finisher:
    before = {} if fresh else {n: (f.file, f.data_offset) for n, f in states.items()}
    checksums = {name: state.checksums() for name, state in BEFORE.items()}
    return Finisher(LAYOUT, "momentum", OPTIONS, set(), before, checksums, ema=0.9)


def flat(file: ModelFile) -> bytes:
    return bytes(file.file.view(file.data_offset, file.layout.total_bytes))


class Server:
    """A collection on a folder, of updates that are published beside it."""

    def __init__(
        self,
        folder: Path,
        names: str,
        *,
        encoding: str = "raw",
        fresh: bool = False,
        states: dict[str, ModelFile] = BEFORE,
        **options: Any,
    ) -> None:
        self.folder, self.names = folder, names
        folder.mkdir(exist_ok=True)
        self.exchange, self.now = Exchange(), 0
        self.sites: dict[bytes, Exchange] = {}
        self.waiting: list[tuple[bytes, bytes, bytes]] = []
        for name in names:
            self.sites[name.encode()] = site = Exchange()
            update, set_id = model_of(ord(name)), name.encode() * 16
            if encoding == "raw":
                site.publish(set_id, update.file, update.data_offset, LAYOUT.total_bytes, CHUNK)
                continue
            at = update.file, update.data_offset, BASE.file, BASE.data_offset
            sent = UpdateEncoder(LAYOUT, encoding).encode(1, *at)
            site.publish_encoded(set_id, sent.file, sent.offsets, sent.encodings, sent.checksums)
        self.finisher = finisher(fresh=fresh, states=states)
        after = {n: (folder / n, layout) for n, layout in self.finisher.states}
        self.setting = CollectionSetting(
            self.exchange,
            LAYOUT,
            Scratch(folder / "model", folder / "record", {}, {}, after),
            memory=options.pop("memory", 1 << 20),
            base=BASE,
            codec=None if encoding == "raw" else Codec(LAYOUT, encoding),
            finisher=self.finisher,
            **options,
        )
        self.participants = tuple(
            Participant(name, name.encode().hex() * 16, WEIGHTS[name]) for name in names
        )
        self.peers = {name: name.encode() for name in names}

    def start(self) -> Server:
        self.running = Collection.of(self.setting, self.participants, self.peers)
        return self

    def pull_ahead(self) -> Server:
        self.running = Collection(self.setting, len(self.names))
        for participant in self.participants:
            self.running.offer(participant, self.peers[participant.site])
        self.run()
        assert self.running.close(self.participants, self.peers)
        return self

    def run(self, dice: random.Random | None = None, chunks: int = 100_000) -> Server:
        """Deliver chunks in an order of the dice until there is nothing more to do."""
        waiting, idle = self.waiting, 0
        while idle < 40 and chunks and not self.running.collector.done:
            self.now += 1
            self.exchange.tick(self.now)
            while (request := self.exchange.next_out(self.now)) is not None:
                site = self.sites[request[0]]
                site.deliver(0, b"server", request[1], None)
                while (reply := site.next_out(0)) is not None:
                    waiting.append((request[0], reply[1], bytes(reply[2] or b"")))
            if not waiting and self.running.collector.aside and not self.running.open:
                assert select.select([self.exchange.wake_fd], [], [], 60)[0], "it combines no more"
                self.exchange.clear_wake()
                continue
            if not waiting:
                idle += 1
                continue
            idle, chunks = 0, chunks - 1
            peer, head, body = waiting.pop(dice.randrange(len(waiting)) if dice else 0)
            self.exchange.deliver(self.now, peer, head, body)
        return self

    def killed(self) -> Path:
        """Return a copy of the folder as a process that is killed now leaves it."""
        copy = self.folder.with_name(self.folder.name + "'")
        shutil.copytree(self.folder, copy)
        return copy

    def result(self) -> Files:
        assert self.running.collector.done
        model, checksums = self.running.finish()
        assert checksums == model.checksums()
        found = {name: flat(state) for name, state in self.running.scratch.states.items()}
        return {"model": flat(model), **found}


def expected(names: str, *, fresh: bool = False, weights: Mapping[str, int] = WEIGHTS) -> Files:
    of = finisher(fresh=fresh)
    after = {name: (MappedFile.anonymous(layout.total_bytes), 0) for name, layout in of.states}
    out = bytearray(LAYOUT.total_bytes)
    updates = [flat(model_of(ord(name))) for name in names]
    finish_mean(of, updates, [weights[name] for name in names], flat(BASE), out, after)
    return {"model": bytes(out), **{name: bytes(file.view()) for name, (file, _) in after.items()}}


@pytest.mark.parametrize("fresh", [False, True], ids=["with states", "without states"])
@pytest.mark.parametrize(
    "options",
    [{}, {"threads": 3}, {"memory": 20 * CHUNK}, {"memory": 1}],
    ids=["at once", "threads", "folded", "one chunk"],
)
def test_the_bytes_are_the_same_however_the_chunks_are_reduced(
    tmp_path: Path, options: dict[str, Any], fresh: bool
) -> None:
    server = Server(tmp_path / "run", "abcde", fresh=fresh, **options).start()
    assert server.run(random.Random(1)).result() == expected("abcde", fresh=fresh)


def test_updates_that_were_pulled_ahead_give_the_same_bytes(tmp_path: Path) -> None:
    server = Server(tmp_path / "run", "abc").pull_ahead().run()
    assert server.result() == expected("abc")


@pytest.mark.parametrize("encoding", ["int8", "top-k"])
def test_differences_give_the_same_bytes_at_once_and_folded(tmp_path: Path, encoding: str) -> None:
    at_once = Server(tmp_path / "a", "abcde", encoding=encoding).start().run().result()
    folded = Server(tmp_path / "b", "abcde", encoding=encoding, memory=1).start().run().result()
    assert at_once == folded
    assert at_once != expected("abcde")


def test_without_a_site_that_is_lost_the_bytes_are_those_of_the_others(tmp_path: Path) -> None:
    server = Server(tmp_path / "run", "abc").start().run(random.Random(2), 60)
    assert 0 < server.running.collector.progress()[0] < LAYOUT.chunk_count
    left = tuple(p for p in server.participants if p.site != "b")
    assert server.running.narrow(left, server.peers)
    assert server.run().result() == expected("ac")


@pytest.mark.parametrize("seed", range(6))
def test_a_server_killed_at_any_chunk_goes_on_to_the_same_bytes(tmp_path: Path, seed: int) -> None:
    dice, server = random.Random(seed), Server(tmp_path / "run", "abc").start()
    for _ in range(3):
        server.run(dice, dice.randrange(1, 50))
        before = server.running.collector.progress()[0]
        server = Server(server.killed(), "abc").start()
        assert server.running.collector.progress()[0] >= before
    assert server.run(dice).result() == expected("abc")


@pytest.mark.parametrize("memory", [1 << 20, 1], ids=["at once", "folded"])
def test_shares_are_those_of_who_counts_also_after_kills_and_losses(
    tmp_path: Path, memory: int
) -> None:
    half, dice = WeighedRule("mean", False, 500_000), random.Random(3)
    server = Server(tmp_path / "run", "abc", rule=half, memory=memory).start()
    for _ in range(2):
        server.run(dice, 40)
        server = Server(server.killed(), "abc", rule=half, memory=memory).start()
    whole = Server(tmp_path / "whole", "abc", rule=half, memory=memory).pull_ahead().run()
    assert whole.result() == expected("abc")  # nobody has more than a half of 15
    left = tuple(p for p in server.participants if p.site != "b")
    assert server.running.narrow(left, server.peers)
    assert server.run(dice).result() == expected("ac", weights={"a": 3, "c": 3})
    quarter = WeighedRule("mean", False, 250_000)
    five = Server(tmp_path / "five", "abcde", rule=quarter, memory=memory, threads=3).start()
    bounded = {"a": 3, "b": 3, "c": 3, "d": 1, "e": 2}
    assert five.run(dice).result() == expected("abcde", weights=bounded)
    same = Server(tmp_path / "same", "abcde", rule=WeighedRule("mean", True, 1_000_000)).start()
    assert same.run(dice).result() == expected("abcde", weights=dict.fromkeys("abcde", 1))


@pytest.fixture(params=["median", "python"])
def rule(request: pytest.FixtureRequest) -> str | PythonRule:
    return "median" if request.param == "median" else load_rule(named(Median)).core


@pytest.fixture(scope="module")
def medians(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Files]:
    """What momentum makes of the core's median of some sites, whose chunks came in order."""
    folder = tmp_path_factory.mktemp("medians")

    def result(names: str, encoding: str = "raw") -> Files:
        server = Server(folder / f"{names}-{encoding}", names, encoding=encoding, rule="median")
        return server.start().run().result()

    return result


def test_momentum_of_a_median_has_the_same_bytes_however_the_chunks_come(
    tmp_path: Path, rule: str | PythonRule, medians: Callable[..., Files]
) -> None:
    wanted = medians("abcde")
    assert wanted["model"] != expected("abcde")["model"]
    for number, options in enumerate(({}, {"threads": 3}, {"memory": 25 * CHUNK})):
        server = Server(tmp_path / str(number), "abcde", rule=rule, **options).start()
        assert server.run(random.Random(number)).result() == wanted
    assert Server(tmp_path / "ahead", "abc", rule=rule).pull_ahead().run().result() == medians(
        "abc"
    )
    encoded = Server(tmp_path / "encoded", "abcde", rule=rule, encoding="int8").start()
    assert encoded.run(random.Random(7)).result() == medians("abcde", "int8")


@pytest.mark.parametrize("seed", range(2))
def test_momentum_of_a_median_goes_on_after_kills_and_without_a_lost_site(
    tmp_path: Path, seed: int, rule: str | PythonRule, medians: Callable[..., Files]
) -> None:
    dice = random.Random(seed)
    server = Server(tmp_path / "run", "abc", rule=rule).start()
    for _ in range(3):
        server.run(dice, dice.randrange(1, 50))
        before = server.running.collector.progress()[0]
        server = Server(server.killed(), "abc", rule=rule).start()
        assert server.running.collector.progress()[0] >= before
    left = tuple(p for p in server.participants if p.site != "b")
    assert server.running.narrow(left, server.peers)
    assert server.run(dice).result() == medians("ac")


def with_mean(middle: Files, mean: Files, tensor: str) -> Files:
    """What the median made, but for one tensor, which is that of the mean."""
    layouts = {"model": LAYOUT, **dict(finisher().states)}
    made = {}
    for name, flat_ in middle.items():
        data = bytearray(flat_)
        for key, _, _, at, nbytes in layouts[name].tensors:
            if key == tensor:  # the master has none of `w`
                data[at : at + nbytes] = mean[name][at : at + nbytes]
        made[name] = bytes(data)
    return made


@pytest.mark.parametrize("tensor", ["h", "w"])
def test_buffers_keep_the_mean_however_the_chunks_come_and_after_kills_and_losses(
    tmp_path: Path, tensor: str, rule: str | PythonRule, medians: Callable[..., Files]
) -> None:
    def server(name: str, names: str, **options: Any) -> Server:
        return Server(tmp_path / name, names, rule=rule, plain={tensor}, **options)

    wanted = with_mean(medians("abcde"), expected("abcde"), tensor)
    assert wanted not in (medians("abcde"), expected("abcde"))
    for number, options in enumerate(({}, {"threads": 3}, {"memory": 25 * CHUNK})):
        found = server(str(number), "abcde", **options).start()
        assert found.run(random.Random(number)).result() == wanted
    ahead = server("ahead", "abc").pull_ahead().run().result()
    assert ahead == with_mean(medians("abc"), expected("abc"), tensor)
    encoded = server("encoded", "abcde", encoding="int8").start().run(random.Random(7)).result()
    mean = Server(tmp_path / "mean", "abcde", encoding="int8").start().run().result()
    assert encoded == with_mean(medians("abcde", "int8"), mean, tensor)
    dice, lossy = random.Random(8), server("run", "abc").start()
    for _ in range(2):
        lossy.run(dice, 40)
        before = lossy.running.collector.progress()[0]
        lossy = Server(lossy.killed(), "abc", rule=rule, plain={tensor}).start()
        assert lossy.running.collector.progress()[0] >= before
    left = tuple(p for p in lossy.participants if p.site != "b")
    assert lossy.running.narrow(left, lossy.peers)
    assert lossy.run(dice).result() == with_mean(medians("ac"), expected("ac"), tensor)


@pytest.mark.parametrize("lost", ["model", *STATES])
def test_chunks_that_a_power_cut_took_out_of_a_state_are_reduced_again(
    tmp_path: Path, lost: str
) -> None:
    killed = Server(tmp_path / "run", "abc").start().run(None, 90).killed()
    with (killed / lost).open("r+b") as file:
        head = 8 + int.from_bytes(file.read(8), "little")
        file.seek(head)
        file.write(bytes(2 * CHUNK))
    server = Server(killed, "abc").start()
    assert server.running.collector.progress()[0] < LAYOUT.chunk_count
    assert server.run().result() == expected("abc")


@pytest.mark.parametrize("options", [{}, {"threads": 3}, {"memory": 1}], ids=str)
@pytest.mark.parametrize(
    ("name", "at"), [(STATES[0], 0), (STATES[0], -1), (STATES[1], -1), (STATES[2], -1)]
)
def test_a_state_that_changes_for_a_while_is_found_when_its_chunk_is_read(
    tmp_path: Path, options: dict[str, Any], name: str, at: int
) -> None:
    states = states_before(tmp_path)
    server = Server(tmp_path / "run", "abcde", states=states, **options).start()
    server.run(None, 40)
    state = states[name]
    place = state.data_offset + at % state.layout.total_bytes
    kept = bytes(state.file.view(place, 1))
    state.file.write(place, bytes([kept[0] ^ 1]))
    server.run()
    assert not server.running.collector.done
    event = server.exchange.next_event()
    assert isinstance(event, SetDamaged)
    assert event.message == f"{tmp_path / f'old-{name}'} has changed since it was committed"
    state.file.write(place, kept)  # undone before anybody looks again
    server = Server(server.killed(), "abcde", states=states, **options).start()
    assert 0 < server.running.collector.progress()[0] < LAYOUT.chunk_count
    assert server.run().result() == expected("abcde")


def test_a_collection_without_the_file_of_a_state_begins_anew(tmp_path: Path) -> None:
    killed = Server(tmp_path / "run", "abc").start().run(None, 60).killed()
    (killed / "momentum").unlink()
    server = Server(killed, "abc").start()
    assert server.running.collector.progress()[0] == 0
    assert server.run().result() == expected("abc")


def test_a_finisher_without_a_base_or_its_states_is_refused(tmp_path: Path) -> None:
    server = Server(tmp_path / "run", "a")
    server.setting = CollectionSetting(
        server.exchange, LAYOUT, server.setting.scratch, 1 << 20, finisher=server.finisher
    )
    with pytest.raises(LayoutError, match="needs a base"):
        server.start()
    other = Server(tmp_path / "other", "a")
    scratch = Scratch(tmp_path / "other/model", tmp_path / "other/record", {}, {})
    other.setting = CollectionSetting(
        other.exchange, LAYOUT, scratch, 1 << 20, base=BASE, finisher=other.finisher
    )
    with pytest.raises(StorageError, match="not the states"):
        other.start()
