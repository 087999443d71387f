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

__all__ = [
    "EarlyEnd",
    "Pooling",
    "SiteScore",
    "best_version",
    "pooled_metrics",
    "ranked_versions",
    "site_scores",
    "worse_at",
    "worse_sites",
]


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

    def value_of(self, metric: str) -> float | None:
        """Return the value of a metric, if it is finite and was measured on an example or more."""
        value = self.metrics.get(metric, math.nan)
        return value if math.isfinite(value) and self.examples_of(metric) else None


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


def ranked_versions(
    scores: Mapping[int, Iterable[SiteScore]],
    metric: str,
    mode: Literal["min", "max"],
    quorum: int,
    pooling: Pooling = _MEAN,
) -> list[tuple[int, float]]:
    """Return the eligible versions with their values of ``metric``, the best one first.

    A version is eligible if at least ``quorum`` sites scored it, on an example or more, with a finite value, and
    what they are pooled to is one.
    """
    found = []
    for version in sorted(scores):
        counted = [score for score in scores[version] if score.value_of(metric) is not None]
        if len(counted) < quorum:
            continue
        pooled = pooled_metrics(counted, pooling).get(metric)
        if pooled is not None:
            found.append((version, pooled))
    return sorted(found, key=lambda one: (one[1] if mode == "min" else -one[1], one[0]))


def best_version(
    scores: Mapping[int, Iterable[SiteScore]],
    metric: str,
    mode: Literal["min", "max"],
    quorum: int,
    pooling: Pooling = _MEAN,
) -> int | None:
    """Return the version with the best ``metric``, or None if none is eligible, as `ranked_versions` says."""
    ranked = ranked_versions(scores, metric, mode, quorum, pooling)
    return ranked[0][0] if ranked else None


def worse_at(
    before: Iterable[SiteScore],
    after: Iterable[SiteScore],
    metric: str,
    mode: Literal["min", "max"],
) -> list[str]:
    """Return the sites at which a version has a worse value of ``metric`` than the one before, by name."""
    known = {score.site: score.value_of(metric) for score in before}
    found = []
    for score in after:
        old, new = known.get(score.site), score.value_of(metric)
        if old is not None and new is not None and (new > old if mode == "min" else new < old):
            found.append(score.site)
    return sorted(found)


def worse_sites(
    scores: Mapping[int, Sequence[SiteScore]],
    values: Mapping[int, float],
    metric: str,
    mode: Literal["min", "max"],
) -> dict[int, list[str]]:
    """Return, of each version that is better than all before it, where it is worse than the best of them.

    Args:
        scores: of each version.
        values: what `ranked_versions` has of those that are eligible.
        metric, mode: what selects.
    """
    found: dict[int, list[str]] = {}
    best: int | None = None
    sign = 1 if mode == "min" else -1
    for version in sorted(values):
        if best is not None and sign * values[version] >= sign * values[best]:
            continue
        if best is not None:
            found[version] = worse_at(scores[best], scores[version], metric, mode)
        best = version
    return found


def site_scores(
    scores: Mapping[int, Sequence[SiteScore]], metric: str | None, best: int | None
) -> tuple[dict[str, float], dict[str, float]]:
    """Return each site's value of a metric: of the last version that it scored, and of the best one."""
    last: dict[str, float] = {}
    of_best: dict[str, float] = {}
    for version in sorted(scores) if metric is not None else ():
        for score in scores[version]:
            value = score.value_of(metric or "")
            if value is not None:
                last[score.site] = value
                if version == best:
                    of_best[score.site] = value
    return last, of_best


@dataclass(frozen=True)
class EarlyEnd:
    """When a run ends before its last round: ``[selection]`` of a run file.

    Attributes:
        mode: whether less or more is better.
        patience: after so many rounds without a better version.
        target: once a version has this value, or a better one.
    """

    mode: Literal["min", "max"]
    patience: int | None = None
    target: float | None = None

    def reason(self, ranked: Sequence[tuple[int, float]], scored: int) -> str:
        """Return why the run ends; an empty text if it goes on.

        Args:
            ranked: as `ranked_versions` returns it, of the versions up to ``scored``.
            scored: the last version that the sites have scored.
        """
        if not ranked:
            return ""
        best, value = ranked[0]
        reached = self.target is not None and (
            value <= self.target if self.mode == "min" else value >= self.target
        )
        if reached:
            return f"the model of round {best} has {value:.6g}, and selection.target is {self.target:.6g}"
        if self.patience is not None and scored - best >= self.patience:
            return (
                f"no model of the last {scored - best} rounds is better than that of round {best}, and "
                f"selection.patience is {self.patience}"
            )
        return ""
