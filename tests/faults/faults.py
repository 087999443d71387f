"""The faults: what each does to a site or to its frames, and how the collection must end with it."""

from __future__ import annotations

import enum
import random
from collections.abc import Callable
from dataclasses import replace

import numpy as np

from fedcore._core import Layout
from fedcore.layout import table
from fedcore.protocol import Kind
from fedcore.protocol import frame_header as header

from .reference import CHUNK, DTYPES, FLOATS, SPECIAL_BITS, stored
from .world import Frame, Interference, Site, World, chunk_frame


class Fault(enum.Enum):
    """Everything that can go wrong with one site."""

    # The aggregate is that of all sites all the same.
    LOST_CHUNK = "lost-chunk"
    LOST_REQUEST = "lost-request"
    DUPLICATE = "duplicate"
    DELAYED = "delayed"
    STALE_SET = "stale-set"
    UNASKED = "unasked"
    BEYOND_GRID = "beyond-the-grid"
    FLIPPED_BIT = "flipped-bit"
    OTHER_BYTES_LATER = "other-bytes-later"
    TRUNCATED = "truncated"
    OVERSIZED = "oversized"
    SHORT_CHUNK = "short-chunk"
    OTHER_VERSION = "other-version"
    STRANGER = "stranger"
    SLOW = "slow"
    DEAF_AWHILE = "deaf-awhile"
    BUSY = "busy"
    RECONNECTED = "reconnected"
    RESTARTED = "restarted"
    SERVER_KILLED = "server-killed"
    TORN_PAGE = "torn-page"
    DISK_FULL = "disk-full"
    DENORMAL = "denormal"
    HUGE = "huge"
    NEGATIVE_ZERO = "negative-zero"
    EXTREME_WEIGHT = "extreme-weight"
    # The site is left out.
    KILLED = "killed"
    HALF_OPEN = "half-open"
    NAN = "nan"
    INFINITY = "infinity"
    BAD_CHECKSUMS = "bad-checksums"
    WITHDRAWN = "withdrawn"
    TOO_FEW_CHUNKS = "too-few-chunks"
    BAD_WEIGHT = "bad-weight"
    WRONG_SHAPE = "wrong-shape"
    WRONG_DTYPE = "wrong-dtype"
    WRONG_NAME = "wrong-name"


LEFT_OUT = {
    Fault.KILLED: "lost",
    Fault.HALF_OPEN: "lost",
    Fault.NAN: "nonfinite",
    Fault.INFINITY: "nonfinite",
    Fault.BAD_CHECKSUMS: "checksum",
    Fault.WITHDRAWN: "refused",
    Fault.TOO_FEW_CHUNKS: "refused",
    Fault.BAD_WEIGHT: "weight",
    Fault.WRONG_SHAPE: "layout",
    Fault.WRONG_DTYPE: "layout",
    Fault.WRONG_NAME: "layout",
}
"""The code with which a site with this fault is left out; one with any other fault is not."""


