"""The benchmark of LoRA factors: each way once, and nothing is timed that is not right."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from benchmarks import lora

KINDS = (lora.Kind("small", 60, 90, 2), lora.Kind("large", 120, 90, 1))


def test_each_way_is_measured_once_and_the_dense_one_is_carried_over() -> None:
    rows = lora.measure(4, 8, (2, 4, 8), KINDS, ("small",))
    assert [row["kind"] for row in rows] == ["small", "large"]
    assert [row["dense_measured"] for row in rows] == [True, False]
    assert rows[1]["dense_s"] == pytest.approx(rows[0]["dense_s"] * 120 * 90 * 90 / (60 * 90 * 60))
    for row in rows:
        assert 0.999 <= row["share_of_best"] <= 1 + 1e-9
        assert min(row["own_s"], row["figure_s"], row["stacked_s"]) >= 0
    assert lora.scratch(4, 8, (2, 4, 8), KINDS) > 0


def test_a_product_that_is_not_the_best_one_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    def means(terms: list[Any], rank: int) -> tuple[Any, Any, Any]:
        b, a, sigma = lora.dense(terms, rank)
        return b[:, ::-1], a, np.array(sigma)

    monkeypatch.setattr(lora, "core_way", means)
    with pytest.raises(ArithmeticError, match="wrong"):
        lora.measure(4, 8, (2, 4, 8), KINDS, ())
