"""A link breaks while a site's chunks are on their way: the door takes them for what they are."""

from __future__ import annotations

import logging
import time
from typing import Any

import numpy as np
import pytest

from fedcore import protocol
from fedcore._core import Collector, CollectorOptions, Layout
from fedcore.model_file import create_model
from fedcore.transport.link import Control

from ..support.links import DEADLINE, Links, Parties, wait
from ..support.relay import Relay

MIB = 1 << 20
CHUNKS = 12
UP = 8.0 * MIB  # 67 Mbit/s: a chunk takes longer than the door's look
SET = bytes(range(16))


def test_a_site_whose_link_broke_goes_on_with_the_chunk_that_was_under_way(
    pump: str, links: Links, parties: Parties, caplog: pytest.LogCaptureFixture
) -> None:
    values = np.random.default_rng(1).standard_normal(CHUNKS * MIB // 4).astype(np.float32)
    layout = Layout([("w", "F32", [values.size])], MIB)
    update, out = create_model(None, layout), create_model(None, layout)
    update.view("w")[:] = values.tobytes()
    server = links.server(parties.secured())
    with Relay(server.endpoint, up=UP) as relay, caplog.at_level(logging.WARNING):
        site = links.site(relay.address, parties.credentials("north"))
        site.exchange.publish(SET, update.file, update.data_offset, layout.total_bytes, MIB)
        site.send(protocol.Problem(message="hello"))
        hello: Any = wait(server, lambda m: isinstance(m, Control))
        collector = Collector(
            layout,
            [(hello.peer, SET, 1)],
            out.file,
            out.data_offset,
            None,
            CollectorOptions(64 * MIB),
        )
        server.exchange.start(collector)
        server.kick()
        relay.up.until(lambda passed: passed > 4 * MIB + MIB // 2)
        relay.cut()
        until = time.monotonic() + 3 * DEADLINE
        while not collector.done:
            assert time.monotonic() < until
            server.recv(0.2)
        assert relay.dials == 2
    assert np.array_equal(np.frombuffer(out.view("w"), np.float32), values)
    assert "cut a connection" not in caplog.text
