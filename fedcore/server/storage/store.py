"""A run's folder: model files, the SQLite journal, and the ``best/`` and ``final/`` folders.

A version is a set of files: a model, and the states that the next version is made with. It exists once its row
says so. The order of a commit is: a row lists each file as pending, the files are synchronised under scratch
names, renamed, their folder synchronised, and then one transaction writes the version. The next start finishes or
sets back what is pending. A file that no row lists is never touched. States are kept for the last version alone.
"""

from __future__ import annotations

import json
import logging
import shutil
import sqlite3
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict
from pathlib import Path
from typing import Any, Final

from fedcore import __version__
from fedcore._core import MappedFile
from fedcore.errors import ConfigError, IntegrityError, StorageError
from fedcore.layout import DEFAULT_CHUNK_BYTES
from fedcore.outlet import Outlet
from fedcore.protocol import strict_json
from fedcore.replacing import place_of, put_in_place

from .decisions import Decisions
from .exports import Committed, write_durably, write_export
from .files import Files, model_name, record_name, scratch_name, state_name
from .fixed import check_fixed
from .history import (
    Life,
    StateRow,
    VersionRow,
    read_life,
    read_states,
    read_versions,
)
from .integrity import verify_model
from .journal import SCHEMA, Journal, holds_something, storing
from .lock import FolderLock
from .logged import Logged
from .site_rows import SiteRows, number_of
from .verdicts import Verdicts

__all__ = ["StateRow", "Store", "VersionRow"]

AVERAGE: Final = "ema"
"""The state that is the average of the models, and the folder that it is exported to."""
_WITHOUT_STATES: Final = "without_states"

_BEYOND_DISK: Final = 16
"""A model larger than so many times the whole disk is not waited for: no disk is made so much larger."""

logger = logging.getLogger("fedcore.server")


