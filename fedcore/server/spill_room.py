"""Whether the spill file has room for what a survey keeps, which is looked at before a round begins."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Final

from fedcore._core import Layout
from fedcore.config import RunConfig
from fedcore.layout import FLOATS, ITEMSIZE
from fedcore.words import plural

from .collection import kept_free, spill_path
from .rule import rule_of

__all__ = ["lack_of_room", "room_for_updates", "update_bytes"]

_BLOCK: Final = 4096
_ELEMENT_BYTES: Final = {"bf16": 2.0, "fp16": 2.0, "int8": 1.1, "nf4": 0.6}
"""At most, with scales, by encoding."""


def update_bytes(layout: Layout, encoding: str) -> int:
    """Return about how much of a disk the chunks of one update take as they travel, at most.

    Args:
        layout: of the update.
        encoding: of its floats, one that a rule of several passes takes.
    """
    each, whole = _ELEMENT_BYTES.get(encoding), layout.chunk_count * _BLOCK
    for _, dtype, _, _, nbytes in layout.tensors:
        if each is None or dtype not in FLOATS:
            whole += nbytes
        else:
            whole += min(nbytes, int(nbytes // ITEMSIZE[dtype] * each))
    return whole


def room_for_updates(path: Path, each: int, keep_free: int) -> int:
    """Return how many updates of so many bytes a spill file has room for, with what it has taken already.

    Args:
        path: the file; neither it nor its folder need be there yet.
        each: bytes of an update.
        keep_free: bytes of the device that it leaves to others.

    Raises:
        OSError: the device does not say.
    """
    folder = path.parent.absolute()
    while not folder.exists():
        folder = folder.parent
    disk = os.statvfs(folder)
    taken = path.stat().st_blocks * 512 if path.exists() else 0
    return max(0, disk.f_bavail * disk.f_frsize + taken - keep_free) // each


def lack_of_room(config: RunConfig, run_id: str, layout: Layout, state_bytes: int) -> str:
    """Return what an operator should know of the room for a round's updates; empty if nothing is amiss.

    Only a rule of several passes keeps them, until it has decided which of them count.

    Args:
        config, run_id: the run's.
        layout: of its model.
        state_bytes: what the states of a version take.
    """
    rule, wanted = rule_of(config), config.participants.trained
    if rule.several is None or not rule.several.keeps_most or not config.server.spill:
        return ""
    path, each = spill_path(config, run_id), update_bytes(layout, config.transfer.update)
    try:
        found = room_for_updates(path, each, kept_free(layout, state_bytes))
    except OSError as error:
        return f"how much room there is for the spill file is not known: {error.strerror or error}"
    if found >= wanted:
        return ""
    return (
        f"the disk of the spill file (server.spill_dir) has room for {found} of {plural(wanted, 'update')} of "
        f"{each:,} bytes beside two models: of the others, those that count are pulled twice"
    )
