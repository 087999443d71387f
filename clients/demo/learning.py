"""What the demo's models have in common: the training loop and the scores (imports torch)."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Generic, Protocol, TypeVar

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from peft import PeftModel

#: Called after every step with the number of steps so far and the step's loss.
Notice = Callable[[int, float], None]


class Rows(Protocol):
    """Some sites' rows, ready for the model."""

    def __len__(self) -> int: ...


R = TypeVar("R", bound=Rows)


@dataclass(frozen=True)
class Score:
    """How good a model is on some rows.

    Attributes:
        loss: mean loss.
        each: the task's metric for every row, in row order.
    """

    loss: float
    each: Tensor

    @property
    def value(self) -> float:
        """The task's metric."""
        return float(self.each.double().mean())


class Learner(ABC, Generic[R]):
    """The model of a task, and how it reads rows, learns and is scored.

    Attributes:
        base: the pretrained model.
    """

    base: Any

    def prepare(self, site: str, notice: Callable[[int, int], None]) -> None:
        """Do the work on a site's rows that every arm needs, once for all of them; none by default.

        Args:
            site: whose rows.
            notice: called with the number of batches done so far and of all batches.
        """

    @abstractmethod
    def rows(self, sites: Sequence[str], split: str) -> R:
        """Read one split of some sites."""

    @abstractmethod
    def adapter(self) -> PeftModel:
        """Wrap the base so that a new adapter, the same for every site, is all that trains."""

    @abstractmethod
    def loss(self, model: nn.Module, rows: R, batch: Sequence[int]) -> Tensor:
        """The mean loss of a batch."""

    @abstractmethod
    def score(self, model: nn.Module, rows: R) -> Score:
        """Score a model."""

    def train(
        self,
        model: nn.Module,
        rows: R,
        batches: Iterable[Sequence[int]],
        learning_rate: float,
        notice: Notice | None = None,
    ) -> list[float]:
        """One AdamW step per batch, at a constant rate; returns the losses."""
        trained = [p for p in model.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(trained, lr=learning_rate, weight_decay=0.0)
        model.train()
        losses: list[float] = []
        for batch in batches:
            loss = self.loss(model, rows, batch)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            losses.append(float(loss.detach()))
            if notice is not None:
                notice(len(losses), losses[-1])
        return losses


def take(batches: Iterator[list[int]], count: int) -> list[list[int]]:
    """The next ``count`` batches."""
    return [next(batches) for _ in range(count)]
