"""A rule in Python works while other threads use the exchange that reduces by it: neither waits for the other."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

import numpy as np
import pytest

from fedcore._core import Exchange
from fedcore.rules.python import load_rule

from ..support.python_rules import Median, named
from ..support.spilling import CHUNK, Federation


class Asking(Median):
    """the median, by a class that lets another thread call the exchange meanwhile"""

    called = threading.Event()

    def combine(self, values: np.ndarray, out: np.ndarray) -> None:
        self.called.set()
        time.sleep(0.02)  # the other thread calls meanwhile
        super().combine(values, out)


@pytest.mark.timeout(300, method="thread")
@pytest.mark.parametrize(
    "ask", [lambda f: f.server.stats(), lambda f: f.events(), lambda f: f.lose("c")]
)
def test_a_thread_that_waits_for_the_exchange_lets_the_rule_have_the_interpreter(
    ask: Callable[[Federation], object],
) -> None:
    Asking.called.clear()
    federation = Federation("abc", 64 * CHUNK, rule=load_rule(named(Asking)).core)
    reducing = threading.Thread(target=federation.run, args=("abc",))
    reducing.start()
    assert Asking.called.wait(200)
    ask(federation)  # it has the interpreter, and the thread that reduces has the exchange
    reducing.join(200)
    assert not reducing.is_alive()
    federation.run("abc")
    assert federation.collector.done


class Slow(Median):
    """the median, by a class that takes a fifth of a second for its first chunk"""

    slept = 0.0

    def combine(self, values: np.ndarray, out: np.ndarray) -> None:
        if not Slow.slept:
            began = time.monotonic()
            time.sleep(0.2)
            Slow.slept = time.monotonic() - began
        super().combine(values, out)


def test_while_a_rule_keeps_the_pump_from_reading_no_site_counts_as_silent() -> None:
    Slow.slept = 0.0
    federation = Federation("abc", 64 * CHUNK, rule=load_rule(named(Slow)).core)
    site = federation.sites[b"d"] = Exchange()
    federation.waiting["d"] = []
    site.heartbeat(1000)
    site.tick(0)
    ping = site.next_out(0)
    assert ping is not None
    federation.server.deliver(0, b"d", ping[1], None)
    silent = federation.server.silent_ms(b"d", 10_000)
    assert silent is not None
    assert 5_000 < silent <= 10_000
    federation.run("abc", until=1)
    after = federation.server.silent_ms(b"d", 10_000)
    assert after is not None
    assert after <= silent - 150
    assert federation.server.last_heard(b"d") == 0
    assert federation.server.silent_ms(b"e", 10_000) is None
