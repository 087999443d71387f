"""The server's memory is divided once, and the parts are never more than the whole."""

from __future__ import annotations

import pytest

from fedcore.errors import ConfigError
from fedcore.protocol import DEFAULT_CHUNK_BYTES
from fedcore.server.budget import (
    FEWEST_CHUNKS,
    PACKING_CHUNKS,
    SITE_BYTES,
    Budget,
    check_memory,
    machine_memory,
)

MIB = 1 << 20


def test_a_budget_beyond_the_machine_is_warned_of() -> None:
    assert check_memory(64 << 30, 23 << 30).startswith(
        "server.memory is 64.0 GiB, and this machine has 23.0 GiB"
    )
    assert check_memory(23 << 30, 23 << 30) == check_memory(64 << 30, 0) == ""
    assert machine_memory() > 1 << 20


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
    least = FEWEST_CHUNKS * DEFAULT_CHUNK_BYTES
    together = sealed.chunks + sealed.outgoing + sealed.control + sites * SITE_BYTES
    assert sealed.chunks >= least - 4 * DEFAULT_CHUNK_BYTES
    assert together + copies <= memory * MIB or sealed.chunks <= least
    assert (sealed.outgoing, sealed.control) == (plain.outgoing, plain.control)


@pytest.mark.parametrize("memory", [16, 24, 64, 256])
@pytest.mark.parametrize("encrypted", [True, False])
def test_what_compressing_takes_comes_out_of_the_servers_memory(
    memory: int, encrypted: bool
) -> None:
    plain = Budget.of(memory * MIB, 2, spill=False, encrypted=encrypted)
    packing = Budget.of(memory * MIB, 2, spill=False, encrypted=encrypted, lossless=True)
    least = FEWEST_CHUNKS * DEFAULT_CHUNK_BYTES
    assert packing.chunks == max(plain.chunks - PACKING_CHUNKS * DEFAULT_CHUNK_BYTES, least)
    assert packing.outgoing == plain.outgoing
