"""What is read from a run folder on which no server works any more."""

from __future__ import annotations

import shutil
import sqlite3
import subprocess
import sys
from contextlib import closing
from pathlib import Path

import pytest

from fedcore.errors import ConfigError
from fedcore.server.storage import past
from fedcore.server.storage.past import read_past

from ..support.run_folders import run_of

DIES = """
import os, signal, sqlite3, sys
db = sqlite3.connect(sys.argv[1])
db.execute("PRAGMA cache_size = 1")
db.execute("BEGIN")
db.execute("DELETE FROM versions")
db.execute("CREATE TABLE filler (text)")
for _ in range(200):
    db.execute("INSERT INTO filler VALUES (?)", ("z" * 4000,))
os.kill(os.getpid(), signal.SIGKILL)
"""


def test_what_a_killed_server_had_not_committed_is_not_shown(tmp_path: Path) -> None:
    folder = run_of(tmp_path / "run", 3.0, 2.0)
    before = read_past(folder)
    assert before.versions
    subprocess.run([sys.executable, "-c", DIES, str(folder / "run.sqlite")], check=False)
    assert (folder / "run.sqlite-journal").stat().st_size, "the journal is hot"
    files = {path: path.read_bytes() for path in folder.glob("run.sqlite*")}
    assert read_past(folder) == before
    assert {path: path.read_bytes() for path in folder.glob("run.sqlite*")} == files


def test_a_journal_that_another_process_has_locked_is_not_copied(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of two files that change meanwhile, a copy could hold half a transaction."""
    folder = run_of(tmp_path / "run", 3.0, 2.0)
    monkeypatch.setattr(past, "BUSY_SECONDS", 0.05)
    with closing(sqlite3.connect(folder / "run.sqlite", isolation_level=None)) as other:
        other.execute("BEGIN EXCLUSIVE")
        with pytest.raises(ConfigError, match=r"another process has .*run\.sqlite locked"):
            read_past(folder)
    assert read_past(folder).versions


def test_a_copy_of_a_journal_that_changed_meanwhile_is_made_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = run_of(tmp_path / "run", 3.0, 2.0)
    before = read_past(folder)
    subprocess.run([sys.executable, "-c", DIES, str(folder / "run.sqlite")], check=False)
    copy, copied = shutil.copyfile, []

    def between(source: Path, target: Path) -> None:
        copy(source, target)
        copied.append(source)
        if len(copied) == 1:  # a server starts: it takes back what was not committed
            with closing(sqlite3.connect(folder / "run.sqlite")) as server:
                server.execute("SELECT 1 FROM meta").fetchone()

    monkeypatch.setattr(past.shutil, "copyfile", between)
    assert read_past(folder) == before
    assert copied == [folder / "run.sqlite"]
