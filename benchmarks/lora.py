"""Sums of the products of LoRA factors at the sizes of a real model, beside NumPy's dense and stacked ways.

All take the same factors of the same sites, and give the best product of one rank. ``dense`` makes the sum of
scale x B x A and decomposes it, as FlexLoRA does. ``stacked`` is FLoRIST's way, written from the paper's formulas:
the singular vectors of the B side by side and of the A below each other, and those of the small matrix between.
"""

from __future__ import annotations

import ctypes
import functools
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from fedcore._core import Layout, LoraRule, factor_error, recompress, rule_scratch

from .updates import forget_peak, peak

Array = npt.NDArray[Any]
Term = tuple[float, Array, Array]


@dataclass(frozen=True)
class Kind:
    """Linear layers of one shape, rows x columns, of which a model has so many."""

    name: str
    rows: int
    columns: int
    count: int


LLAMA_3_8B: Final = (
    Kind("k, v", 1024, 4096, 64),
    Kind("q, o", 4096, 4096, 64),
    Kind("gate, up", 14336, 4096, 64),
    Kind("down", 4096, 14336, 32),
)
RANKS: Final = (4, 8, 16, 64)


def site_factors(kind: Kind, ranks: Sequence[int], seed: int = 0) -> list[Term]:
    """Return what sites of these ranks send: what they share, less of it the later a rank is, and noise."""
    rng = np.random.default_rng(seed)
    most = max(ranks)
    fading = 0.9 ** np.arange(most)
    shared = (
        rng.standard_normal((kind.rows, most)) * fading,
        rng.standard_normal((most, kind.columns)),
    )
    return [
        (
            float(rng.integers(1, 1000)),
            (shared[0][:, :rank] + 0.3 * rng.standard_normal((kind.rows, rank))).astype(np.float32),
            (shared[1][:rank] + 0.3 * rng.standard_normal((rank, kind.columns))).astype(np.float32),
        )
        for rank in ranks
    ]


def dense(terms: Sequence[Term], rank: int) -> tuple[Array, Array, Array]:
    """Decompose the whole sum; returns B, A and the singular values."""
    whole = np.zeros((terms[0][1].shape[0], terms[0][2].shape[1]))
    for scale, b, a in terms:
        whole += scale * (b.astype(float) @ a.astype(float))
    left, sigma, right = np.linalg.svd(whole, full_matrices=False)
    return left[:, :rank] * sigma[:rank], right[:rank], sigma[:rank]


def stacked(terms: Sequence[Term], rank: int) -> tuple[Array, Array, Array]:
    """Decompose the two stacks and what is between them; returns B, A and the singular values."""
    b = np.concatenate([scale * b.astype(float) for scale, b, _ in terms], axis=1)
    a = np.concatenate([a.astype(float) for _, _, a in terms])
    left, of_left, inner = np.linalg.svd(b, full_matrices=False)
    outer, of_right, right = np.linalg.svd(a, full_matrices=False)
    core = (of_left[:, None] * inner) @ (outer * of_right)
    turn, sigma, back = np.linalg.svd(core, full_matrices=False)
    return left @ (turn[:, :rank] * sigma[:rank]), back[:rank] @ right, sigma[:rank]


def core_way(terms: Sequence[Term], rank: int) -> tuple[Array, Array, Array]:
    given: list[Any] = list(terms)  # arrays are buffers, which their types do not say
    b, a, sigma, _ = recompress(given, rank)
    return b, a, sigma


def check(terms: Sequence[Term], b: Array, a: Array, best: float) -> float:
    """Return how much of the best part's norm a product B x A of the sum has: 1 is all.

    Raises:
        ArithmeticError: rows of A are not orthonormal, B is not the sum times A's transpose to within 1e-3 of its
            norm, or the product keeps less than 99.9 % of what the best one does.
    """
    far = np.abs(a @ a.T - np.eye(len(a))).max()
    projected = sum(
        scale * (left.astype(float) @ (right.astype(float) @ a.T)) for scale, left, right in terms
    )
    off = np.linalg.norm(b - projected) / np.linalg.norm(projected)
    share = float(np.linalg.norm(b)) / best
    if far > 1e-9 or off > 1e-3 or share < 0.999:
        raise ArithmeticError(
            f"a product is wrong: {far:.1e}, {off:.1e}, {share:.4f} of the best one"
        )
    return share


