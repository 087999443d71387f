"""The tensors of a downloaded model; where it lies in a file, this process's memory holds one at a time."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from fedcore.model_file import ModelFile

__all__ = ["Received"]


class Received(Mapping[str, memoryview]):
    """Read-only raw bytes by name.

    A look-up lets the pages of the tensor before it go: they stay in the file, and come back if they are read
    again. So whoever reads one tensor after the other never has the whole model in memory beside its own. A model
    that `WorkFolder.received` keeps in memory stays there.
    """

    def __init__(self, file: ModelFile) -> None:
        self._file = file
        self._views = {name: view.toreadonly() for name, view in file.views().items()}
        self._last: str | None = None

    def __getitem__(self, name: str) -> memoryview:
        view = self._views[name]
        if self._last not in (None, name):
            self.release()
        self._last = name
        return view

    def release(self) -> None:
        """Let the pages of what was looked up last go."""
        if self._last is not None:
            start = self._file.data_offset + self._file.offsets[self._last]
            self._file.file.release(start, len(self._views[self._last]))
            self._last = None

    def __iter__(self) -> Iterator[str]:
        return iter(self._views)

    def __len__(self) -> int:
        return len(self._views)
