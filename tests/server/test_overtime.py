"""After the deadline of a round a site that sends too little is left out, and one that sends enough is not."""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from fedcore.server.rounds import overtime
from fedcore.server.rounds.overtime import ALLOWANCE_SECONDS, SITES_AT_ONCE, Overtime
from fedcore.server.rounds.rounds import Phase
from fedcore.server.service import Server
from fedcore.site.session import Session
from fedcore.site.settings import SiteSettings

from ..support.relay import Relay
from ..support.runs import run_config

CHUNKS = 8
SPECS = [("w", "F32", [CHUNKS << 18])]


def play(seconds_a_chunk: dict[str, float], end: float = 120.0) -> dict[str, float]:
    """Have sites send a chunk each so many seconds; return when they are found too slow."""
    watch, found = Overtime(), {}
    now = 0.0
    while now < end:
        pulls = {
            site: (1, int(now / seconds))
            for site, seconds in seconds_a_chunk.items()
            if site not in found
        }
        for site in watch.look(now, pulls):
            found.setdefault(site, now)
        now += 0.25
    return found


@pytest.mark.parametrize(("seconds", "least", "most"), [(4, 10, 16), (9, 10, 12), (1e9, 9, 11)])
def test_a_chunk_each_few_seconds_is_too_slow_soon(seconds: float, least: int, most: int) -> None:
    assert least <= play({"slow": seconds, "fast": 0.02})["slow"] <= most


def test_a_chunk_a_second_is_enough() -> None:
    assert play({"a": 1.0, "b": 0.5}) == {}


def test_many_sites_share_the_line_of_the_server() -> None:
    many = {f"s{number}": 8.0 for number in range(8 * SITES_AT_ONCE)}
    assert play(many) == {}
    assert set(play({**many, "hung": 1e9})) == {"hung"}


def test_a_site_that_is_not_asked_for_anything_has_all_the_time() -> None:
    watch = Overtime()
    for now in range(100):
        assert watch.look(float(now), {"ahead": (0, 7)}) == []
    for now in range(100, 99 + int(ALLOWANCE_SECONDS)):
        assert watch.look(float(now), {"ahead": (1, 7)}) == []
    assert watch.look(200.0, {"ahead": (1, 7)}) == ["ahead"]


def reader(step: int) -> Callable[[str], bytes]:
    values = np.full(CHUNKS << 18, step, np.float32)
    return lambda _: values.tobytes()


def until(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + 200
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


def pulled(server: Server) -> int:
    """Return how many chunks of a's update are at the server."""
    return server.runs[0].collecting.pulls().get("a", (0, 0))[1]


@pytest.mark.timeout(600)
@pytest.mark.parametrize("quorum", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_a_round_closes_without_a_site_that_is_too_slow_where_the_quorum_allows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, quorum: int
) -> None:
    monkeypatch.setattr(overtime, "ALLOWANCE_SECONDS", 0.5)
    monkeypatch.setattr(overtime, "CHUNK_SECONDS", 0.1)
    config = run_config(
        tmp_path, sites=["a", "b"], rounds=1, min_results=quorum, round_deadline="1h"
    )
    server = Server(config)
    with ThreadPoolExecutor(1) as pool, Relay(server.endpoint) as relay, ExitStack() as stack:
        result = pool.submit(server.run)
        stack.callback(server.stop)
        a, b = (
            stack.enter_context(closing(Session(SiteSettings(server=address, site=name))))
            for name, address in (("a", server.endpoint), ("b", relay.address))
        )
        for site in (a, b):
            assert site.is_running()
            site.begin(SPECS, {}, reader(0))
        before = relay.up.passed
        relay.up.rate = 2e6
        b.submit(reader(3), 1)
        relay.up.until(lambda passed: passed > before + (1 << 20))
        a.submit(reader(1), 1)
        until(lambda: server.runs[0].rounds.phase is Phase.AGGREGATING)
        until(lambda: pulled(server) == CHUNKS)  # so that it is never the one that is too slow
        server.runs[0].rounds.deadline_seconds = 0
        assert result.result(200).ok
    final = load_file(tmp_path / "runs/t/final/model.safetensors")["w"]
    assert final[0] == (1 if quorum == 1 else 2)
