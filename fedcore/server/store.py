"""A run's folder: model files, the SQLite journal, and the ``best/`` and ``final/`` folders.

A version exists once its row is there. The order of a commit is: the file is synchronised under a scratch name,
renamed, its folder synchronised, and then one transaction writes the row. A file without a row is what a crash
left in between and is removed when the run folder is opened again.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import re
import shutil
import sqlite3
import time
import uuid
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from fedcore.errors import BusyError, ConfigError, FedcoreError, StorageError
from fedcore.layout import sync_folder
from fedcore.protocol import strict_json

from .selection import SiteScore

__all__ = ["Store", "VersionRow"]

_SCHEMA: Final = 2
_TABLES: Final = """
CREATE TABLE IF NOT EXISTS meta (key TEXT PRIMARY KEY, value TEXT NOT NULL);
CREATE TABLE IF NOT EXISTS versions (
    version INTEGER PRIMARY KEY, checksum TEXT NOT NULL, sha256 TEXT NOT NULL, bytes INTEGER NOT NULL,
    seconds REAL NOT NULL, committed_at REAL NOT NULL);
CREATE TABLE IF NOT EXISTS contributions (
    version INTEGER NOT NULL, site TEXT NOT NULL, weight INTEGER NOT NULL, metrics TEXT NOT NULL,
    PRIMARY KEY (version, site));
CREATE TABLE IF NOT EXISTS scores (
    version INTEGER NOT NULL, site TEXT NOT NULL, examples INTEGER NOT NULL, metrics TEXT NOT NULL,
    PRIMARY KEY (version, site));
CREATE TABLE IF NOT EXISTS answers (
    version INTEGER NOT NULL, site TEXT NOT NULL, examples INTEGER NOT NULL, outputs TEXT NOT NULL,
    PRIMARY KEY (version, site));
