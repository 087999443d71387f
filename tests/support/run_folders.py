"""Run folders with models in them, made without sites."""

from __future__ import annotations

from array import array
from collections.abc import Collection
from pathlib import Path
from typing import Any

from fedcore._core import Layout
from fedcore.model_file import create_model
from fedcore.server.rounds.selection import SiteScore
from fedcore.server.storage.integrity import checksum_of
from fedcore.server.storage.store import StateRow, Store, VersionRow

LAYOUT = Layout([("w", "F32", [600])])
SETTINGS: dict[str, Any] = {"run": {"rounds": 9, "task": "train"}}


def values(version: int) -> bytes:
    return array("f", [version + i / 8 for i in range(600)]).tobytes()


def commit(
    store: Store, version: int, loss: float | None = None, states: Collection[str] = ()
) -> None:
    """Commit a version as a server does, with states if any, and score it."""
    store.announce(version, LAYOUT.total_bytes, dict.fromkeys(states, LAYOUT.total_bytes))
    model = create_model(store.scratch(version), LAYOUT, {"fedcore.version": str(version)})
    checksums = model.fill(lambda _: values(version))
    model.file.sync()
    sites = {"a": 1} if version else {}
    row = VersionRow(version, checksum_of(checksums), "", LAYOUT.total_bytes, 1.0, sites)
    kept = {}
    for state in states:
        file = create_model(store.state_scratch(version, state), LAYOUT)
        checksum = checksum_of(file.fill(lambda _: values(version + 100)))
        file.file.sync()
        kept[state] = StateRow(checksum, LAYOUT.total_bytes)
    store.commit(row, {}, None if version else {"config.json": "{}"}, kept)
    if loss is not None:
        store.add_score(version, SiteScore("a", 1, {"loss": loss}))


def run_of(folder: Path, *losses: float | None) -> Path:
    """Make a run folder with a version for each loss; an export of the last one lies in ``best/``."""
    store = Store(folder, SETTINGS)
    for version, loss in enumerate(losses):
        commit(store, version, loss)
    store.export("best", len(losses) - 1)
    store.close()
    return folder


def contents(folder: Path) -> dict[str, bytes]:
    """Return every file of a run folder but the lock, by its path in it."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name != ".lock"
    }


def flip(path: Path) -> None:
    """Change one bit of a file's last byte, in place, be it writable or not."""
    path.chmod(0o644)
    with path.open("r+b") as file:
        file.seek(-1, 2)
        last = file.read(1)[0]
        file.seek(-1, 2)
        file.write(bytes([last ^ 1]))
