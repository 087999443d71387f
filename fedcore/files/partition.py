"""Split one data set over sites: evenly, by label with a Dirichlet skew, by source, or by length.

Each function takes one value per example and returns a `Partition`: the indices that each site holds. Every
example is at exactly one site, and the split is a function of the arguments and the seed alone: random numbers are
SHA-256 in counter mode, so they depend on no library's version.

Papers:
    Hsu, Qi, Brown 2019, "Measuring the effects of non-identical data distribution for federated visual
    classification" (`dirichlet` with ``balanced=True``).
    Yurochkin et al. 2019, "Bayesian nonparametric federated learning of neural networks", and Li, Diao, Chen, He
    2022, "Federated learning on non-IID data silos: an experimental study" (NIID-Bench): `dirichlet`.
    Marsaglia, Tsang 2000, "A simple method for generating gamma variables".
    Graham 1969, "Bounds on multiprocessing timing anomalies" (largest first, in `by_source`).
"""

from __future__ import annotations

import hashlib
import math
from bisect import bisect_right
from collections import Counter
from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any, Final

from fedcore.errors import ConfigError

from .pictures import SITES, caption, new_figure, save, styled

__all__ = ["Partition", "by_length", "by_source", "dirichlet", "iid", "plot"]

_ATTEMPTS: Final = 1000
_LEAST_ALPHA: Final = 1e-9


@dataclass(frozen=True)
class Partition:
    """Who holds what.

    Attributes:
        sites: the indices of each site's examples, ascending; site ``i`` is ``sites[i]``.
    """

    sites: tuple[tuple[int, ...], ...]

    @property
    def sizes(self) -> list[int]:
        """Number of examples of each site."""
        return [len(site) for site in self.sites]

    def counts(self, values: Sequence[Hashable]) -> list[dict[Any, int]]:
        """Return, for each site, how many of its examples have which value (a label, a source)."""
        return [dict(Counter(values[index] for index in site)) for site in self.sites]


def iid(examples: int, sites: int, *, seed: int = 0) -> Partition:
    """Deal ``examples`` shuffled examples out to ``sites`` sites, whose sizes differ by one at most.

    Raises:
        ConfigError: there are fewer examples than sites, or no site.
    """
    _check(examples, sites, 1)
    order = list(range(examples))
    _Stream(seed, "iid").shuffle(order)
    return _cut(order, _even(examples, sites))


def dirichlet(
    labels: Sequence[Hashable],
    sites: int,
    *,
    alpha: float,
    balanced: bool = False,
    min_size: int = 1,
    seed: int = 0,
) -> Partition:
    """Skew the sites' label distributions: the smaller ``alpha``, the fewer labels a site sees.

    Unbalanced (Yurochkin et al. 2019; Li et al. 2022): for each label, the shares of the sites are drawn from a
    symmetric Dirichlet(alpha), and its shuffled examples are cut in these shares. The sites' sizes differ. Shares
    are drawn again until each site has ``min_size`` examples.

    Balanced (Hsu et al. 2019): all sites have the same number of examples, give or take one. Each site's label
    distribution is drawn from Dirichlet(alpha x p), p being the labels' shares in the data, and its examples
    from that distribution without replacement; a label that has run out is left out. The sites take turns, example
    by example, so that no site is left with the remainder of all others.

    Args:
        labels: one per example; anything hashable.
        sites: how many sites there are.
        alpha: concentration. With 100 the sites are nearly alike; with 0.1 most hold one or two labels.
        balanced: see above.
        min_size: the least number of examples of a site.
        seed: 0 or more.

    Raises:
        ConfigError: an argument is out of range, or 1,000 draws gave no split with ``min_size`` at each site.
    """
    _check(len(labels), sites, min_size)
    if not (math.isfinite(alpha) and alpha >= _LEAST_ALPHA):
        raise ConfigError(f"alpha {alpha!r}: expected a number of {_LEAST_ALPHA:g} or more")
    stream = _Stream(seed, "dirichlet")
    groups = _groups(labels)
    for group in groups:
        stream.shuffle(group)
    if balanced:
        return _balanced(groups, len(labels), sites, alpha, stream)
    for _ in range(_ATTEMPTS):
        cuts = [_shares(stream.dirichlet([alpha] * sites), len(group)) for group in groups]
        if all(sum(cut[site] for cut in cuts) >= min_size for site in range(sites)):
            break
    else:
        raise ConfigError(
            f"alpha {alpha:g}: {_ATTEMPTS:,} draws gave no split with at least {min_size} examples at each of "
            f"{sites} sites; raise alpha, or lower the minimum size or the number of sites"
        )
    held: list[list[int]] = [[] for _ in range(sites)]
    for group, cut in zip(groups, cuts, strict=True):
        for site, part in enumerate(_cut(group, cut).sites):
            held[site] += part
    return _partition(held)


