"""What a run folder tells without a server: how its run stands, and the training metrics that its sites logged."""

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
from fedcore.server.rounds.selection import best_version, weighted_metrics

from .history import Life, read_life, read_scores, read_versions
from .logged import Rows, Series, read_points, read_series

__all__ = ["read_past", "read_training"]

_ENDS: Final[tuple[Literal["stopped", "failed"], ...]] = ("stopped", "failed")


def read_past(folder: Path) -> protocol.StatusReply:
    """Return how the run in a folder stands, on which no server works; nothing in the folder is changed.

    Raises:
        ConfigError: the journal can't be read, or another version of fedcore wrote it.
    """
    with _journal(folder) as rows:
        return _read(folder, rows)


def read_training(folder: Path) -> list[Series]:
    """Return the training metrics that a run folder holds; a server that works on it is not disturbed.

    Raises:
        ConfigError: the journal can't be read, or another version of fedcore wrote it.
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
    uri = path.absolute().as_uri()
    db = sqlite3.connect(f"{uri}?mode=ro", uri=True)
    copy = None
    try:
        try:
            db.execute("SELECT 1 FROM meta").fetchone()
        except (
            sqlite3.Error
        ):  # after a crash, SQLite takes back what was not committed: of a copy here
            db.close()
            try:
                copy = tempfile.TemporaryDirectory(prefix="fedcore-")
                for name in (path.name, f"{path.name}-journal"):
                    with contextlib.suppress(FileNotFoundError):
                        shutil.copyfile(folder / name, Path(copy.name, name))
            except OSError as error:
                raise ConfigError(f"cannot read a copy of {path}: {error}") from None
            db = sqlite3.connect(Path(copy.name, path.name))
            db.execute("SELECT 1 FROM meta").fetchone()
        yield lambda query, *values: db.execute(query, values).fetchall()
    except sqlite3.Error as error:
        raise ConfigError(
            f"cannot read {path}: {error}; another version of fedcore may have written it"
        ) from None
    finally:
        db.close()
        if copy is not None:
            copy.cleanup()


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
    best = None
    if metric and mode:
        expected = people.get("count") or len(people.get("sites") or ())
        quorum = people.get("min_results") or people.get("sample") or expected
        best = best_version(scores, metric, mode, quorum)
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
        sites=[protocol.SiteStatus(site=name, state="absent") for name in names],
        versions=[
            protocol.VersionStatus(
                version=row.version,
                metrics=protocol.first_metrics(
                    weighted_metrics(scores.get(row.version, [])), metric
                ),
                scored=len(scores.get(row.version, [])),
                participants=list(row.participants),
                seconds=row.seconds,
                bytes=row.nbytes,
            )
            for row in versions
        ],
        message=_message(folder, last, stop_asked="stop_asked" in meta),
    )
