"""What is decided of a round's updates: as text with all bits, and again without some of them."""

from __future__ import annotations

import itertools
import json
import math
from typing import Any

import pytest

from fedcore.errors import RuleError
from fedcore.rules.python import load_rule
from fedcore.server.rounds.actions import Participant
from fedcore.server.rounds.verdicts import Verdict, decide

NAMES = "abcdef"
SITES = tuple(Participant(name, name * 32, 3 + k) for k, name in enumerate(NAMES))
PLACES = (0.0, 1 / 3, 1.0, 2.5, 7.0, math.inf)  # the last row is that of the base
KRUM = load_rule("krum", {"f": 0})


def squares(places: tuple[float, ...]) -> list[list[float]]:
    return [[0.0 if a == b else (a - b) ** 2 for b in places] for a in places]


def verdict() -> Verdict:
    made = decide(KRUM, SITES, squares((*PLACES, 0.1)))
    digests = tuple(bytes([k]) * 16 for k in range(len(SITES)))
    return Verdict(made.rule, made.participants, made.decision, made.squares, b"key", digests)


def test_a_verdict_comes_back_from_its_text_with_all_bits() -> None:
    made = verdict()
    assert Verdict.of_text(made.text) == made
    assert made.scores["f"] == math.inf
    assert Verdict.of_text(made.settled.text) == made.settled
    assert not made.settled.squares
    assert not made.settled.surveyed(SITES)


def test_a_text_that_is_not_whole_is_refused_wherever_it_is_cut() -> None:
    made = verdict().text
    for end in range(0, len(made), 7):
        with pytest.raises(ValueError, match="not whole"):
            Verdict.of_text(made[:end])
    of = json.loads(made)
    spoiled: list[dict[str, Any]] = [
        *(
            {name: value for name, value in of.items() if name != gone}
            for gone in of
            if gone not in _LATER
        ),
        {**of, "squares": of["squares"][1:]},
        {**of, "digests": of["digests"][1:]},
        {**of, "base": -1},
        {**of, "base": 0.5},
        {**of, "updates": [[*update[:3], "1", update[4]] for update in of["updates"]]},
        {**of, "key": "%"},
        *(
            {**of, "squares": [row, *of["squares"][1:]]}
            for first in [of["squares"][0]]
            for row in (
                first[1:],
                [*first, "0x0p+0"],
                *([wrong, *first[1:]] for wrong in ("nan", "-0x1p+0", "0x1p+9999")),
            )
        ),
    ]
    for values in spoiled:
        with pytest.raises(ValueError, match="not whole"):
            Verdict.of_text(json.dumps(values))


_LATER = ("key", "digests")  # the first journals had none


def test_a_verdict_holds_while_those_that_count_are_there() -> None:
    made = verdict()
    (kept,) = made.kept
    assert (kept.site, kept.weight) == ("d", 1)
    for count in range(1, 7):
        for left in itertools.combinations(SITES, count):
            assert made.holds_for(left) == (SITES[3] in left)
    stranger = Participant("g", "0" * 32, 1)
    another = Participant("a", "0" * 32, 3)
    for more in (stranger, another):
        assert not made.surveyed([*SITES, more])
        assert not made.holds_for([*SITES, more])


def test_without_one_that_counts_it_is_decided_as_if_that_had_never_been_surveyed() -> None:
    made = verdict()
    left = tuple(site for site in SITES if site.site != "d")
    again = made.among(KRUM, left)
    rows = [place for place, name in zip(PLACES, NAMES, strict=True) if name != "d"]
    assert again.decision == decide(KRUM, left, squares((*rows, 0.1))).decision
    assert again.kept_digests == tuple(
        made.digests[NAMES.index(known.site)] for known in again.kept
    )
    with pytest.raises(RuleError, match="at least 3"):
        made.among(KRUM, SITES[:2])


def test_updates_too_far_apart_for_a_rule_end_the_run_as_its_failure() -> None:
    rule, two = load_rule("rfa", {}), [Participant(name, name * 32, 1) for name in "ab"]
    with pytest.raises(RuleError, match="beyond binary64"):
        decide(rule, two, squares((0.0, math.inf, 0.0)))
