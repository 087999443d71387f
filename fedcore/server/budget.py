"""What the server's memory is spent on, and what the process asks of the system it runs on."""

from __future__ import annotations

import contextlib
import ctypes
import logging
import os
from dataclasses import dataclass
from typing import Final

from fedcore.errors import ConfigError
from fedcore.protocol import DEFAULT_CHUNK_BYTES
from fedcore.transport.open_files import require_files
from fedcore.words import plural

__all__ = ["Budget", "check_memory", "machine_memory", "steady_heap"]

logger = logging.getLogger("fedcore.server")

SITE_BYTES: Final = 104 << 10
"""What a connection takes: its buffers in libzmq, the reply under way, what is known of the site."""
_SUM_CHUNKS: Final = 4  # the sums of a chunk in fp64, or the chunks that are read back together
_FEWEST_CHUNKS: Final = 6  # the sums of a chunk in fp64, its result, and one that comes
_PACKING_CHUNKS: Final = 6  # to compress a chunk of the model, and to unpack one of an update
_FILES_BESIDE: Final = 64  # descriptors that are no connection
_SPARE: Final = (
    7  # a connection more for so many: the door leaves an eighth of all descriptors free
)
_M_TRIM_THRESHOLD: Final = -1
_M_MMAP_THRESHOLD: Final = -3
_M_ARENA_MAX: Final = -8


@dataclass(frozen=True)
class Budget:
    """How ``server.memory`` is divided; all in bytes.

    Attributes:
        chunks: updates' chunks: under way, waiting, and the sums that they are folded into.
        outgoing: pages of the global model that are on their way to sites.
        control: control messages that wait to be handled, of all sites together.
        control_per_peer: the same of one peer.
    """

    chunks: int
    outgoing: int
    control: int
    control_per_peer: int

    @classmethod
    def of(
        cls,
        memory: int,
        sites: int,
        *,
        spill: bool,
        encrypted: bool = False,
        lossless: bool = False,
        chunk_bytes: int = DEFAULT_CHUNK_BYTES,
    ) -> Budget:
        """Divide ``memory`` for so many sites, of which some may have chunks in a spill file.

        Of ``encrypted`` links each holds the encrypted copy of the chunk that it is sending: an eighth at most is
        set aside for them. ``lossless`` runs compress and unpack chunks, which takes memory, too.

        Raises:
            ConfigError: it is too little for them.
        """
        least = _FEWEST_CHUNKS * chunk_bytes
        outgoing = max(memory // 8, 2 * chunk_bytes)
        control = memory // 16
        beside = memory // 16  # what the allocator holds besides, page tables
        chunks = memory - outgoing - control - beside - sites * SITE_BYTES
        if chunks < least:
            needed = (least + sites * SITE_BYTES) * 4 // 3 + chunk_bytes
            raise ConfigError(
                f"server.memory = {memory >> 20}MiB is too little for {plural(sites, 'site')}; it must be at "
                f"least {-(-needed >> 20)}MiB"
            )
        if encrypted:
            chunks -= min(sites * chunk_bytes, memory // 8, chunks - least)
        if lossless:
            chunks -= min(_PACKING_CHUNKS * chunk_bytes, chunks - least)
        read_back = _SUM_CHUNKS * chunk_bytes
        # Where sites are folded nothing is spilled; the peak is that of fewer sites all the same.
        folded = chunks < sites * chunk_bytes
        if spill and (folded or chunks >= sites * chunk_bytes + read_back):
            chunks -= min(read_back, chunks - least) if folded else read_back
        return cls(chunks, outgoing, control, control // 2)


def check_memory(memory: int, available: int) -> str:
    """Return a warning if a budget is more than this machine has; an empty text otherwise.

    Args:
        memory: ``server.memory``, in bytes.
        available: what the machine has, in bytes; 0 if it does not say.
    """
    if not available or memory <= available:
        return ""
    return (
        f"server.memory is {memory / (1 << 30):.1f} GiB, and this machine has {available / (1 << 30):.1f} GiB: "
        "the system may end the server; set it to what can be spared"
    )


def machine_memory() -> int:
    """Return the bytes of memory that this machine has; 0 where the system does not say."""
    with contextlib.suppress(OSError, ValueError, AttributeError):
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return 0


def steady_heap() -> None:
    """Make the heap one, of blocks that are used again: with several heaps, each holds what was once its most.

    Does nothing where the C library has no such settings.
    """
    with contextlib.suppress(AttributeError, OSError):
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(_M_ARENA_MAX, 1)
        # Chunks come from the heap, where the next one finds warm pages, and not from the system.
        mallopt(_M_MMAP_THRESHOLD, 6 << 20)
        mallopt(_M_TRIM_THRESHOLD, 2 << 20)


def require_connections(sites: int) -> None:
    """Allow this process as many open files as it may have.

    Raises:
        ConfigError: that is too few for a connection of each site.
    """
    who = f"a server of {sites} site{'' if sites == 1 else 's'}"
    require_files(sites + -(-sites // _SPARE) + _FILES_BESIDE, who)