CREATE TABLE IF NOT EXISTS members (site TEXT PRIMARY KEY);
CREATE TABLE IF NOT EXISTS chosen (round INTEGER NOT NULL, site TEXT NOT NULL, PRIMARY KEY (round, site));
CREATE TABLE IF NOT EXISTS files (name TEXT PRIMARY KEY, text TEXT NOT NULL);
"""
# Keys of a run file that make it another run when they change, once a model is committed.
_FIXED: Final = (
    "run.task", "model.initial", "participants.sites", "participants.count", "aggregation.rule",
    "selection.metric", "selection.mode", "transfer.update", "transfer.top_k", "transfer.lossless",
)  # fmt: skip
_MODEL_NAME: Final = re.compile(r"round-\d{4,}\.safetensors|\.round-\d{4,}\.(partial|progress)")


@dataclass(frozen=True)
class VersionRow:
    """One committed version and the sites in it, with their weights.

    Attributes:
        checksum: CRC-32C over its chunks' checksums, in hex; a file that differs is not used.
        sha256: of its flat bytes, in hex; empty until it has been computed.
    """

    version: int
    checksum: str
    sha256: str
    nbytes: int
    seconds: float
    participants: Mapping[str, int]


def _shown(value: object) -> str:
    return "not given" if value is None else repr(value)


def _write_durably(path: Path, text: str) -> None:
    with path.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


@contextlib.contextmanager
def _storing(path: Path) -> Iterator[None]:
    """Turn what the disk or the journal says into StorageError, with the path."""
    try:
        yield
    except FedcoreError:
        raise
    except sqlite3.Error as error:
        raise StorageError(f"cannot write {path}: {error}") from None
    except OSError as error:
        raise StorageError(f"cannot write {path}: {error.strerror or error}") from None


class Store:
    """The only writer of a run folder; a second server on it is refused.

    Raises:
        BusyError: another process has the folder.
        ConfigError: the folder holds a run with other settings.
        StorageError: the folder can't be written.
    """

    def __init__(self, folder: Path, settings: Mapping[str, Any]) -> None:
        self.folder = folder
        self.models = folder / "models"
        try:
            self.models.mkdir(parents=True, exist_ok=True)
            self._lock = (folder / ".lock").open("a+")
        except OSError as error:
            raise StorageError(f"cannot write run folder {folder}: {error.strerror}") from None
        self._take_lock()
        try:
            # One thread at a time uses it, though not always the one that opened it.
            self._db = sqlite3.connect(
                folder / "run.sqlite", isolation_level=None, check_same_thread=False
            )
            self._db.execute("PRAGMA journal_mode=WAL")
            self._db.execute("PRAGMA synchronous=FULL")
            self._db.executescript(_TABLES)
            self._open(settings)
            with _storing(folder):
                self._clean()
        except sqlite3.OperationalError as error:
            self._lock.close()
            raise StorageError(f"cannot use {folder / 'run.sqlite'}: {error}") from None
        except sqlite3.DatabaseError as error:
            self._lock.close()
            raise StorageError(
                f"cannot use {folder / 'run.sqlite'}: {error}; give this run another name (run.name), or remove "
                "the folder"
            ) from None
        except BaseException:
            self._lock.close()
            raise

    def check_space(self, nbytes: int) -> None:
        """Raise StorageError if the disk can't hold a model of ``nbytes`` bytes."""
        free = shutil.disk_usage(self.folder).free
        if nbytes > free:
            raise StorageError(
                f"a model of {nbytes:,} bytes does not fit on the server's disk, which has {free:,} left"
            )

    def _take_lock(self) -> None:
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            self._lock.seek(0)
            owner = self._lock.read().strip()
            self._lock.close()
            raise BusyError(
                f"run folder {self.folder} is in use by another server (process {owner or 'unknown'}); stop "
                "it, or give this run another name"
            ) from None
        with _storing(self.folder / ".lock"):
            self._lock.seek(0)
            self._lock.truncate()
            self._lock.write(str(os.getpid()))
            self._lock.flush()

    def _open(self, settings: Mapping[str, Any]) -> None:
        text = self._meta("settings")
        if text is None:
            with self._transaction():
                self._set_meta("schema", str(_SCHEMA))
                self._set_meta("run_id", uuid.uuid4().hex)
                self._set_meta("settings", json.dumps(settings, sort_keys=True))
            return
        if self._meta("schema") != str(_SCHEMA):
            raise ConfigError(f"run folder {self.folder} was written by another version of fedcore")
        before = json.loads(text)
        before.get("run", {}).setdefault("task", "train")
        for key in _FIXED if self.last_version is not None else ():
            section, _, name = key.partition(".")
            old, new = before.get(section, {}).get(name), settings.get(section, {}).get(name)
            if old != new:
                raise ConfigError(
                    f"run folder {self.folder} holds a run with another {key}: it was {_shown(old)} and is now "
                    f"{_shown(new)}; give this run another name (run.name), or remove the folder"
                )
        with self._transaction():
            self._set_meta("settings", json.dumps(settings, sort_keys=True))

    def _clean(self) -> None:
        known = {self.path(row.version).name for row in self.versions()}
        known |= self._under_way()
        for path in self.models.iterdir():
            if path.name not in known and _MODEL_NAME.fullmatch(path.name) and path.is_file():
                path.unlink()
        for path in self.folder.glob(".*-new"):
            shutil.rmtree(path)
        for path in self.folder.glob(".*-old"):
            target = self.folder / path.name[1 : -len("-old")]
            if target.exists():
                shutil.rmtree(path)
            else:  # a crash came between the two renames of an export
                path.rename(target)
        for name in ("summary", "results"):
            (self.folder / f".{name}.json.partial").unlink(missing_ok=True)

    def _under_way(self) -> set[str]:
        """Return the names of what a killed server left of the version after the last."""
        last = self.last_version
        version = 0 if last is None else last + 1
        scratch, record = self.scratch(version), self.record(version)
        if not record.is_file():
            return set()
        if not scratch.exists() and self.path(version).is_file():
            self.path(version).rename(scratch)  # its commit came as far as the rename
        return {scratch.name, record.name} if scratch.is_file() else set()

    @contextlib.contextmanager
    def _transaction(self) -> Iterator[None]:
        with _storing(self.folder / "run.sqlite"):
            self._db.execute("BEGIN IMMEDIATE")
            try:
                yield
                self._db.execute("COMMIT")
            except BaseException:
                if self._db.in_transaction:  # SQLite itself rolls back where the disk is full
                    self._db.execute("ROLLBACK")
                raise

    def _meta(self, key: str) -> str | None:
        row = self._db.execute("SELECT value FROM meta WHERE key = ?", (key,)).fetchone()
        return None if row is None else str(row[0])

    def _set_meta(self, key: str, value: str) -> None:
        self._db.execute("INSERT OR REPLACE INTO meta VALUES (?, ?)", (key, value))

    # --- versions ---

    @property
    def run_id(self) -> str:
        """Random id of the run, the same after a restart."""
        value = self._meta("run_id")
        assert value is not None
        return value

    @property
    def last_version(self) -> int | None:
        """The last committed version, or None."""
        row = self._db.execute("SELECT MAX(version) FROM versions").fetchone()
        return None if row[0] is None else int(row[0])

    @property
    def finished(self) -> bool:
        """Whether the run ended as planned, the last version scored."""
        return self._meta("finished") == str(self.last_version)

    def path(self, version: int) -> Path:
        """Where a version's model file lies."""
        return self.models / f"round-{version:04d}.safetensors"

    def scratch(self, version: int) -> Path:
        """Where a version's file is written before its commit."""
        return self.models / f".round-{version:04d}.partial"

    def record(self, version: int) -> Path:
        """Where it is recorded how much of that file is there."""
        return self.models / f".round-{version:04d}.progress"

    def discard(self, version: int) -> None:
        """Remove what a killed server left of a version that was not committed."""
        for path in (self.record(version), self.scratch(version)):
            with _storing(path):
                path.unlink(missing_ok=True)

    def commit(
        self,
        row: VersionRow,
        scratch: Path,
        metrics: Mapping[str, Mapping[str, float]],
        files: Mapping[str, str] | None = None,
    ) -> None:
        """Make a version durable: rename its synchronised scratch file, then write its rows.

        Args:
            row: the version and its participants.
            scratch: its file, written and synchronised.
            metrics: training metrics by site.
            files: JSON files that describe the model, with version 0.
        """
        with _storing(self.path(row.version)):
            scratch.rename(self.path(row.version))
            sync_folder(self.models)
        with self._transaction():
            self._db.execute(
                "INSERT INTO versions VALUES (?, ?, ?, ?, ?, ?)",
                (row.version, row.checksum, row.sha256, row.nbytes, row.seconds, time.time()),
            )
            self._db.executemany(
                "INSERT INTO contributions VALUES (?, ?, ?, ?)",
                [
                    (row.version, site, weight, json.dumps(dict(metrics.get(site, {}))))
                    for site, weight in row.participants.items()
                ],
            )
            for name, text in (files or {}).items():
                self._db.execute("INSERT OR REPLACE INTO files VALUES (?, ?)", (name, text))
        with contextlib.suppress(OSError):  # it says nothing any more
            self.record(row.version).unlink(missing_ok=True)

    def prune(self, keep: Collection[int]) -> list[int]:
        """Remove the files of the versions that are not in ``keep``, hashed ones only; returns which they were.

        Their rows stay.
        """
        removed = []
        for row in self.versions():
            path = self.path(row.version)
            if row.version not in keep and row.sha256 and path.is_file():
                with _storing(path):
                    path.unlink()
                removed.append(row.version)
        return removed

    def versions(self) -> list[VersionRow]:
        """Return every committed version, in order."""
        sites: dict[int, dict[str, int]] = {}
        for version, site, weight in self._db.execute(
            "SELECT version, site, weight FROM contributions ORDER BY site"
        ):
            sites.setdefault(version, {})[site] = weight
        return [
            VersionRow(version, checksum, sha256, nbytes, seconds, sites.get(version, {}))
            for version, checksum, sha256, nbytes, seconds in self._db.execute(
                "SELECT version, checksum, sha256, bytes, seconds FROM versions ORDER BY version"
            )
        ]

    def add_sha256(self, version: int, digest: str) -> None:
        """Keep a version's digest, which is computed after its commit."""
        with self._transaction():
            self._db.execute("UPDATE versions SET sha256 = ? WHERE version = ?", (digest, version))

    def add_score(self, version: int, score: SiteScore) -> None:
        """Keep a site's metrics of a version; the first ones count."""
        with self._transaction():
            self._db.execute(
                "INSERT OR IGNORE INTO scores VALUES (?, ?, ?, ?)",
                (version, score.site, score.examples, json.dumps(dict(score.metrics))),
            )

    def scores(self) -> dict[int, list[SiteScore]]:
        """Return all scores by version."""
        found: dict[int, list[SiteScore]] = {}
        for version, site, examples, metrics in self._db.execute(
            "SELECT version, site, examples, metrics FROM scores ORDER BY version, site"
        ):
            found.setdefault(version, []).append(SiteScore(site, examples, json.loads(metrics)))
        return found

    def add_answer(
        self, version: int, site: str, examples: int, outputs: Mapping[str, Any]
    ) -> None:
        """Keep a site's outputs of a version, and that it has answered; the first ones count."""
        with self._transaction():
            self._db.execute(
                "INSERT OR IGNORE INTO answers VALUES (?, ?, ?, ?)",
                (version, site, examples, json.dumps(dict(outputs))),
            )
            self._db.execute(
                "INSERT OR IGNORE INTO scores VALUES (?, ?, ?, '{}')", (version, site, examples)
            )

    def answers(self) -> dict[int, dict[str, dict[str, Any]]]:
        """Return all outputs by version and site."""
        found: dict[int, dict[str, dict[str, Any]]] = {}
        for version, site, outputs in self._db.execute(
            "SELECT version, site, outputs FROM answers ORDER BY version, site"
        ):
            found.setdefault(version, {})[site] = json.loads(outputs)
        return found

    def add_member(self, site: str) -> None:
        """Note that a site has joined, for a server that is started again after a crash."""
        with self._transaction():
            self._db.execute("INSERT OR IGNORE INTO members VALUES (?)", (site,))

    def members(self) -> list[str]:
        """Return the sites that had joined when the last server vanished; none if it ended the run in order."""
        return [row[0] for row in self._db.execute("SELECT site FROM members ORDER BY site")]

    def choose(self, round_: int, sites: Collection[str]) -> None:
        """Note who trains in a round where not all do, all of them; what was noted of other rounds goes."""
        with self._transaction():
            self._db.execute("DELETE FROM chosen")
            self._db.executemany(
                "INSERT INTO chosen VALUES (?, ?)", [(round_, site) for site in sites]
            )

    def chosen(self, round_: int) -> list[str]:
        """Return the sites that were chosen for a round by the server before this one."""
        rows = self._db.execute("SELECT site FROM chosen WHERE round = ? ORDER BY site", (round_,))
        return [row[0] for row in rows]

    def end(self, *, finished: bool) -> None:
        """Note that the run ends in order, and whether as planned; nobody is expected back.

        Call it once all else that the run leaves behind is written: a finished run is not opened again.
        """
        with self._transaction():
            self._db.execute("DELETE FROM members")
            self._db.execute("DELETE FROM chosen")
            if finished:
                self._set_meta("finished", str(self.last_version))

    # --- folders that loaders open ---

    def files(self) -> dict[str, str]:
        """Return the JSON files that describe the model, by name."""
        return dict(self._db.execute("SELECT name, text FROM files"))

    def export(self, name: str, version: int) -> Path:
        """Write ``best/`` or ``final/``: the version's model under the name that loaders expect, and its files.

        The folder is built beside the old one and takes its place by a rename.
        """
        files = self.files()
        weights = "adapter_model" if "adapter_config.json" in files else "model"
        target, new, old = (
            self.folder / name,
            self.folder / f".{name}-new",
            self.folder / f".{name}-old",
        )
        source = self.path(version)
        if not source.is_file():
            raise StorageError(
                f"cannot write {target}: {source} is missing; put it back, or give this run another name"
            )
        with _storing(target):
            for path in (new, old):
                shutil.rmtree(path, ignore_errors=True)
            new.mkdir()
            model = new / f"{weights}.safetensors"
            try:
                os.link(source, model)
            except OSError:
                shutil.copyfile(source, model)
            about = {"run_id": self.run_id, "version": version}
            for file, text in {**files, "fedcore.json": json.dumps(about) + "\n"}.items():
                _write_durably(new / file, text)
            sync_folder(new)
            if target.exists():
                target.rename(old)
            try:
                new.rename(target)
            except OSError:
                if old.exists():
                    old.rename(target)
                raise
            sync_folder(self.folder)
            shutil.rmtree(old, ignore_errors=True)
        return target

    def write_summary(self, summary: Mapping[str, Any]) -> Path:
        """Write ``summary.json`` atomically."""
        return self._write_json("summary.json", summary)

    def write_results(self, results: Mapping[str, Any]) -> Path:
        """Write ``results.json`` atomically."""
        return self._write_json("results.json", results)

    def _write_json(self, name: str, values: Mapping[str, Any]) -> Path:
        path = self.folder / name
        partial = self.folder / f".{name}.partial"
        with _storing(path):
            _write_durably(partial, strict_json(values, indent=2) + "\n")
            partial.rename(path)
        return path

    def close(self) -> None:
        """Close the journal and let go of the folder."""
        self._db.close()
        self._lock.close()
