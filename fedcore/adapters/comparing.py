"""Whether adapters of several sites belong together, and the order in which they count."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping, Sequence
from typing import Any, Final

from fedcore.errors import ConfigError, LayoutError
from fedcore.layout import compare_layouts, table
from fedcore.protocol import shown

from .folder import Adapter
from .methods import BASES

__all__ = ["check_together", "compare_adapters", "differing_half"]

_SAME: Final = (
    "use_dora", "bias", "lora_bias", "fan_in_fan_out", "modules_to_save", "layer_replication",
    "trainable_token_indices", "alora_invocation_tokens", "ensure_weight_tying",
)  # fmt: skip
_NAMED: Final = 3
_BLOCK: Final = 1 << 20


def check_together(adapters: Sequence[Adapter], allow: Collection[str] = ()) -> None:
    """Check that adapters change the same modules of the same base model in the same way.

    Raises:
        ConfigError: their base models or an entry of their configurations differ.
        LayoutError: they adapt other modules, or hold other tensors beside the factors.
    """
    first = adapters[0]
    for other in adapters[1:]:
        here, there = str(first.path), str(other.path)
        names = [_base(adapter.config) for adapter in (first, other)]
        if names[0] != names[1] and all(names) and BASES not in allow:
            raise ConfigError(
                f"the adapters are of different base models: {shown(names[0], 200)!r} at {here}, "
                f"{shown(names[1], 200)!r} at {there}. If it is one model under two names, say --allow {BASES}"
            )
        for key in _SAME:
            one, two = (_entry(adapter.config, key) for adapter in (first, other))
            if one != two:
                raise ConfigError(
                    f"{key} is {shown(str(one), 80)} at {here} and {shown(str(two), 80)} at {there}: it must be "
                    "the same at all sites"
                )
        _check_modules(first, other)
        difference = compare_layouts(first.others, other.others, here, there)
        if difference is not None:
            raise LayoutError(f"the adapters hold different tensors beside factors: {difference}")


def _base(config: Mapping[str, Any]) -> str:
    name = config.get("base_model_name_or_path")
    return name if isinstance(name, str) else ""


def _entry(config: Mapping[str, Any], key: str) -> Any:
    """Return an entry; what is empty, false or missing is the same, and names have no order."""
    value = config.get(key)
    if not value or value == "none":
        return None
    return (
        sorted(value)
        if isinstance(value, list) and all(isinstance(v, str) for v in value)
        else value
    )


def _check_modules(first: Adapter, other: Adapter) -> None:
    for one, two in ((first, other), (other, first)):
        missing = sorted(one.groups.keys() - two.groups.keys())
        if missing:
            more = f" and {len(missing) - _NAMED} more" if len(missing) > _NAMED else ""
            names = ", ".join(shown(name, 200) for name in missing[:_NAMED])
            raise LayoutError(
                f"{one.path} adapts {names}{more}, and {two.path} does not: choose the same target_modules"
            )
    for module, group in first.groups.items():
        shape = other.groups[module].shape
        if group.shape != shape:
            raise LayoutError(
                f"module {module!r} is {group.shape[0]} x {group.shape[1]} at {first.path} and {shape[0]} x "
                f"{shape[1]} at {other.path}: the base models differ"
            )


def compare_adapters(one: tuple[int, Adapter], other: tuple[int, Adapter]) -> int:
    """Order by weight, tensors, bytes, scales and configuration: the order of the folders does not count."""
    (w, a), (v, b) = one, other
    mine, theirs = (w, table(a.model.layout)), (v, table(b.model.layout))
    if mine != theirs:
        return -1 if mine < theirs else 1
    for name, _, _, _, nbytes in a.model.layout.tensors:
        for at in range(0, nbytes, _BLOCK):
            x, y = (
                bytes(each.model.file.view(each.offset(name) + at, min(_BLOCK, nbytes - at)))
                for each in (a, b)
            )
            if x != y:
                return -1 if x < y else 1
    first, second = (
        (sorted(each.scales.items()), json.dumps(each.config, sort_keys=True)) for each in (a, b)
    )
    return (first > second) - (first < second)


def differing_half(adapters: Sequence[Adapter], half: str) -> tuple[str, Adapter] | None:
    """Return a module whose A or B (``half``) is not the first adapter's bit for bit, and where; None: all are."""
    first = adapters[0]
    for module, group in first.groups.items():
        name = group.a if half == "A" else group.b
        mine = first.array(name)
        for other in adapters[1:]:
            theirs = other.array(name)
            same = mine.shape == theirs.shape and mine.dtype == theirs.dtype
            if not same or mine.tobytes() != theirs.tobytes():
                return module, other
    return None
