"""Which version is the best by what the sites scored."""

from __future__ import annotations

import pytest

from fedcore.config import RunConfig, parse_run
from fedcore.errors import ConfigError
from fedcore.server.rounds.selection import Pooling, SiteScore, best_version, pooled_metrics
from fedcore.server.storage.history import read_scores, score_text


def scores(*values: tuple[str, int, float]) -> list[SiteScore]:
    return [SiteScore(site, examples, {"loss": value}) for site, examples, value in values]


def test_metrics_are_weighted_by_examples_and_leave_out_what_is_not_finite() -> None:
    nan = float("nan")
    assert pooled_metrics(scores(("a", 1, 1.0), ("b", 3, 2.0), ("c", 9, nan))) == {"loss": 1.75}


def test_each_metric_is_weighted_by_the_examples_that_it_was_measured_on() -> None:
    found = [
        SiteScore("a", 100, {"x": 1.0, "y": 1.0, "z": 1.0}, {"x": 10, "y": 90, "z": 0}),
        SiteScore("b", 100, {"x": 2.0, "y": 2.0, "w": 5.0}, {"x": 90, "y": 10}),
    ]
    assert pooled_metrics(found) == pytest.approx({"w": 5.0, "x": 1.9, "y": 1.1})
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
    of_no_example = SiteScore("b", 1, {"loss": 1.0}, {"loss": 0})
    table[1] = [*scores(("a", 1, 1.0)), of_no_example]
    assert best_version(table, "loss", "min", 2) == 0


HONEST = (("a", 100, 1.0), ("b", 200, 1.2), ("c", 100, 1.1))


def test_a_site_that_boasts_of_examples_selects_no_model_against_the_others() -> None:
    good = scores(*HONEST, ("liar", 1 << 40, 1.5))
    bad = scores(
        *((site, examples, value + 1) for site, examples, value in HONEST), ("liar", 1 << 40, 0.5)
    )
    table = {0: good, 1: bad}
    assert best_version(table, "loss", "min", 4) == 1
    median, bounded = Pooling(median=True), Pooling.of_settings("mean", 0.25)
    for pooling in (median, bounded):
        assert best_version(table, "loss", "min", 4, pooling) == 0
    assert pooled_metrics(good, bounded)["loss"] == pytest.approx(1.2)
    assert pooled_metrics(good, median) == {"loss": pytest.approx(1.15)}
    assert pooled_metrics(good[:3], median) == {"loss": 1.1}


def test_a_share_of_the_examples_is_bounded_and_fewer_sites_weigh_the_same() -> None:
    half = Pooling.of_settings(None, 0.5)
    assert pooled_metrics(scores(("a", 1, 0.0), ("b", 2, 0.0), ("c", 9, 4.0)), half) == {
        "loss": 2.0
    }
    assert pooled_metrics(scores(("c", 9, 4.0)), half) == {"loss": 4.0}
    assert pooled_metrics(scores(("a", 1, 0.0), ("c", 9, 4.0)), half) == {"loss": 2.0}


def test_the_median_of_huge_scores_is_a_number() -> None:
    largest = 1.7e308
    found = scores(("a", 1, largest), ("b", 1, largest), ("c", 1, float("inf")))
    assert pooled_metrics(found, Pooling(median=True)) == {"loss": largest}


def config(**selection: object) -> RunConfig:
    values = {"run": {"name": "t", "rounds": 1}, "participants": {"count": 4, "min_results": 3}}
    return parse_run({**values, "selection": {"metric": "loss", "mode": "min", **selection}})


def test_a_share_or_average_that_can_not_be_is_refused_when_the_file_is_read() -> None:
    assert config(max_share=0.4).selection.max_share == 0.4
    with pytest.raises(ConfigError, match=r"selection\.max_share = 0\.3 needs 4 or more scores"):
        config(max_share=0.3)
    with pytest.raises(ConfigError, match=r"selection\.max_share: examples do not count in a med"):
        config(max_share=0.4, average="median")
    with pytest.raises(ConfigError, match=r"selection\.average: .*'mean' or 'median'"):
        config(average="mode")
