"""A rule of several passes where a server is killed, or a site is lost, in each pass and between them."""

from __future__ import annotations

import contextlib
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from fedcore._core import Layout
from fedcore.layout import DEFAULT_CHUNK_BYTES
from fedcore.monitor.ask import ask_status
from fedcore.server.storage.store import Store

from ..support.ports import free_address
from .gated_site import SERVER, GatedSite

CHUNKS = 6
COUNT = CHUNKS * DEFAULT_CHUNK_BYTES // 4 - 1000
LAYOUT = Layout([("w", "F32", [COUNT])], DEFAULT_CHUNK_BYTES)
ALL = 1 << 30
DECIDED = "takes the updates of"


def update(name: str, round_: int) -> np.ndarray:
    """Those of a later name are farther from the others."""
    dice = np.random.default_rng([round_, *name.encode()])
    return dice.standard_normal(COUNT, np.float32) * np.float32(ord(name) - 90)


class Krum:
    """A run by Krum with f = 0, on a server that is killed and started again."""

    def __init__(self, folder: Path, names: str, least: int = 3) -> None:
        self.address = address = free_address()
        self.folder = folder
        (folder / "run.toml").write_text(
            f'[run]\nname = "t"\nrounds = 1\n[participants]\nsites = {list(names)}\n'
            f'min_results = {least}\nidle_timeout = "10s"\n'
            '[aggregation]\nrule = "krum"\noptions = { f = 0 }\n'
            f'[server]\nlisten = "{address}"\nmemory = "96MiB"\nspill = false\ninsecure = true\n'
        )
        self.sites = {
            name: GatedSite(name, 7, address, LAYOUT, lambda r, n=name: update(n, r).tobytes())
            for name in names
        }
        self._start()
        for site in self.sites.values():
            site.allow(ALL, 0)
            site.start()

    def _start(self) -> None:
        with (self.folder / "server.log").open("ab") as log:
            self.server = subprocess.Popen(
                [sys.executable, "-P", "-c", SERVER, str(self.folder / "run.toml")],
                stdout=log,
                stderr=log,
            )

    def log(self) -> str:
        return (self.folder / "server.log").read_text()

    def kill(self, after: Callable[[], object] = lambda: None) -> float:
        """Kill the server and, ``after`` something else, start it again; returns when."""
        self.server.send_signal(signal.SIGKILL)
        self.server.wait(200)
        after()
        for site in self.sites.values():
            if site.is_alive():
                site.forget()
        at = time.monotonic()
        self._start()
        return at

    def asked(self, since: float, names: str = "") -> None:
        """Wait until chunks of sites were asked for after a time."""
        for name in names or self.sites:
            site = self.sites[name]
            site.wait(lambda site=site: site.asked_at > since)

    def reduced(self, chunks: int) -> None:
        """Wait until so many chunks are reduced."""
        until = time.monotonic() + 200
        while ask_status(self.address, 60).chunks_done < chunks:
            assert time.monotonic() < until, self.log()
            time.sleep(0.01)

    def spend(self, chunks: int, names: str = "") -> None:
        """Let so many chunks of sites' updates leave, and wait until they have."""
        for name in names or self.sites:
            self.sites[name].allow(chunks)
        for name in names or self.sites:
            self.sites[name].wait(self.sites[name].spent)

    def decided(self, times: int) -> None:
        """Wait until it was decided so often which updates count."""
        until = time.monotonic() + 200
        while self.log().count(DECIDED) < times:
            assert time.monotonic() < until, self.log()
            time.sleep(0.01)

    def finish(self) -> np.ndarray:
        for site in self.sites.values():
            site.allow(ALL)
        assert self.server.wait(200) == 0, self.log()
        return load_file(self.folder / "runs/t/models/round-0001.safetensors")["w"]

    def end(self) -> None:
        self.server.kill()
        self.server.wait()
        for site in self.sites.values():
            site.stop()


@pytest.fixture
def make(tmp_path: Path) -> Iterator[Callable[..., Krum]]:
    made: list[Krum] = []

    def start(names: str, least: int = 3) -> Krum:
        made.append(Krum(tmp_path, names, least))
        return made[0]

    yield start
    for run in made:
        run.end()


