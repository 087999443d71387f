"""A run's journal: one SQLite file that is whole by itself after each transaction.

There is no write-ahead log beside it: once a transaction has ended, it is in ``run.sqlite``, synchronised.
SQLite's rollback file ``run.sqlite-journal`` holds something during a transaction alone, or after a crash in one.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import re
import sqlite3
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Final

from fedcore import __version__
from fedcore.errors import ConfigError, FedcoreError, IntegrityError, StorageError
from fedcore.outlet import Outlet
from fedcore.replacing import sync_folder

__all__ = ["SCHEMA", "Journal", "JournalLockedError", "storing"]

SCHEMA: Final = 3
"""The number of the tables below. It rises when an older fedcore could not read them."""
_READABLE: Final = ("2", "3")
_TABLES: Final = """
CREATE TABLE IF NOT EXISTS meta (key TEXT PRIMARY KEY, value TEXT NOT NULL);
CREATE TABLE IF NOT EXISTS versions (
    version INTEGER PRIMARY KEY, checksum TEXT NOT NULL, sha256 TEXT NOT NULL, bytes INTEGER NOT NULL,
    seconds REAL NOT NULL, committed_at REAL NOT NULL);
CREATE TABLE IF NOT EXISTS states (
    version INTEGER NOT NULL, name TEXT NOT NULL, checksum TEXT NOT NULL, bytes INTEGER NOT NULL,
    PRIMARY KEY (version, name));
CREATE TABLE IF NOT EXISTS paths (
    path TEXT PRIMARY KEY, version INTEGER NOT NULL, bytes INTEGER NOT NULL, state TEXT NOT NULL,
    target TEXT NOT NULL DEFAULT '');
CREATE TABLE IF NOT EXISTS contributions (
    version INTEGER NOT NULL, site TEXT NOT NULL, weight INTEGER NOT NULL, metrics TEXT NOT NULL,
    PRIMARY KEY (version, site));
CREATE TABLE IF NOT EXISTS verdicts (version INTEGER PRIMARY KEY, text TEXT NOT NULL);
CREATE TABLE IF NOT EXISTS figures (version INTEGER PRIMARY KEY, text TEXT NOT NULL);
CREATE TABLE IF NOT EXISTS scores (
    version INTEGER NOT NULL, site TEXT NOT NULL, examples INTEGER NOT NULL, metrics TEXT NOT NULL,
    PRIMARY KEY (version, site));
CREATE TABLE IF NOT EXISTS late_scores (
    version INTEGER NOT NULL, site TEXT NOT NULL, after INTEGER NOT NULL, PRIMARY KEY (version, site));
CREATE TABLE IF NOT EXISTS answers (
    version INTEGER NOT NULL, site TEXT NOT NULL, examples INTEGER NOT NULL, outputs TEXT NOT NULL,
    PRIMARY KEY (version, site));
CREATE TABLE IF NOT EXISTS members (site TEXT PRIMARY KEY);
CREATE TABLE IF NOT EXISTS chosen (round INTEGER NOT NULL, site TEXT NOT NULL, PRIMARY KEY (round, site));
CREATE TABLE IF NOT EXISTS declared (site TEXT PRIMARY KEY, digest TEXT NOT NULL);
CREATE TABLE IF NOT EXISTS declarations (digest TEXT PRIMARY KEY, text TEXT NOT NULL);
CREATE TABLE IF NOT EXISTS files (name TEXT PRIMARY KEY, text TEXT NOT NULL);
CREATE TABLE IF NOT EXISTS series (
    id INTEGER PRIMARY KEY, site TEXT NOT NULL, name TEXT NOT NULL, UNIQUE (site, name));
CREATE TABLE IF NOT EXISTS points (
    series INTEGER NOT NULL, seq INTEGER NOT NULL, round INTEGER NOT NULL, step INTEGER, time REAL NOT NULL,
    value REAL, PRIMARY KEY (series, seq)) WITHOUT ROWID;
CREATE VIEW IF NOT EXISTS metrics AS
    SELECT site, name, seq, round, step, time, value FROM points JOIN series ON series = id;
