"""Whether a model still holds the global model that was loaded into it.

Callbacks and hooks put other weights into a model: an average of the last steps, the best checkpoint, or the one
that was written when a cluster ended the job. A site scores the global model, and trains from it, all the same. So
the tensors are compared with checksums that were taken when they were loaded. Each process compares its own part
of a sharded tensor, without a collective call.
"""

from __future__ import annotations

from typing import Final

import torch

from fedcore._core import crc32c

from .parameters import ModelParameters, raw_bytes

__all__ = ["Aside", "Guard", "Probe", "shown"]

_SHOWN: Final = 4


class Guard:
    """Checksums of a model's tensors as they were loaded."""

    def __init__(self, parameters: ModelParameters) -> None:
        self._sums = {name: _checksum(part) for name, part in parameters.parts().items()}

    def changed(self, parameters: ModelParameters) -> list[str]:
        """Return the names of the tensors that hold something else now."""
        return [
            name
            for name, part in parameters.parts().items()
            if name in self._sums and _checksum(part) != self._sums[name]
        ]


class Aside:
    """Other weights, kept while the global model takes their place. They take as much memory as what travels."""

    def __init__(self, parameters: ModelParameters) -> None:
        self._kept = {name: part.clone() for name, part in parameters.parts().items()}

    def put_back(self, parameters: ModelParameters) -> None:
        """Let the model hold them again."""
        with torch.no_grad():
            for name, part in parameters.parts().items():
                part.copy_(self._kept[name])


class Probe:
    """One small tensor, which any swap of a whole model changes."""

    def __init__(self, parameters: ModelParameters) -> None:
        parts = [p for p in parameters.parts().values() if p.is_floating_point() and p.numel()]
        self._part = min(parts, key=lambda part: part.numel(), default=None)
        self._sum = self._now()

    def _now(self) -> int:
        return 0 if self._part is None else _checksum(self._part)

    def differs(self) -> bool:
        """Whether it holds something else than at first."""
        return self._now() != self._sum


def shown(names: list[str]) -> str:
    """Return the first few names, and how many more there are."""
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(map(repr, names[:_SHOWN])) + more


def _checksum(part: torch.Tensor) -> int:
    return crc32c(raw_bytes(part)) if part.numel() else 0
