"""Selection of the best global model by a named validation metric.

Every version is scored by the sites on their own validation data. A version's metric is the mean over the sites
that scored it, weighted by the numbers of validation examples behind it; the best version has the least or the
greatest, as the run file says, and a tie goes to the earlier one.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Literal

__all__ = ["SiteScore", "best_version", "weighted_metrics"]


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


def weighted_metrics(scores: Iterable[SiteScore]) -> dict[str, float]:
    """Return the mean of each metric over the sites that report a finite value, weighted by its examples.

    Sites are summed in the order of their names, so that the result does not depend on arrival. A metric whose sum
    is beyond the numbers there are is left out.
    """
    sums: dict[str, tuple[float, int]] = {}
    for score in sorted(scores, key=lambda s: s.site):
        for name, value in score.metrics.items():
            rows = score.examples_of(name)
            if math.isfinite(value) and rows:
                total, examples = sums.get(name, (0.0, 0))
                sums[name] = total + rows * value, examples + rows
    return {
        name: total / examples
        for name, (total, examples) in sorted(sums.items())
        if math.isfinite(total)
    }


def best_version(
    scores: Mapping[int, Iterable[SiteScore]], metric: str, mode: Literal["min", "max"], quorum: int
) -> int | None:
    """Return the version with the best ``metric``, or None if none is eligible.

    A version is eligible if at least ``quorum`` sites scored it with a finite value, and their mean is one.
    """
    best: tuple[float, int] | None = None
    for version in sorted(scores):
        finite = [s for s in scores[version] if math.isfinite(s.metrics.get(metric, math.nan))]
        if len(finite) < quorum:
            continue
        mean = weighted_metrics(finite).get(metric)
        if mean is None:
            continue
        value = mean if mode == "min" else -mean
        if best is None or value < best[0]:
            best = value, version
    return None if best is None else best[1]
