"""Which tensors of an adapter belong together, and by what its configuration scales them.

PEFT saves an adapted module X as ``base_model.model.X.lora_A.weight`` (r x n) and
``base_model.model.X.lora_B.weight`` (m x r). The module's weight changes by ``scale * B @ A``. The two factors are
a *group*. Nothing here needs torch or PEFT.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from fedcore.errors import ConfigError, LayoutError
from fedcore.layout import FLOATS, TensorSpec
from fedcore.protocol import shown

__all__ = ["CONFIG", "PREFIX", "Group", "find_groups", "module_of", "parse_config", "scale_of"]

CONFIG: Final = "adapter_config.json"
"""The name of the file that describes an adapter."""

PREFIX: Final = "base_model.model."
"""What PEFT puts before the names of the base model's modules."""
_A: Final = ".lora_A.weight"
_B: Final = ".lora_B.weight"
_MATRIX: Final = 2
_LONGEST: Final = 1 << 20  # characters of a configuration


@dataclass(frozen=True, slots=True)
class Group:
    """The two factors of one adapted module.

    Attributes:
        module: the module's name in the base model.
        a: the name of the tensor A, of shape rank x columns.
        b: the name of the tensor B, of shape rows x rank.
        rank: the adapter's rank in this module.
        rows: outputs of the module.
        columns: inputs of the module.
    """

    module: str
    a: str
    b: str
    rank: int
    rows: int
    columns: int

    @property
    def shape(self) -> tuple[int, int]:
        """The shape of the product B A, which does not depend on the rank."""
        return self.rows, self.columns


def find_groups(tensors: Iterable[TensorSpec]) -> tuple[list[Group], list[str]]:
    """Return the groups of an adapter in the order of their modules, and the names of all other tensors.

    The factors of a convolution are no matrices: they are among the others.

    Raises:
        LayoutError: a factor lacks its other half, is no float, or their shapes do not fit.
    """
    table = {name: (dtype, tuple(shape)) for name, dtype, shape in tensors}
    found: list[Group] = []
    grouped: set[str] = set()
    for name, (_, shape) in table.items():
        if not name.endswith((_A, _B)):
            continue
        whole = name.removesuffix(_A).removesuffix(_B)
        other = whole + (_B if name.endswith(_A) else _A)
        if other not in table:
            raise LayoutError(
                f"the adapter holds {shown(name, 200)!r} and no {shown(other, 200)!r}: save the whole adapter"
            )
        paired = table[other][1]
        if name.endswith(_B) or (len(shape) > _MATRIX and len(paired) > _MATRIX):
            continue
        _check_pair(whole, table[name], table[other])
        found.append(Group(module_of(name), name, other, shape[0], paired[0], shape[1]))
        grouped |= {name, other}
    return sorted(found, key=lambda group: group.module), sorted(table.keys() - grouped)


def module_of(factor: str) -> str:
    """Return the name in the base model of the module whose factor this tensor is."""
    return factor.removesuffix(_A).removesuffix(_B).removeprefix(PREFIX)


def _check_pair(whole: str, a: tuple[str, tuple[int, ...]], b: tuple[str, tuple[int, ...]]) -> None:
    fits = len(a[1]) == len(b[1]) == _MATRIX and a[1][0] == b[1][1]
    if not fits or 0 in a[1] + b[1]:
        raise LayoutError(
            f"the factors of {shown(whole, 200)!r} do not fit: A is {list(a[1])} and B is {list(b[1])}, expected "
            "A [rank, inputs] and B [outputs, rank]"
        )
    for dtype, _ in (a, b):
        if dtype not in FLOATS:
            raise LayoutError(f"a factor of {shown(whole, 200)!r} is {dtype}, and no float")


def parse_config(text: str, where: str) -> dict[str, Any]:
    """Return the entries of an ``adapter_config.json``; ``where`` begins the messages.

    Raises:
        ConfigError: it is no JSON object.
    """
    try:
        values = json.loads(text) if len(text) <= _LONGEST else None
    except (ValueError, RecursionError):
        values = None
    if not isinstance(values, dict):
        raise ConfigError(f"{where}: not the adapter_config.json that PEFT writes")
    return values


def scale_of(config: Mapping[str, Any], group: Group) -> float:
    """Return what PEFT multiplies B A with: alpha / r, or alpha / sqrt(r) for rsLoRA.

    ``rank_pattern`` and ``alpha_pattern`` are matched as PEFT does it: the first key that is a regular expression
    of the module's name, or of its end after a dot. The keys are run as they are, so that a configuration which
    comes from elsewhere must not be given to a process that others wait for.

    Raises:
        ConfigError: an entry is no such number, or the rank is not that of the tensors.
    """
    rank = _of_module(config, "rank_pattern", "r", group.module)
    alpha = _of_module(config, "alpha_pattern", "lora_alpha", group.module)
    if rank != group.rank:
        raise ConfigError(
            f"adapter_config.json gives module {group.module!r} the rank {rank:g}, and its tensors have "
            f"{group.rank}: the file belongs to another adapter"
        )
    return alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)


def _of_module(config: Mapping[str, Any], patterns: str, default: str, module: str) -> float:
    found = config.get(patterns) or {}
    if not isinstance(found, dict):
        raise ConfigError(f"adapter_config.json: {patterns} is no table")
    key = _matching(list(found), module)
    value = config.get(default) if key is None else found[key]
    try:
        number = math.nan if isinstance(value, bool | str | None) else float(value)
    except (TypeError, OverflowError):  # no number, or an integer beyond all floats
        number = math.nan
    if not math.isfinite(number):
        what = default if key is None else f"{patterns}[{key!r}]"
        text = shown(repr(value), 80)
        raise ConfigError(f"adapter_config.json: {what} is {text}, expected a number")
    return number


def _matching(keys: Sequence[str], module: str) -> str | None:
    for key in keys:
        try:
            if re.match(rf"(.*\.)?({key})$", module):
                return key
        except re.error as error:
            raise ConfigError(
                f"adapter_config.json: the pattern {key!r} is no regular expression ({error})"
            ) from None
    return None
