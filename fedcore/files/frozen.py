"""What a model has that does not travel, described by digests, and how two such descriptions are compared.

Adapters are averaged on the assumption that all sites train them over the same base. The base never travels, so
each site describes it by groups of tensors. A group holds the tensors whose names differ in numbers only, such as
``model.layers.*.mlp.up_proj.weight``. Entries of the base model's configuration are groups too.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from fedcore.protocol.fields import MAX_GROUPS

__all__ = [
    "FLOAT",
    "HALF",
    "MAX_GROUPS",
    "Comparison",
    "FrozenGroup",
    "compare_frozen",
    "config_groups",
    "model_config",
]

FrozenGroup = tuple[str, str, int, str]
"""Name, form, number of tensors, and digest (32 hexadecimal digits; empty where the values can't be read)."""

FLOAT: Final = "float"
"""The form of tensors that are not quantised; their digest is that of the values in bfloat16."""
HALF: Final = "float16"
"""The same, loaded as float16: rounding to bfloat16 from there may give other values."""
_CONFIG: Final = "config"
_MAX_ENTRIES: Final = 96

# Entries of a transformers config that say nothing of what the weights compute, or that training alone asks for.
_FREE: Final = frozenset(
    {
        "_attn_implementation", "_attn_implementation_internal", "_attn_implementation_autoset", "_commit_hash",
        "_name_or_path", "architectures", "auto_map", "bos_token_id", "decoder_start_token_id", "dtype",
        "eos_token_id", "finetuning_task", "gradient_checkpointing", "id2label", "label2id", "output_attentions",
        "output_hidden_states", "output_router_logits", "pad_token_id", "problem_type", "quantization_config",
        "return_dict", "sep_token_id", "task_specific_params", "torch_dtype", "transformers_version", "use_cache",
    }
)  # fmt: skip


@dataclass(frozen=True)
class Comparison:
    """How two descriptions compare.

    Attributes:
        groups: how many groups the first one has.
        differs: names of the groups that differ.
        skipped: groups that could not be compared, each with the reason.
    """

    groups: int
    differs: list[str]
    skipped: list[str]


def model_config(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return the entries of a model's configuration that change what its weights compute."""

    def kept(value: Any) -> Any:
        return model_config(value) if isinstance(value, Mapping) else value

    return {
        key: kept(value)
        for key, value in values.items()
        if key not in _FREE and "dropout" not in key and "pdrop" not in key
    }


def config_groups(values: Mapping[str, Any]) -> list[FrozenGroup]:
    """Describe a model's configuration, one group for each entry that counts."""
    found = sorted(model_config(values).items())[:_MAX_ENTRIES]
    return [
        (f"config {key}"[:200], _CONFIG, 1, _digest(json.dumps(value, sort_keys=True, default=str)))
        for key, value in found
    ]


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:32]


def compare_frozen(here: Sequence[FrozenGroup], there: Sequence[FrozenGroup]) -> Comparison:
    """Compare two descriptions group by group.

    Quantised tensors are compared with those of the same quantiser only: a copy of 4 bits is further from its
    original than a fine-tuned model is.
    """
    ours, theirs = _by_name(here), _by_name(there)
    forms = {form for _, form, _, _ in (*here, *there)} - {_CONFIG}
    quantised = not forms <= {FLOAT, HALF}
    differs: list[str] = []
    skipped: list[str] = []
    for name in sorted(ours.keys() | theirs.keys()):
        one, other = ours.get(name), theirs.get(name)
        if one is None or other is None:
            # One version of a library may have an entry, and a quantiser tensors, that another has not.
            if quantised and _CONFIG not in (one or other or {}):
                skipped.append(f"{name} (at one site only)")
            elif _CONFIG not in (one or other or {}):
                differs.append(f"{name} (at one site only)")
        elif not all((*one.values(), *other.values())):
            skipped.append(f"{name} (its values can't be read)")
        elif set(one.values()) != set(other.values()):
            if one.keys() == other.keys():
                differs.append(name)
            else:
                skipped.append(f"{name} ({'/'.join(sorted(one))} and {'/'.join(sorted(other))})")
    return Comparison(len(ours), differs, skipped)


def _by_name(groups: Sequence[FrozenGroup]) -> dict[str, dict[str, str]]:
    """Return the digest of each form of each group."""
    found: dict[str, dict[str, str]] = {}
    for name, form, _, digest in groups:
        found.setdefault(name, {})[form] = digest
    return found
