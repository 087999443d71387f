"""Selection of the best global model by a named validation metric.

Every version is scored by the sites on their own validation data. A version's metric is the mean over the sites
that scored it, weighted by the numbers of validation examples behind it, or their median; the best version has the
least or the greatest, as the run file says, and a tie goes to the earlier one.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final, Literal

from fedcore.weighing import EXAMPLES, Weighing

__all__ = ["Pooling", "SiteScore", "best_version", "pooled_metrics"]


@dataclass(frozen=True)
class SiteScore:
    """One site's metrics of one version, on ``examples`` validation examples.

    Attributes:
        rows: the number of examples of each metric that was measured on others than all ``examples``.
    """

    site: str
    examples: int
    metrics: Mapping[str, float]
    rows: Mapping[str, int] = field(default_factory=dict)

    def examples_of(self, metric: str) -> int:
        """Return the number of examples that a metric was measured on."""
        return self.rows.get(metric, self.examples)


@dataclass(frozen=True)
class Pooling:
    """How the sites' values of a metric become one: by their weighted mean, or by their median.

    Attributes:
        median: it is the median, in which examples do not count.
        weighing: what makes the weights of the mean. Where fewer sites have a value than its greatest share needs,
            they weigh the same.
    """

    median: bool = False
    weighing: Weighing = EXAMPLES

    @classmethod
    def of_settings(cls, average: str | None, max_share: float | None) -> Pooling:
        """Return what ``[selection]`` of a run file says; None: a key that it does not have."""
        return cls(average == "median", Weighing(max_share=max_share))

    def value(self, values: Sequence[float], examples: Sequence[int]) -> float:
        """Return the one value of at least one site; what is beyond the numbers there are is infinite or NaN."""
        if self.median:
            ranked = sorted(values)
            low, high = ranked[(len(values) - 1) // 2], ranked[len(values) // 2]
            middle = (low + high) / 2
            return middle if math.isfinite(middle) else low / 2 + high / 2
        if len(values) < self.weighing.least:
            weights: Sequence[float] = [1] * len(values)
        elif self.weighing == EXAMPLES:
            weights = examples
        else:
            weights = self.weighing.of(examples)
        total = 0.0
        for weight, value in zip(weights, values, strict=True):
            total += weight * value
        return total / sum(weights)


_MEAN: Final = Pooling()


def pooled_metrics(scores: Iterable[SiteScore], pooling: Pooling = _MEAN) -> dict[str, float]:
    """Return one value of each metric, of those that sites report and that are finite.

    Sites are taken in the order of their names, so that the result does not depend on arrival. A metric whose sum
    is beyond the numbers there are is left out.
    """
    found: dict[str, list[tuple[float, int]]] = {}
    for score in sorted(scores, key=lambda s: s.site):
        for name, value in score.metrics.items():
            rows = score.examples_of(name)
            if math.isfinite(value) and rows:
                found.setdefault(name, []).append((value, rows))
    pooled = {
        name: pooling.value([value for value, _ in of], [rows for _, rows in of])
        for name, of in sorted(found.items())
    }
    return {name: value for name, value in pooled.items() if math.isfinite(value)}


def best_version(
    scores: Mapping[int, Iterable[SiteScore]],
    metric: str,
    mode: Literal["min", "max"],
    quorum: int,
    pooling: Pooling = _MEAN,
) -> int | None:
    """Return the version with the best ``metric``, or None if none is eligible.

    A version is eligible if at least ``quorum`` sites scored it, on an example or more, with a finite value, and
    what they are pooled to is one.
    """
    best: tuple[float, int] | None = None
    for version in sorted(scores):
        counted = [
            score
            for score in scores[version]
            if math.isfinite(score.metrics.get(metric, math.nan)) and score.examples_of(metric)
        ]
        if len(counted) < quorum:
            continue
        pooled = pooled_metrics(counted, pooling).get(metric)
        if pooled is None:
            continue
        value = pooled if mode == "min" else -pooled
        if best is None or value < best[0]:
            best = value, version
    return None if best is None else best[1]