def by_source(sources: Sequence[Hashable], sites: int | None = None, *, seed: int = 0) -> Partition:
    """Keep each source (a hospital, an author, a domain) together at one site.

    Without ``sites``, each source is a site, in the order of their first examples. With fewer sites than sources,
    the largest source that is left goes to the site with the fewest examples (Graham 1969); the seed decides ties.

    Raises:
        ConfigError: there are more sites than sources, or no example.
    """
    groups = _groups(sources)
    count = len(groups) if sites is None else sites
    _check(len(sources), count, 1)
    if count > len(groups):
        raise ConfigError(f"{count} sites, but only {len(groups)} sources; a source is at one site")
    if count == len(groups):
        return _partition(groups)
    _Stream(seed, "source").shuffle(groups)
    held: list[list[int]] = [[] for _ in range(count)]
    for group in sorted(groups, key=len, reverse=True):
        min(held, key=len).extend(group)
    return _partition(held)


def by_length(lengths: Sequence[float], sites: int, *, seed: int = 0) -> Partition:
    """Give the first site the shortest examples and the last site the longest; sizes differ by one at most.

    Args:
        lengths: one per example, in any unit (characters, tokens).
        sites: how many sites there are.
        seed: decides between examples of one length.

    Raises:
        ConfigError: there are fewer examples than sites, or no site.
    """
    _check(len(lengths), sites, 1)
    order = list(range(len(lengths)))
    _Stream(seed, "length").shuffle(order)
    order.sort(key=lambda index: lengths[index])
    return _cut(order, _even(len(lengths), sites))


@styled
def plot(
    partition: Partition,
    values: Sequence[Hashable],
    path: Path | str,
    *,
    names: Sequence[str] | None = None,
    title: str = "",
) -> None:
    """Draw who holds what as one stacked bar per site; needs matplotlib (the package's ``plot`` extra).

    Args:
        partition: the split.
        values: one per example, such as its label or source; each gets a colour.
        path: the picture; its ending says which kind.
        names: of the sites; ``site-1`` and so on if None.
        title: above the bars.

    Raises:
        ConfigError: matplotlib is not installed.
    """
    counts = partition.counts(values)
    kinds = sorted({kind for count in counts for kind in count}, key=str)
    shown = list(names) if names is not None else _site_names(len(counts))
    figure, (axes,) = new_figure(size=(7, 1.4 + 0.4 * len(shown)))
    colours = _colours(len(kinds))
    left = [0] * len(shown)
    for place, kind in enumerate(kinds):
        widths = [count.get(kind, 0) for count in counts]
        axes.barh(shown, widths, left=left, color=colours[place % len(colours)], label=str(kind))
        left = [a + b for a, b in zip(left, widths, strict=True)]
    axes.invert_yaxis()
    axes.set(xlabel="examples", title=title)
    if len(kinds) <= 20:
        axes.legend(loc="center left", bbox_to_anchor=(1.0, 0.5))
    caption(
        figure, [f"{sum(map(sum, (c.values() for c in counts))):,} examples, each at one site."]
    )
    save(figure, Path(path), beside=())


def _colours(kinds: int) -> Sequence[Any]:
    """Return colours that tell so many kinds apart, as far as there are so many."""
    if kinds <= len(SITES):
        return SITES
    import matplotlib as mpl

    palette: Any = mpl.colormaps["tab20" if kinds > 10 else "tab10"]
    colours: Sequence[Any] = palette.colors
    return colours


def _site_names(sites: int) -> list[str]:
    return [f"site-{site + 1}" for site in range(sites)]


# --- splitting -------------------------------------------------------------------------------------


def _check(examples: int, sites: int, min_size: int) -> None:
    if sites < 1:
        raise ConfigError(f"sites {sites}: expected at least 1")
    if min_size < 0:
        raise ConfigError(f"minimum size {min_size}: expected 0 or more")
    if examples < sites * max(1, min_size):
        raise ConfigError(
            f"{examples} examples are too few for {sites} sites with at least {max(1, min_size)} each"
        )


def _groups(values: Sequence[Hashable]) -> list[list[int]]:
    """Return the indices of each value, values in the order of their first examples."""
    groups: dict[Hashable, list[int]] = {}
    for index, value in enumerate(values):
        groups.setdefault(value, []).append(index)
    return list(groups.values())