def flipped(data: bytes, dice: random.Random) -> bytes:
    """The same bytes but for one bit."""
    at = dice.randrange(8 * len(data))
    out = bytearray(data)
    out[at // 8] ^= 1 << at % 8
    return bytes(out)


# --- what happens to frames: each acts once, on the frame of one chunk ---


def _duplicate(world: World, site: Site, frame: Frame) -> list[Frame]:
    return [frame, replace(frame)]


def _delayed(world: World, site: Site, frame: Frame) -> list[Frame]:
    return [replace(frame, due=world.now + world.dice.randrange(1, 4000))]


def _stale_set(world: World, site: Site, frame: Frame) -> list[Frame]:
    other = world.dice.randbytes(16)
    return [
        chunk_frame(frame.peer, other, frame.index, world.dice.randbytes(len(frame.body))),
        frame,
    ]


def _unasked(world: World, site: Site, frame: Frame) -> list[Frame]:
    asked = world.asked.get(frame.set_id, set())
    free = [i for i in range(world.layout.chunk_count) if i not in asked]
    if not free:
        return _beyond_grid(world, site, frame)
    index = world.dice.choice(free)
    body = world.dice.randbytes(world.layout.chunk_range(index)[1])
    # It comes at once: a chunk that has been asked for when it arrives is an answer.
    world.arrive(chunk_frame(frame.peer, frame.set_id, index, body))
    return [frame]


def _beyond_grid(world: World, site: Site, frame: Frame) -> list[Frame]:
    index = world.dice.choice(
        [world.layout.chunk_count, world.layout.chunk_count + 7, (1 << 64) - 1]
    )
    return [chunk_frame(frame.peer, frame.set_id, index, world.dice.randbytes(CHUNK)), frame]


def _flipped_bit(world: World, site: Site, frame: Frame) -> list[Frame]:
    return [replace(frame, body=flipped(frame.body, world.dice), genuine=False)]


def _other_bytes_later(world: World, site: Site, frame: Frame) -> list[Frame]:
    other = chunk_frame(
        frame.peer, frame.set_id, frame.index, world.dice.randbytes(len(frame.body))
    )
    return [frame, replace(other, only_after=True)]


def _truncated(world: World, site: Site, frame: Frame) -> list[Frame]:
    if world.dice.random() < 0.5:
        cut = replace(frame, head=frame.head[: world.dice.randrange(48)], genuine=False)
    else:
        cut = replace(
            frame, body=frame.body[: world.dice.randrange(len(frame.body))], genuine=False
        )
    return [cut]


def _oversized(world: World, site: Site, frame: Frame) -> list[Frame]:
    more = world.dice.randbytes(world.dice.randrange(1, 100))
    if world.dice.random() < 0.5:
        return [replace(frame, head=frame.head + more, genuine=False)]
    return [replace(frame, body=frame.body + more, genuine=False)]


def _short_chunk(world: World, site: Site, frame: Frame) -> list[Frame]:
    body = frame.body[: world.dice.randrange(1, len(frame.body))]
    return [chunk_frame(frame.peer, frame.set_id, frame.index, body)]


def _other_version(world: World, site: Site, frame: Frame) -> list[Frame]:
    head = header(Kind.CHUNK, frame.set_id, frame.index, 0, frame.body, version=3)
    return [replace(frame, head=head, genuine=False)]


def _stranger(world: World, site: Site, frame: Frame) -> list[Frame]:
    others = [s.peer for s in world.sites if s is not site]
    peer = world.dice.choice([b"a stranger", *others])
    return [
        chunk_frame(peer, frame.set_id, frame.index, world.dice.randbytes(len(frame.body))),
        frame,
    ]


def _deaf_awhile(world: World, site: Site, frame: Frame) -> list[Frame]:
    site.deaf_until = max(site.deaf_until, world.now + world.dice.randrange(1000, 7000))
    return []


def _busy(world: World, site: Site, frame: Frame) -> list[Frame]:
    return [Frame(frame.peer, header(Kind.REFUSE, frame.set_id, frame.index, 3), genuine=False)]


def _reconnected(world: World, site: Site, frame: Frame) -> list[Frame]:
    world.reconnect(site)
    return []


def _restarted(world: World, site: Site, frame: Frame) -> list[Frame]:
    world.restart(site)
    return []


def _server_killed(world: World, site: Site, frame: Frame) -> list[Frame]:
    world.kill_server()
    return [frame]


def _torn_page(world: World, site: Site, frame: Frame) -> list[Frame]:
    world.tear()
    world.kill_server()
    return [frame]


def _disk_full(world: World, site: Site, frame: Frame) -> list[Frame]:
    world.fill_disk()
    return [frame]


def _killed(world: World, site: Site, frame: Frame) -> list[Frame]:
    site.gone = True
    if site.name not in world.rejections:
        world.leave_out(site, "lost", "it was noticed at once")
    return []


def _half_open(world: World, site: Site, frame: Frame) -> list[Frame]:
    site.gone = True
    return []


def _withdrawn(world: World, site: Site, frame: Frame) -> list[Frame]:
    site.withdrawn = True
    site.exchange.withdraw(site.set_id)
    return []


_ONCE: dict[Fault, Interference] = {
    Fault.LOST_CHUNK: lambda world, site, frame: [],
    Fault.DUPLICATE: _duplicate,
    Fault.DELAYED: _delayed,
    Fault.STALE_SET: _stale_set,
    Fault.UNASKED: _unasked,
    Fault.BEYOND_GRID: _beyond_grid,
    Fault.FLIPPED_BIT: _flipped_bit,
    Fault.OTHER_BYTES_LATER: _other_bytes_later,
    Fault.TRUNCATED: _truncated,
    Fault.OVERSIZED: _oversized,
    Fault.SHORT_CHUNK: _short_chunk,
    Fault.OTHER_VERSION: _other_version,
    Fault.STRANGER: _stranger,
    Fault.DEAF_AWHILE: _deaf_awhile,
    Fault.BUSY: _busy,
    Fault.RECONNECTED: _reconnected,
    Fault.RESTARTED: _restarted,
    Fault.SERVER_KILLED: _server_killed,
    Fault.TORN_PAGE: _torn_page,
    Fault.DISK_FULL: _disk_full,
    Fault.KILLED: _killed,
    Fault.HALF_OPEN: _half_open,
}


def once(interfere: Interference, index: int, *, again: bool = False) -> Interference:
    """Interfere with the first frame that carries chunk ``index``, or with each one."""
    spent = False

    def act(world: World, site: Site, frame: Frame) -> list[Frame]:
        nonlocal spent
        if frame.kind != Kind.CHUNK or frame.index != index or spent:
            return [frame]
        spent = not again
        return interfere(world, site, frame)

    return act


# --- what is wrong with the update itself ---


def set_values(
    layout: Layout, site: Site, dice: random.Random, place: int, choose: Callable[[str], int]
) -> None:
    """Put ``choose(dtype)``'s bits into elements of a random float tensor, those of ``place`` modulo 2."""
    floats = [t for t in layout.tensors if t[1] in FLOATS and t[2][0] > 3]
    _, dtype, shape, offset, nbytes = dice.choice(floats)
    values = np.frombuffer(memoryview(site.update)[offset : offset + nbytes], stored(dtype))
    bits = values.view(f"u{values.itemsize}")
    count = dice.choice([1, 1, 5, shape[0] // 3])
    for _ in range(max(1, count)):
        bits[min(dice.randrange(shape[0]) // 2 * 2 + place, (shape[0] - 2) // 2 * 2 + place)] = (
            choose(dtype)
        )


def _declare_wrongly(fault: Fault, layout: Layout, site: Site, dice: random.Random) -> None:
    """Let a site say that one of its tensors is another."""
    declared = site.declared or list(table(layout))
    at = dice.randrange(len(declared))
    name, dtype, shape = declared[at]
    if fault is Fault.WRONG_SHAPE:
        shape = dice.choice([[*shape, 1], [1, *shape], [shape[0] + 1, *shape[1:]]])
    elif fault is Fault.WRONG_DTYPE:
        dtype = DTYPES[(DTYPES.index(dtype) + 1) % len(DTYPES)]  # never the old one after two
    else:
        name += dice.choice(["x", ".weight", "\u00e9"])
    declared[at] = name, dtype, shape
    site.declared = declared


def _special(which: int, dice: random.Random) -> Callable[[str], int]:
    def choose(dtype: str) -> int:
        bits = SPECIAL_BITS[dtype][which]
        sign = SPECIAL_BITS[dtype][4] if dice.random() < 0.5 else 0
        return bits | sign

    return choose


_VALUES = {
    Fault.NAN: 0,
    Fault.INFINITY: 1,
    Fault.HUGE: 2,
    Fault.DENORMAL: 3,
    Fault.NEGATIVE_ZERO: 4,
}


def inject(
    fault: Fault,
    layout: Layout,
    site: Site,
    dice: random.Random,
    *,
    place: int = 0,
    chunk: int | None = None,
) -> None:
    """Make ``fault`` happen to ``site``, at ``chunk`` or anywhere.

    ``place`` (0 or 1) keeps the values of two faults apart.
    """
    index = dice.randrange(layout.chunk_count) if chunk is None else chunk
    if fault in _VALUES:
        set_values(layout, site, dice, place, _special(_VALUES[fault], dice))
    elif fault in (Fault.WRONG_SHAPE, Fault.WRONG_DTYPE, Fault.WRONG_NAME):
        _declare_wrongly(fault, layout, site, dice)
    elif fault is Fault.BAD_WEIGHT:
        site.weight = dice.choice([0, -1, (1 << 24) + 5, (1 << 64) - 1, 1 << 70])
    elif fault is Fault.EXTREME_WEIGHT:
        if 1 <= site.weight < 1 << 24:
            site.weight = dice.choice([1, (1 << 24) - 1, ((1 << 24) - 1) << 40])
    elif fault is Fault.TOO_FEW_CHUNKS:
        site.chunks_missing = dice.randrange(1, layout.chunk_count)
    elif fault is Fault.BAD_CHECKSUMS:
        site.interferences.append(once(_flipped_bit, index, again=True))
    elif fault is Fault.WITHDRAWN:
        site.interferences.append(once(_withdrawn, index, again=True))
    elif fault is Fault.SLOW:
        site.interferences.append(
            lambda world, _, frame: [replace(frame, due=world.now + world.dice.randrange(3000))]
        )
    elif fault is Fault.LOST_REQUEST:
        site.requests_lost.add(index)
    else:
        site.interferences.append(once(_ONCE[fault], index))