class Store(SiteRows, Decisions, Verdicts):
    """The only writer of a run folder; a second server on it is refused.

    Args:
        folder: the run folder; it is made where there is none.
        settings: the run's settings, by section and key; None leaves those that are recorded.
        discard: move what the journal does not know into a folder of its own, and go on.
        chunk_bytes: how large the chunks are that checksums are taken of, in a run without a model; another run
            keeps its own.
        wait: wait for as long as another process has the journal locked; else it is refused, or reserved until
            `release` is called.

    Attributes:
        chunk_bytes: how large the run's chunks are.
        taken: gives what the run has taken up to now; it is kept with each commit, and at the end.
        logged: the training metrics of the sites.
        journal: the rows, and the database that they are in.

    Raises:
        BusyError: another process has the folder.
        ConfigError: the folder holds a run with other settings, or of another version of fedcore.
        IntegrityError: the folder holds models that its journal does not know.
        JournalLockedError: another process has the journal locked, without ``wait``.
        StorageError: the folder can't be written.
    """

    def __init__(
        self,
        folder: Path,
        settings: Mapping[str, Any] | None,
        *,
        discard: bool = False,
        chunk_bytes: int = DEFAULT_CHUNK_BYTES,
        wait: bool = True,
    ) -> None:
        self.folder = folder
        self.models = folder / "models"
        self.chunk_bytes = chunk_bytes
        self.taken: Callable[[], Life] | None = None
        self._closed = False
        try:
            self.models.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise StorageError(f"cannot write run folder {folder}: {error.strerror}") from None
        self._lock = FolderLock(folder)
        try:
            self._open_journal(discard, wait)
        except BaseException:
            self._lock.close()
            raise
        try:
            self._take_up(settings, discard)
        except BaseException:
            self.close()
            raise

    def _open_journal(self, discard: bool, wait: bool) -> None:
        path = self.folder / "run.sqlite"
        if not holds_something(path):  # SQLite would make a new one, and drop what lies beside it
            before = Files(self.folder, None)
            if found := before.foreign():
                if not discard:
                    before.refuse_foreign(found, None)
                beside = [
                    name
                    for name in (
                        "run.sqlite-wal",
                        "run.sqlite-journal",
                        "summary.json",
                        "results.json",
                    )
                    if (self.folder / name).exists()
                ]
                logger.warning(
                    "moved to %s: %s", before.set_aside([*found, *beside]), ", ".join(found)
                )
        self.journal = Journal(path, wait=wait)
        self._files = Files(self.folder, self.journal)
        self.logged = Logged(self.journal)

    def _take_up(self, settings: Mapping[str, Any] | None, discard: bool) -> None:
        if self.journal.found_schema == "2":
            with self.journal.transaction():
                sizes = {row.version: row.nbytes for row in self.versions()}
                self._files.take_up_format_2(sizes, self.last_version)
        if settings is not None:
            begun = self.last_version is not None
            check_fixed(self.folder, self.journal.meta("settings") if begun else None, settings)
        found = self._files.foreign()
        if found and not discard:
            self._files.refuse_foreign(found, self.last_version)
        if found:
            logger.warning("moved to %s: %s", self._files.set_aside(found), ", ".join(found))
        now = {"schema": str(SCHEMA), "fedcore": __version__}
        recorded = self.journal.meta("chunk_bytes")
        if settings is not None and self.last_version is None:  # no model has chunks yet
            now["chunk_bytes"] = str(self.chunk_bytes)
        else:
            self.chunk_bytes = DEFAULT_CHUNK_BYTES if recorded is None else int(recorded)
        cut_anew = recorded is not None and int(recorded) != self.chunk_bytes
        if settings is not None:
            now["settings"] = json.dumps(settings, sort_keys=True)
        if found or any(self.journal.meta(key) != value for key, value in now.items()):
            with self.journal.transaction():
                if (
                    found or cut_anew
                ):  # what sites have of versions that are gone, or of other chunks
                    self.journal.renew_run_id()
                for key, value in now.items():
                    self.journal.set_meta(key, value)
        with storing(self.folder):
            self._files.settle()
            for name in ("summary", "results"):
                (self.folder / f".{name}.json.partial").unlink(missing_ok=True)

    def check_possible(self, nbytes: int) -> None:
        """Raise StorageError if no room that could be made would hold a model of ``nbytes`` bytes."""
        whole = shutil.disk_usage(self.folder).total
        if nbytes > _BEYOND_DISK * whole:
            raise StorageError(
                f"a model of {nbytes:,} bytes is far beyond the server's whole disk of {whole:,} bytes"
            )

    def untouched(self, nbytes: int) -> MappedFile:
        """Return a file of so many bytes that nobody reads or writes: it takes neither memory nor disk.

        Raises:
            StorageError: the disk can't hold a file of this size.
        """
        path = self.models / f".{self.run_id}.untouched"
        with storing(path):
            with path.open("wb") as file:
                file.truncate(nbytes)
            try:
                return MappedFile.open(str(path), writable=True)
            finally:
                path.unlink()

    def check_space(self, nbytes: int) -> None:
        """Raise StorageError if the disk can't hold a model of ``nbytes`` bytes."""
        free = shutil.disk_usage(self.folder).free
        if nbytes > free:
            raise StorageError(
                f"a model of {nbytes:,} bytes does not fit on the server's disk, which has {free:,} left"
            )

    @property
    def _db(self) -> sqlite3.Connection:
        return self.journal.db

    def hold_back(self, *outlets: Outlet[Any]) -> None:
        """Let nothing leave through these outlets while a row of a `group` is not on the device."""
        self.journal.outlets = outlets

    def group(self) -> AbstractContextManager[None]:
        """Have the rows of many messages reach the device together; see `Journal.group`."""
        return self.journal.group()

    def settle(self) -> None:
        """Have all rows on the device that wait in a group; see `Journal.settle`."""
        self.journal.settle()

    def reserve(self) -> bool:
        """Let no other process lock the journal for a while; see `Journal.reserve`."""
        return self.journal.reserve()

    def release(self) -> None:
        """Let other processes lock the journal again; see `Journal.release`."""
        self.journal.release()

    # --- versions ---

    @property
    def run_id(self) -> str:
        """Random id of the run, the same after a restart."""
        return self.journal.run_id

    @property
    def life(self) -> Life:
        """What the run has taken before this process."""
        return read_life(self.journal.meta("life"))

    def _keep_life(self) -> None:
        """Within a transaction: keep what the run has taken up to now, this process included."""
        if self.taken is not None:
            self.journal.set_meta("life", json.dumps(asdict(self.taken())))

    @property
    def last_version(self) -> int | None:
        """The last committed version, or None."""
        row = self.journal.rows("SELECT MAX(version) FROM versions")[0]
        return None if row[0] is None else int(row[0])

    @property
    def finished(self) -> bool:
        """Whether the run ended as planned, the last version scored."""
        return self.journal.meta("finished") == str(self.last_version)

    def path(self, version: int) -> Path:
        """Where a version's model file lies."""
        return self.models / model_name(version)

    def scratch(self, version: int) -> Path:
        """Where a version's file is written before its commit."""
        return self.models / scratch_name(model_name(version))

    def record(self, version: int) -> Path:
        """Where it is recorded how much of that file is there."""
        return self.models / record_name(model_name(version))

    def state_path(self, version: int, state: str) -> Path:
        """Where the file of a version's state lies."""
        return self.models / state_name(version, state)

    def state_scratch(self, version: int, state: str) -> Path:
        """Where that file is written before the version's commit."""
        return self.models / scratch_name(state_name(version, state))

    def announce(self, version: int, nbytes: int, states: Mapping[str, int] | None = None) -> None:
        """Note that a version is going to be written: call it before its scratch files are made.

        Args:
            version: its number.
            nbytes: the bytes of its model's tensors.
            states: those of its states, by name.

        Raises:
            IntegrityError: a file of one of their names is there that this run has not written.
        """
        self._files.announce(version, self._sizes(version, nbytes, states or {}))

    @staticmethod
    def _sizes(version: int, nbytes: int, states: Mapping[str, int]) -> dict[str, int]:
        sizes = {state_name(version, state): size for state, size in states.items()}
        return {model_name(version): nbytes, **sizes}

    def clear(self, version: int) -> None:
        """Remove what a killed server left of an announced version that was not committed."""
        paths = [self.record(version), self.scratch(version)]
        for pending in self._files.pending_of(version):
            paths.append(self.models / scratch_name(Path(pending).name))
        for path in paths:
            with storing(path):
                path.unlink(missing_ok=True)

    def commit(
        self,
        row: VersionRow,
        metrics: Mapping[str, Mapping[str, float]],
        files: Mapping[str, str] | None = None,
        states: Mapping[str, StateRow] | None = None,
    ) -> None:
        """Make a version durable: rename its synchronised scratch files, then write its rows.

        The states of the version before are removed.

        Args:
            row: the version and its participants; it was announced.
            metrics: training metrics by site.
            files: JSON files that describe the model, with version 0.
            states: the version's states by name, all that were announced.
        """
        states = states or {}
        sizes = {state: kept.nbytes for state, kept in states.items()}
        pending = self._files.pending_of(row.version)
        announced = {f"models/{name}" for name in self._sizes(row.version, row.nbytes, sizes)}
        assert set(pending) == announced, "the version's files are not those that were announced"
        self._files.put_in_place(row.version)
        outdated = self._files.states_before(row.version)
        with self.logged.transaction():
            self._db.execute(
                "INSERT INTO versions VALUES (?, ?, ?, ?, ?, ?)",
                (row.version, row.checksum, row.sha256, row.nbytes, row.seconds, time.time()),
            )
            self._db.executemany(
                "INSERT INTO contributions VALUES (?, ?, ?, ?)",
                [
                    (row.version, site, number_of(weight), json.dumps(dict(metrics.get(site, {}))))
                    for site, weight in row.participants.items()
                ],
            )
            if row.verdict is not None:
                self._put_verdict(row.version, row.verdict.settled)
            if row.factors is not None:
                values = row.version, row.factors.text
                self._db.execute("INSERT OR REPLACE INTO figures VALUES (?, ?)", values)
            for name, text in (files or {}).items():
                self._db.execute("INSERT OR REPLACE INTO files VALUES (?, ?)", (name, text))
            self._db.execute("DELETE FROM states")
            self._db.executemany(
                "INSERT INTO states VALUES (?, ?, ?, ?)",
                [(row.version, name, kept.checksum, kept.nbytes) for name, kept in states.items()],
            )
            self._files.mark("removed", outdated)
            self._files.mark("committed", pending)
            self._keep_life()
            following = row.version + 1
            self._files.announce_next(following, self._sizes(following, row.nbytes, sizes))
        self._files.forget_record(row.version)
        for path in outdated:
            with storing(self.folder / path):
                (self.folder / path).unlink(missing_ok=True)

    def states(self, version: int) -> dict[str, StateRow]:
        """Return a version's states by name; none of any version but the last."""
        return read_states(self.journal.rows, version)

    def verify_states(self, version: int) -> None:
        """Read the files of a version's states and compare them with the checksums that were recorded.

        Raises:
            IntegrityError: one is missing, or another one.
        """
        for state, kept in self.states(version).items():
            verify_model(self.state_path(version, state), kept.checksum, self.chunk_bytes)

    @property
    def left_states(self) -> list[int]:
        """The versions to which the run went back, and whose states were gone: what uses them began anew there."""
        return list(json.loads(self.journal.meta(_WITHOUT_STATES) or "[]"))

    def verify(self, version: int) -> None:
        """Read a committed version's model and compare it with the checksum that was recorded.

        Raises:
            IntegrityError: it is missing, or another one.
        """
        verify_model(self.path(version), self._row(version).checksum, self.chunk_bytes)

    def _row(self, version: int) -> VersionRow:
        return next(row for row in self.versions() if row.version == version)

    def prune(self, keep: Collection[int]) -> list[int]:
        """Remove the files of the versions that are not in ``keep``, hashed ones only; returns which they were.

        Their rows stay.
        """
        removed = [
            row.version
            for row in self.versions()
            if row.version not in keep and row.sha256 and self.path(row.version).is_file()
        ]
        if removed:
            with self.journal.transaction():
                self._files.mark("removed", [f"models/{model_name(v)}" for v in removed])
        for version in removed:
            with storing(self.path(version)):
                self.path(version).unlink()
        return removed

    def roll_back(self, version: int) -> Path:
        """Make an earlier version the last one; returns the folder with what was after it, and with the journal.

        An earlier version has no states: the journal notes where what uses them begins anew (`left_states`). The
        run has another id from then on: what sites have kept of the later rounds counts no longer.

        Raises:
            ConfigError: there is no such version, or it is the last one already.
            IntegrityError: its file is missing, or not the one that was committed.
        """
        known, last = [row.version for row in self.versions()], self.last_version
        if last is None or version not in known:
            there = f"it has rounds {known[0]} to {known[-1]}" if known else "it has none"
            raise ConfigError(f"{self.folder} has no model of round {version}: {there}")
        if version == last:
            raise ConfigError(f"{self.folder} is at round {version} already")
        self.verify(version)
        aside = self._files.aside_with_journal()
        with self.journal.transaction():
            self._files.leave(version, last, aside)
            left = self.left_states
            if version > 0 and (self.states(last) or last in left):
                left = [*(v for v in left if v < version), version]
                self.journal.set_meta(_WITHOUT_STATES, json.dumps(left))
            for table in ("versions", "states", "contributions", "verdicts", "figures"):
                self._db.execute(f"DELETE FROM {table} WHERE version > ?", (version,))
            self._drop_scores_after(version)
            self._db.execute("DELETE FROM chosen")
            self.logged.drop_after(version)
            self._drop_allowed()
            self._db.execute("DELETE FROM meta WHERE key = 'finished'")
            self._drop_stop()
            self.journal.renew_run_id()
        self._files.finish_leaving()
        return aside

    def missing(self) -> list[int]:
        """Return the versions whose files are not there, though nobody asked for their removal."""
        return self._files.missing()

    def versions(self) -> list[VersionRow]:
        """Return every committed version, in order."""
        return read_versions(self.journal.rows)

    def add_sha256(self, version: int, digest: str) -> None:
        """Keep a version's digest, which is computed after its commit."""
        with self.journal.transaction():
            self._db.execute("UPDATE versions SET sha256 = ? WHERE version = ?", (digest, version))

    def keep_buffers(self, names: Sequence[str] | None) -> None:
        """Note which tensors of the model are buffers; None: it is not known."""
        with self.journal.transaction():
            self.journal.set_meta("buffers", json.dumps(names))

    def buffers(self) -> tuple[str, ...] | None:
        """Return which tensors of the model are buffers; None if it is not known."""
        names = json.loads(self.journal.meta("buffers") or "null")
        return None if names is None else tuple(names)

    def keep_factors(self, pairs: Sequence[tuple[str, str]]) -> None:
        """Note which tensors of the model are the factors A and B of one adapted module."""
        with self.journal.transaction():
            self.journal.set_meta("factors", json.dumps(pairs))

    def factors(self) -> tuple[tuple[str, str], ...]:
        """Return which tensors are factors; nothing if no model has any, or it is not known yet."""
        return tuple((a, b) for a, b in json.loads(self.journal.meta("factors") or "[]"))

    def keep_ranks(self, site: str, ranks: Sequence[int]) -> None:
        """Note which rank a site's adapter has in each adapted module."""
        with self.journal.transaction():
            self.journal.set_meta(f"ranks {site}", json.dumps(ranks))

    def ranks(self, site: str) -> tuple[int, ...]:
        """Return which rank a site's adapter has in each adapted module; nothing if the site has not said it."""
        return tuple(json.loads(self.journal.meta(f"ranks {site}") or "[]"))

    def leave(self) -> None:
        """Note what the run has taken, before this process ends and the run goes on."""
        with self.logged.transaction():
            self._keep_life()

    def end(self, *, finished: bool) -> None:
        """Note that the run ends in order, and whether as planned.

        Call it once all else that the run leaves behind is written: a finished run is not opened again, except to
        tell the `members` of its end.
        """
        with self.logged.transaction():
            self._db.execute("DELETE FROM chosen")
            self._keep_life()
            if finished:
                self.journal.set_meta("finished", str(self.last_version))
                self._drop_stop()

    # --- folders that loaders open ---

    def files(self) -> dict[str, str]:
        """Return the JSON files that describe the model, by name."""
        return dict(self.journal.rows("SELECT name, text FROM files"))

    def add_file(self, name: str, text: str) -> None:
        """Keep a file that describes the model, if the initial model came without it."""
        with self.journal.grouped():
            self._db.execute("INSERT OR IGNORE INTO files VALUES (?, ?)", (name, text))

    def export(self, name: str, version: int) -> Path:
        """Write ``best/`` or ``final/`` from a version, or ``ema/`` from the average up to the last version.

        Each file is compared with its recorded checksum first.

        Raises:
            IntegrityError: the version's file, or its state, is missing or not the one that was committed.
            StorageError: the folder can't be written.
        """
        try:
            source = Committed(
                version, self.path(version), self._row(version).checksum, self.chunk_bytes
            )
            average = None
            if name == AVERAGE:
                average = self.state_path(version, AVERAGE)
                verify_model(average, self.states(version)[AVERAGE].checksum, self.chunk_bytes)
            return write_export(self._files, name, source, self.files(), average)
        except IntegrityError as error:
            raise IntegrityError(f"cannot write {self.folder / name}: {error}") from None

    def write_summary(self, summary: Mapping[str, Any]) -> Path:
        """Write ``summary.json`` atomically."""
        return self._write_json("summary.json", summary)

    def write_results(self, results: Mapping[str, Any]) -> Path:
        """Write ``results.json`` atomically."""
        return self._write_json("results.json", results)

    def _write_json(self, name: str, values: Mapping[str, Any]) -> Path:
        path = self.folder / name
        partial = self.folder / f".{name}.partial"
        with storing(path):
            place = place_of(path)
            write_durably(partial, strict_json(values, indent=2) + "\n")
            put_in_place(partial, place)
        return path

    def close(self) -> None:
        """Close the journal and let go of the folder; nothing if that is done."""
        if self._closed:
            return
        self._closed = True
        self.journal.close()
        self._lock.close()
