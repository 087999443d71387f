"""Combine safetensors files by hand, with the kernels that the server uses."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Final

from fedcore._core import reduce_files
from fedcore._device import use_device
from fedcore.errors import (
    ConfigError,
    LayoutError,
    NonFiniteError,
    RuleError,
    StorageError,
    WeightError,
)
from fedcore.layout import FLOATS, compare_layouts, table
from fedcore.model_file import ModelFile, check_booleans, create_model, open_model
from fedcore.protocol import MAX_WEIGHT
from fedcore.replacing import partial_of, place_of, put_in_place, sync_folder
from fedcore.rules import DEFAULT_RULE, Rule
from fedcore.rules.deciding import Decision
from fedcore.rules.python import load_rule
from fedcore.rules.several import SEVERAL
from fedcore.weighing import Weighing, effective_weight

from .choosing import Choosing
from .weights import Weights, open_weights

__all__ = ["aggregate_files"]

_BLOCK: Final = 1 << 20


def aggregate_files(
    inputs: Sequence[Path],
    weights: Sequence[int] | None,
    out: Path,
    *,
    rule: str = "mean",
    settings: Mapping[str, float] | None = None,
    max_share: float | None = None,
    base: Path | None = None,
    threads: int = 1,
    device: str | None = None,
    force: bool = False,
    progress: Callable[[int, int], None] | None = None,
    choice: Callable[[Sequence[Path], Decision], None] | None = None,
) -> ModelFile:
    """Combine ``inputs`` by a rule, by default the weighted mean, and write the result to ``out``.

    The order in which files are given does not matter: a mean is summed in the order of their weights, files of
    the same weight in the order of their flat bytes (canonical order of tensors, first difference decides), so
    that the same files with the same weights give the same output. A rule of several passes takes files in the
    order of their names, as a run takes sites: of equal scores the first one counts, and the values of an update
    do not change which one that is. Integers and booleans must be equal in all files.

    Args:
        inputs: safetensors files with the same tensors, in any order within the file, or folders that hold one,
            as one file or in shards; a run folder stands for its ``best/``.
        weights: one integer from 1 to 2**64 - 1 per file, of which `effective_weight` counts; all equal if None.
            A rule that does not weigh checks them and makes no use of them.
        out: file to write; it appears only when it is complete.
        rule: a name in `fedcore.rules.RULES` or in `fedcore.rules.several.SEVERAL`, or ``package.module:Class``
            of a `fedcore.rules.PythonRule`.
        settings: values for some of the rule's options.
        max_share: the greatest part of all weights that one file has (`fedcore.weighing.Weighing`).
        base: the model that the files were trained from, for rules that shorten the way from it.
        threads: worker threads; the result does not depend on it.
        device: ``auto``, ``cpu`` or ``cuda``, for the process; FEDCORE_DEVICE decides if None. The result
            does not depend on it. Rules other than the mean are always computed on the CPU.
        force: replace ``out`` if it exists.
        progress: called with the bytes done and the bytes in all.
        choice: called with the files in canonical order and with what a rule of several passes decided of them.
            The header of the result has the same.

    Raises:
        ConfigError: no input or too few for the rule or the greatest share, ``out`` is one of them, the rule is
            unknown, does not take the settings, does not weigh, or needs the base or makes no use of it, or the
            device can't be used.
        LayoutError: the files hold different tensors; each one is named.
        NonFiniteError: a file holds NaN or infinity; file and tensor are named.
        WeightError: a weight is out of range, or their number is wrong.
        StorageError: a file can't be read or written, or ``out`` exists.
        RuleError: a rule in Python has failed; tensor and element are named.
    """
    combining, several = _rules(rule, settings or {}, max_share, len(inputs), base is not None)
    paths = [*inputs, *([] if base is None else [base])]
    counts = _check_arguments(inputs, weights, paths, out, force)
    use_device(device)
    models = _open(paths, out)
    _check_integers(models[: len(inputs)])
    start = None if base is None else models.pop()
    if several is not None and not several.rule.weighted:
        counts = [1] * len(models)
    if several is not None:
        order = sorted(zip(counts, models, strict=True), key=lambda pair: _named(pair[1].path))
        counts, models = [weight for weight, _ in order], [model for _, model in order]
    elif not combining.symmetric:
        pairs = sorted(zip(counts, models, strict=True), key=functools.cmp_to_key(_compare))
        counts, models = [weight for weight, _ in pairs], [model for _, model in pairs]
    metadata: dict[str, str] = {}
    if several is not None:
        found = several.decide(models, counts, start, threads=threads, progress=progress)
        if choice is not None:
            choice([model.path for model in models], found)
        metadata = several.record(models, found)
        counts, models = several.weighed(models, start, found)
    place = place_of(out)
    with partial_of(place) as partial:
        target = create_model(partial, models[0].layout, metadata)
        _reduce(models, counts, target, rule=combining, threads=threads, progress=progress)
        put_in_place(partial, place)
        sync_folder(place.parent)
    return open_model(out)


def _rules(
    name: str, settings: Mapping[str, float], max_share: float | None, count: int, based: bool
) -> tuple[Rule, Choosing | None]:
    """Return the rule that combines, and what decides what the files weigh in it; None: what they are given."""
    try:
        weighing = Weighing(max_share=max_share)
    except ValueError as error:
        raise ConfigError(str(error)) from None
    kind = SEVERAL.get(name)
    combining = load_rule(DEFAULT_RULE) if kind else load_rule(name, settings, weighing)
    if based and not (kind and kind.needs_base):
        raise ConfigError(f"the rule {name!r} makes no use of a base: leave it out")
    if kind is not None and kind.needs_base and not based:
        raise ConfigError(
            f"the rule {name!r} shortens the way from the model that the files were trained from: give it as base"
        )
    if kind is not None and max_share is not None and not kind.weighted:
        raise ConfigError(f"the rule {name!r} does not weigh: leave out how files are weighed")
    if 0 < count < weighing.least:
        raise ConfigError(
            f"max_share = {max_share} needs {weighing.least} or more files, got {count}: one of them has a "
            "greater share, whatever it weighs"
        )
    if kind is None:
        return combining, None
    options = kind.having(settings)
    kind.check(count, options)
    return combining, Choosing(kind, options, weighing)


def _open(inputs: Sequence[Path], out: Path) -> list[Weights]:
    """Open the files, which hold the same tensors, and none of which is to be written."""
    for path in inputs:
        if not path.exists():
            raise StorageError(f"cannot open model file {path}: it does not exist")
    models = [open_weights(path) for path in inputs]
    if out.exists() and any(out.samefile(f.path) for model in models for f in model.files):
        raise ConfigError(f"{out} is one of the inputs; give the result another name")
    for model in models[1:]:
        difference = compare_layouts(
            table(models[0].layout), table(model.layout), str(models[0].path), str(model.path)
        )
        if difference is not None:
            raise LayoutError(f"the files hold different tensors: {difference}")
    return models


def _check_arguments(
    inputs: Sequence[Path],
    weights: Sequence[int] | None,
    paths: Sequence[Path],
    out: Path,
    force: bool,
) -> list[int]:
    if not inputs:
        raise ConfigError("there is no file to combine")
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
    place_of(out)
    if out.exists() and any(out.samefile(path) for path in paths if path.exists()):
        raise ConfigError(f"{out} is one of the inputs; give the result another name")
    if out.exists() and not force:
        raise StorageError(f"{out} exists; use --force to replace it")
    return [effective_weight(count) for count in counts]


def _named(path: Path) -> tuple[str, ...]:
    """Order by folder and name: as sites by their names, where each file is called by its site's."""
    whole = path.absolute()
    return (*whole.parent.parts, whole.name.removesuffix(".safetensors"), whole.name)


