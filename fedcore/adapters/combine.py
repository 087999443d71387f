"""Combine the adapters of several sites into one folder that PEFT opens."""

from __future__ import annotations

import functools
import glob
import os
import shutil
from collections.abc import Callable, Collection, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from fedcore._core import Layout
from fedcore.errors import ConfigError, StorageError, WeightError
from fedcore.layout import DEFAULT_CHUNK_BYTES
from fedcore.model_file import ModelFile, create_model
from fedcore.protocol import MAX_WEIGHT
from fedcore.replacing import sync_folder
from fedcore.weighing import effective_weight

from .comparing import check_together, compare_adapters
from .folder import WEIGHTS, open_adapter
from .groups import CONFIG
from .making import Making, make_config, plan
from .methods import METHODS, Method
from .report import Figure, Report

__all__ = ["combine_adapters"]


def combine_adapters(
    folders: Sequence[Path],
    weights: Sequence[int] | None,
    out: Path,
    *,
    method: Method,
    max_rank: int | None = None,
    base: Path | None = None,
    allow: Collection[str] = (),
    threads: int = 1,
    progress: Callable[[int, int], None] | None = None,
) -> Report:
    """Combine adapters of LoRA and write the folder ``out``: ``adapter_config.json`` and the tensors.

    The result does not depend on the order of the folders or on threads. Each thread has one module in memory
    at a time.

    Args:
        folders: adapters as PEFT saves them, or run folders.
        weights: an integer from 1 to 2**64 - 1 for each; all equal if None.
        out: the folder to write, which is not there or is empty; it appears when it is complete.
        method: ``exact``, ``factors``, ``freeze-a``, ``alternate`` or ``share-a``.
        max_rank: with ``exact``, the greatest rank of what comes out; None: as great as the sum of the ranks.
        base: the adapter that the sites started from. With ``exact``, a site of lower rank than the base started
            from its best part of that rank.
        allow: names of traits that are averaged where the method refuses them, or ``bases``.
        threads: worker threads.
        progress: called with the modules done and the modules in all.

    Raises:
        ConfigError, LayoutError: the adapters can't be combined by this method; the message says why.
        NonFiniteError: a tensor holds NaN or infinity.
        WeightError: a weight is out of range, or their number is wrong.
        StorageError: a file can't be read or written, or ``out`` exists.
    """
    _check_method(method, max_rank)
    if threads < 1:
        raise ConfigError(f"the number of threads is {threads}: expected 1 or more")
    counts = _check_weights(folders, weights)
    _check_out(out)
    adapters = [open_adapter(folder, method, allow) for folder in folders]
    start = None if base is None else open_adapter(base, method, allow)
    check_together([*adapters, *([] if start is None else [start])], allow)
    ordered = sorted(zip(counts, adapters, strict=True), key=functools.cmp_to_key(compare_adapters))
    making = plan(method, [a for _, a in ordered], [w for w, _ in ordered], start, max_rank)
    figures = _write(making, out, threads, progress)
    return Report(method, len(adapters), making.mixed, figures, making.notes)


def _check_method(method: str, max_rank: int | None) -> None:
    if method not in METHODS:
        raise ConfigError(
            f"there is no method {method!r} for adapters: expected one of {', '.join(METHODS)}"
        )
    if max_rank is not None and method != "exact":
        raise ConfigError(
            f"the method {method!r} keeps the sites' ranks: leave out the greatest rank (--max-rank)"
        )
    if max_rank is not None and max_rank < 1:
        raise ConfigError(f"the greatest rank is {max_rank}: expected 1 or more")


def _check_weights(folders: Sequence[Path], weights: Sequence[int] | None) -> list[int]:
    if not folders:
        raise ConfigError("there is no adapter to combine")
    counts = [1] * len(folders) if weights is None else list(weights)
    if len(counts) != len(folders):
        raise WeightError(
            f"there are {len(folders)} adapters and {len(counts)} weights; give one weight per adapter"
        )
    for folder, weight in zip(folders, counts, strict=True):
        if isinstance(weight, bool) or not isinstance(weight, int) or not 1 <= weight <= MAX_WEIGHT:
            raise WeightError(
                f"weight {weight!r} of {folder}: expected an integer from 1 to 2**64 - 1, the number of "
                "training examples"
            )
    return [effective_weight(count) for count in counts]


def _check_out(out: Path) -> None:
    if out.is_dir() and not any(out.iterdir()):
        return
    if out.exists() or out.is_symlink():
        raise StorageError(f"{out} exists: name a folder that does not, or remove it")
    if not out.absolute().parent.is_dir():
        raise StorageError(f"{out}: there is no folder {out.absolute().parent}")


def _write(
    making: Making, out: Path, threads: int, progress: Callable[[int, int], None] | None
) -> tuple[Figure, ...]:
    place = out.absolute()
    partial = place.with_name(f".{place.name}.{os.getpid()}.partial")
    try:
        _remove_left(place)
        partial.mkdir()
        try:
            target = create_model(partial / WEIGHTS, Layout(making.tensors, DEFAULT_CHUNK_BYTES))
            figures = _fill(making, target, threads, progress)
            target.file.sync()
            with (partial / CONFIG).open("w", encoding="utf-8") as file:
                file.write(make_config(making))
                file.flush()
                os.fsync(file.fileno())
            sync_folder(partial)
            partial.rename(place)
            sync_folder(place.parent)
        finally:
            shutil.rmtree(partial, ignore_errors=True)
    except OSError as error:
        if isinstance(error, StorageError):
            raise
        raise StorageError(f"cannot write {out}: {error}") from None
    return figures


def _remove_left(place: Path) -> None:
    """Remove what a process that was killed has left of the same result."""
    for left in place.parent.glob(f".{glob.escape(place.name)}.*.partial"):
        number = left.name.removesuffix(".partial").rpartition(".")[2]
        if number.isdigit() and not Path("/proc", number).exists() and Path("/proc/self").exists():
            shutil.rmtree(left, ignore_errors=True)


def _fill(
    making: Making, target: ModelFile, threads: int, progress: Callable[[int, int], None] | None
) -> tuple[Figure, ...]:
    making.average(target, threads)
    modules = list(making.first.groups)
    figures: list[Figure] = []
    with ThreadPoolExecutor(threads) as pool:
        found = pool.map(functools.partial(making.fill, target), modules)
        for done, figure in enumerate(found, 1):
            if figure is not None:
                figures.append(figure)
            if progress is not None:
                progress(done, len(modules))
    return tuple(figures)
