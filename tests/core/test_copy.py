"""The rule "copy", with which a site collects the model that it downloads."""

from __future__ import annotations

import numpy as np
import pytest

from fedcore import _core
from fedcore._core import Collector, CollectorDone, CollectorOptions, Exchange, Layout, MappedFile
from fedcore.errors import ConfigError
from fedcore.rules import RULES

LAYOUT = Layout([("w", "F32", [3_001]), ("count", "I64", [5])], 4096)
SET = b"m" * 16


def mapped(data: bytes) -> MappedFile:
    file = MappedFile.anonymous(LAYOUT.total_bytes)
    file.write(0, data)
    return file


def odd_bytes(seed: int) -> bytes:
    """Any bits: NaN and infinity among the numbers."""
    data = np.random.default_rng(seed).bytes(LAYOUT.total_bytes)
    values = np.frombuffer(data, np.uint8).copy()
    values[40:].view(np.float32)[::50] = np.nan
    return values.tobytes()


@pytest.mark.parametrize("based", [False, True])
def test_a_copy_has_the_bytes_of_its_source_whatever_they_hold(based: bool) -> None:
    source, out = odd_bytes(1), MappedFile.anonymous(LAYOUT.total_bytes)
    base = (mapped(odd_bytes(2)), 0) if based else None
    server, site = Exchange(), Exchange()
    server.publish(SET, mapped(source), 0, LAYOUT.total_bytes, 4096)
    options = CollectorOptions(1 << 20, rule="copy")
    collector = Collector(LAYOUT, [(b"", SET, 1)], out, 0, base, options)
    site.start(collector)
    while (request := site.next_out(0)) is not None:
        server.deliver(0, b"site", request[1], None)
        while (reply := server.next_out(0)) is not None:
            assert reply[2] is not None
            site.deliver(0, b"", reply[1], bytes(reply[2]))
        site.tick(0)
    assert site.next_event() == CollectorDone(collector.id)
    assert bytes(out.view()) == source


def test_a_copy_of_two_sources_is_refused() -> None:
    out = MappedFile.anonymous(LAYOUT.total_bytes)
    sources = [(b"a", SET, 1), (b"b", SET, 1)]
    with pytest.raises(ConfigError, match="takes at most 1 inputs, got 2"):
        Collector(LAYOUT, sources, out, 0, None, CollectorOptions(1 << 20, rule="copy"))


def test_a_copy_is_no_choice_for_an_aggregate() -> None:
    assert "copy" not in RULES
    assert "copy" not in [name for name, *_ in _core.rules()]
