"""The files of a run folder that are the server's own: which they are, what a crash left of them, what is foreign.

The journal's table ``paths`` lists every path before it is written (``pending``), once it counts (``committed``),
once it was removed on purpose (``removed``), and before it is moved away (``leaving``, with its target). Between
``pending`` and ``committed`` a file is written under its scratch name, synchronised, renamed, and its folder
synchronised. An exported folder is the server's own if the run's id is in it. What else has a name of the server's
own files is named, and never touched.

A version is a model and any number of states, from which the next version is made. They are written and committed
together, under one record of how much of them is there. States are kept for the last version alone.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import re
import shutil
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Final

from fedcore.errors import IntegrityError, LayoutError, StorageError
from fedcore.files.opening import CARD, WEIGHTS
from fedcore.model_file import open_model
from fedcore.replacing import sync_folder

from .journal import Journal, storing

__all__ = [
    "ABOUT",
    "EXPORTS",
    "Files",
    "about_export",
    "keep_additions",
    "model_name",
    "new_and_old",
    "record_name",
    "remove_export",
    "scratch_name",
    "state_name",
]

EXPORTS: Final = ("best", "final", "ema")
"""The folders that loaders open."""
ABOUT: Final = "fedcore.json"
"""What says in them whose they are; the first file that is written there, and the last that is removed."""
_MODELS: Final = "models"
_STATE: Final = r"[a-z][a-z0-9]*"
_IS_STATE: Final = re.compile(rf"{_MODELS}/round-[0-9]{{4,}}\.{_STATE}\.safetensors")
_OWN_NAME: Final = re.compile(
    rf"round-[0-9]{{4,}}(\.{_STATE})?\.safetensors|\.round-[0-9]{{4,}}(\.{_STATE})?\.(partial|progress)"
)
_SHOWN: Final = 6

logger = logging.getLogger("fedcore.server")


def model_name(version: int) -> str:
    """Return the name of a version's model in the folder of models."""
    return f"round-{version:04d}.safetensors"


def state_name(version: int, state: str) -> str:
    """Return the name of one of a version's states there."""
    return f"round-{version:04d}.{state}.safetensors"


def scratch_name(name: str) -> str:
    """Return under which name a file of a version is written before its commit."""
    return f".{name.removesuffix('.safetensors')}.partial"


def record_name(name: str) -> str:
    """Return the name of the file that records how much of a version is there, beside a model or a state of it."""
    return f".{name.split('.', maxsplit=1)[0]}.progress"


def new_and_old(name: str) -> tuple[str, str]:
    """Return the names between which an exported folder changes: the one being made, and the one before."""
    return f".{name}-new", f".{name}-old"


