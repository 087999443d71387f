"""What a run's journal keeps of its sites: who is there, what they declared, what they said of its versions."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Mapping
from typing import Any, Final

from fedcore.server.rounds.selection import SiteScore

from .history import read_scores, score_text
from .journal import Journal

__all__ = ["SiteRows", "number_of"]

_SCORES_BEFORE: Final = (
    "SELECT version, site, examples, metrics FROM scores LEFT JOIN late_scores USING (version, site) "
    "WHERE version < ?1 AND (after IS NULL OR after < ?1) ORDER BY version, site"
)


def number_of(weight: float) -> float:
    """Return what SQLite keeps of a weight: its integers end at 2^63 - 1; 24 bits are exact as a float, too."""
    return weight if weight < 1 << 63 else float(weight)


class SiteRows:
    """A part of `Store`; it works on the journal alone."""

    journal: Journal

    def add_score(self, version: int, score: SiteScore) -> bool:
        """Keep a site's metrics of a version; returns whether they are the first ones, which count."""
        with self.journal.grouped():
            added = self.journal.db.execute(
                "INSERT OR IGNORE INTO scores VALUES (?, ?, ?, ?)",
                (version, score.site, number_of(score.examples), score_text(score)),
            )
            if added.rowcount > 0:
                self.journal.db.execute(
                    "INSERT OR REPLACE INTO late_scores SELECT ?1, ?2, last FROM "
                    "(SELECT MAX(version) AS last FROM versions) WHERE last > ?1",
                    (version, score.site),
                )
        return added.rowcount > 0

    def scores(self) -> dict[int, list[SiteScore]]:
        """Return all scores by version."""
        return read_scores(self.journal.rows)

    def scores_before(self, version: int) -> dict[int, list[SiteScore]]:
        """Return the scores of the versions before one that came before it was committed.

        What was decided at its commit follows from them, also after a later score of an older version.
        """
        return read_scores(lambda query: self.journal.rows(query, version), _SCORES_BEFORE)

    def _drop_scores_after(self, version: int) -> None:
        """Remove what was said of the versions after one, which is the last one again."""
        for table in ("scores", "late_scores", "answers"):
            self.journal.db.execute(f"DELETE FROM {table} WHERE version > ?", (version,))
        self.journal.db.execute("UPDATE late_scores SET after = MIN(after, ?)", (version,))

    def add_answer(
        self, version: int, site: str, examples: int, outputs: Mapping[str, Any]
    ) -> bool:
        """Keep a site's outputs of a version, and that it has answered; returns whether they are the first ones,
        which count."""
        with self.journal.grouped():
            added = self.journal.db.execute(
                "INSERT OR IGNORE INTO answers VALUES (?, ?, ?, ?)",
                (version, site, number_of(examples), json.dumps(dict(outputs))),
            )
            self.journal.db.execute(
                "INSERT OR IGNORE INTO scores VALUES (?, ?, ?, '{}')",
                (version, site, number_of(examples)),
            )
        return added.rowcount > 0

    def answers(self) -> dict[int, dict[str, dict[str, Any]]]:
        """Return all outputs by version and site."""
        found: dict[int, dict[str, dict[str, Any]]] = {}
        for version, site, outputs in self.journal.rows(
            "SELECT version, site, outputs FROM answers ORDER BY version, site"
        ):
            found.setdefault(version, {})[site] = json.loads(outputs)
        return found

    def add_member(self, site: str) -> None:
        """Note that a site has joined, for a server that is started again after a crash."""
        with self.journal.grouped():
            self.journal.db.execute("INSERT OR IGNORE INTO members VALUES (?)", (site,))

    def members(self) -> list[str]:
        """Return the sites that had joined when the last server vanished; none that it told of the run's end."""
        return [row[0] for row in self.journal.rows("SELECT site FROM members ORDER BY site")]

    def keep_initial_site(self, site: str) -> None:
        """Note whose model is version 0."""
        with self.journal.transaction():
            self.journal.set_meta("initial_site", site)

    def initial_site(self) -> str | None:
        """Return whose model is version 0; None if it is the run file's, or not known."""
        return self.journal.meta("initial_site")

    def declared(self) -> dict[str, str]:
        """Return what each site declared last, of the sites that are in a model or are expected back.

        Others keep nobody out: they may have been there by mistake.
        """
        rows = self.journal.rows(
            "SELECT site, text FROM declared JOIN declarations USING (digest) WHERE site IN "
            "(SELECT site FROM contributions UNION SELECT site FROM members) ORDER BY site"
        )
        return {str(site): str(text) for site, text in rows}

    def keep_declared(self, site: str, text: str | None) -> None:
        """Keep what a site declared, instead of what it declared before; None: keep nothing of it."""
        with self.journal.grouped():
            before = self.journal.db.execute(
                "SELECT digest FROM declared WHERE site = ?", (site,)
            ).fetchone()
            self.journal.db.execute("DELETE FROM declared WHERE site = ?", (site,))
            if text is not None:
                digest = hashlib.sha256(text.encode()).hexdigest()
                self.journal.db.execute(
                    "INSERT OR IGNORE INTO declarations VALUES (?, ?)", (digest, text)
                )
                self.journal.db.execute("INSERT INTO declared VALUES (?, ?)", (site, digest))
            if before is not None:
                self.journal.db.execute(
                    "DELETE FROM declarations WHERE digest = ?1 AND "
                    "NOT EXISTS (SELECT 1 FROM declared WHERE digest = ?1)",
                    before,
                )

    def choose(self, round_: int, sites: Collection[str]) -> None:
        """Note who trains in a round where not all do, all of them; what was noted of other rounds goes."""
        with self.journal.grouped():
            self.journal.db.execute("DELETE FROM chosen")
            self.journal.db.executemany(
                "INSERT INTO chosen VALUES (?, ?)", [(round_, site) for site in sites]
            )

    def chosen(self, round_: int) -> list[str]:
        """Return the sites that were chosen for a round by the server before this one."""
        query = "SELECT site FROM chosen WHERE round = ? ORDER BY site"
        rows = self.journal.rows(query, round_)
        return [row[0] for row in rows]

    def forget_members(self, sites: Collection[str]) -> None:
        """Note that these sites know that the run has ended, so that nobody expects them back."""
        with self.journal.transaction():
            self.journal.db.executemany(
                "DELETE FROM members WHERE site = ?", [(site,) for site in sites]
            )