@pytest.mark.timeout(600)
def test_a_server_killed_in_each_pass_and_between_ends_with_the_same_bytes(
    make: Callable[..., Krum],
) -> None:
    run = make("abcd")
    run.spend(CHUNKS // 2)
    run.asked(run.kill())  # in the survey, which is done again
    run.spend(CHUNKS)
    run.decided(1)
    run.asked(run.kill(), "a")  # what is decided is in the journal
    run.spend(CHUNKS // 2, "a")
    run.reduced(CHUNKS // 2)
    run.kill()  # in the second pass
    made = run.finish()
    assert np.array_equal(made, update("a", 1))
    assert run.log().count(DECIDED) == 1
    assert "going on where the server was killed" in run.log()
    assert all(run.sites[name].left(1) == CHUNKS // 2 + CHUNKS for name in "bcd")


@pytest.mark.timeout(600)
def test_without_a_site_that_is_lost_in_either_pass_the_rule_decides_of_the_others(
    make: Callable[..., Krum],
) -> None:
    run = make("abcde")
    run.spend(CHUNKS // 2)
    run.sites["b"].leave()
    run.spend(CHUNKS - CHUNKS // 2, "acde")
    run.decided(1)
    run.spend(CHUNKS // 2, "a")
    run.sites["a"].leave()  # it was chosen
    made = run.finish()
    assert np.array_equal(made, update("c", 1))
    assert run.sites["c"].left(1) == 2 * CHUNKS
    assert all(run.sites[name].left(1) == CHUNKS for name in "de")
    store = Store(run.folder / "runs/t", None)
    verdict = store.versions()[1].verdict
    store.close()
    assert verdict is not None
    assert verdict.left_out == ("d", "e")


@pytest.mark.timeout(600)
@pytest.mark.parametrize("killed", [False, True])
def test_a_site_that_sends_another_update_once_it_is_chosen_is_named_and_left_out(
    make: Callable[..., Krum], killed: bool
) -> None:
    run = make("abcd")
    run.spend(CHUNKS)
    run.decided(1)
    run.sites["a"].twist = lambda body: body[:-4] + b"\0\0\0\0"
    if killed:
        run.asked(run.kill(), "a")
    made = run.finish()
    assert np.array_equal(made, update("b", 1))
    assert "the update of a is left out of round 1: chunk" in run.log()
    assert "is not what it was when it was asked for the first time" in run.log()


@pytest.mark.timeout(600)
def test_what_another_version_of_the_rule_had_decided_is_decided_anew(
    make: Callable[..., Krum],
) -> None:
    run = make("abcd")
    run.spend(CHUNKS)
    run.decided(1)
    run.kill(lambda: change(run, '"krum 1 ', '"krum 0 '))
    assert np.array_equal(run.finish(), update("a", 1))
    assert run.log().count(DECIDED) == 2
    assert all(run.sites[name].left(1) == 2 * CHUNKS for name in "bcd")  # surveyed once more


@pytest.mark.timeout(600)
def test_a_torn_decision_ends_the_start_with_what_can_be_done(make: Callable[..., Krum]) -> None:
    run = make("abcd")
    run.spend(CHUNKS)
    run.decided(1)
    run.kill(lambda: change(run, '"measure"', '"meas'))
    assert run.server.wait(200) != 0
    assert "what was decided of the updates of round 1 is damaged" in run.log()
    assert "Put a whole run.sqlite back from a backup" in run.log()
    assert "Traceback" not in run.log()


def change(run: Krum, old: str, new: str) -> None:
    """Change the text of what was decided, in the journal of a run on which no server works."""
    with contextlib.closing(sqlite3.connect(run.folder / "runs/t/run.sqlite")) as db, db:
        ((text,),) = db.execute("SELECT text FROM verdicts").fetchall()
        assert old in text
        db.execute("UPDATE verdicts SET text = ?", (text.replace(old, new),))


@pytest.mark.timeout(600)
@pytest.mark.parametrize("killed", [False, True])
def test_sites_whose_updates_do_not_count_may_go_though_a_round_needs_all(
    make: Callable[..., Krum], killed: bool
) -> None:
    run = make("abcd", 4)
    run.spend(CHUNKS)
    run.decided(1)
    for name in "cd":
        run.sites[name].leave()
    if killed:
        run.asked(run.kill(), "a")
    made = run.finish()
    assert np.array_equal(made, update("a", 1))
    assert run.log().count(DECIDED) == 1
