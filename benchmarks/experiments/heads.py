"""Sites that train a linear head on what a frozen encoder makes of texts: a round takes milliseconds."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final

from fedcore.files.partition import dirichlet

from .peft import Lab, Settings, Source

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["HeadSettings", "Heads", "mark_of"]

_SCALE: Final = 10.0
"""The length of a row's vector, as the head of the other experiments has it."""


@dataclass(frozen=True)
class HeadSettings(Settings):
    """What all runs share.

    Attributes:
        sites: how many take part, with texts dealt out by label with the skew ``alpha``.
        rate: of the sites' SGD.
    """

    max_tokens: int = 48
    train_rows: int = 1600
    test_rows: int = 400
    rounds: int = 30
    steps: int = 10
    batch_size: int = 16
    sites: int = 10
    alpha: float = 1.0
    rate: float = 0.3


class Heads:
    """The sites of a seed, and their texts after the encoder.

    Attributes:
        rows: how many rows each site holds.
    """

    def __init__(self, settings: HeadSettings, source: Source, seed: int) -> None:
        import torch

        self._settings, self._seed = settings, seed
        lab = Lab(settings, source, seed)
        self._x, self._y = _vectors(lab, "train")
        self._test = _vectors(lab, "test")
        self._classes = len(lab.pool.labels)
        labels = [text.label for text in lab.pool.train]
        held = dirichlet(
            labels, settings.sites, alpha=settings.alpha, min_size=settings.batch_size, seed=seed
        )
        self._held = [torch.tensor(list(numbers)) for numbers in held.sites]
        self.rows: Sequence[int] = [len(numbers) for numbers in self._held]

    def start(self) -> Tensor:
        """Return the model that every run begins with, all zeros, as one row of values."""
        import torch

        return torch.zeros(self._x.shape[1] * self._classes)

    def train(self, model: Tensor, site: int, round_: int, *, flipped: bool = False) -> Tensor:
        """Return what some steps of SGD on a site's rows change.

        The batches follow from seed, site and round. ``flipped``: the rows have wrong labels.
        """
        import torch

        rows, settings = self._held[site], self._settings
        dice = torch.Generator().manual_seed((self._seed * 1000 + site) * 10_000 + round_)
        head = model.view(self._classes, -1).clone()
        for _ in range(settings.steps):
            batch = rows[torch.randint(len(rows), (settings.batch_size,), generator=dice)]
            x, y = self._x[batch], self._y[batch]
            y = self._classes - 1 - y if flipped else y
            wrong = torch.softmax(x @ head.T, dim=1)
            wrong[torch.arange(len(y)), y] -= 1
            head -= settings.rate / len(y) * wrong.T @ x
        return head.flatten() - model

    def score(self, model: Tensor) -> float:
        """Return the accuracy on all test rows."""
        x, y = self._test
        return float(((x @ model.view(self._classes, -1).T).argmax(1) == y).double().mean())


def mark_of(settings: HeadSettings, source: Source, seed: int, **more: object) -> str:
    """Return a hash of everything that a run depends on; ``more``: what its name does not say."""
    plain = {
        "settings": asdict(settings),
        "seed": seed,
        "model": Path(str(source.model)).name,
        "texts": [asdict(text) for text in source.texts],
        **more,
    }
    return hashlib.sha256(json.dumps(plain, sort_keys=True).encode()).hexdigest()[:16]


def _vectors(lab: Lab, side: str) -> tuple[Tensor, Tensor]:
    """Return the mean of each text's token vectors, at a fixed length, and the class numbers."""
    import torch

    rows = lab.rows(side)
    means = torch.stack([state.mean(0) for state in rows.states])
    vectors = torch.nn.functional.normalize(means, dim=1) * _SCALE
    return torch.cat([vectors, torch.ones(len(vectors), 1)], dim=1), rows.labels