def _compare(one: tuple[int, Weights], other: tuple[int, Weights]) -> int:
    """Order by weight, then by flat bytes; equal files may come in either order, which changes nothing."""
    if one[0] != other[0]:
        return -1 if one[0] < other[0] else 1
    for (name, a), b in zip(one[1].views().items(), other[1].views().values(), strict=True):
        for at in range(0, len(a), _BLOCK):
            x, y = bytes(a[at : at + _BLOCK]), bytes(b[at : at + _BLOCK])
            if x != y:
                return -1 if x < y else 1
        for model in (one[1], other[1]):
            model.where[name].file.release(model.offset(name), len(a))
    return 0


def _check_integers(models: Sequence[Weights]) -> None:
    fixed = [
        (name, dtype, nbytes)
        for name, dtype, _, _, nbytes in models[0].layout.tensors
        if dtype not in FLOATS
    ]
    for name, dtype, nbytes in fixed:
        first = models[0].view(name, nbytes)
        check_booleans(models[0].path, name, dtype, first)
        for model in models[1:]:
            if model.view(name, nbytes) != first:
                raise LayoutError(
                    f"tensor {name!r} is {dtype} and differs between {models[0].path.name} and "
                    f"{model.path.name}; only floats can be combined"
                )


def _reduce(
    models: Sequence[Weights],
    weights: Sequence[int],
    target: ModelFile,
    *,
    rule: Rule,
    threads: int,
    progress: Callable[[int, int], None] | None,
) -> None:
    layout = models[0].layout
    groups: dict[tuple[int, ...], list[tuple[str, str, int, int]]] = {}  # tensors in the same files
    for name, dtype, _, offset, nbytes in layout.tensors:
        files = tuple(id(model.where[name]) for model in models)
        groups.setdefault(files, []).append((name, dtype, nbytes, offset))
    before = 0
    for tensors in groups.values():
        jobs = [
            (dtype, nbytes, [m.offset(name) for m in models], target.data_offset + offset)
            for name, dtype, nbytes, offset in tensors
        ]
        inputs = [model.where[tensors[0][0]].file for model in models]

        def report(done: int, before: int = before) -> None:
            if progress is not None:
                progress(before + done, layout.total_bytes)

        try:
            bad = reduce_files(inputs, weights, jobs, target.file, threads, report, rule.core)
        except RuleError as error:
            if error.tensor is None:
                raise
            where = f"tensor {tensors[error.tensor][0]!r}, element {error.element}"
            raise RuleError(
                f"the rule {rule.name!r} failed in {where}: {error}", trace=error.trace
            ) from None
        if bad is not None:
            source, tensor, element = bad
            file = models[source].where[tensors[tensor][0]]
            raise NonFiniteError(
                f"{file.path}: NaN or infinity in tensor {tensors[tensor][0]!r}, element {element}"
            )
        before += sum(nbytes for _, _, nbytes, _ in tensors)
    target.file.sync()
