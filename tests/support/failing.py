"""A journal whose rows do not reach the disk."""

from __future__ import annotations

import sqlite3
from typing import Any


class Failing:
    """A connection of SQLite that cannot commit."""

    def __init__(self, db: sqlite3.Connection) -> None:
        self._db = db

    def __getattr__(self, name: str) -> Any:
        return getattr(self._db, name)

    def execute(self, statement: str, *values: Any) -> Any:
        if statement == "COMMIT":
            raise sqlite3.DatabaseError("disk I/O error")
        return self._db.execute(statement, *values)
