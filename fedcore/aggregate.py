"""Average safetensors files by hand, with the reducer that the server uses."""

from __future__ import annotations

import contextlib
import functools
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Final

from ._core import reduce_files
from ._device import use_device
from .errors import ConfigError, LayoutError, NonFiniteError, StorageError, WeightError
from .layout import FLOATS, ModelFile, compare_layouts, create_model, open_model, sync_folder, table
from .protocol import MAX_WEIGHT
from .weighing import effective_weight

__all__ = ["aggregate_files"]

_BLOCK: Final = 1 << 20


def aggregate_files(
    inputs: Sequence[Path],
    weights: Sequence[int] | None,
    out: Path,
    *,
    threads: int = 1,
    device: str | None = None,
    force: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> ModelFile:
    """Write the weighted mean of ``inputs`` to ``out``.

    The order of the files does not matter: they are summed in the order of their weights, files of the same
    weight in the order of their flat bytes (canonical order of tensors, first difference decides), so that
    the same files with the same weights give the same output. Integers and booleans must be equal in all files.

    Args:
        inputs: safetensors files with the same tensors, in any order within the file.
        weights: one integer from 1 to 2**64 - 1 per file, of which `effective_weight` counts; all equal if None.
        out: file to write; it appears only when it is complete.
        threads: worker threads; the result does not depend on it.
        device: ``auto``, ``cpu`` or ``cuda``, for the process; FEDCORE_DEVICE decides if None. The result
            does not depend on it.
        force: replace ``out`` if it exists.
        progress: called with the bytes done and the bytes in all.

    Raises:
        ConfigError: no input, ``out`` is one of them, or the device can't be used.
        LayoutError: the files hold different tensors; each one is named.
        NonFiniteError: a file holds NaN or infinity; file and tensor are named.
        WeightError: a weight is out of range, or their number is wrong.
        StorageError: a file can't be read or written, or ``out`` exists.
    """
    counts = _check_arguments(inputs, weights, out, force)
    use_device(device)
    files = [open_model(path) for path in inputs]
    for file in files[1:]:
        difference = compare_layouts(
            table(files[0].layout), table(file.layout), str(files[0].path), str(file.path)
        )
        if difference is not None:
            raise LayoutError(f"the files hold different tensors: {difference}")
    _check_integers(files)
    pairs = sorted(zip(counts, files, strict=True), key=functools.cmp_to_key(_compare))
    counts, files = [weight for weight, _ in pairs], [file for _, file in pairs]
    partial = out.with_name(f".{out.name}.{os.getpid()}.partial")
    try:
        _reduce(files, counts, partial, threads, progress)
        partial.rename(out)
        sync_folder(out.parent)
    finally:
        with contextlib.suppress(FileNotFoundError):
            partial.unlink()
    return open_model(out)


def _check_arguments(
    inputs: Sequence[Path], weights: Sequence[int] | None, out: Path, force: bool
) -> list[int]:
    if not inputs:
        raise ConfigError("there is no file to average")
    counts = [1] * len(inputs) if weights is None else list(weights)
    if len(counts) != len(inputs):
        raise WeightError(
            f"there are {len(inputs)} files and {len(counts)} weights; give one weight per file"
        )
    for path, weight in zip(inputs, counts, strict=True):
        if isinstance(weight, bool) or not isinstance(weight, int) or not 1 <= weight <= MAX_WEIGHT:
            raise WeightError(
                f"weight {weight!r} of {path}: expected an integer from 1 to 2**64 - 1, the number of "
                "training examples"
            )
    if not out.parent.is_dir():
        raise StorageError(f"{out}: there is no folder {out.parent}")
    if out.exists() and any(out.samefile(path) for path in inputs if path.exists()):
        raise ConfigError(f"{out} is one of the inputs; give the result another name")
    if out.exists() and not force:
        raise StorageError(f"{out} exists; use --force to replace it")
    return [effective_weight(count) for count in counts]


def _compare(one: tuple[int, ModelFile], other: tuple[int, ModelFile]) -> int:
    """Order by weight, then by flat bytes; equal files may come in either order, which changes nothing."""
    if one[0] != other[0]:
        return -1 if one[0] < other[0] else 1
    for (name, a), b in zip(one[1].views().items(), other[1].views().values(), strict=True):
        for at in range(0, len(a), _BLOCK):
            x, y = bytes(a[at : at + _BLOCK]), bytes(b[at : at + _BLOCK])
            if x != y:
                return -1 if x < y else 1
        for file in (one[1], other[1]):
            file.file.release(file.data_offset + file.offsets[name], len(a))
    return 0


def _check_integers(files: Sequence[ModelFile]) -> None:
    first = files[0].views()
    fixed = [(name, dtype) for name, dtype, *_ in files[0].layout.tensors if dtype not in FLOATS]
    for file in files[1:]:
        views = file.views()
        for name, dtype in fixed:
            if views[name] != first[name]:
                raise LayoutError(
                    f"tensor {name!r} is {dtype} and differs between {files[0].path.name} and "
                    f"{file.path.name}; only floats can be averaged"
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
