"""Which version is the best by what the sites scored."""

from __future__ import annotations

import pytest

from fedcore.server.rounds.selection import SiteScore, best_version, weighted_metrics
from fedcore.server.storage.history import read_scores, score_text


def scores(*values: tuple[str, int, float]) -> list[SiteScore]:
    return [SiteScore(site, examples, {"loss": value}) for site, examples, value in values]


def test_metrics_are_weighted_by_examples_and_leave_out_what_is_not_finite() -> None:
    nan = float("nan")
    assert weighted_metrics(scores(("a", 1, 1.0), ("b", 3, 2.0), ("c", 9, nan))) == {"loss": 1.75}


def test_each_metric_is_weighted_by_the_examples_that_it_was_measured_on() -> None:
    found = [
        SiteScore("a", 100, {"x": 1.0, "y": 1.0, "z": 1.0}, {"x": 10, "y": 90, "z": 0}),
        SiteScore("b", 100, {"x": 2.0, "y": 2.0, "w": 5.0}, {"x": 90, "y": 10}),
    ]
    assert weighted_metrics(found) == pytest.approx({"w": 5.0, "x": 1.9, "y": 1.1})
    rows = [(0, one.site, one.examples, score_text(one)) for one in found]
    assert read_scores(lambda _: rows) == {0: found}, "from the journal, too"


@pytest.mark.parametrize(("mode", "best"), [("min", 1), ("max", 0)])
def test_the_best_version_follows_the_mode_and_a_tie_keeps_the_earlier(
    mode: str, best: int
) -> None:
    table = {
        0: scores(("a", 1, 2.0)),
        1: scores(("a", 1, 1.0)),
        2: scores(("a", 1, 1.0)),
        3: scores(("b", 1, 2.0)),
    }
    assert best_version(table, "loss", mode, 1) == best  # type: ignore[arg-type]


def test_a_version_that_too_few_scored_is_not_eligible() -> None:
    table = {
        0: scores(("a", 1, 2.0), ("b", 1, 2.0)),
        1: scores(("a", 1, 1.0), ("b", 1, float("nan"))),
    }
    assert best_version(table, "loss", "min", 2) == 0
    assert best_version(table, "accuracy", "max", 1) is None
