"""What a run folder shows without a server: how its run stands, and the training metrics that its sites logged."""

from __future__ import annotations

import contextlib
import json
import shutil
import sqlite3
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Final, Literal

from fedcore import protocol
from fedcore.errors import ConfigError
from fedcore.monitor.ask import read_summary
from fedcore.server.rounds.selection import (
    Pooling,
    pooled_metrics,
    ranked_versions,
    site_scores,
    worse_sites,
)

from .history import Life, read_life, read_scores, read_versions, version_status
from .journal import is_locked
from .logged import Rows, Series, read_points, read_series

__all__ = ["read_past", "read_training"]

BUSY_SECONDS: Final = 5.0
_TRIES: Final = 5
_ENDS: Final[tuple[Literal["stopped", "failed"], ...]] = ("stopped", "failed")


def read_past(folder: Path) -> protocol.StatusReply:
    """Return how the run in a folder stands, on which no server works; nothing in the folder is changed.

    Raises:
        ConfigError: the journal can't be read, another process has it locked, or another version of fedcore wrote
            it.
        IntegrityError: what was decided of a round's updates is damaged in it.
    """
    with _journal(folder) as rows:
        return _read(folder, rows)


def read_training(folder: Path) -> list[Series]:
    """Return the training metrics that a run folder holds; a server that works on it is not disturbed.

    Raises:
        ConfigError: the journal can't be read, another process has it locked, or another version of fedcore wrote
            it.
    """
    with _journal(folder) as rows:
        if not rows("SELECT 1 FROM sqlite_master WHERE name = 'points'"):
            return []  # a fedcore that kept none wrote it
        found = [
            Series(site, name, read_points(rows, id_)) for id_, site, name in read_series(rows)
        ]
    return [series for series in found if series.points]


@contextlib.contextmanager
def _journal(folder: Path) -> Iterator[Rows]:
    """Give what runs queries on the journal of a run folder; nothing in the folder is changed."""
    path = folder / "run.sqlite"
    with contextlib.ExitStack() as open_until:
        try:
            db = open_until.enter_context(contextlib.closing(_opened(path, open_until)))
            yield lambda query, *values: db.execute(query, values).fetchall()
        except sqlite3.Error as error:
            if is_locked(error):
                raise ConfigError(f"another process has {path} locked: try again later") from None
            raise ConfigError(
                f"cannot read {path}: {error}; another version of fedcore may have written it"
            ) from None


def _opened(path: Path, open_until: contextlib.ExitStack) -> sqlite3.Connection:
    """Open a journal for reading: itself, or a copy of it where a crash left something to take back.

    SQLite takes it back by writing to the file, so it does that to the copy. The copy is consistent: it is made
    anew if a file changed meanwhile, and never of a journal that a process has locked.
    """
    for _ in range(_TRIES):
        db = sqlite3.connect(f"{path.absolute().as_uri()}?mode=ro", uri=True, timeout=BUSY_SECONDS)
        try:
            db.execute("SELECT 1 FROM meta").fetchone()
            return db
        except sqlite3.Error as error:
            db.close()
            if is_locked(error):
                raise
        copy = open_until.enter_context(tempfile.TemporaryDirectory(prefix="fedcore-"))
        files = (path, path.with_name(f"{path.name}-journal"))
        try:
            before = [_state(file) for file in files]
            for file in files:
                with contextlib.suppress(FileNotFoundError):
                    shutil.copyfile(file, Path(copy, file.name))
            if [_state(file) for file in files] != before:
                continue
        except OSError as error:
            raise ConfigError(f"cannot read a copy of {path}: {error}") from None
        db = sqlite3.connect(Path(copy, path.name))
        db.execute("SELECT 1 FROM meta").fetchone()
        return db
    raise ConfigError(f"another process changes {path}: try again later")


def _state(file: Path) -> tuple[int, int, int] | None:
    """Return what changes when a file is written or replaced; None if it is not there."""
    try:
        found = file.stat()
    except FileNotFoundError:
        return None
    return found.st_ino, found.st_size, found.st_mtime_ns


def _phase(folder: Path, last: int | None, life: Life) -> Literal["waiting", "stopped", "failed"]:
    """Return how the last server ended the run, or ``"waiting"`` if that was not the last that happened to it."""
    try:
        summary = json.loads((folder / "summary.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return "waiting"
    if (summary.get("version"), summary.get("seconds")) != (last, life.seconds):
        return "waiting"
    for ended in _ENDS:
        if summary.get("outcome") == ended:
            return ended
    return "waiting"


def _message(folder: Path, last: int | None, *, stop_asked: bool) -> str:
    if stop_asked:
        return f"no server works on {folder}; an operator has stopped the run: start fedcore-server to end it"
    after = " after the last committed round" if last else ""
    return f"no server works on {folder}; start fedcore-server with its run file to go on{after}"


def _read(folder: Path, rows: Rows) -> protocol.StatusReply:
    meta: dict[str, str] = dict(rows("SELECT key, value FROM meta"))
    versions, scores = read_versions(rows), read_scores(rows)
    last = versions[-1].version if versions else None
    if (
        last is not None
        and meta.get("finished") == str(last)
        and (folder / "summary.json").is_file()
    ):
        return read_summary(folder)
    settings = json.loads(meta.get("settings", "{}"))
    run, selection = settings.get("run", {}), settings.get("selection", {})
    people, life = settings.get("participants", {}), read_life(meta.get("life"))
    metric, mode = selection.get("metric"), selection.get("mode")
    pooling = Pooling.of_settings(selection.get("average"), selection.get("max_share"))
    best, worse = None, {}
    if metric and mode:
        expected = people.get("count") or len(people.get("sites") or ())
        quorum = people.get("min_results") or people.get("sample") or expected
        ranked = ranked_versions(scores, metric, mode, quorum, pooling)
        best = ranked[0][0] if ranked else None
        worse = worse_sites(scores, dict(ranked), metric, mode)
    score, of_best = site_scores(scores, metric, best)
    names = people.get("sites") or [
        row[0] for row in rows("SELECT site FROM members ORDER BY site")
    ]
    return protocol.StatusReply(
        run=run.get("name", folder.name),
        phase=_phase(folder, last, life),
        round=min((last or 0) + 1, run.get("rounds") or 1) if last is not None else 0,
        rounds=run.get("rounds") or 0,
        metric=metric,
        mode=mode,
        best_version=best,
        model_bytes=versions[-1].nbytes if versions else 0,
        bytes_in=life.bytes_in,
        bytes_out=life.bytes_out,
        elapsed=life.seconds,
        sites=[
            protocol.SiteStatus(
                site=name, state="absent", score=score.get(name), best_score=of_best.get(name)
            )
            for name in names
        ],
        versions=[
            version_status(
                row,
                protocol.first_metrics(
                    pooled_metrics(scores.get(row.version, []), pooling), metric
                ),
                len(scores.get(row.version, [])),
                worse.get(row.version, []),
            )
            for row in versions
        ],
        message=_message(folder, last, stop_asked="stop_asked" in meta),
    )
