"""Sorting networks in registers: every number of sources and every trim, against NumPy, bit by bit."""

from __future__ import annotations

from collections.abc import Iterator

import ml_dtypes
import numpy as np
import pytest

from fedcore import _core
from fedcore.errors import NonFiniteError

from ..support.values import ranked

DTYPES = {"F32": np.float32, "F16": np.float16, "BF16": ml_dtypes.bfloat16}
MOST = 17  # one more than stays in registers
COUNT = 1_061  # more than a piece, and no multiple of a register


@pytest.fixture(params=_core.simd_levels(), autouse=True)
def level(request: pytest.FixtureRequest) -> Iterator[None]:
    before = _core.simd_level()
    _core.set_simd_level(request.param)
    yield
    _core.set_simd_level(before)


def updates(dtype: str, sources: int) -> np.ndarray:
    """Finite numbers of any magnitude, with many ties and zeros of both signs; a row a source."""
    kind = np.dtype(DTYPES[dtype])
    dice = np.random.default_rng(sources)
    values = np.frombuffer(dice.bytes(sources * COUNT * kind.itemsize), kind).copy()
    with np.errstate(invalid="ignore"):
        values[~np.isfinite(values.astype(np.float64))] = kind.type(-0.0)
    values = values.reshape(sources, COUNT)
    values[:, ::5] = dice.choice(np.array([-1, -0.0, 0, 1], kind), values[:, ::5].shape)
    return values


def wide(values: np.ndarray) -> np.ndarray:
    """Return each element's values in binary64, in order."""
    return ranked(values).astype(np.float64)


def combine(dtype: str, values: np.ndarray, trim: int | None) -> np.ndarray:
    out = np.empty(values.shape[1], np.float64)
    rule = "median" if trim is None else ("trimmed-mean", {"trim": trim})
    rows = [row.view(np.uint8) for row in values]
    _core.combine_wide(rule, dtype, rows, [1] * len(rows), out)
    return out


@pytest.mark.parametrize("dtype", DTYPES)
def test_any_number_of_sources_has_the_median_of_numpy(dtype: str) -> None:
    for sources in range(1, MOST + 1):
        values = updates(dtype, sources)
        low, high = (wide(values)[i] for i in ((sources - 1) // 2, sources // 2))
        expected = low if sources % 2 else (low + high) * 0.5
        assert combine(dtype, values, None).tobytes() == expected.tobytes(), sources


@pytest.mark.parametrize("dtype", DTYPES)
def test_any_number_of_sources_can_be_trimmed_by_any_number(dtype: str) -> None:
    for sources in range(3, MOST + 1):
        values = updates(dtype, sources)
        rows = wide(values)
        for trim in range(1, (sources + 1) // 2):
            total = rows[trim]
            for row in rows[trim + 1 : sources - trim]:
                total = total + row
            expected = total / (sources - 2 * trim)
            found = combine(dtype, values, trim)
            assert found.tobytes() == expected.tobytes(), (sources, trim)


@pytest.mark.parametrize("dtype", DTYPES)
def test_no_number_of_sources_hides_a_value_that_is_not_finite(dtype: str) -> None:
    for sources in range(3, MOST + 1):
        values = updates(dtype, sources)
        for bad in (np.nan, -np.nan, np.inf, -np.inf):
            source = sources * 7 % 11 % sources
            for at in (0, COUNT - 1):
                kept = values[source, at]
                values[source, at] = bad
                for trim in (None, 1):
                    with pytest.raises(NonFiniteError):
                        combine(dtype, values, trim)
                values[source, at] = kept
