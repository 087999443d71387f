"""Products of factors: the best part of their sum, and what averaging them loses, against dense matrices."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from fractions import Fraction
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from fedcore import _core
from fedcore.errors import ConfigError, LayoutError, NonFiniteError, WeightError

Array = npt.NDArray[Any]
Term = tuple[float, Array, Array]


@pytest.fixture(autouse=True)
def restore_level() -> Iterator[None]:
    before = _core.simd_level()
    yield
    _core.set_simd_level(before)


def terms_of(rows: int, columns: int, ranks: Sequence[int], seed: int = 0) -> list[Term]:
    rng = np.random.default_rng(seed)
    return [
        (
            float(rng.normal()),
            rng.normal(size=(rows, rank)).astype(np.float32),
            rng.normal(size=(rank, columns)).astype(np.float32),
        )
        for rank in ranks
    ]


def dense(terms: Sequence[Term]) -> Array:
    return np.sum([scale * b.astype(float) @ a.astype(float) for scale, b, a in terms], axis=0)


def check(terms: Sequence[Term], most: int, whole: Array | None = None) -> int:
    """Compare recompress() with the dense singular values and vectors; returns the numerical rank."""
    whole = dense(terms) if whole is None else whole
    left, sigma, right = np.linalg.svd(whole, full_matrices=False)
    b, a, found, info = _core.recompress(terms, most)
    rank = min(most, *whole.shape)
    kept = info["rank"]
    noise = 1e-13 * sigma[0]
    assert b.shape == (whole.shape[0], rank)
    assert a.shape == (rank, whole.shape[1])
    np.testing.assert_allclose(found, sigma[:rank], rtol=0, atol=noise)
    best = left[:, :rank] * sigma[:rank] @ right[:rank]
    if rank == len(sigma) or sigma[rank - 1] - sigma[rank] > 1e-6 * sigma[0]:  # it is unique
        np.testing.assert_allclose(b @ a, best, rtol=0, atol=10 * noise)
    np.testing.assert_allclose(np.linalg.norm(whole - b @ a), info["cut"], rtol=1e-9, atol=noise)
    np.testing.assert_allclose(np.linalg.norm(whole), info["norm"], rtol=1e-12)
    np.testing.assert_allclose(a[:kept] @ a[:kept].T, np.eye(kept), rtol=0, atol=1e-13)
    np.testing.assert_allclose(np.linalg.norm(b, axis=0), found, rtol=1e-9, atol=10 * noise)
    assert (np.diff(found) <= 0).all()
    assert not a[kept:].any()
    assert not b[:, kept:].any()
    assert not found[kept:].any()
    assert all(row[np.abs(row).argmax()] > 0 for row in a[:kept])
    return int(kept)


@pytest.mark.parametrize("most", [1, 5, 16, 1000])
@pytest.mark.parametrize(
    ("rows", "columns", "ranks"),
    [
        (1, 1, [1]),
        (5, 7, [2]),
        (40, 30, [2, 8, 4]),
        (600, 530, [4, 8, 16, 1]),  # more than one tile of rows
        (1100, 20, [16, 16]),  # more columns of factors than columns
        (3, 700, [8, 1]),  # and than rows
    ],
)
def test_recompress_gives_the_best_part_of_a_sum_of_products(
    rows: int, columns: int, ranks: list[int], most: int
) -> None:
    kept = check(terms_of(rows, columns, ranks), most)
    assert kept == min(most, rows, columns, sum(ranks))


@pytest.mark.parametrize("scale", [1e-300, 1.0, 1e300])
def test_known_singular_values_come_back_to_the_last_digits(scale: float) -> None:
    # Orthogonal matrices of rational numbers, so that the product is known exactly.
    turn = [[Fraction(3, 5), Fraction(-4, 5)], [Fraction(4, 5), Fraction(3, 5)]]
    other = [[Fraction(5, 13), Fraction(12, 13)], [Fraction(-12, 13), Fraction(5, 13)]]
    sigma = [Fraction(3), Fraction(1, 2**40)]
    b = np.array([[float(x * s) for x, s in zip(row, sigma, strict=True)] for row in turn])
    a = np.array([[float(x) for x in row] for row in other])
    left, right, found, info = _core.recompress([(scale, b, a)], 2)
    assert info["rank"] == 2
    assert found[0] / scale == pytest.approx(3, rel=2e-15)
    assert found[1] / scale == pytest.approx(2**-40, rel=1e-3)
    exact = [
        [sum(turn[i][k] * sigma[k] * other[k][j] for k in (0, 1)) for j in (0, 1)] for i in (0, 1)
    ]
    np.testing.assert_allclose(left / scale @ right, np.array(exact, float), rtol=4e-15)


def test_terms_that_are_zero_or_cancel_leave_nothing() -> None:
    [(scale, b, a)] = terms_of(30, 20, [4])
    for terms in (
        [(scale, 0 * b, a), (scale, b, 0 * a), (0.0, b, a)],
        [(scale, b, a), (-scale, b, a)],
        [(scale, b[:, :0], a[:0])],
    ):
        left, right, sigma, info = _core.recompress(terms, 3)
        assert np.abs(left @ right).max() <= 1e-14
        assert left.shape == (30, 3)
        assert right.shape == (3, 20)
        assert (sigma <= 1e-13).all()
        assert info["norm"] <= 1e-13


def test_equal_singular_values_keep_the_rows_orthonormal() -> None:
    basis = np.linalg.qr(np.random.default_rng(3).normal(size=(24, 6)))[0]
    assert check([(2.0, basis, basis.T.copy())], 6) == 6
    assert check([(2.0, basis, basis.T.copy()), (1.0, np.eye(24), np.eye(24))], 24) == 24
    assert check([(1.0, np.eye(40), np.eye(40))], 7) == 7


def test_the_numerical_rank_is_that_of_the_sum() -> None:
    terms = terms_of(50, 60, [3])
    _, b, a = terms[0]
    again = [
        (1.0, b[:, ::-1].copy(), a[::-1].copy()),
        (0.5, b @ np.ones((3, 9), "f4"), np.ones((9, 60), "f4")),
    ]
    assert check([*terms, *again], 16) == 4
    assert check(terms * 7, 16) == 3


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_subnormal_factors_keep_what_precision_they_have(dtype: type[np.floating[Any]]) -> None:
    tiny = float(np.finfo(dtype).smallest_subnormal)
    rng = np.random.default_rng(5)
    b = (rng.integers(-9, 10, size=(12, 3)) * tiny).astype(dtype)
    a = rng.normal(size=(3, 15))
    left, right, sigma, info = _core.recompress([(1.0, b.astype(dtype), a.astype(dtype))], 3)
    whole = (b.astype(float) / tiny) @ a.astype(dtype).astype(float)
    np.testing.assert_allclose(sigma / tiny, np.linalg.svd(whole)[1][:3], rtol=1e-6, atol=1)
    np.testing.assert_allclose(left / tiny @ right, whole, rtol=0, atol=3)
    assert info["rank"] == 3


def test_weights_of_all_sizes_and_huge_values_keep_the_best_part() -> None:
    light, heavy = terms_of(40, 30, [4, 4])
    assert check([(1.0, *light[1:]), (2.0**24, *heavy[1:])], 8) == 8
    huge = [
        (1.0, (b * 2.0**100).astype("f4"), (a * 2.0**100).astype("f4"))
        for _, b, a in (light, heavy)
    ]
    assert check(huge, 8) == 8
    check([*huge, light], 8)
    assert (
        check(
            [(1e200, b.astype(float) * 1e-300, a.astype(float) * 1e100) for _, b, a in (light,)], 4
        )
        == 4
    )


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_a_value_that_is_not_finite_names_its_term_and_factor(bad: float) -> None:
    for factor in (1, 2):
        terms = terms_of(20, 10, [2, 3])
        terms[1][factor].flat[7] = bad
        with pytest.raises(NonFiniteError, match=f"in {'-BA'[factor]} of term 1"):
            _core.recompress(terms, 4)
        with pytest.raises(NonFiniteError, match=f"in {'-BA'[factor]} of term 1"):
            _core.factor_error([1, 2], [term[1:] for term in terms])
    with pytest.raises(NonFiniteError, match="scale"):
        _core.recompress([(bad, *terms[0][1:])], 4)


def test_what_does_not_fit_or_is_too_large_is_refused() -> None:
    [(_, b, a), other] = terms_of(20, 10, [2, 3])
    for wrong in (
        [(1.0, b, a[:1])],
        [(1.0, b, a), (1.0, other[1][:19], other[2])],
        [(1.0, b[:, 0].copy(), a)],
    ):
        with pytest.raises(LayoutError):
            _core.recompress(wrong, 2)
    with pytest.raises(LayoutError, match="float"):
        _core.recompress([(1.0, b.astype(np.int32), a)], 2)
    with pytest.raises(ConfigError):
        _core.recompress([], 2)
    with pytest.raises(NonFiniteError, match="too large"):
        _core.recompress([(1e300, b.astype(float) * 1e300, a)], 2)
    with pytest.raises(WeightError):
        _core.factor_error([1.0], [])
    with pytest.raises(ConfigError, match="positive"):
        _core.factor_error([0.0], [(b, a)])


def test_factors_of_two_bytes_are_read_exactly() -> None:
    terms = terms_of(30, 20, [4])
    scale, b, a = terms[0]
    halves = [(scale, b.astype(np.float16), a.astype(np.float16))]
    assert check(halves, 4) == 4
    words = [(x.view(np.uint32) >> 16).astype(np.uint16) for x in (b, a)]
    wide = [(word.astype(np.uint32) << 16).view(np.float32) for word in words]
    of_words = _core.recompress([(scale, *words, "BF16")], 4)
    for one, same in zip(of_words[:3], _core.recompress([(scale, *wide)], 4)[:3], strict=True):
        assert one.tobytes() == same.tobytes()


def test_instruction_sets_and_threads_give_the_same_bits() -> None:
    results = set()
    for level, threads in itertools.product(_core.simd_levels(), (1, 3)):
        _core.set_simd_level(level)
        got = b""
        shapes = ((37, 29, [3, 5]), (4200, 2100, [9, 16, 20]), (60, 70, [90, 90, 90]))
        for (rows, columns, ranks), most in zip(shapes, (4, 16, 32), strict=True):
            terms = terms_of(rows, columns, ranks)
            *arrays, info = _core.recompress(terms, most, threads)
            got += b"".join(array.tobytes() for array in arrays) + repr(info).encode()
            weights, pairs = [3, 5, 7][: len(terms)], [term[1:] for term in terms]
            figure = _core.factor_error(weights, pairs, pairs[0], threads)
            got += repr(figure).encode()
        results.add(got)
    assert len(results) == 1


def test_rows_of_several_blocks_give_the_best_part_too() -> None:
    for rows, columns in ((4200, 30), (30, 4200), (2049, 2050)):
        terms = terms_of(rows, columns, [4, 6])
        b, a, sigma, info = _core.recompress(terms, 10, 2)
        left = np.linalg.qr(np.concatenate([scale * b.astype(float) for scale, b, _ in terms], 1))
        right = np.linalg.qr(np.concatenate([a.astype(float) for _, _, a in terms]).T)
        np.testing.assert_allclose(sigma, np.linalg.svd(left.R @ right.R.T)[1], rtol=1e-12)
        np.testing.assert_allclose(left.Q.T @ b @ a @ right.Q, left.R @ right.R.T, atol=1e-9)
        np.testing.assert_allclose(a @ a.T, np.eye(10), atol=1e-13)
        assert info["rank"] == 10


def padded(b: Array, a: Array, rank: int) -> tuple[Array, Array]:
    more = rank - b.shape[1]
    return np.pad(b.astype(float), ((0, 0), (0, more))), np.pad(
        a.astype(float), ((0, more), (0, 0))
    )


@pytest.mark.parametrize("ranks", [[4, 4, 4], [2, 8, 5], [100, 40, 150]])
def test_the_figure_is_that_of_dense_matrices(ranks: list[int]) -> None:
    weights, pairs = [3.0, 5.0, 1.0], [term[1:] for term in terms_of(70, 600, ranks)]
    share = np.array(weights) / sum(weights)
    both = [padded(*pair, max(ranks)) for pair in pairs]
    whole = np.sum([w * b @ a for w, (b, a) in zip(share, both, strict=True)], axis=0)
    mean = [
        np.sum([w * pair[i] for w, pair in zip(share, both, strict=True)], axis=0) for i in (0, 1)
    ]
    of_sum, error, change = _core.factor_error(weights, pairs)
    np.testing.assert_allclose(of_sum, np.linalg.norm(whole), rtol=1e-12)
    np.testing.assert_allclose(error, np.linalg.norm(whole - mean[0] @ mean[1]), rtol=1e-12)
    assert change == of_sum
    base = terms_of(70, 600, [170], seed=9)[0][1:]
    change = _core.factor_error(weights, pairs, base)[2]
    np.testing.assert_allclose(change, np.linalg.norm(whole - dense([(1.0, *base)])), rtol=1e-12)


def test_means_of_one_factor_alone_are_exact() -> None:
    pairs = [term[1:] for term in terms_of(50, 60, [4, 4, 4])]
    same_a = [(b, pairs[0][1]) for b, _ in pairs]
    same_b = [(pairs[0][0], a) for _, a in pairs]
    for exact in (same_a, same_b, pairs[:1]):
        of_sum, error, _ = _core.factor_error([3, 5, 1][: len(exact)], exact)
        assert error <= 1e-15 * of_sum


@pytest.mark.parametrize(("zero", "least", "most"), [(True, 0.13, 0.15), (False, 0.995, 1.005)])
def test_differences_keep_the_ranks_that_a_mean_of_products_loses(
    zero: bool, least: float, most: float
) -> None:
    # Sites of ranks 2, 2, 2 and 8 train towards one matrix of rank 8; the last has a seventh of the weight.
    rng = np.random.default_rng(1)
    _, b, a = (1.0, rng.normal(size=(32, 8)), rng.normal(size=(8, 32)))
    truth = b @ a
    ranks, weights, full = (2, 2, 2, 8), np.array([2, 2, 2, 1]) / 7, 8
    b, a = np.zeros((32, full)), np.zeros((full, 32))
    for _ in range(40):
        terms: list[Term] = [] if zero else [(1.0, b, a)]
        for weight, rank in zip(weights, ranks, strict=True):
            sent = b[:, :rank].copy(), a[:rank].copy()
            frozen = np.zeros((32, 32)) if zero else b @ a - sent[0] @ sent[1]
            trained = _core.recompress([(1.0, truth - frozen, np.eye(32))], rank)[:2]
            terms += [(weight, *trained)] if zero else [(weight, *trained), (-weight, *sent)]
        b, a = _core.recompress(terms, full)[:2]
    share = np.linalg.svd(b @ a)[1][:8] / np.linalg.svd(truth)[1][:8]
    np.testing.assert_allclose(share[:2], 1, atol=0.005)
    assert (share[2:] >= least).all()
    assert (share[2:] <= most).all()


def test_many_columns_are_merged_in_a_tree_of_the_terms_alone() -> None:
    # Of rank 20 together, but for a little noise: no node of the tree has to cut off anything else.
    rng = np.random.default_rng(7)
    left, right = rng.normal(size=(150, 20)), rng.normal(size=(20, 170))
    terms = [
        (float(k + 1), left @ rng.normal(size=(20, 64)), rng.normal(size=(64, 20)) @ right)
        for k in range(7)
    ]
    assert check(terms, 20) == 20
    noisy = [(scale, b + 1e-6 * rng.normal(size=b.shape), a) for scale, b, a in terms]
    whole = dense(noisy)
    b, a, sigma, info = _core.recompress(noisy, 16)
    expected = np.linalg.svd(whole)[1]
    np.testing.assert_allclose(sigma, expected[:16], rtol=1e-6)
    lost = np.linalg.norm(whole - b @ a)
    assert lost <= info["cut"] * (1 + 1e-9)
    assert lost <= 1.001 * np.sqrt((expected[16:] ** 2).sum())


def test_a_tree_over_random_terms_loses_little_more_than_the_best_part() -> None:
    terms = [(1.0 + k, b, a) for k, (_, b, a) in enumerate(terms_of(300, 280, [64, 64, 4, 64, 80]))]
    whole = dense(terms)
    b, a, _, info = _core.recompress(terms, 32)
    least = np.sqrt((np.linalg.svd(whole)[1][32:] ** 2).sum())
    lost = np.linalg.norm(whole - b @ a)
    assert least <= lost * (1 + 1e-12)
    assert lost <= min(info["cut"], 1.02 * least)
