"""Ways to bring the adapters of many sites together, on the factors alone (imports torch).

An adapted module's *factors* are B (outputs x rank), with LoRA's scale in it, and A (rank x inputs). What they add
to the module's weight is B A. Sites differ in rank: a site has the first rows of A and the first columns of B.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, Final, Protocol

import numpy as np
import torch
from torch import Tensor

from fedcore._core import factor_error, recompress

__all__ = ["WAYS", "Factors", "Sent", "Way", "draw_rows"]

Factors = dict[str, tuple[Tensor, Tensor]]
"""B and A of each module, by its name."""


@dataclass(frozen=True)
class Sent:
    """What a site has at the start of a round.

    Attributes:
        factors: what it trains.
        rest: what is added to the weights of its modules and stays as it is; nothing where a module is missing.
        halves: which of the two factors it trains and sends.
    """

    factors: Factors
    rest: Mapping[str, Tensor]
    halves: frozenset[str] = frozenset("AB")


class Server(Protocol):
    """What a way keeps from round to round."""

    def begin(self, site: int, rank: int, round_: int) -> Sent:
        """Return what a site starts a round with; rounds count from 1."""

    def end(self, weights: Sequence[int], made: Mapping[int, Factors]) -> None:
        """Take what the sites have trained, by site; ``weights`` are theirs, in the same order."""

    def whole(self, site: int, /) -> dict[str, Tensor]:
        """Return what is scored at a site: all that the adapter adds to each module's weight."""


@dataclass
class _Halves:
    """The mean of each factor by itself; what a site of a lower rank does not have is zero.

    ``halves`` are trained and travel in a round. ``personal``: B is each site's own.
    """

    start: Factors
    halves: Callable[[int], frozenset[str]]
    personal: bool = False
    _own: dict[int, Factors] = field(default_factory=dict)
    _round: int = 0

    def begin(self, site: int, rank: int, round_: int) -> Sent:
        self._round = round_
        mine = self._of(site)
        return Sent(
            {name: (mine[name][0][:, :rank], a[:rank]) for name, (_, a) in self.start.items()},
            {},
            frozenset("AB") if self.personal else self.halves(round_),
        )

    def end(self, weights: Sequence[int], made: Mapping[int, Factors]) -> None:
        halves = self.halves(self._round)
        for name, (b, a) in self.start.items():
            rank = a.shape[0]
            both = [padded(factors[name], rank) for factors in made.values()]
            self.start[name] = (
                _mean([one[0] for one in both], weights) if "B" in halves else b,
                _mean([one[1] for one in both], weights) if "A" in halves else a,
            )
            if self.personal:
                for site, (own, _) in zip(made, both, strict=True):
                    self._own.setdefault(site, {})[name] = (own, a)

    def _of(self, site: int) -> Factors:
        return self._own.get(site, self.start) if self.personal else self.start

    def whole(self, site: int) -> dict[str, Tensor]:
        return {name: self._of(site)[name][0] @ a for name, (_, a) in self.start.items()}


