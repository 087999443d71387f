"""Real processes: a site killed after its training is started again and delivers what it has trained."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from ..support.processes import SITE, Federation, Site
from ..support.relay import Relay

pytestmark = pytest.mark.timeout(600)

CHUNK = 1 << 20
FLOATS = 4_000_000
UPDATE = 4 * FLOATS
LESS_THAN_A_CHUNK = 64 << 10  # its announcement passes
ENCODED = 300_000  # int8 values of an update in an encoded run; their scales come on top
WINDOW = 6  # chunks: three quarters of 16 MiB for two sites
SCRIPT = SITE.replace("300_000", f"{FLOATS:_}")


@pytest.fixture
def federation(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Federation]:
    with started(tmp_path, monkeypatch) as made:
        yield made


@contextmanager
def started(folder: Path, patch: pytest.MonkeyPatch) -> Iterator[Federation]:
    patch.setenv("FEDCORE_WORK", str(folder / "work"))
    made = Federation(folder)
    (folder / "site.py").write_text(SCRIPT)
    made.write(2, sites=["a", "b"], idle_timeout="2s")
    with (folder / "run.toml").open("a") as file:
        file.write('memory = "16MiB"\n')
    try:
        yield made
    finally:
        made.end()


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    with (
        pytest.MonkeyPatch.context() as patch,
        started(tmp_path_factory.mktemp("undisturbed"), patch) as made,
    ):
        server = made.server()
        for name in ("a", "b"):
            made.site(name).go(2)
        assert server.wait() == 0, (made.folder / "server.log").read_text()
        return made.models()


def through(federation: Federation, relay: Relay, name: str) -> Site:
    site = Site(federation.folder, name, relay.address)
    federation.started.append(site.process)
    return site


def kill(site: Site) -> None:
    os.kill(site.process.pid, signal.SIGKILL)
    site.process.wait()


def finish(federation: Federation, a: Site, b: Site) -> None:
    """Train the second round, and see that ``b`` has not trained the first one again."""
    for site in (a, b):
        site.go()
    assert federation.started[0].wait() == 0, (federation.folder / "server.log").read_text()
    assert "trained before this process was started" in b.log.read_text()
    left = list((federation.folder / "work").iterdir())
    assert left == [], "what a site keeps goes with the run"


def test_a_site_killed_before_a_chunk_of_its_update_has_come_delivers_it_once_it_is_back(
    federation: Federation, undisturbed: dict[str, bytes]
) -> None:
    federation.server()
    with Relay(federation.address) as relay:
        a, b = federation.site("a"), through(federation, relay, "b")
        for site in (a, b):
            site.reached(1)
        relay.up.hold_after(LESS_THAN_A_CHUNK)
        b.go()
        federation.until(lambda states: states["b"].state == "delivered")
        kill(b)
        relay.cut()  # what its system would still send is lost, too
        relay.up.release()
        again = through(federation, relay, "b")
        federation.until(lambda states: states["b"].state == "delivered")
        a.go()
        for site in (a, again):
            site.reached(2)
        finish(federation, a, again)
    assert federation.models() == undisturbed


def test_a_site_killed_in_mid_upload_sends_at_most_a_window_twice(
    federation: Federation, undisturbed: dict[str, bytes]
) -> None:
    federation.server()
    with Relay(federation.address) as relay:
        a, b = federation.site("a"), through(federation, relay, "b")
        for site in (a, b):
            site.reached(1)
        relay.up.hold_after(3 * UPDATE // 4)
        before = relay.up.passed
        for site in (a, b):
            site.go()
        relay.up.until(lambda passed: passed > before + 3 * UPDATE // 4 - 2 * CHUNK)
        kill(b)
        relay.up.release()
        again = through(federation, relay, "b")
        for site in (a, again):
            site.reached(2)
        sent = relay.up.passed - before
        assert sent < UPDATE + (WINDOW + 1) * CHUNK
        finish(federation, a, again)
    assert federation.models() == undisturbed


@contextmanager
def started_relay(made: Federation) -> Iterator[tuple[Any, Relay]]:
    server = made.server()
    with Relay(made.address) as relay:
        yield server, relay


@contextmanager
def encoded(folder: Path, patch: pytest.MonkeyPatch) -> Iterator[Federation]:
    folder.mkdir()
    patch.setenv("FEDCORE_WORK", str(folder / "work"))
    made = Federation(folder)
    made.write(3, sites=["a", "b"], idle_timeout="2s")
    with (folder / "run.toml").open("a") as file:
        file.write('[transfer]\nupdate = "int8"\n')
    try:
        yield made
    finally:
        made.end()


@pytest.fixture(scope="module")
def undisturbed_encoded(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """The models of a run with encoded updates in which nothing happens."""
    with (
        pytest.MonkeyPatch.context() as patch,
        encoded(tmp_path_factory.mktemp("encoded") / "undisturbed", patch) as made,
    ):
        server = made.server()
        for name in ("a", "b"):
            made.site(name).go(3)
        assert server.wait() == 0, (made.folder / "server.log").read_text()
        return made.models()


@pytest.mark.parametrize("pulled", [False, True])
def test_a_site_killed_in_a_run_with_encoded_updates_changes_no_byte_of_any_model(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    undisturbed_encoded: dict[str, bytes],
    pulled: bool,
) -> None:
    """It is killed before a chunk of its update has come, or once all of it was pulled ahead."""
    with (
        encoded(tmp_path / "killed", monkeypatch) as made,
        started_relay(made) as (server, relay),
    ):
        a, b = made.site("a"), through(made, relay, "b")
        for site in (a, b):
            site.reached(1)
            site.go()
        for site in (a, b):
            site.reached(2)
        if not pulled:
            relay.up.hold_after(LESS_THAN_A_CHUNK)
        before = relay.up.passed
        b.go()
        made.until(lambda states: states["b"].state == "delivered")
        if pulled:
            relay.up.until(lambda passed: passed > before + ENCODED)
        kill(b)
        relay.cut()  # what its system would still send is lost, too
        relay.up.release()
        b = through(made, relay, "b")
        a.go()
        for site in (a, b):
            site.reached(3)
            site.go()
        assert server.wait() == 0, (made.folder / "server.log").read_text()
        assert pulled or "trained before this process was started" in b.log.read_text()
        assert made.models() == undisturbed_encoded
