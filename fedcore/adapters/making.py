"""What comes out of adapters that are combined: its tensors, their values and its configuration."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from fedcore._core import factor_error, recompress, reduce_files
from fedcore.errors import ConfigError, LayoutError, NonFiniteError
from fedcore.layout import FLOATS, TensorSpec
from fedcore.model_file import ModelFile

from .cards import config_text, set_ranks
from .comparing import differing_half
from .folder import Adapter
from .groups import PREFIX
from .methods import Method
from .report import Figure

__all__ = ["Making", "make_config", "plan"]

Array = npt.NDArray[Any]
# What the core reads is Any: before Python 3.12, the types of NumPy do not say that an array is a buffer.
Pair = tuple[Any, Any]
Term = tuple[float, Any, Any]
_BIAS: Final = ".lora_B.bias"
_FACTOR_PARTS: Final = (".lora_embedding_", ".lora_A.", ".lora_B.weight")


@dataclass(frozen=True)
class Making:
    """How one adapter is made of several.

    Attributes:
        method: how they are combined.
        adapters: in canonical order.
        weights: of each.
        base: what the sites started from.
        averaged: the factors that are averaged: ``AB``, ``A`` or ``B``; the other one is the same at all sites,
            or stays there.
        folded: the modules whose scale becomes part of a factor, so that theirs is 1 in the result.
        ranks: of the result, by module.
        tensors: of the result.
        notes: what a reader has to know.
    """

    method: Method
    adapters: Sequence[Adapter]
    weights: Sequence[int]
    base: Adapter | None
    averaged: str
    folded: frozenset[str]
    ranks: Mapping[str, int]
    tensors: list[TensorSpec]
    notes: tuple[str, ...]

    @property
    def first(self) -> Adapter:
        """The first adapter in canonical order; the result has its configuration where nothing differs."""
        return self.adapters[0]

    @property
    def mixed(self) -> bool:
        """Whether the sites' ranks differ in a module."""
        return any(len({a.groups[m].rank for a in self.adapters}) > 1 for m in self.first.groups)

    def average(self, target: ModelFile, threads: int) -> None:
        """Write what is averaged tensor by tensor, with the kernels of the server, and what is the same anyway."""
        jobs: list[tuple[str, int, list[int], int]] = []
        names: list[str] = []
        computed, unchanged = self._computed(), self._unchanged()
        for name, dtype, _, offset, nbytes in target.layout.tensors:
            if name in computed:
                continue
            if dtype not in FLOATS or name in unchanged:
                target.view(name)[:] = self._same_bytes(name, dtype, nbytes)
                continue
            names.append(name)
            places = [adapter.offset(name) for adapter in self.adapters]
            jobs.append((dtype, nbytes, places, target.data_offset + offset))
        if not jobs:
            return
        files = [adapter.model.file for adapter in self.adapters]
        bad = reduce_files(files, self.weights, jobs, target.file, threads)
        if bad is not None:
            raise _not_finite(self.adapters[bad[0]], names[bad[1]], bad[2])

    def _unchanged(self) -> set[str]:
        groups = self.first.groups.values()
        if self.averaged == "AB":
            return set()
        return {group.b if self.averaged == "A" else group.a for group in groups}

    def _computed(self) -> set[str]:
        """Return the tensors that `fill` writes."""
        names: set[str] = set()
        for module in self.folded:
            group = self.first.groups[module]
            names |= {group.a if half == "A" else group.b for half in self.averaged}
            names.add(f"{PREFIX}{module}{_BIAS}")
        return names

    def _same_bytes(self, name: str, dtype: str, nbytes: int) -> bytes:
        found = {
            bytes(adapter.model.file.view(adapter.offset(name), nbytes))
            for adapter in self.adapters
        }
        if len(found) > 1:
            raise LayoutError(
                f"tensor {name!r} is {dtype} and differs between the sites; only floats can be combined"
            )
        return found.pop()

    def fill(self, target: ModelFile, module: str) -> Figure | None:
        """Write what is computed of one module; return its figure, None where no products are combined."""
        try:
            if self.method == "exact":
                return self._fill_exact(target, module)
            if module in self.folded:
                self._fill_folded(target, module)
            return None if self.method == "share-a" else self._figure(module)
        finally:
            for adapter in (*self.adapters, *([] if self.base is None else [self.base])):
                adapter.release(module)

    def _fill_exact(self, target: ModelFile, module: str) -> Figure:
        group = self.first.groups[module]
        total = sum(self.weights)
        sites = [
            (weight / total * adapter.scales[module], *_factors(adapter, module))
            for weight, adapter in zip(self.weights, self.adapters, strict=True)
        ]
        rest, change = self._base_terms(module)
        b, a, _, info = recompress([*rest, *sites], self.ranks[module])
        _write(target, group.b, b)
        _write(target, group.a, a)
        self._fill_bias(target, module)
        norm, error, _ = self._errors(module)
        if self.base is not None:
            *_, of_change = recompress([*change, *sites], 1)
            return Figure(
                module,
                norm,
                error,
                of_change["norm"],
                info["cut"],
                info["rank"],
                self.ranks[module],
            )
        return Figure(module, norm, error, None, info["cut"], info["rank"], self.ranks[module])

    def _base_terms(self, module: str) -> tuple[list[Term], list[Term]]:
        """Return what stays of the base beside the sites' products, and what the change takes away from them.

        A site of rank r started from the base's best part of rank r: that part leaves with the site's weight.
        """
        if self.base is None:
            return [], []
        b, a, _, _ = recompress(
            [(self.base.scales[module], *_factors(self.base, module))],
            self.base.groups[module].rank,
        )
        total = sum(self.weights)
        taken = [
            sum(
                weight
                for weight, adapter in zip(self.weights, self.adapters, strict=True)
                if adapter.groups[module].rank > place
            )
            for place in range(a.shape[0])
        ]
        left = np.array([(total - weight) / total for weight in taken])
        stays = left > 0
        kept = np.ascontiguousarray(b[:, stays] * left[stays])
        rest = [(1.0, kept, a[stays])] if stays.any() else []
        gone = np.array([weight / total for weight in taken])
        return rest, [(-1.0, b * gone, a)]

    def _fill_folded(self, target: ModelFile, module: str) -> None:
        """Write means of factors whose scales or ranks differ: filled up with zeros, the scale in one of them."""
        group = self.first.groups[module]
        for half in self.averaged:
            name = group.a if half == "A" else group.b
            # Of both, B carries the scale. Where B stays at its site, so does the scale.
            carries = half == self.averaged[-1] and self.method != "share-a"
            rank = self.ranks[module]
            shape = (rank, group.columns) if half == "A" else (group.rows, rank)
            total = np.zeros(shape)
            for weight, adapter in zip(self.weights, self.adapters, strict=True):
                values = _values(adapter, name).astype(np.float64)
                scale = adapter.scales[module] if carries else 1.0
                part = total[: values.shape[0], : values.shape[1]]
                part += weight * (scale * values)
            _write(target, name, total / sum(self.weights))
        self._fill_bias(target, module)

    def _fill_bias(self, target: ModelFile, module: str) -> None:
        name = f"{PREFIX}{module}{_BIAS}"
        if name not in target.offsets:
            return
        parts = [
            weight * (adapter.scales[module] * _values(adapter, name).astype(np.float64))
            for weight, adapter in zip(self.weights, self.adapters, strict=True)
        ]
        _write(target, name, sum(parts[1:], start=parts[0]) / sum(self.weights))

    def _figure(self, module: str) -> Figure:
        norm, error, change = self._errors(module)
        return Figure(
            module, norm, error, None if self.base is None else change, width=self.ranks[module]
        )

    def _errors(self, module: str) -> tuple[float, float, float]:
        pairs = [_scaled(adapter, module, self.averaged[-1]) for adapter in self.adapters]
        base = None if self.base is None else _scaled(self.base, module, self.averaged[-1])
        return factor_error([float(weight) for weight in self.weights], pairs, base)