def timed(action: Callable[[], Any]) -> tuple[Any, float, int]:
    """Return what a call gives, its CPU seconds, and how much memory the process had at most above what it had."""
    ctypes.CDLL(None).malloc_trim(0)  # what was freed before counts for nothing
    before = forget_peak()
    begin = time.process_time()
    result = action()
    return result, time.process_time() - begin, max(0, peak() - before)


def measure(
    sites: int = 16,
    rank: int = 64,
    ranks: Sequence[int] = RANKS,
    kinds: Sequence[Kind] = LLAMA_3_8B,
    with_dense: Sequence[str] = ("k, v",),
) -> list[dict[str, Any]]:
    """Time one layer of each kind, and check each result; a row a kind.

    ``dense_s`` is measured for the kinds of ``with_dense``, and for the others the first measured time times the
    ratio of rows x columns x the smaller of the two: ``dense_measured`` tells which. Seconds are CPU seconds.

    Raises:
        ArithmeticError: a result is wrong.
    """
    rows: list[dict[str, Any]] = []
    for kind in kinds:
        terms = site_factors(kind, [ranks[k % len(ranks)] for k in range(sites)])
        total = sum(scale for scale, _, _ in terms)
        terms = [(scale / total, b, a) for scale, b, a in terms]
        (b, a, _), own_s, own_bytes = timed(functools.partial(core_way, terms, rank))
        (left, right, sigma), stacked_s, stacked_bytes = timed(
            functools.partial(stacked, terms, rank)
        )
        best = float(np.linalg.norm(sigma))
        row = {
            "kind": kind.name,
            "rows": kind.rows,
            "columns": kind.columns,
            "count": kind.count,
            "own_s": own_s,
            "own_bytes": own_bytes,
            "share_of_best": check(terms, b, a, best),
            "stacked_s": stacked_s,
            "stacked_bytes": stacked_bytes,
            "dense_measured": kind.name in with_dense,
        }
        check(terms, left, right, best)
        pairs: list[Any] = [(b, a) for _, b, a in terms]
        (_, row["figure_s"], _) = timed(
            functools.partial(factor_error, [scale for scale, _, _ in terms], pairs)
        )
        if kind.name in with_dense:
            (left, right, of_dense), row["dense_s"], row["dense_bytes"] = timed(
                functools.partial(dense, terms, rank)
            )
            check(terms, left, right, best)
            np.testing.assert_allclose(of_dense, sigma, rtol=1e-9)
        rows.append(row)
    _extrapolate(rows)
    return rows


def _work(row: dict[str, Any]) -> int:
    return int(row["rows"] * row["columns"] * min(row["rows"], row["columns"]))


def _extrapolate(rows: list[dict[str, Any]]) -> None:
    known = next((row for row in rows if row["dense_measured"]), None)
    for row in rows:
        if known is not None:
            row.setdefault("dense_s", known["dense_s"] * _work(row) / _work(known))


def scratch(sites: int, rank: int, ranks: Sequence[int], kinds: Sequence[Kind]) -> int:
    """Return the bytes that the core says a server's rule takes beside the factors, for the largest layer."""
    table, groups = [], []
    for number, kind in enumerate(kinds):
        b, a = f"{number}.lora_B.weight", f"{number}.lora_A.weight"
        table += [(b, "F32", [kind.rows, rank]), (a, "F32", [rank, kind.columns])]
        groups.append((b, a))
    return rule_scratch(LoraRule("exact", Layout(table), groups, max(ranks)), sites)
