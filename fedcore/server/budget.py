"""What the server's memory is spent on, and what the process asks of the system it runs on."""

from __future__ import annotations

import bisect
import contextlib
import ctypes
import logging
import os
from dataclasses import dataclass, replace
from typing import Final

from fedcore._core import rule_scratch, survey_scratch
from fedcore.config import RunConfig
from fedcore.errors import ConfigError
from fedcore.protocol import DEFAULT_CHUNK_BYTES
from fedcore.rules.finishers import find_finisher
from fedcore.transport.open_files import require_files
from fedcore.words import plural

from .rule import rule_of

__all__ = ["Budget", "check_memory", "machine_memory", "steady_heap"]

logger = logging.getLogger("fedcore.server")

SITE_BYTES: Final = 104 << 10
"""What a connection takes: its buffers in libzmq, the reply under way, what is known of the site."""
_SUM_CHUNKS: Final = 4  # the sums of a chunk in fp64, or the chunks that are read back together
FEWEST_CHUNKS: Final = 6  # the sums of a chunk in fp64, its result, and one that comes
_BESIDE_CHUNKS: Final = 2
_STATE_CHUNKS: Final = 4  # a state of a chunk of bfloat16, read and written
_OPTIMIZER_CHUNKS: Final = 2 + _STATE_CHUNKS  # pages of the base, and the master
PACKING_CHUNKS: Final = 6  # to compress a chunk of the model, and to unpack one of an update
_CHUNK_SIZES: Final = tuple(DEFAULT_CHUNK_BYTES >> shift for shift in range(5))
"""What a rule may have that needs a chunk of each update at the same time: 1 MiB down to 64 KiB."""
_DECODED_BYTES: Final = 8 << 10  # a piece of an encoded update, in each thread
_BASE_BYTES: Final = 8 << 20  # pages of the base that differences are added to; see Collector
_MOST_MIB: Final = 1 << 30
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
        chunk_bytes: how large a chunk is.
        spill: the run may have a spill file: its chunks have room when they are read back.
    """

    chunks: int
    outgoing: int
    control: int
    control_per_peer: int
    chunk_bytes: int = DEFAULT_CHUNK_BYTES
    spill: bool = True

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
        least = FEWEST_CHUNKS * chunk_bytes
        outgoing = max(memory // 8, 2 * chunk_bytes)
        control = memory // 16
        # What the allocator holds besides, page tables, pages of the output that are not given back yet: of few
        # chunks one or two more are resident at times.
        beside = max(memory // 16, _BESIDE_CHUNKS * chunk_bytes)
        chunks = memory - outgoing - control - beside - sites * SITE_BYTES
        if chunks < least:
            needed = (least + sites * SITE_BYTES) * 4 // 3 + _BESIDE_CHUNKS * chunk_bytes
            raise ConfigError(
                f"server.memory = {memory >> 20}MiB is too little for {plural(sites, 'site')}; it must be at "
                f"least {-(-needed >> 20)}MiB"
            )
        if encrypted:
            chunks -= min(sites * chunk_bytes, memory // 8, chunks - least)
        if lossless:
            chunks -= min(PACKING_CHUNKS * chunk_bytes, chunks - least)
        read_back = _SUM_CHUNKS * chunk_bytes
        # Where sites are folded nothing is spilled; the peak is that of fewer sites all the same.
        folded = chunks < sites * chunk_bytes
        if spill and (folded or chunks >= sites * chunk_bytes + read_back):
            chunks -= min(read_back, chunks - least) if folded else read_back
        return cls(chunks, outgoing, control, control // 2, chunk_bytes, spill)

    @classmethod
    def of_run(
        cls, config: RunConfig, *, encrypted: bool, chunk_bytes: int | None = None
    ) -> Budget:
        """Divide a run's memory for its sites and its rule.

        A rule that does not fold needs a chunk of each of a round's updates at the same time, and as many more
        that are read back where there is a spill file. Chunks are smaller then, as far as they must be. Where even
        these do not fit, the run goes without a spill file: sites that are ahead are held back.

        Args:
            config: the run's.
            encrypted: the links are.
            chunk_bytes: the size that chunks must have; None: it may be chosen.

        Raises:
            ConfigError: it is too little.
        """
        rule = rule_of(config)
        memory = config.server.memory
        if rule.folds:
            size = chunk_bytes or DEFAULT_CHUNK_BYTES
            divided = cls._of_config(config, memory, encrypted, size)
            if _states(config) is not None:
                cls._check_optimizer(config, divided, encrypted)
            return divided
        sizes = _CHUNK_SIZES if chunk_bytes is None else (chunk_bytes,)

        def found(memory: int, spill: bool) -> Budget | None:
            budgets = (cls._together(config, memory, encrypted, size, spill) for size in sizes)
            return next(filter(None, budgets), None)

        budget = found(memory, config.server.spill) or found(memory, spill=False)
        if budget is None:
            enough = range(_MOST_MIB)
            least = bisect.bisect_left(
                enough, True, key=lambda mib: found(mib << 20, spill=False) is not None
            )
            raise ConfigError(
                f"server.memory = {memory >> 20}MiB is too little for aggregation.rule = {rule.name!r}, which "
                f"needs a chunk of the updates of all {config.participants.trained} sites at the same time; it "
                f"must be at least {least}MiB"
            )
        return budget

    @classmethod
    def _of_config(cls, config: RunConfig, memory: int, encrypted: bool, size: int) -> Budget:
        return cls.of(
            memory,
            config.participants.expected,
            spill=config.server.spill and rule_of(config).folds,
            encrypted=encrypted,
            lossless=config.transfer.lossless,
            chunk_bytes=size,
        )

    @classmethod
    def _check_optimizer(cls, config: RunConfig, budget: Budget, encrypted: bool) -> None:
        """Raise ConfigError unless the states of a chunk fit beside the least that a budget needs."""
        size = budget.chunk_bytes
        kept = _states(config) or 0
        least = (FEWEST_CHUNKS + _OPTIMIZER_CHUNKS + _STATE_CHUNKS * kept) * size

        def enough(mib: int) -> bool:
            return cls._of_config(config, mib << 20, encrypted, size).chunks >= least

        if budget.chunks < least:
            mib = config.server.memory >> 20
            needed = bisect.bisect_left(range(_MOST_MIB), True, lo=mib, key=enough)
            raise ConfigError(
                f"server.memory = {mib}MiB is too little for aggregation.{_finisher(config)}; it must be at "
                f"least {needed}MiB"
            )

    @classmethod
    def _together(
        cls, config: RunConfig, memory: int, encrypted: bool, size: int, spill: bool
    ) -> Budget | None:
        """Return a budget that holds a chunk of each update at the same time; None if there is none.

        With ``spill`` it also holds a chunk of each that is read back.
        """
        try:
            budget = cls._of_config(config, memory, encrypted, size)
        except ConfigError:
            return None
        rule = rule_of(config)
        updates, encoded = config.participants.trained, config.transfer.update != "raw"
        kept = _states(config)
        per_thread = rule_scratch(rule.core, updates) + encoded * updates * _DECODED_BYTES
        per_thread += rule_scratch("mean", updates)  # of buffers
        if rule.several is not None:
            per_thread += survey_scratch(updates, size)
        read_back = updates * size if spill else 0
        chunks = budget.chunks - read_back - config.reducer_threads * per_thread
        added = encoded or kept is not None or rule.several is not None
        beside = min(_BASE_BYTES, chunks // 16) + size if added else 0
        if kept is not None:  # its states, and the master
            beside += _STATE_CHUNKS * (kept + 1) * size
        if chunks < updates * size + beside:
            return None
        return replace(budget, chunks=chunks, spill=spill)


def _finisher(config: RunConfig) -> str:
    return "ema" if config.aggregation.optimizer is None else "optimizer"


def _states(config: RunConfig) -> int | None:
    """Return how many states a run's finishers keep, but for a master; None if it has no finisher."""
    optimizer, average = config.aggregation.optimizer, config.aggregation.ema is not None
    if optimizer is None:
        return 1 if average else None
    return len(find_finisher(optimizer.name).states) + average


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
