"""What is read from a run folder on which no server works any more."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

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