def plan(
    method: Method,
    adapters: Sequence[Adapter],
    weights: Sequence[int],
    base: Adapter | None,
    max_rank: int | None,
) -> Making:
    """Decide what comes out of adapters in canonical order.

    Raises:
        ConfigError: the method can't combine them, such as factors that must be the same and differ.
    """
    averaged, notes = _averaged(method, adapters)
    if method == "share-a" and base is not None:
        raise ConfigError("the method 'share-a' makes no use of a base: leave it out")
    modules = adapters[0].groups
    if method == "exact":
        folded = frozenset(modules)
        ranks = {module: _exact_rank(module, adapters, base, max_rank) for module in modules}
    else:
        folded = frozenset(module for module in modules if _is_folded(method, module, adapters))
        ranks = {module: max(a.groups[module].rank for a in adapters) for module in modules}
        notes += _check_folded(method, folded, adapters)
    for adapter in adapters:
        notes += [note for note in adapter.notes if note not in notes]
    tensors = _tensors(method, averaged, folded, ranks, adapters[0])
    return Making(method, adapters, weights, base, averaged, folded, ranks, tensors, tuple(notes))


def _averaged(method: Method, adapters: Sequence[Adapter]) -> tuple[str, list[str]]:
    """Return which factors are averaged, having checked that the others are the same."""
    if method in ("exact", "factors"):
        return "AB", []
    if method == "share-a":
        for module, group in adapters[0].groups.items():
            for other in adapters[1:]:
                if other.groups[module].rank != group.rank:
                    raise ConfigError(
                        f"the method 'share-a' needs one rank, and module {module!r} has {group.rank} at "
                        f"{adapters[0].path} and {other.groups[module].rank} at {other.path}: B stays at its "
                        "site, and fits an A of its own rank alone"
                    )
        return "A", [
            "the result holds A alone: B stays at its site. PEFT opens it with B = 0, which changes nothing; at a "
            "site, set_peft_model_state_dict puts it below the B that is there"
        ]
    differs = differing_half(adapters, "A")
    if differs is None:
        note = "A is the same at all sites: B was averaged, and the result is exact"
        return "B", [note]
    module, other = differs
    if method == "freeze-a":
        raise ConfigError(
            f"the method 'freeze-a' needs the same A at all sites, and that of module {module!r} differs "
            f"between {adapters[0].path} and {other.path}: freeze A in training, or take the method exact"
        )
    also = differing_half(adapters, "B")
    if also is not None:
        raise ConfigError(
            f"the method 'alternate' needs the same A or the same B at all sites, and both differ: A of "
            f"{module!r} between {adapters[0].path} and {other.path}, B of {also[0]!r} between "
            f"{adapters[0].path} and {also[1].path}. Train one of them a round, or take the method exact"
        )
    return "A", ["B is the same at all sites: A was averaged, and the result is exact"]