def _even(examples: int, sites: int) -> list[int]:
    return [examples // sites + (site < examples % sites) for site in range(sites)]


def _shares(probabilities: Iterable[float], examples: int) -> list[int]:
    """Cut ``examples`` in these shares: what is left of rounding down goes to whoever lost most by it."""
    exact = [p * examples for p in probabilities]
    whole = [int(value) for value in exact]
    order = sorted(range(len(exact)), key=lambda site: whole[site] - exact[site])
    for site in order[: examples - sum(whole)]:
        whole[site] += 1
    return whole


def _cut(order: Sequence[int], sizes: Iterable[int]) -> Partition:
    ends = list(accumulate(sizes))
    return _partition([order[a:b] for a, b in zip([0, *ends], ends, strict=False)])


def _partition(held: Iterable[Iterable[int]]) -> Partition:
    return Partition(tuple(tuple(sorted(site)) for site in held))


def _balanced(
    groups: list[list[int]], examples: int, sites: int, alpha: float, stream: _Stream
) -> Partition:
    prior = [alpha * len(group) / examples for group in groups]
    drawn = [stream.dirichlet(prior) for _ in range(sites)]
    sizes = _even(examples, sites)
    left = [list(group) for group in groups]
    held: list[list[int]] = [[] for _ in range(sites)]
    sums = [list(accumulate(weights)) for weights in drawn]
    for turn in range(max(sizes)):
        for site in range(sites):
            if turn >= sizes[site]:
                continue
            if sums[site][-1] <= 0:  # all that the site was to have has run out
                drawn[site] = [float(len(group)) for group in left]
                sums[site] = list(accumulate(drawn[site]))
            label = bisect_right(sums[site], stream.uniform() * sums[site][-1])
            label = min(label, len(groups) - 1)
            while not left[label]:  # rounding at the border of a label that has run out
                label = (label + 1) % len(groups)
            held[site].append(left[label].pop())
            if not left[label]:
                for weights, other in zip(drawn, range(sites), strict=True):
                    weights[label] = 0.0
                    sums[other] = list(accumulate(weights))
    return _partition(held)


# --- random numbers --------------------------------------------------------------------------------


class _Stream:
    """Random numbers: 64-bit words of SHA-256(purpose, seed, block number)."""

    def __init__(self, seed: int, purpose: str) -> None:
        if seed < 0:
            raise ConfigError(f"seed {seed}: expected 0 or more")
        self._prefix = f"fedcore.partition/{purpose}/{seed}/".encode()
        self._block = 0
        self._words: list[int] = []

    def _word(self) -> int:
        if not self._words:
            digest = hashlib.sha256(self._prefix + str(self._block).encode()).digest()
            self._block += 1
            self._words = [int.from_bytes(digest[i : i + 8], "little") for i in (24, 16, 8, 0)]
        return self._words.pop()

    def uniform(self) -> float:
        """Return a number in (0, 1), a multiple of 2**-53 moved by half of it."""
        return ((self._word() >> 11) + 0.5) * 2.0**-53

    def below(self, limit: int) -> int:
        """Return an integer from 0 to ``limit`` - 1, each as likely as the others (Lemire 2019)."""
        threshold = (1 << 64) % limit
        while True:
            product = self._word() * limit
            if product & 0xFFFFFFFFFFFFFFFF >= threshold:
                return product >> 64

    def shuffle(self, values: list[Any]) -> None:
        """Shuffle in place (Fisher and Yates)."""
        for last in range(len(values) - 1, 0, -1):
            other = self.below(last + 1)
            values[last], values[other] = values[other], values[last]

    def _normal(self) -> float:
        return math.sqrt(-2 * math.log(self.uniform())) * math.cos(2 * math.pi * self.uniform())

    def _log_gamma(self, shape: float) -> float:
        """Return the logarithm of a gamma variable (Marsaglia and Tsang 2000); a small shape underflows."""
        if shape < 1:
            return self._log_gamma(shape + 1) + math.log(self.uniform()) / shape
        d = shape - 1 / 3
        c = 1 / math.sqrt(9 * d)
        while True:
            x = self._normal()
            v = 1 + c * x
            if v > 0 and math.log(self.uniform()) < 0.5 * x * x + d - d * v**3 + d * math.log(v**3):
                return math.log(d) + 3 * math.log(v)

    def dirichlet(self, alphas: Sequence[float]) -> list[float]:
        """Return one draw; its numbers add up to 1."""
        logs = [self._log_gamma(alpha) for alpha in alphas]
        top = max(logs)
        weights = [math.exp(value - top) for value in logs]
        total = sum(weights)
        return [weight / total for weight in weights]
