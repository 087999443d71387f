"""Average safetensors files by hand, with the reducer that the server uses."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Sequence
from pathlib import Path

from ._core import reduce_files
from .errors import ConfigError, LayoutError, NonFiniteError, StorageError, WeightError
from .layout import FLOATS, ModelFile, compare_layouts, create_model, open_model, table

__all__ = ["aggregate_files"]


def aggregate_files(
    inputs: Sequence[Path],
    weights: Sequence[int] | None,
    out: Path,
    *,
    threads: int = 1,
    force: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> ModelFile:
    """Write the weighted mean of ``inputs`` to ``out``.

    The order of the files does not matter: they are summed in the order of (weight, SHA-256 of their tensors),
    so that the same files with the same weights give the same bytes. Integers and booleans must be equal in
    all files.

    Args:
        inputs: safetensors files with the same tensors, in any order within the file.
        weights: one integer from 1 to 2**24 - 1 per file; all equal if None.
        out: file to write; it appears only when it is complete.
        threads: worker threads; the result does not depend on it.
        force: replace ``out`` if it exists.
        progress: called with the bytes done and the bytes in all.

    Raises:
        ConfigError: no input, or ``out`` is one of them.
        LayoutError: the files hold different tensors; each one is named.
        NonFiniteError: a file holds NaN or infinity; file and tensor are named.
        WeightError: a weight is out of range, or their number is wrong.
        StorageError: a file can't be read or written, or ``out`` exists.
    """
    if not inputs:
        raise ConfigError("there is no file to average")
    counts = [1] * len(inputs) if weights is None else list(weights)
    if len(counts) != len(inputs):
        raise WeightError(
            f"there are {len(inputs)} files and {len(counts)} weights; give one weight per file"
        )
    if out.exists() and any(out.samefile(path) for path in inputs if path.exists()):
        raise ConfigError(f"{out} is one of the inputs; give the result another name")
    if out.exists() and not force:
        raise StorageError(f"{out} exists; use --force to replace it")
    files = [open_model(path) for path in inputs]
    for file in files[1:]:
        difference = compare_layouts(
            table(files[0].layout), table(file.layout), str(files[0].path), str(file.path)
        )
        if difference is not None:
            raise LayoutError(f"the files hold different tensors: {difference}")
    order = sorted(range(len(files)), key=lambda i: (counts[i], files[i].sha256()))
    files, counts = [files[i] for i in order], [counts[i] for i in order]
    _check_integers(files)
    partial = out.with_name(f".{out.name}.{os.getpid()}.partial")
    try:
        _reduce(files, counts, partial, threads, progress)
        partial.rename(out)
    finally:
        with contextlib.suppress(FileNotFoundError):
            partial.unlink()
    return open_model(out)


def _check_integers(files: Sequence[ModelFile]) -> None:
    for name, dtype, *_ in files[0].layout.tensors:
        if dtype not in FLOATS and any(
            file.view(name) != files[0].view(name) for file in files[1:]
        ):
            raise LayoutError(
                f"tensor {name!r} is {dtype} and differs between the files; only floats can be averaged"
            )


def _reduce(
    files: Sequence[ModelFile],
    weights: Sequence[int],
    path: Path,
    threads: int,
    progress: Callable[[int, int], None] | None,
) -> None:
    layout = files[0].layout
    target = create_model(path, layout)
    tensors = [
        (
            dtype,
            nbytes,
            [f.data_offset + f.offsets[name] for f in files],
            target.data_offset + offset,
        )
        for name, dtype, _, offset, nbytes in layout.tensors
    ]

    def report(done: int) -> None:
        if progress is not None:
            progress(done, layout.total_bytes)

    bad = reduce_files([f.file for f in files], weights, tensors, target.file, threads, report)
    if bad is not None:
        source, tensor, element = bad
        raise NonFiniteError(
            f"{files[source].path}: NaN or infinity in tensor {layout.tensors[tensor][0]!r}, element {element}"
        )
    target.file.sync()
