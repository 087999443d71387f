"""PEFT's ``adapter_config.json`` of two sites, compared entry by entry, in words."""

from __future__ import annotations

import json
from collections.abc import Mapping, Set
from typing import Any, Final

from fedcore.protocol import shown

__all__ = ["RANKS", "changed_base", "compare_configs", "describe_model", "read_config"]

# Where a site's base model lies and what wrote the file say nothing of what the tensors mean.
_UNSAID: Final = frozenset({"auto_mapping", "inference_mode", "peft_version", "revision"})
# These differ in training alone, or say where the base came from, which its digests tell better.
_FREE: Final = frozenset({"base_model_name_or_path", "runtime_config", "ephemeral_gpu_offload"})
RANKS: Final = frozenset({"r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern"})
"""The entries that say an adapter's rank and scale."""
# Ways to draw an adapter's first values that leave the base as it is.
_DRAWN: Final = (True, False, None, "gaussian", "orthogonal", "eva")
_BY_CHANCE: Final = ("pissa_niter", "corda", "lora_ga")
_LABELS: Final = {
    "r": "{type} rank r",
    "lora_alpha": "{type} scale lora_alpha",
    "alpha": "{type} scale alpha",
    "peft_type": "the PEFT method",
}
_TYPES: Final = {
    "LORA": "LoRA",
    "ADALORA": "AdaLoRA",
    "DORA": "DoRA",
    "LOHA": "LoHa",
    "LOKR": "LoKr",
}
_FIRST: Final = ("peft_type", "r", "lora_alpha", "target_modules", "modules_to_save")
_SHOWN: Final = 60
_ENTRIES: Final = 4
_DEEPEST: Final = 20


def read_config(files: Mapping[str, str], name: str) -> dict[str, Any]:
    """Return a JSON file's entries; empty if there is no such file or it is no shallow object."""
    try:
        values = json.loads(files.get(name, "{}"))
    except (ValueError, RecursionError):
        return {}
    return values if isinstance(values, dict) and _is_shallow(values) else {}


def describe_model(adapter: Mapping[str, Any], model: Mapping[str, Any]) -> str:
    """Return what kind of model these configurations are of, in a few words; empty if they say nothing."""
    if adapter:
        rank = f", r = {_short(adapter['r'])}" if "r" in adapter else ""
        return f"a PEFT adapter ({_kind(adapter)}{rank})"
    if model:
        names = model.get("architectures")
        first = names[0] if isinstance(names, list) and names else model.get("model_type", "")
        return f"a whole model ({shown(str(first), _SHOWN)})" if first else "a whole model"
    return ""


def compare_configs(
    known: Mapping[str, Any],
    config: Mapping[str, Any],
    there: str,
    here: str,
    free: Set[str] = frozenset(),
) -> tuple[list[str], list[str]]:
    """Return the entries that differ and matter, and those that differ and are harmless.

    An entry that only one version of PEFT writes is no difference. Each text gives the value of ``there`` first.
    Entries in ``free`` may differ.
    """
    differs: list[str] = []
    harmless: list[str] = []
    shared = known.keys() & config.keys() - _UNSAID
    for key in sorted(shared, key=lambda key: (_place(key), key)):
        one, other = known[key], config[key]
        if _unordered(one) == _unordered(other):
            continue
        may = key in _FREE | free or "dropout" in key or _only_drawn(key, one, other)
        label = _LABELS.get(key, shown(key, _SHOWN)).replace("{type}", _kind(config))
        text = f"{label} is {_short(one, other)} at {there}, {_short(other, one)} at {here}"
        (harmless if may else differs).append(text)
    return _few(differs), _few(harmless)


def changed_base(adapter: Mapping[str, Any]) -> list[str]:
    """Warn of a way to start that changes the base by chance or by data: whoever opens the result has another."""
    start = adapter.get("init_lora_weights")
    if isinstance(start, str) and start.startswith(_BY_CHANCE):
        return [
            f"init_lora_weights is {_short(start)}, which changes the base by random numbers or by data: the "
            "models of this run open to what was scored over the changed base only. Save that base once, load it "
            "at all sites and wherever the result is opened, and set init_lora_weights=True"
        ]
    return []


def _few(texts: list[str]) -> list[str]:
    more = len(texts) - _ENTRIES
    return texts if more <= 0 else [*texts[:_ENTRIES], f"and {more} more entries"]


def _place(key: str) -> int:
    return _FIRST.index(key) if key in _FIRST else len(_FIRST)


def _kind(config: Mapping[str, Any]) -> str:
    kind = shown(str(config.get("peft_type", "PEFT")), _SHOWN)
    return _TYPES.get(kind, kind)


def _only_drawn(key: str, one: Any, other: Any) -> bool:
    return key.startswith("init_") and one in _DRAWN and other in _DRAWN


def _is_shallow(value: Any) -> bool:
    """Whether a value is nested no deeper than any that means something: comparing it takes the stack, too."""
    level = [value]
    for _ in range(_DEEPEST):
        if not level:
            return True
        level = [
            inner
            for outer in level
            if isinstance(outer, dict | list)
            for inner in (outer.values() if isinstance(outer, dict) else outer)
        ]
    return not level


def _unordered(value: Any) -> Any:
    """PEFT keeps names of modules in sets, which it writes in any order."""
    if isinstance(value, list) and all(isinstance(part, str) for part in value):
        return sorted(value)
    return value


def _short(value: Any, other: Any = None) -> str:
    """Return a value as JSON; of two lists of names, what only this one has is given first."""
    if isinstance(value, list) and isinstance(other, list) and len(json.dumps(value)) > _SHOWN:
        own = [part for part in value if part not in other]
        value = own or f"{len(value)} names"
    text = json.dumps(value)
    return text if len(text) <= _SHOWN else text[: _SHOWN - 3] + "..."