@dataclass
class _Products:
    """The mean of the products, kept as the best factors of rank ``most``.

    Sites send differences to what they were given; ``zero``: the products themselves, and no site has the rest.
    """

    start: Factors
    most: int
    zero: bool
    _ranks: dict[int, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.start = {
            name: (b.new_zeros(b.shape[0], self.most), a.new_zeros(self.most, a.shape[1]))
            for name, (b, a) in self.start.items()
        }

    def begin(self, site: int, rank: int, round_: int) -> Sent:
        self._ranks[site] = rank
        seed = torch.Generator().manual_seed(round_)
        factors, rest = {}, {}
        for name, (b, a) in self.start.items():
            first = a[:rank].clone()
            empty = ~first.any(dim=1)
            first[empty] = draw_rows(rank, a.shape[1], seed)[empty]
            factors[name] = (b[:, :rank], first)
            if not self.zero and rank < self.most:
                rest[name] = b[:, rank:] @ a[rank:]
        return Sent(factors, rest)

    def end(self, weights: Sequence[int], made: Mapping[int, Factors]) -> None:
        total = sum(weights)
        for name, (b, a) in self.start.items():
            terms = [
                (weight / total, *_arrays(factors[name]))
                for weight, factors in zip(weights, made.values(), strict=True)
            ]
            if not self.zero:
                left = torch.tensor(
                    [
                        sum(
                            w
                            for w, site in zip(weights, made, strict=True)
                            if self._ranks[site] <= i
                        )
                        / total
                        for i in range(self.most)
                    ]
                )
                terms.append((1.0, *_arrays((b * left, a))))
            found = [torch.from_numpy(np.float32(f)) for f in recompress(terms, self.most)[:2]]
            self.start[name] = padded((found[0], found[1]), self.most)

    def whole(self, _site: int) -> dict[str, Tensor]:
        return {name: b @ a for name, (b, a) in self.start.items()}


def _arrays(factors: tuple[Tensor, Tensor]) -> tuple[Any, Any]:
    return factors[0].contiguous().numpy(), factors[1].contiguous().numpy()


def _mean(tensors: Sequence[Tensor], weights: Sequence[int]) -> Tensor:
    sums = sum(w * t.double() for w, t in zip(weights, tensors, strict=True))
    assert isinstance(sums, Tensor)
    return (sums / sum(weights)).float()


def padded(factors: tuple[Tensor, Tensor], rank: int) -> tuple[Tensor, Tensor]:
    """Return the factors with columns and rows of zeros up to a rank."""
    b, a = factors
    more = rank - a.shape[0]
    return torch.nn.functional.pad(b, (0, more)), torch.nn.functional.pad(a, (0, 0, 0, more))


def draw_rows(rank: int, inputs: int, dice: torch.Generator) -> Tensor:
    """Return rows of A as PEFT draws them: uniform within 1 / sqrt(inputs)."""
    return (torch.rand(rank, inputs, generator=dice) * 2 - 1) / math.sqrt(inputs)


def averaging_error(weights: Sequence[int], made: Sequence[Factors]) -> float:
    """Return how far the product of the mean factors is from the mean of the products, relative to that."""
    whole = wrong = 0.0
    for name, (_, a) in made[0].items():
        rank = max(a.shape[0], *(one[name][1].shape[0] for one in made))
        pairs = [_arrays(padded(one[name], rank)) for one in made]
        norm, error, _ = factor_error([float(w) for w in weights], pairs)
        whole, wrong = whole + norm**2, wrong + error**2
    return math.sqrt(wrong / whole) if whole else 0.0


@dataclass(frozen=True)
class Way:
    """One way.

    Attributes:
        halves: the factors that are trained and travel, round after round, and then from the first again.
        personal: B is each site's own, and A alone travels.
        products: the products are averaged, and the result travels to the sites at the rank that is kept.
        zero: and not their differences to what sites were given.
    """

    halves: tuple[str, ...] = ("AB",)
    personal: bool = False
    products: bool = False
    zero: bool = False

    def server(self, start: Factors, most: int) -> Server:
        """Return what it keeps: ``start`` holds factors with B = 0, and ``most`` is the rank that is kept."""
        if self.products:
            return _Products(dict(start), most, self.zero)
        rounds = [frozenset(halves) for halves in self.halves]
        return _Halves(dict(start), lambda r: rounds[(r - 1) % len(rounds)], self.personal)

    def traffic(self, outputs: int, inputs: int, rank: int, most: int) -> tuple[int, int]:
        """Return how many bytes a site of a rank sends and gets in a round, on average, for one module."""
        sizes = {"A": 4 * rank * inputs, "B": 4 * rank * outputs}
        sent = sum(sizes[half] for halves in self.halves for half in halves) // len(self.halves)
        return sent, 4 * most * (outputs + inputs) if self.products else sent


WAYS: Final[Mapping[str, Way]] = MappingProxyType(
    {
        "factors": Way(),
        "freeze-a": Way(halves=("B",)),
        "alternate": Way(halves=("B", "A")),
        "share-a": Way(halves=("A",), personal=True),
        "zero": Way(products=True, zero=True),
        "exact": Way(products=True),
    }
)
"""FedIT, FFA-LoRA, RoLoRA, FedSA-LoRA, FlexLoRA, and differences to the whole adapter (docs/lora.md)."""