"""
_NAMES: Final = re.compile(r"IF NOT EXISTS (\w+)")
_BUSY_SECONDS: Final = 5.0
_SAY_SECONDS: Final = 60.0

logger = logging.getLogger("fedcore.server")


class JournalLockedError(StorageError):
    """Another process has a journal locked, and it is not waited for."""


@contextlib.contextmanager
def storing(path: Path) -> Iterator[None]:
    """Turn an error of the disk or of the journal into StorageError, with the path."""
    try:
        yield
    except FedcoreError:
        raise
    except sqlite3.Error as error:
        raise StorageError(f"cannot write {path}: {error}") from None
    except OSError as error:
        raise StorageError(f"cannot write {path}: {error.strerror or error}") from None


class Journal:
    """The tables of one run. One thread at a time uses it, though not always the one that opened it.

    Args:
        path: the file; a new one is made where there is none, or an empty one.
        wait: wait for as long as another process has it locked; else it is refused, or opened and reserved.
        busy_seconds: how long SQLite waits for another process's transaction before a line says so.

    Attributes:
        outlets: what leaves through them may follow from the rows of a `group`; they are held until these are on
            the device.

    Raises:
        ConfigError: the file is of a version of fedcore that this one can't read.
        IntegrityError: the file does not hold the run's id.
        JournalLockedError: another process has it locked, without ``wait``.
        StorageError: the file can't be read or written.
    """

    def __init__(
        self, path: Path, *, wait: bool = True, busy_seconds: float = _BUSY_SECONDS
    ) -> None:
        self.path = path
        self._busy_seconds = busy_seconds
        self.outlets: Sequence[Outlet[Any]] = ()
        self._run_id: str | None = None
        self._grouping = False
        self._waits = False  # rows that are not on the device
        self._locked_since: float | None = None  # another process has it locked
        self._next_line = 0.0
        self._lost = ""  # why rows that others were decided by will never be on the device
        self.new = not holds_something(path)
        try:
            self.db = self._connect()
        except sqlite3.DatabaseError as error:
            raise self._unusable(error) from None
        try:
            if not wait:
                self._reserve_at_once()
            self._open()
        except sqlite3.DatabaseError as error:
            self.db.close()
            raise self._unusable(error) from None
        except BaseException:
            self.db.close()
            raise

    def _unusable(self, error: sqlite3.DatabaseError) -> StorageError:
        text = f"cannot use {self.path}: {error}"
        if isinstance(error, sqlite3.OperationalError):
            return StorageError(text)
        return StorageError(
            f"{text}; put a whole one back from a backup (the models are still there), or give this run another "
            "name (run.name)"
        )

    def _reserve_at_once(self) -> None:
        if not self._lock_out():
            raise JournalLockedError(f"another process has {self.path} locked")

    def _connect(self) -> sqlite3.Connection:
        return sqlite3.connect(
            self.path, timeout=self._busy_seconds, isolation_level=None, check_same_thread=False
        )

    def _open(self) -> None:
        found = self._schema()
        if found is not None and found not in _READABLE:
            written = self._read_meta("fedcore") or "another version"
            raise ConfigError(
                f"run folder {self.path.parent} has format {found}, written by fedcore {written}; this is fedcore "
                f"{__version__}, which reads formats {' and '.join(_READABLE)}: go on under fedcore {written}, or "
                "give this run another name (run.name)"
            )
        # Leaving the write-ahead log of an older fedcore copies what it holds into the file.
        mode = self._patiently(lambda: self.db.execute("PRAGMA journal_mode=TRUNCATE").fetchone())
        if mode[0] != "truncate":
            raise StorageError(
                f"cannot use {self.path}: SQLite keeps it in mode {mode[0]}; end the other programs that have it "
                "open"
            )
        self.db.execute("PRAGMA synchronous=FULL")
        if not self.new:
            complaint = self.db.execute("PRAGMA quick_check(1)").fetchone()[0]
            if complaint != "ok":
                raise sqlite3.DatabaseError(complaint)
        if found is not None and self._read_meta("run_id") is None:
            raise IntegrityError(
                f"{self.path} does not say which run it is (its table meta has no row run_id): put a whole one "
                "back from a backup (the models are still there), or give this run another name (run.name)"
            )
        self._inode = _inode(self.path)
        self.found_schema = found
        if found != str(SCHEMA) or self._lacks_tables():
            with self.transaction():
                for statement in _TABLES.split(";"):
                    self.db.execute(statement)
                if found is None:
                    self.set_meta("run_id", uuid.uuid4().hex)
                    self.set_meta("schema", str(SCHEMA))

    def _lacks_tables(self) -> bool:
        """Whether a fedcore that had fewer tables wrote this file."""
        names = {row[0] for row in self.db.execute("SELECT name FROM sqlite_master")}
        return not names.issuperset(_NAMES.findall(_TABLES))

    def _schema(self) -> str | None:
        has_meta = "SELECT 1 FROM sqlite_master WHERE type = 'table' AND name = 'meta'"
        row = self._patiently(lambda: self.db.execute(has_meta).fetchone())
        return None if row is None else self._read_meta("schema")

    def _read_meta(self, key: str) -> str | None:
        row = self.db.execute("SELECT value FROM meta WHERE key = ?", (key,)).fetchone()
        return None if row is None else str(row[0])

    # --- transactions ---

    @contextlib.contextmanager
    def transaction(self) -> Iterator[None]:
        """Run statements that count entirely or not at all; they are on the device afterwards.

        It waits as long as another process has the journal locked, and says so.

        Raises:
            StorageError: the journal can't be written, or it was replaced by another file.
        """
        self.settle()
        with storing(self.path):
            self._check_place()
            self._patiently(lambda: self.db.execute("BEGIN IMMEDIATE"))
            try:
                yield
                self._patiently(lambda: self.db.execute("COMMIT"))
            except BaseException:
                if self.db.in_transaction:  # SQLite itself rolls back where the disk is full
                    self.db.execute("ROLLBACK")
                raise

    @contextlib.contextmanager
    def group(self) -> Iterator[None]:
        """Have what `grouped` writes in here reach the device together, at the end or with the next `transaction`.

        Synchronising costs far more than a row. The outlets are held for as long as a row waits: what follows from
        it leaves after it is on the device, or never.

        Raises:
            StorageError: the rows can't be written; none of them counts.
        """
        self._grouping = True
        try:
            yield
        finally:
            self._grouping = False
            self.settle()

    @contextlib.contextmanager
    def grouped(self) -> Iterator[None]:
        """Run statements that count entirely or not at all; within a `group` they may not be on the device yet.

        Raises:
            StorageError: as in `transaction`.
        """
        if not self._grouping:
            with self.transaction():
                yield
            return
        with storing(self.path):
            self._begin_waiting()
            self.db.execute("SAVEPOINT one")
            try:
                yield
                self.db.execute("RELEASE one")
            except BaseException as error:
                if self.db.in_transaction:
                    self.db.execute("ROLLBACK TO one")
                    self.db.execute("RELEASE one")
                else:  # SQLite itself rolls back where the disk is full, and with it the rows before
                    self._lose_what_waits(error)
                raise

    def _begin_waiting(self) -> None:
        self._check_lost()
        if not self.db.in_transaction:
            self._check_place()
            self._patiently(lambda: self.db.execute("BEGIN IMMEDIATE"))
        if not self._waits:
            self._waits = True
            for outlet in self.outlets:
                outlet.hold()

    def settle(self) -> None:
        """Have all rows on the device that wait in a group.

        Raises:
            StorageError: they can't be written: none of them counts, nothing that followed from them leaves, and
                nothing more is written.
        """
        self._check_lost()
        if not self._waits:
            return
        with storing(self.path):
            try:
                if (
                    self.db.in_transaction
                ):  # not where an interrupt came between the commit and here
                    self._patiently(lambda: self.db.execute("COMMIT"))
            except Exception as error:
                if self.db.in_transaction:
                    self.db.execute("ROLLBACK")
                self._lose_what_waits(error)
                raise
        self._waits = False
        with contextlib.ExitStack() as ended:  # each one, also where what leaves by another fails
            for outlet in reversed(self.outlets):
                ended.callback(outlet.release)

    def _lose_what_waits(self, error: BaseException) -> None:
        self._waits, self._lost = False, str(error) or type(error).__name__
        for outlet in self.outlets:
            outlet.discard()

    def _check_lost(self) -> None:
        """Write nothing after rows were lost that others may have been decided by."""
        if self._lost:
            raise StorageError(
                f"cannot write {self.path}: {self._lost}; rows of it are lost: start the server again"
            )

    def try_transaction(self, act: Callable[[], None]) -> bool:
        """Call ``act`` in a transaction if no other process has the journal locked; returns whether it did.

        Raises:
            StorageError: as in `transaction`.
        """
        self.settle()
        with storing(self.path):
            self._check_place()
            self.db.execute("PRAGMA busy_timeout = 0")
            try:
                self.db.execute("BEGIN EXCLUSIVE")
            except sqlite3.OperationalError as error:
                if is_locked(error):
                    return False
                raise
            finally:
                self.db.execute(f"PRAGMA busy_timeout = {round(self._busy_seconds * 1000)}")
            try:
                act()
                self.db.execute("COMMIT")
            except BaseException:
                if self.db.in_transaction:
                    self.db.execute("ROLLBACK")
                raise
            return True

    def reserve(self) -> bool:
        """Let no other process lock the journal until `release`; False if one has it locked already.

        Between the two nothing that reads or writes it waits for another process.

        Raises:
            StorageError: it can't be read.
        """
        with storing(self.path):
            reserved = self._lock_out()
        if not reserved:
            self._note_locked()
            return False
        self._note_free()
        return True

    def _lock_out(self) -> bool:
        """Lock other processes out, and keep the lock; False if one of them has the journal locked."""
        self.db.execute("PRAGMA busy_timeout = 0")
        try:
            self.db.execute("PRAGMA locking_mode = EXCLUSIVE")
            self.db.execute("BEGIN EXCLUSIVE")
            self.db.execute("ROLLBACK")
        except sqlite3.OperationalError as error:
            if not is_locked(error):
                raise
            self.release()  # at once: no wait for the lock
            return False
        finally:
            self.db.execute(f"PRAGMA busy_timeout = {round(self._busy_seconds * 1000)}")
        return True

    def release(self) -> None:
        """Let other processes lock the journal again."""
        with storing(self.path):
            self.db.execute("PRAGMA locking_mode = NORMAL")
            try:
                self.db.execute(
                    "SELECT 1 FROM meta LIMIT 1"
                ).fetchone()  # the lock goes with a read
            except sqlite3.OperationalError as error:
                if not is_locked(error):
                    raise

    def rows(self, query: str, *values: object) -> list[tuple[Any, ...]]:
        """Return what a SELECT finds."""
        with storing(self.path):
            return list(self._patiently(lambda: self.db.execute(query, values).fetchall()))

    def _patiently(self, act: Callable[[], Any]) -> Any:
        """Call ``act`` until no other process has the journal locked."""
        while True:
            try:
                done = act()
            except sqlite3.OperationalError as error:
                if not is_locked(error):
                    raise
            else:
                self._note_free()
                return done
            self._note_locked()

    def _note_locked(self) -> None:
        now = time.monotonic()
        if self._locked_since is None:
            self._locked_since = self._next_line = now
        if now >= self._next_line:
            self._next_line = now + _SAY_SECONDS
            logger.warning(
                "another process has %s locked: waiting for it (%.0f s so far)",
                self.path,
                now - self._locked_since,
            )

    def _note_free(self) -> None:
        if self._locked_since is not None:
            self._locked_since = None
            logger.info("%s is free again", self.path)

    def _check_place(self) -> None:
        """Refuse to write into a file that nobody would find again."""
        if not hasattr(self, "_inode"):
            return
        now = _inode(self.path)
        if now == self._inode:
            return
        if now is None:
            self._put_back()
            return
        raise IntegrityError(
            f"{self.path} was replaced while this server works on it; nothing more is written there: put the "
            "right one in its place, and start the server again"
        )

    def _put_back(self) -> None:
        """Write the journal again after somebody has removed its file: all of it is still readable."""
        partial = self.path.with_name(f".{self.path.name}.partial")
        partial.unlink(missing_ok=True)
        self.db.execute("VACUUM INTO ?", (str(partial),))
        with partial.open("rb") as file:
            os.fsync(file.fileno())
        self.db.close()
        partial.rename(self.path)
        sync_folder(self.path.parent)
        self.db = self._connect()
        self.db.execute("PRAGMA journal_mode=TRUNCATE")
        self.db.execute("PRAGMA synchronous=FULL")
        self._inode = _inode(self.path)
        logger.warning(
            "%s was removed while the server works on it; it is written again", self.path
        )

    # --- meta ---

    def meta(self, key: str) -> str | None:
        """Return a value of the run; None if it was never set."""
        return self._read_meta(key)

    def set_meta(self, key: str, value: str) -> None:
        """Set a value of the run, within a transaction."""
        self.db.execute("INSERT OR REPLACE INTO meta VALUES (?, ?)", (key, value))

    @property
    def run_id(self) -> str:
        """Random id of the run, the same after a restart."""
        if self._run_id is None:  # it is asked for with each message
            self._run_id = self.meta("run_id")
        if self._run_id is None:  # it was there when the file was opened
            raise IntegrityError(
                f"{self.path} has lost the id of its run: put it back from a backup"
            )
        return self._run_id

    @property
    def run_ids(self) -> set[str]:
        """The run's id and those that it had before it went back to an older version."""
        return {self.run_id, *json.loads(self.meta("earlier_run_ids") or "[]")}

    def renew_run_id(self) -> None:
        """Give the run another id, within a transaction: what sites kept of later versions counts no longer."""
        self.set_meta("earlier_run_ids", json.dumps(sorted(self.run_ids)))
        self.set_meta("run_id", uuid.uuid4().hex)
        self._run_id = None

    def close(self) -> None:
        """Close the file."""
        self.db.close()


def is_locked(error: sqlite3.Error) -> bool:
    """Return whether SQLite refused because another process has the journal locked."""
    return getattr(error, "sqlite_errorcode", 0) & 0xFF in (
        sqlite3.SQLITE_BUSY,
        sqlite3.SQLITE_LOCKED,
    )


def holds_something(path: Path) -> bool:
    """Return whether a journal is there that isn't empty."""
    try:
        return path.stat().st_size > 0
    except FileNotFoundError:
        return False
    except OSError as error:
        raise StorageError(f"cannot read {path}: {error.strerror}") from None


def _inode(path: Path) -> tuple[int, int] | None:
    try:
        found = path.stat()
    except FileNotFoundError:
        return None
    return found.st_dev, found.st_ino