class Files:
    """The paths of one run folder.

    Args:
        folder: the run folder.
        journal: its journal; None where there is none yet: then nothing is known.
    """

    def __init__(self, folder: Path, journal: Journal | None) -> None:
        self.folder = folder
        self.models = folder / _MODELS
        self._journal = journal

    @property
    def journal(self) -> Journal:
        """The journal, which must be there."""
        assert self._journal is not None
        return self._journal

    def _rows(self, *states: str) -> list[tuple[str, int, str]]:
        """Return path, version and target of the rows in one of these states; all states if none is given."""
        if self._journal is None:
            return []
        marks = ",".join("?" * len(states))
        where = f" WHERE state IN ({marks})" if states else ""
        return self._journal.rows(
            f"SELECT path, version, target FROM paths{where} ORDER BY path", *states
        )

    # --- what no row lists ---

    def foreign(self) -> list[str]:
        """Return the paths that have names of the server's own files, though this run has not written them."""
        known: set[str] = set()
        for path, _, _ in self._rows():
            known |= self._with_scratch(path)
        found = []
        if self.models.is_dir():
            names = sorted(entry.name for entry in os.scandir(self.models))
            found = [f"{_MODELS}/{name}" for name in names if _OWN_NAME.fullmatch(name)]
        lost = {path for path, version, _ in self._rows("pending") if self._is_lost(path, version)}
        found = [path for path in found if path not in known or path in lost]
        for name in (n for export in EXPORTS for n in (export, *new_and_old(export))):
            if os.path.lexists(self.folder / name) and not self.is_own_export(self.folder / name):
                found.append(name)
        return found

    def _is_lost(self, path: str, version: int) -> bool:
        """Return whether a file that is listed as pending was committed after this journal was copied.

        A commit that a crash interrupts leaves the record of its chunks beside it. Without one, only the initial
        model can be whole.
        """
        whole = self.folder / path
        if version == 0 or not whole.is_file() or self._record_of(path).exists():
            return False
        try:
            open_model(whole)
        except (LayoutError, StorageError):
            return False
        return True

    def _record_of(self, path: str) -> Path:
        return self.models / record_name(Path(path).name)

    def _with_scratch(self, path: str) -> set[str]:
        """Return the path of a version's file with those that belong to its writing."""
        folder, _, name = path.rpartition("/")
        names = {path, f"{folder}/{scratch_name(name)}"}
        return names if _is_state(path) else {*names, f"{folder}/{record_name(name)}"}

    def is_own_export(self, folder: Path) -> bool:
        """Return whether an exported folder, or what a crash left of one, is of a version of this run."""
        about = about_export(folder)
        if not about and folder.is_dir() and not folder.is_symlink():
            return set(_names(folder)) <= {ABOUT}  # a crash came before its first file was written
        if self._journal is None:
            return False
        versions = {version for _, version, _ in self._rows()}
        return about.get("run_id") in self._journal.run_ids and about.get("version") in versions

    def refuse_foreign(self, found: list[str], last_version: int | None) -> None:
        """Raise IntegrityError that names what this run has not written, and what can be done."""
        shown = ", ".join(found[:_SHOWN])
        more = f" and {len(found) - _SHOWN} more" if len(found) > _SHOWN else ""
        if self._journal is None:
            state, after = (
                "there is no journal (run.sqlite is missing or empty)",
                "begins a new run",
            )
        elif last_version is None:
            state, after = "by its journal (run.sqlite) no model is committed", "begins the run"
        else:
            state = f"by its journal (run.sqlite) the last model is that of round {last_version}"
            after = f"goes on after round {last_version}"
        raise IntegrityError(
            f"run folder {self.folder} holds {shown}{more}, which its journal does not know: {state}. Nothing was "
            "changed. Put back the run.sqlite that belongs to them, or give this run another name (run.name). Or "
            f"start the server once with --discard: it moves them to {self._aside().name}/ in the run folder and "
            f"{after}"
        )

    # --- moving away ---

    def _aside(self) -> Path:
        """Return a folder that is not there yet."""
        number = 1
        while os.path.lexists(self.folder / f"discarded-{number}"):
            number += 1
        return self.folder / f"discarded-{number}"

    def set_aside(self, paths: Iterable[str]) -> Path:
        """Move paths into a new folder of the run folder, under the same names there; returns that folder."""
        aside = self._aside()
        with storing(aside):
            aside.mkdir()
            for path in paths:
                _move(self.folder / path, aside / path)
            sync_folder(aside)
            sync_folder(self.folder)
        return aside

    def aside_with_journal(self) -> Path:
        """Make a folder with a copy of the journal: what is moved there can be brought back. Returns its path."""
        aside = self._aside()
        with storing(aside):
            aside.mkdir()
            copy = aside / self.journal.path.name
            shutil.copyfile(self.journal.path, copy)
            with copy.open("rb") as file:
                os.fsync(file.fileno())
            sync_folder(aside)
            sync_folder(self.folder)
        return aside

    def leave(self, after: int, last: int, aside: Path) -> None:
        """Note, within a transaction, what moves to ``aside``: the files of versions after ``after``, and what was
        exported or written of them. `finish_leaving` moves it, and so does the next start."""
        for path, version, _ in self._rows("pending"):
            for name in self._with_scratch(path) if version > after else ():
                self.enter("leaving", version, {name: 0})
        for name in EXPORTS:
            exported = about_export(self.folder / name).get("version")
            if isinstance(exported, int) and exported > after:
                self.enter("leaving", exported, {name: 0})
        for name in ("summary.json", "results.json"):
            if (self.folder / name).exists():
                self.enter("leaving", last, {name: 0})
        self.journal.db.execute(
            "UPDATE paths SET state = 'leaving', target = ? WHERE version > ? AND state != 'removed'",
            (aside.name, after),
        )
        self.journal.db.execute(
            "DELETE FROM paths WHERE version > ? AND state = 'removed'", (after,)
        )

    # --- what is about to be written ---

    def announce(self, version: int, sizes: Mapping[str, int]) -> None:
        """List the files of a version, by name and bytes, before the first of them is begun.

        What was listed of the version and is not among them goes.

        Raises:
            IntegrityError: something has one of their names that this run has not written.
        """
        paths = {f"{_MODELS}/{name}": nbytes for name, nbytes in sizes.items()}
        listed = {path for path, of, _ in self._rows("pending") if of == version}
        if paths.keys() == listed:
            return
        for path in paths.keys() - listed:
            for name in sorted(self._with_scratch(path)):
                self.refuse_existing(name)
        dropped = listed - paths.keys()
        for path in dropped:
            with storing(self.folder / path):
                (self.models / scratch_name(Path(path).name)).unlink(missing_ok=True)
        with self.journal.transaction():
            self.enter("pending", version, paths)
            self.journal.db.executemany(
                "DELETE FROM paths WHERE path = ?", [(path,) for path in dropped]
            )

    def announce_next(self, version: int, sizes: Mapping[str, int]) -> None:
        """List the files of the version after this one, within a transaction, unless something has their names."""
        paths = {f"{_MODELS}/{name}": nbytes for name, nbytes in sizes.items()}
        names = {name for path in paths for name in self._with_scratch(path)}
        if not any(os.path.lexists(self.folder / name) for name in names):
            self.enter("pending", version, paths)

    def refuse_existing(self, path: str) -> None:
        """Raise IntegrityError if something is there."""
        if os.path.lexists(self.folder / path):
            raise IntegrityError(
                f"{self.folder / path} is there, but this run has not written it: move it away and start the "
                "server again"
            )

    def enter(self, state: str, version: int, paths: Mapping[str, int]) -> None:
        """Write the rows of paths, within a transaction."""
        self.journal.db.executemany(
            "INSERT OR REPLACE INTO paths VALUES (?, ?, ?, ?, '')",
            [(path, version, nbytes, state) for path, nbytes in paths.items()],
        )

    def put_in_place(self, version: int) -> None:
        """Rename a version's pending files, which are written and synchronised, to their own names.

        The record beside them says to the next start that a crash came before they were committed.
        """
        names = [Path(path).name for path, of, _ in self._rows("pending") if of == version]
        with contextlib.suppress(OSError):  # a round for whose record there was no room has one now
            (self.models / record_name(model_name(version))).touch()
        for name in names:
            with storing(self.models / name):
                (self.models / scratch_name(name)).rename(self.models / name)
        with storing(self.models):
            sync_folder(self.models)

    def mark(self, state: str, paths: Iterable[str]) -> None:
        """Set the state of paths, within a transaction."""
        self.journal.db.executemany(
            "UPDATE paths SET state = ? WHERE path = ?", [(state, path) for path in paths]
        )

    def pending_of(self, version: int) -> list[str]:
        """Return the paths of a version that are announced and not committed."""
        return [path for path, of, _ in self._rows("pending") if of == version]

    def forget_record(self, version: int) -> None:
        """Remove what recorded how much of a version is there; it says nothing once the version is committed."""
        try:
            (self.models / record_name(model_name(version))).unlink(missing_ok=True)
        except OSError as error:  # the next start removes it
            logger.debug("cannot remove the record of round %d: %s", version, error)

    # --- a start ---

    def settle(self) -> None:
        """Finish or set back what a killed server left of the listed paths."""
        for path, _, _ in self._rows("pending"):
            self._set_back(path)
        for path, _, _ in self._rows("committed"):
            for name in self._with_scratch(path) - {path}:
                (self.folder / name).unlink(missing_ok=True)
        for path, _, _ in self._rows("removed"):
            if _is_state(path):  # a model is removed when the next ones are
                (self.folder / path).unlink(missing_ok=True)
        for name in EXPORTS:
            self._settle_export(name)
        self.finish_leaving()

    def _set_back(self, path: str) -> None:
        """Keep a version that was being collected if its record is there; remove what can't be gone on with."""
        final, record = self.folder / path, self._record_of(path)
        scratch = self.models / scratch_name(final.name)
        if record.is_file() and not scratch.exists() and final.is_file():
            final.rename(scratch)  # its commit came as far as the rename
        if os.path.lexists(final):
            logger.warning("moved to %s: %s, which was not committed", self.set_aside([path]), path)
        if not (scratch.is_file() and record.is_file()):
            scratch.unlink(missing_ok=True)
            record.unlink(missing_ok=True)

    def _settle_export(self, name: str) -> None:
        new, old = (self.folder / n for n in new_and_old(name))
        target = self.folder / name
        if new.exists():
            remove_export(new)
        if old.exists():
            if target.exists():
                keep_additions(old, target)
                remove_export(old)
            else:  # a crash came between the two renames of an export
                old.rename(target)

    def finish_leaving(self) -> None:
        """Move what is listed as leaving."""
        rows = self._rows("leaving")
        for path, _, target in rows:
            with storing(self.folder / path):
                if os.path.lexists(self.folder / path):
                    _move(self.folder / path, self.folder / target / path)
        if rows:
            sync_folder(self.folder)
            with self.journal.transaction():
                self.journal.db.execute("DELETE FROM paths WHERE state = 'leaving'")

    # --- what should be there ---

    def missing(self) -> list[int]:
        """Return the versions whose committed model is not there."""
        return [
            version
            for path, version, _ in self._rows("committed")
            if not _is_state(path) and not (self.folder / path).is_file()
        ]

    def states_before(self, version: int) -> list[str]:
        """Return the paths of the states of earlier versions."""
        rows = self._rows("committed")
        return [path for path, of, _ in rows if of < version and _is_state(path)]

    def take_up_format_2(self, versions: Mapping[int, int], last: int | None) -> None:
        """List, within a transaction, the files of a run of fedcore before it listed any.

        Args:
            versions: bytes of each committed version.
            last: the last one.
        """
        for version, nbytes in versions.items():
            name = model_name(version)
            there = (self.models / name).is_file() or version == last
            self.enter("committed" if there else "removed", version, {f"{_MODELS}/{name}": nbytes})
        following = model_name(0 if last is None else last + 1)
        if (self.models / record_name(following)).is_file():
            self.enter("pending", 0 if last is None else last + 1, {f"{_MODELS}/{following}": 0})


def about_export(folder: Path) -> dict[str, object]:
    """Return what an exported folder says of itself: ``run_id`` and ``version``; nothing if it is none."""
    try:
        found = json.loads((folder / ABOUT).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def keep_additions(old: Path, new: Path) -> None:
    """Move what somebody has added to an exported folder to the one that takes its place."""
    written = {*_names(new), *WEIGHTS, CARD, ABOUT}
    for name in _names(old):
        if name not in written:
            (old / name).rename(new / name)


def remove_export(folder: Path) -> None:
    """Remove an exported folder of this run, or what is left of one; what says whose it is goes last."""
    for path in folder.iterdir():
        if path.name != ABOUT:
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            else:
                path.unlink()
    (folder / ABOUT).unlink(missing_ok=True)
    folder.rmdir()


def _is_state(path: str) -> bool:
    return _IS_STATE.fullmatch(path) is not None


def _names(folder: Path) -> Iterator[str]:
    return iter(sorted(path.name for path in folder.iterdir()))


def _move(source: Path, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    source.rename(target)