def _exact_rank(
    module: str, adapters: Sequence[Adapter], base: Adapter | None, max_rank: int | None
) -> int:
    group = adapters[0].groups[module]
    ranks = [adapter.groups[module].rank for adapter in adapters]
    columns = sum(ranks)
    if base is not None:
        columns += max(0, base.groups[module].rank - min(ranks))
    return min(max_rank or columns, *group.shape)


def _is_folded(method: Method, module: str, adapters: Sequence[Adapter]) -> bool:
    """Whether ranks, dtypes or scales of a module differ, so that its tensors have no plain mean."""
    groups = [adapter.groups[module] for adapter in adapters]
    dtypes = {
        (a.dtype(group.a), a.dtype(group.b)) for a, group in zip(adapters, groups, strict=True)
    }
    scales = {adapter.scales[module] for adapter in adapters}
    if method == "share-a":
        return len({dtype for dtype, _ in dtypes}) > 1
    return len({group.rank for group in groups}) > 1 or len(dtypes) > 1 or len(scales) > 1


def _check_folded(method: Method, folded: frozenset[str], adapters: Sequence[Adapter]) -> list[str]:
    if not folded or method == "share-a":
        return []
    what = "ranks, scales or dtypes of the sites differ"
    extra = [n for n, *_ in adapters[0].others if any(part in n for part in _FACTOR_PARTS)]
    if extra:
        raise ConfigError(f"{what}, and {extra[0]!r} is a factor that is averaged as it is")
    if any("init_lora_weights" in note for adapter in adapters for note in adapter.notes):
        raise ConfigError(f"{what}, and the base model is changed by rank: give all sites the same")
    return [
        f"{what}: scales are part of the factors in the result, and lower ranks were filled up with zeros"
    ]


def _tensors(
    method: Method,
    averaged: str,
    folded: frozenset[str],
    ranks: Mapping[str, int],
    first: Adapter,
) -> list[TensorSpec]:
    found: list[TensorSpec] = []
    for module, group in first.groups.items():
        rank = ranks[module]
        wide = module in folded
        a = "F32" if wide and "A" in averaged else first.dtype(group.a)
        found.append((group.a, a, [rank, group.columns]))
        if method != "share-a":
            b = "F32" if wide and "B" in averaged else first.dtype(group.b)
            found.append((group.b, b, [group.rows, rank]))
    biases = {f"{PREFIX}{module}{_BIAS}" for module in folded}
    found += [(n, "F32" if n in biases else dtype, shape) for n, dtype, shape in first.others]
    return found


def make_config(making: Making) -> str:
    """Return the text of the result's ``adapter_config.json``."""
    config = {**making.first.config, "inference_mode": True}
    if making.folded and making.method != "share-a":
        scales = {
            m: 1.0 if m in making.folded else making.first.scales[m] for m in making.first.groups
        }
        set_ranks(config, making.ranks, scales)
    return config_text(config)


def _values(adapter: Adapter, name: str) -> Array:
    values = adapter.array(name)
    bad = np.flatnonzero(~np.isfinite(values))
    if bad.size:
        raise _not_finite(adapter, name, int(bad[0]))
    return values


def _not_finite(adapter: Adapter, name: str, element: int) -> NonFiniteError:
    return NonFiniteError(f"{adapter.path}: NaN or infinity in tensor {name!r}, element {element}")


def _factors(adapter: Adapter, module: str) -> Pair:
    group = adapter.groups[module]
    return _values(adapter, group.b), _values(adapter, group.a)


def _scaled(adapter: Adapter, module: str, carries: str) -> Pair:
    """Return B and A with the scale in one of them, as it is in the result."""
    b, a = (factor.astype(np.float64) for factor in _factors(adapter, module))
    scale = adapter.scales[module]
    return (b, a * scale) if carries == "A" else (b * scale, a)


def _write(target: ModelFile, name: str, values: Array) -> None:
    with np.errstate(over="ignore"):
        rounded = np.ascontiguousarray(values, np.float32)
    if not np.isfinite(rounded).all():
        raise NonFiniteError(f"tensor {name!r} of the result is beyond float32")
    target.view(name)[:] = rounded.tobytes()
