"""Selection of the best global model by a named validation metric.

Every version is scored by the sites on their own validation data. A version's metric is the mean over the sites
that scored it, weighted by their numbers of validation examples; the best version has the least or the greatest,
as the run file says, and a tie goes to the earlier one.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Literal

__all__ = ["SiteScore", "best_version", "weighted_metrics"]


@dataclass(frozen=True)
class SiteScore:
    """One site's metrics of one version, on ``examples`` validation examples."""

    site: str
    examples: int
    metrics: Mapping[str, float]


def weighted_metrics(scores: Iterable[SiteScore]) -> dict[str, float]:
    """Return the example-weighted mean of each metric over the sites that report a finite value of it.

    Sites are summed in the order of their names, so that the result does not depend on arrival. A metric whose sum
    is beyond the numbers there are is left out.
    """
    sums: dict[str, tuple[float, int]] = {}
    for score in sorted(scores, key=lambda s: s.site):
        for name, value in score.metrics.items():
            if math.isfinite(value):
                total, examples = sums.get(name, (0.0, 0))
                sums[name] = total + score.examples * value, examples + score.examples
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
