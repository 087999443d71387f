"""A world whose server surveys updates first: a rule of several passes decides which of them count."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from typing import Any

import numpy as np

from fedcore._core import Collector, CollectorOptions, Layout
from fedcore.errors import WeightError
from fedcore.rules.deciding import Decision, SeveralPasses

from .reference import FLOATS, stored
from .world import Site, World


class SurveyedWorld(World):
    """Like `World`; what it has decided outlives a server that is killed, and what it has measured does not.

    Args:
        several: the rule.
        options: numbers for its options.

    Attributes:
        squares: of the updates that were surveyed last, and of the base.
        surveyed: whose they are.
        decision: what the rule has made of them; None before it has.
    """

    def __init__(
        self, *args: Any, several: SeveralPasses, options: Mapping[str, float], **how: Any
    ) -> None:
        self.several, self.settings = several, several.having(options)
        self.decision: Decision | None = None
        self.squares: list[list[float]] = []
        self.surveyed: list[Site] = []
        self._digests: list[bytes] = []
        super().__init__(*args, **how)
        self._key = self.dice.randbytes(1032)

    @property
    def _options(self) -> CollectorOptions:
        return CollectorOptions(
            self.budget,
            spill=self.spill,
            codec=self._codec,
            threads=self.threads,
            survey=True,
            keep_surveyed=self.several.keeps_most,
            base_weight=0 if self.decision is None else self.decision.base,
            digest_key=self._key,
        )

    def _begin(self, *, fresh: bool) -> None:
        if not fresh and self.decision is not None:
            self._go_on()
            return
        self.decision, self.added, self._key = None, [], self.dice.randbytes(1032)
        assert self._base is not None
        place = self._base.file, self._base.data_offset
        self.collector = Collector.open(self.layout, len(self.collecting), place, self._options)
        self.server.start(self.collector)
        for site in self.collecting:
            try:
                self.server.add(self.collector, site.peer, site.set_id, site.weight)
            except WeightError as error:
                self.leave_out(site, "weight", str(error))
                return
            self.added.append(site)
        self.server.survey(self.collector, list(range(len(self.added))))

    def done(self) -> None:
        """All chunks are measured, or reduced."""
        assert self.collector is not None
        if not self.collector.surveying:
            super().done()
            return
        self.squares, self.surveyed = self.collector.distances, list(self.added)
        self.decision = self.several.decide(self.squares, [1] * len(self.added), self.settings)
        numbers = [k for k, weight in enumerate(self.decision.weights) if weight]
        self._digests = [self.collector.digests(k) for k in numbers]
        self.collecting = [self.added[k] for k in numbers]
        self.out, record = self._files(fresh=True)
        weights = [self.decision.weights[k] for k in numbers], self.decision.base
        place = self.out.file, self.out.data_offset
        self.server.close(self.collector, numbers, *place, record, weights=weights)
        while self.server.tick(self.now) == 0:  # some chunks at a time
            continue

    def _go_on(self) -> None:
        """Another server goes on with what was decided."""
        assert self._base is not None
        self.out, record = self._files(fresh=False)
        self.added = list(self.collecting)
        self.collector = Collector(
            self.layout,
            [
                (site.peer, set_id, w)
                for site, (_, set_id, w) in zip(self.added, self.weighed(), strict=True)
            ],
            self.out.file,
            self.out.data_offset,
            (self._base.file, self._base.data_offset),
            self._options,
            record=record,
            digests=self._digests,
        )
        self.server.start(self.collector)

    def weighed(self) -> list[tuple[str, bytes, int]]:
        """Whose updates count, and what they weigh."""
        assert self.decision is not None
        of = dict(zip((s.name for s in self.surveyed), self.decision.weights, strict=True))
        return [(site.name, site.set_id, of[site.name]) for site in self.collecting]


def distances(layout: Layout, flats: list[bytes]) -> list[list[float]]:
    """The squared distances of all pairs, over the floats, by NumPy."""
    wide = []
    for flat in flats:
        parts = []
        for _, dtype, _, offset, nbytes in layout.tensors:
            if dtype in FLOATS:
                bits = np.frombuffer(flat[offset : offset + nbytes], stored(dtype))
                narrow = (
                    (bits.astype(np.uint32) << 16).view(np.float32) if dtype == "BF16" else bits
                )
                parts.append(narrow.astype(np.longdouble))
        wide.append(np.concatenate(parts))
    found = [[0.0] * len(flats) for _ in flats]
    for one, other in itertools.combinations(range(len(flats)), 2):
        found[one][other] = found[other][one] = float(((wide[one] - wide[other]) ** 2).sum())
    return found
