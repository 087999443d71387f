"""The average of a run's models as a model file: its parameters rounded, and the other tensors of the last one."""

from __future__ import annotations

from pathlib import Path
from typing import Final

from fedcore._core import round_state
from fedcore.layout import ITEMSIZE
from fedcore.model_file import create_model, open_model

__all__ = ["write_average"]

_ELEMENTS: Final = 1 << 20
_ABOUT: Final = "fedcore.average"


def write_average(path: Path, model: Path, state: Path) -> None:
    """Write a model file with the tensors of ``model``, of which those in ``state`` have its elements.

    An element is rounded once to the model's dtype. Memory does not grow with the model.

    Raises:
        StorageError: it can't be written.
    """
    last, average = open_model(model), open_model(state)
    metadata = {k: v for k, v in last.metadata.items() if k != "format"}
    target = create_model(path, last.layout, {**metadata, _ABOUT: "ema"})
    wide = {name: ITEMSIZE[dtype] for name, dtype, *_ in average.layout.tensors}
    for name, dtype, _, offset, nbytes in last.layout.tensors:
        to, width = target.data_offset + offset, ITEMSIZE[dtype]
        source = average if name in wide else last
        begin, kept = source.data_offset + source.offsets[name], wide.get(name, width)
        for at in range(0, nbytes // width, _ELEMENTS):
            count = min(_ELEMENTS, nbytes // width - at)
            piece = begin + at * kept
            if name in wide:
                round_state(source.file, piece, target.file, to + at * width, dtype, count)
            else:
                out = target.file.view(to + at * width, count * width)
                out[:] = source.file.view(piece, count * width)
            source.file.release(piece, count * kept)
            target.file.release(to + at * width, count * width)
    for file in (last, average):
        file.file.check_whole()
    target.file.sync()
