"""The server's memory is divided once, and the parts are never more than the whole."""

from __future__ import annotations

import pytest

from fedcore.errors import ConfigError
from fedcore.protocol import DEFAULT_CHUNK_BYTES
from fedcore.server.budget import _FEWEST_CHUNKS, SITE_BYTES, Budget

MIB = 1 << 20


@pytest.mark.parametrize("memory", [16, 64, 256, 4096])
@pytest.mark.parametrize("sites", [1, 3, 16, 200])
@pytest.mark.parametrize("spill", [True, False])
def test_encrypted_copies_come_out_of_the_servers_memory(
    memory: int, sites: int, spill: bool
) -> None:
    try:
        plain = Budget.of(memory * MIB, sites, spill=spill)
    except ConfigError:
        with pytest.raises(ConfigError):
            Budget.of(memory * MIB, sites, spill=spill, encrypted=True)
        return
    sealed = Budget.of(memory * MIB, sites, spill=spill, encrypted=True)
    copies = min(sites * DEFAULT_CHUNK_BYTES, memory * MIB // 8)
    least = _FEWEST_CHUNKS * DEFAULT_CHUNK_BYTES
    together = sealed.chunks + sealed.outgoing + sealed.control + sites * SITE_BYTES
    assert sealed.chunks >= least - 4 * DEFAULT_CHUNK_BYTES
    assert together + copies <= memory * MIB or sealed.chunks <= least
    assert (sealed.outgoing, sealed.control) == (plain.outgoing, plain.control)
