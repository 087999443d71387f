"""A live server under mutated frames and random bytes, from strangers and from a member, while honest sites train.

``FEDCORE_FUZZ_SECONDS`` sets how long the slow variant goes on, ``FEDCORE_FUZZ_SEED`` which frames are sent.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest

from fedcore import protocol
from fedcore.protocol import SiteStatus

from ..support.fuzzer import Fuzzer, anonymous_bytes
from ..support.processes import Federation

SEED = int(os.environ.get("FEDCORE_FUZZ_SEED", "1"))
SECONDS = float(os.environ.get("FEDCORE_FUZZ_SECONDS", "120"))
MAX_GROWTH = 24 << 20
ROUNDS = 3
FRAMES = 1000


def fuzz(federation: Federation, seconds: float) -> int:
    """Send hostile frames during three rounds, and check the models and the log.

    Each of the two peers sends for so long, and `FRAMES` of them at least. Returns by how many bytes the server
    has grown since the first round.
    """
    federation.write(ROUNDS, sites=["a", "b", "c"], min_results=2, round_deadline="1h")
    server, honest = federation.server(), [federation.site("a"), federation.site("b")]
    over = threading.Event()
    stranger = Fuzzer(federation.address, "zz", SEED)
    member = Fuzzer(federation.address, "c", SEED + 1)

    def harass() -> None:
        while not over.is_set():
            stranger.one()
        stranger.close()

    def leave() -> None:
        member.say(protocol.Join(version="f", site="c", instance="0" * 32))
        member.say(protocol.Leave(reason="enough"))

    def has_left(states: Mapping[str, SiteStatus]) -> bool:
        """Have the member leave; what it says while the server is behind may be lost, so it says it again."""
        if states["c"].state == "left":
            return True
        leave()
        return False

    thread = threading.Thread(target=harass, daemon=True)
    try:
        for site in honest:
            site.reached(1)
        thread.start()
        used = [anonymous_bytes(server.pid)]
        for round_ in range(1, ROUNDS + 1):
            until = time.monotonic() + seconds / ROUNDS
            enough = FRAMES * round_ / ROUNDS
            while time.monotonic() < until or min(stranger.sent, member.sent) < enough:
                member.say(protocol.Join(version="f", site="c", instance="0" * 32))
                for _ in range(50):
                    member.one()
            leave()
            federation.until(has_left)
            used.append(anonymous_bytes(server.pid))
            for site in honest:
                site.go()
            if round_ < ROUNDS:
                for site in honest:
                    site.reached(round_ + 1)
    finally:
        over.set()
        if thread.ident is not None:
            thread.join()
        member.close()
    assert server.wait() == 0, (federation.folder / "server.log").read_text()[-4000:]
    assert [site.process.wait() for site in honest] == [0, 0]
    print(
        f"{stranger.sent + member.sent} messages; MiB: {[used_ >> 20 for used_ in used]}; "
        f"log: {(federation.folder / 'server.log').stat().st_size} bytes"
    )
    for round_ in range(1, ROUNDS + 1):
        assert np.array_equal(federation.model(round_), federation.mean(round_, "a", "b"))
    assert federation.participants() == [[], *[["a", "b"]] * ROUNDS]
    assert (federation.folder / "server.log").stat().st_size < (1 + seconds / 6) * (1 << 20), (
        "strangers fill the disk"
    )
    return max(used[1:]) - used[1]


@pytest.mark.timeout(600)
def test_hostile_frames_harm_no_honest_site(tmp_path: Path) -> None:
    federation = Federation(tmp_path)
    try:
        assert fuzz(federation, 0) < MAX_GROWTH  # as many frames as `FRAMES` says
    finally:
        federation.end()


@pytest.mark.slow
@pytest.mark.timeout(SECONDS + 300)
def test_minutes_of_hostile_frames_harm_no_honest_site(tmp_path: Path) -> None:
    federation = Federation(tmp_path)
    try:
        assert fuzz(federation, SECONDS) < MAX_GROWTH
    finally:
        federation.end()
