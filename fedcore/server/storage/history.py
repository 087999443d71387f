"""What a journal has of a run: its versions, their scores, and what all of it took."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from fedcore import protocol
from fedcore.adapters.report import Measured
from fedcore.server.rounds.selection import SiteScore
from fedcore.server.rounds.verdicts import Verdict

from .verdicts import read_verdicts

__all__ = [
    "Life",
    "StateRow",
    "VersionRow",
    "read_life",
    "read_scores",
    "read_states",
    "read_versions",
    "score_text",
    "version_status",
]


@dataclass(frozen=True)
class VersionRow:
    """One committed version and the sites in it, with their weights.

    Attributes:
        checksum: CRC-32C over its chunks' checksums, in hex; a file that differs is not used.
        sha256: of its flat bytes, in hex; empty until it has been computed.
        verdict: what a rule of several passes has decided of the round's updates.
        factors: how far the mean of adapters' factors lay from that of their products, where that was measured.
    """

    version: int
    checksum: str
    sha256: str
    nbytes: int
    seconds: float
    participants: Mapping[str, float]
    verdict: Verdict | None = None
    factors: Measured | None = None


@dataclass(frozen=True)
class StateRow:
    """A state of a committed version.

    Attributes:
        checksum: as that of a model's file.
        nbytes: of its tensors.
    """

    checksum: str
    nbytes: int


@dataclass(frozen=True)
class Life:
    """What a run has taken over all servers that worked on it.

    Attributes:
        started: when the first of them began, in UTC as ISO 8601 has it; shown, never compared.
        seconds: for how long servers worked on it.
        bytes_in, bytes_out: what they received and sent.
    """

    started: str = ""
    seconds: float = 0.0
    bytes_in: int = 0
    bytes_out: int = 0


def read_versions(rows: Callable[[str], list[tuple[Any, ...]]]) -> list[VersionRow]:
    """Return the committed versions of a journal, in order; ``rows`` runs a query on it."""
    sites: dict[int, dict[str, float]] = {}
    query = "SELECT version, site, weight FROM contributions ORDER BY site"
    for version, site, weight in rows(query):
        whole = int(weight)
        sites.setdefault(version, {})[site] = whole if whole == weight else weight
    verdicts, figures = read_verdicts(rows), _read_figures(rows)
    query = "SELECT version, checksum, sha256, bytes, seconds FROM versions ORDER BY version"
    return [
        VersionRow(
            version,
            checksum,
            sha256,
            nbytes,
            seconds,
            sites.get(version, {}),
            verdicts.get(version),
            figures.get(version),
        )
        for version, checksum, sha256, nbytes, seconds in rows(query)
    ]


def _read_figures(rows: Callable[[str], list[tuple[Any, ...]]]) -> dict[int, Measured]:
    """Return a journal's figures of adapters by version. An older fedcore's has none.

    A damaged one is left out.
    """
    found: dict[int, Measured] = {}
    if rows("SELECT 1 FROM sqlite_master WHERE name = 'figures'"):
        for version, text in rows("SELECT version, text FROM figures"):
            with contextlib.suppress(ValueError):  # it decides nothing
                found[version] = Measured.of_text(text)
    return found


def version_status(
    row: VersionRow, metrics: Mapping[str, float], scored: int, worse_at: Sequence[str] = ()
) -> protocol.VersionStatus:
    """Return what a status shows of a version: its ``metrics``, which so many sites have ``scored``, and where it
    is worse than the best version before it."""
    verdict = row.verdict
    return protocol.VersionStatus(
        version=row.version,
        metrics=dict(metrics),
        scored=scored,
        participants=list(row.participants),
        worse_at=list(worse_at),
        seconds=row.seconds,
        bytes=row.nbytes,
        updates=[]
        if verdict is None
        else [
            protocol.UpdateStatus(site=site, weight=weight, score=score)
            for (site, score), weight in zip(
                verdict.scores.items(), verdict.decision.weights, strict=True
            )
        ],
        measure="" if verdict is None else verdict.decision.measure,
        factors=None if row.factors is None else row.factors.status,
    )


def read_states(
    rows: Callable[[str, object], list[tuple[Any, ...]]], version: int
) -> dict[str, StateRow]:
    """Return a version's states by name; ``rows`` runs a query with a value on a journal."""
    query = "SELECT name, checksum, bytes FROM states WHERE version = ? ORDER BY name"
    return {name: StateRow(checksum, nbytes) for name, checksum, nbytes in rows(query, version)}


_SCORES: Final = "SELECT version, site, examples, metrics FROM scores ORDER BY version, site"


def read_scores(
    rows: Callable[[str], list[tuple[Any, ...]]], query: str = _SCORES
) -> dict[int, list[SiteScore]]:
    """Return a journal's scores by version; ``rows`` runs a query on it."""
    found: dict[int, list[SiteScore]] = {}
    for version, site, examples, text in rows(query):
        values = json.loads(text)
        measured = {name: value[1] for name, value in values.items() if isinstance(value, list)}
        metrics = {name: values[name][0] if name in measured else values[name] for name in values}
        found.setdefault(version, []).append(SiteScore(site, int(examples), metrics, measured))
    return found


def score_text(score: SiteScore) -> str:
    """Return a score's metrics for the journal: a number, or number and examples where it has its own."""
    return json.dumps(
        {
            name: [value, score.rows[name]] if name in score.rows else value
            for name, value in score.metrics.items()
        }
    )


def read_life(text: str | None) -> Life:
    """Return what a journal says of the run's life so far; nothing where an older fedcore wrote it."""
    return Life() if text is None else Life(**json.loads(text))
