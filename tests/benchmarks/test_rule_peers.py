"""The comparison of rules with other frameworks', with fedcore alone: nothing is installed here."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from benchmarks.rule_peers import PAIRS, Updates, compare, expected, faults, judge, make


def test_a_rule_and_an_optimizer_are_right_on_the_updates_that_peers_get() -> None:
    rules = ("krum", "adam")
    assert set(rules) < set(PAIRS)
    rows = compare(64 << 10, 10, rules)
    assert [(row["rule"], row.get("verdict", row.get("error"))) for row in rows] == [
        (rule, "right") for rule in rules
    ]
    assert all(row["seconds"] > 0 and row["peak_rss_bytes"] > 0 for row in rows)


def test_inputs_that_show_errors_of_others_show_none_of_fedcore() -> None:
    assert [row["gives"] for row in faults(())] == ["refused, and the update is named", "1.007812"]


@pytest.fixture
def updates(tmp_path: Path) -> Updates:
    return make(tmp_path, 64 << 10, 10)


def test_a_result_that_is_off_by_its_last_bit_is_not_called_right(updates: Updates) -> None:
    right = expected("trimmed-mean", updates, "flower").astype(np.float32)
    for values, words in (
        (right, "right"),
        (np.nextafter(right, np.float32(9)), "not rounded right"),
    ):
        values.tofile(updates.folder / "out.raw")
        assert words in judge("trimmed-mean", updates, {"dtype": "float32"}, "flower")


def test_another_choice_or_another_formula_is_named(updates: Updates) -> None:
    updates.head("update-02").astype(np.float32).tofile(updates.folder / "out.raw")
    assert judge("krum", updates, {"dtype": "float32"}, "flower") == (
        "update-02 chosen, not update-05"
    )
    updates.head("base").tofile(updates.folder / "out.raw")
    assert judge("adam", updates, {"dtype": "float64"}, "flower").startswith("another formula")
    assert judge("adam", updates, {"dtype": "float64"}, "flower").endswith("as float64")
