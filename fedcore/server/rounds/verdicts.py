"""What a rule of several passes has decided of a round's updates: kept in the journal before it is acted on.

Pure, as all of this folder: it is the same for the same distances. It is made again from them without an update
that is lost before it has come once more.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from fedcore.errors import ConfigError, RuleError
from fedcore.rules import Rule
from fedcore.rules.deciding import Decision, Squares

from .actions import Participant

__all__ = ["Verdict", "decide"]


@dataclass(frozen=True)
class Verdict:
    """What is decided of the updates of a round.

    Attributes:
        rule: name, version and settings of the rule.
        participants: whose updates were surveyed, in canonical order, and their numbers of examples.
        decision: what each of them weighs, and its score.
        squares: of the participants, and of the model that they start from, the last row; empty once the round is
            committed.
        key, digests: of the chunks of each participant: what comes once more has to be what was surveyed. They are
            empty once the round is committed.
    """

    rule: str
    participants: tuple[Participant, ...]
    decision: Decision
    squares: Squares = ()
    key: bytes = field(default=b"", repr=False)
    digests: tuple[bytes, ...] = field(default=(), repr=False)

    @property
    def kept(self) -> tuple[Participant, ...]:
        """Whose updates count, with what they weigh."""
        found = zip(self.participants, self.decision.weights, strict=True)
        return tuple(replace(known, weight=weight) for known, weight in found if weight)

    @property
    def counted(self) -> tuple[Participant, ...]:
        """Whose updates count, with their numbers of examples."""
        found = zip(self.participants, self.decision.weights, strict=True)
        return tuple(known for known, weight in found if weight)

    @property
    def scores(self) -> dict[str, float]:
        """The score of each site."""
        sites = (known.site for known in self.participants)
        return dict(zip(sites, self.decision.scores, strict=True))

    @property
    def left_out(self) -> tuple[str, ...]:
        """The sites whose updates do not count."""
        found = zip(self.participants, self.decision.weights, strict=True)
        return tuple(known.site for known, weight in found if not weight)

    def holds_for(self, participants: Collection[Participant]) -> bool:
        """Whether these updates were surveyed, and those that count are among them."""
        there = set(participants)
        mine = {(known.site, known.set_id) for known in self.kept}
        return self.surveyed(participants) and mine <= {(p.site, p.set_id) for p in there}

    def surveyed(self, participants: Collection[Participant]) -> bool:
        """Whether these updates were surveyed."""
        return bool(self.squares) and set(participants) <= set(self.participants)

    def among(self, rule: Rule, participants: Collection[Participant]) -> Verdict:
        """Return what is decided of some of the updates, in canonical order.

        Raises:
            RuleError: as `decide`.
        """
        rows = [k for k, known in enumerate(self.participants) if known in participants]
        known = tuple(self.participants[k] for k in rows)
        digests = tuple(self.digests[k] for k in rows)
        rows.append(len(self.participants))
        made = decide(rule, known, [[self.squares[i][j] for j in rows] for i in rows])
        return replace(made, key=self.key, digests=digests)

    @property
    def kept_digests(self) -> tuple[bytes, ...]:
        """The digests of those whose updates count."""
        found = zip(self.digests, self.decision.weights, strict=bool(self.digests))
        return tuple(digests for digests, weight in found if weight)

    def why(self, site: str) -> str:
        """Return the score of a site, in words."""
        return f"{self.decision.measure} {self.scores[site]:.6g}"

    @property
    def settled(self) -> Verdict:
        """The same without the distances and digests, which nothing is decided by any more."""
        return replace(self, squares=(), key=b"", digests=())

    @property
    def text(self) -> str:
        """It as text, with all bits of its numbers."""
        of = self.decision
        updates = [
            [known.site, known.set_id, known.weight, weight, score.hex()]
            for known, weight, score in zip(self.participants, of.weights, of.scores, strict=True)
        ]
        upper = [[value.hex() for value in row[i + 1 :]] for i, row in enumerate(self.squares)]
        return json.dumps(
            {
                "rule": self.rule,
                "measure": of.measure,
                "base": of.base,
                "updates": updates,
                "squares": upper,
                "key": base64.b64encode(self.key).decode(),
                "digests": [base64.b64encode(of).decode() for of in self.digests],
            }
        )

    @classmethod
    def of_text(cls, text: str) -> Verdict:
        """Return the verdict of a `text`.

        Raises:
            ValueError: it is none, or not whole.
        """
        try:
            found = cls._of_values(json.loads(text))
        except (
            AttributeError,
            KeyError,
            OverflowError,
            RecursionError,
            TypeError,
            ValueError,
        ) as error:
            what = f"no {error}" if isinstance(error, KeyError) else str(error)
            raise ValueError(f"it is not whole ({what})") from None
        count, rows = len(found.participants), len(found.squares)
        weights = [*found.decision.weights, found.decision.base]
        if not all(type(weight) is int and 0 <= weight < 1 << 63 for weight in weights):
            raise ValueError("it is not whole (a weight is out of range)")
        if rows not in (0, count + 1) or len(found.digests) not in (0, count):
            raise ValueError("it is not whole (numbers of some updates are missing)")
        return found

    @classmethod
    def _of_values(cls, of: dict[str, Any]) -> Verdict:
        updates = of["updates"]
        return cls(
            of["rule"],
            tuple(Participant(site, set_id, examples) for site, set_id, examples, *_ in updates),
            Decision(
                weights=tuple(weight for *_, weight, _ in updates),
                base=of["base"],
                scores=tuple(float.fromhex(score) for *_, score in updates),
                measure=of["measure"],
            ),
            _whole(of["squares"]),
            base64.b64decode(of.get("key", ""), validate=True),
            tuple(base64.b64decode(text, validate=True) for text in of.get("digests", ())),
        )


def decide(
    rule: Rule, participants: Sequence[Participant], squares: Sequence[Sequence[float]]
) -> Verdict:
    """Return what a rule of several passes decides of updates.

    Args:
        rule: the run's.
        participants: whose updates they are, in canonical order, and their numbers of examples.
        squares: their squared distances, and those of the model that they start from, the last row.

    Raises:
        RuleError: none of them counts, they are too few for the rule, or too far apart for it.
    """
    assert rule.several is not None
    weights = rule.weighing.of([known.weight for known in participants])
    try:
        decision = rule.several.decide(squares, weights, rule.settings)
    except ConfigError as error:  # the run's settings are right: it is for these updates
        raise RuleError(str(error)) from None
    if not any(decision.weights):
        raise RuleError(f"the rule {rule.name!r} leaves out the updates of all sites")
    return Verdict(rule.recorded, tuple(participants), decision, tuple(map(tuple, squares)))


def _whole(upper: Sequence[Sequence[str]]) -> tuple[tuple[float, ...], ...]:
    """Return the symmetric matrix of rows that begin right of its diagonal.

    Raises:
        ValueError: a row is not as long as it has to be, or a number is no square.
    """
    squares = [[0.0] * len(upper) for _ in upper]
    for i, row in enumerate(upper, 1):
        if len(row) != len(upper) - i:
            raise ValueError("a distance is missing")
    for i, row in enumerate(upper):
        for j, value in enumerate(row, i + 1):
            squares[i][j] = squares[j][i] = float.fromhex(value)
            if not squares[i][j] >= 0:
                raise ValueError("a square is out of range")
    return tuple(map(tuple, squares))
