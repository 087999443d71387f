"""What a framework is given to do in a measured round."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["TENSORS", "Work"]

TENSORS = 148


@dataclass(frozen=True)
class Work:
    """What every framework is given to do."""

    size: int
    sites: int
    rounds: int

    @property
    def elements(self) -> int:
        """Elements of each of the fp32 tensors."""
        return max(1, self.size // TENSORS // 4)

    @property
    def added(self) -> float:
        """What all rounds together add to a value, exact in fp32."""
        return self.rounds * (self.sites + 1) / 2

    @property
    def model_bytes(self) -> int:
        return self.elements * TENSORS * 4

    @property
    def round_bytes(self) -> int:
        """Every site gets the model and sends one."""
        return 2 * self.sites * self.model_bytes
