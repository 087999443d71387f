"""Whether an update is the global model again, which is worth a warning."""

from __future__ import annotations

from collections.abc import Mapping

from typing_extensions import Buffer

from fedcore._core import same_bytes
from fedcore.model_file import Reader

__all__ = ["Unchanged"]


class Unchanged:
    """A reader that compares what goes through it, up to the first byte that differs.

    Attributes:
        throughout: whether all that was read so far is as it was received.
    """

    def __init__(self, read: Reader, received: Mapping[str, memoryview]) -> None:
        self._read, self._received = read, received
        self.throughout = True

    def __call__(self, name: str) -> Buffer:
        """Return the raw bytes of the tensor of that name."""
        found = self._read(name)
        if self.throughout:
            self.throughout = same_bytes(found, self._received[name])
        return found
