"""A federation whose updates are surveyed before it is decided which of them count, and what it comes to."""

from __future__ import annotations

from fractions import Fraction

import numpy as np

from fedcore._core import Collector, CollectorOptions, Record
from fedcore.model_file import ModelFile, create_model

from .spilling import CHUNK, LAYOUT, WEIGHTS, Federation, update

BASE = update("z")
DTYPES = {"w": "<f4", "d": "<f8"}  # "h" is zero in all of them


class Surveyed(Federation):
    """A federation whose sources are surveyed first."""

    def __init__(
        self, names: str, budget: int = 64 * CHUNK, spill: object = None, **options: object
    ) -> None:
        super().__init__(names, 1 << 30, **{k: options.pop(k) for k in names if k in options})  # type: ignore[arg-type]
        self.server.cancel(self.collector)
        self.collector = Collector.open(
            LAYOUT,
            len(names),
            (BASE.file, BASE.data_offset),
            CollectorOptions(budget, spill=spill, spill_after_ms=100, survey=True, **options),  # type: ignore[arg-type]
        )
        self.server.start(self.collector)
        for name in names:
            self.server.add(self.collector, name.encode(), name.encode() * 16, WEIGHTS[name])

    def survey(self, names: str = "") -> None:
        self.server.survey(self.collector, [self.names.index(name) for name in names or self.names])

    def close(
        self, names: str, weights: dict[str, int], base: int = 0, record: Record | None = None
    ) -> None:
        self.out = create_model(None, LAYOUT)
        order = [self.names.index(name) for name in names]
        given = [weights[name] for name in names], base
        self.server.close(
            self.collector, order, self.out.file, self.out.data_offset, record, weights=given
        )


def values(file: ModelFile, name: str) -> np.ndarray:
    return np.frombuffer(file.view(name), DTYPES[name]).astype(np.float64)


def exact(one: ModelFile, other: ModelFile, names: str = "dw") -> Fraction:
    total = Fraction()
    for name in names:
        for a, b in zip(values(one, name), values(other, name), strict=True):
            total += (Fraction(a) - Fraction(b)) ** 2
    return total


def mean(names: str, weights: dict[str, int], base: int) -> bytes:
    """The mean of these updates, and of the base where it weighs."""
    given = [(update(n), weights[n]) for n in names] + ([(BASE, base)] if base else [])
    whole = sum(weight for _, weight in given)
    wide = sum(np.float64(weight) * values(file, "w") for file, weight in given) / whole
    columns = zip(*(values(file, "d") for file, _ in given), strict=True)
    exact_means = [
        float(
            sum(Fraction(v) * weight for v, (_, weight) in zip(column, given, strict=True)) / whole
        )
        for column in columns
    ]
    flat = np.array(exact_means).tobytes() + wide.astype(np.float32).tobytes()
    return flat + bytes(2 * 777)


def surveyed(names: str, seed: int = 0, **options: object) -> list[list[float]]:
    federation = Surveyed(names, **options)  # type: ignore[arg-type]
    federation.survey()
    federation.run(names, seed)
    return federation.collector.distances
