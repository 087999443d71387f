"""What LoRA adapters can have, and what each method of combining makes of it.

One table (`TRAITS`) decides for runs and for ``fedcore aggregate --lora``. docs/lora.md shows it.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, Literal, TypeAlias

from fedcore.errors import ConfigError, LayoutError
from fedcore.layout import TensorSpec
from fedcore.protocol import shown

from .groups import find_groups
from .methods import METHODS, Method

__all__ = ["METHODS", "TRAITS", "Method", "Trait", "check_adapter", "traits_table"]

Handling: TypeAlias = Literal["exact", "averaged", "refused"]

_NAMED: Final = 3
_CHANGING: Final = ("pissa", "olora", "corda", "lora_ga", "loftq")
_VARIANTS: Final = (
    "use_qalora",
    "use_bdlora",
    "kasa_config",
    "monteclora_config",
    "arrow_config",
)


@dataclass(frozen=True, slots=True)
class Trait:
    """Something that an adapter can have.

    Attributes:
        name: what it is called, in the table and after ``--allow``.
        found: says what of it an adapter has, from its configuration and the names of the tensors that are in no
            group; an empty text if it has none of it.
        handling: ``exact``: the result is right; ``averaged``: each tensor is averaged, which is named and not
            exact; ``refused``. One for all methods, or by method.
        why: the reason, for a reader who is refused.
        instead: what works; an empty text where all methods take it.
        allowable: a user may have it averaged where it is refused.
    """

    name: str
    found: Callable[[Mapping[str, Any], Sequence[str]], str]
    handling: Handling | Mapping[Method, Handling]
    why: str
    instead: str = ""
    allowable: bool = False

    def by(self, method: Method) -> Handling:
        """Return how a method handles it."""
        return self.handling if isinstance(self.handling, str) else self.handling[method]


def _entry(key: str, ordinary: str = "") -> Callable[..., str]:
    """Make what finds an entry of the configuration that is neither empty nor has the ordinary value."""

    def found(config: Mapping[str, Any], _: Sequence[str]) -> str:
        value = config.get(key)
        return "" if not value or value == ordinary else _entry_text(key, value)

    return found


def _entry_text(key: str, value: Any) -> str:
    return f"{key} = {shown(str(value), 80)}"


def _method(config: Mapping[str, Any], _: Sequence[str]) -> str:
    kind = config.get("peft_type")
    return "" if kind == "LORA" else f"peft_type = {shown(str(kind), 40)}"


def _variants(config: Mapping[str, Any], _: Sequence[str]) -> str:
    return ", ".join(key for key in _VARIANTS if config.get(key))


def _start(config: Mapping[str, Any], _: Sequence[str]) -> str:
    start = config.get("init_lora_weights")
    changing = isinstance(start, str) and start.lower().startswith(_CHANGING)
    return _entry_text("init_lora_weights", start) if changing else ""


def _alphas(config: Mapping[str, Any]) -> list[Any]:
    pattern = config.get("alpha_pattern")
    return [config.get("lora_alpha"), *(pattern.values() if isinstance(pattern, dict) else ())]


def _zero(config: Mapping[str, Any], _: Sequence[str]) -> str:
    return "an alpha of 0" if any(alpha == 0 for alpha in _alphas(config)) else ""


def _negative(config: Mapping[str, Any], _: Sequence[str]) -> str:
    found = [a for a in _alphas(config) if isinstance(a, int | float) and a < 0]
    return f"an alpha of {found[0]}" if found else ""


def _named(*parts: str) -> Callable[..., str]:
    """Make what finds tensors outside the groups by a part of their names, as PEFT writes them."""

    def found(_: Mapping[str, Any], others: Sequence[str]) -> str:
        return _few([name for name in others if any(part in name for part in parts)])

    return found


def _few(names: Sequence[str]) -> str:
    more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
    return ", ".join(shown(name, 200) for name in names[:_NAMED]) + more


def _unknown(_: Mapping[str, Any], others: Sequence[str]) -> str:
    known = (".lora_magnitude_vector", ".lora_B.bias", ".lora_embedding_", ".lora_A.", ".lora_B.")
    return _few([n for n in others if ".lora_" in n and not any(part in n for part in known)])


_FACTORS_ONLY: Final[Mapping[Method, Handling]] = {
    "factors": "averaged", "freeze-a": "refused", "alternate": "refused", "share-a": "refused",
    "exact": "refused",
}  # fmt: skip
_NOT_SHARED: Final[Mapping[Method, Handling]] = {
    "factors": "exact", "freeze-a": "exact", "alternate": "exact", "share-a": "refused",
    "exact": "exact",
}  # fmt: skip

TRAITS: Final = (
    Trait(
        "other-methods", _method, "refused",
        "it is not LoRA, and has no factors A and B",
        "fedcore aggregate without --lora averages tensor by tensor",
    ),
    Trait(
        "variants", _variants, "refused",
        "this variant of LoRA puts something between its factors or into their shape",
        "train plain LoRA, or average tensor by tensor without --lora",
    ),
    Trait(
        "target_parameters", _entry("target_parameters"), "refused",
        "one pair of tensors holds the factors of several matrices",
        "adapt modules (target_modules)",
    ),
    Trait(
        "zero-alpha", _zero, "refused",
        "an adapter of scale 0 does nothing, whatever its factors are",
        "set lora_alpha above 0",
    ),
    Trait(
        "dora", _entry("use_dora"), _FACTORS_ONLY,
        "the magnitudes of DoRA are not linear: their mean is not the mean of the models",
        "set use_dora=False, or average the factors",
        allowable=True,
    ),
    Trait(
        "changed-base", _start, _FACTORS_ONLY,
        "this start changes the base model, and PEFT does so again, by the rank in the file, when it opens it",
        "save with path_initial_model_for_weight_conversion, which makes plain LoRA of it, or set "
        "init_lora_weights=True",
    ),
    Trait(
        "embeddings", _named(".lora_embedding_"), _FACTORS_ONLY,
        "the factors of an embedding are read row by row and start otherwise",
        "leave the embedding out of target_modules; name it in modules_to_save or use trainable_token_indices",
    ),
    Trait(
        "convolutions", _named(".lora_A.weight", ".lora_B.weight"), _FACTORS_ONLY,
        "the factors of a convolution are no matrices",
        "leave convolutions out of target_modules",
    ),
    Trait(
        "tied", _entry("ensure_weight_tying"), _FACTORS_ONLY,
        "tied modules share factors, each transposed in the other",
        "set ensure_weight_tying=False",
    ),
    Trait(
        "unknown", _unknown, _FACTORS_ONLY,
        "these tensors of the adapter have no meaning here",
        "train plain LoRA",
    ),
    Trait(
        "lora_bias", _entry("lora_bias"), _NOT_SHARED,
        "the bias belongs to B, which stays at its site",
        "set lora_bias=False",
    ),
    Trait(
        "bias", _entry("bias", "none"), "exact",
        "biases of the base model are averaged, which is exact",
    ),
    Trait(
        "modules_to_save", _entry("modules_to_save"), "exact",
        "whole modules are averaged, which is exact",
    ),
    Trait(
        "trainable_token_indices", _entry("trainable_token_indices"), "exact",
        "rows of the embedding are averaged, which is exact",
    ),
    Trait(
        "fan_in_fan_out", _entry("fan_in_fan_out"), "exact",
        "the product B A is transposed when it is applied, at each site alike",
    ),
    Trait(
        "layer_replication", _entry("layer_replication"), "exact",
        "each copy of a layer has factors of its own",
    ),
    Trait(
        "rslora", _entry("use_rslora"), "exact",
        "the scale, alpha / sqrt(r), is part of what is combined",
    ),
    Trait(
        "patterns",
        lambda config, _: ", ".join(k for k in ("rank_pattern", "alpha_pattern") if config.get(k)),
        "exact",
        "rank and scale are those of each module",
    ),
    Trait(
        "negative-alpha", _negative, "exact",
        "the sign is part of the scale, which is part of what is combined",
    ),
)  # fmt: skip
"""What an adapter can have, the refused first."""


def check_adapter(
    config: Mapping[str, Any],
    tensors: Sequence[TensorSpec],
    method: Method,
    *,
    where: str,
    allow: Collection[str] | None = None,
) -> list[str]:
    """Check that a method can combine an adapter, and return what it averages without being exact, a text each.

    Args:
        config: the entries of ``adapter_config.json``.
        tensors: the adapter's tensors, by the names that PEFT gives them in a file.
        method: how it is to be combined.
        where: whose adapter it is; it begins the messages.
        allow: names of traits that are averaged where they are refused; None: nothing can be allowed, as in a run.

    Raises:
        ConfigError: the method refuses what the adapter has; the message says why, and what works.
        LayoutError: it holds no adapted module, or half of one.
    """
    try:
        groups, others = find_groups(tensors)
    except LayoutError as error:
        raise LayoutError(f"{where}: {error}") from None
    notes: list[str] = []
    for trait in TRAITS:
        found = trait.found(config, others)
        handling = trait.by(method)
        if not found or handling == "exact":
            continue
        allowable = trait.allowable and allow is not None
        if handling == "refused" and not (allowable and trait.name in (allow or ())):
            raise ConfigError(
                f"{where}: the method {method!r} refuses {found}: {trait.why}. What works: {trait.instead}"
                + (f" (--allow {trait.name})" if allowable else "")
            )
        notes.append(f"{found} is averaged tensor by tensor, which is not exact: {trait.why}")
    if not groups:
        raise LayoutError(
            f"{where}: it holds no factors of LoRA: expected tensors whose names end with .lora_A.weight and "
            ".lora_B.weight"
        )
    return notes


def traits_table() -> str:
    """Return the table of traits and methods in Markdown."""
    head = ["the adapter has", *(f"`{method}`" for method in METHODS), "why", "what works instead"]
    rows = [
        [
            f"`{trait.name}`",
            *(
                "allowed" if trait.allowable and trait.by(m) == "refused" else trait.by(m)
                for m in METHODS
            ),
            trait.why,
            trait.instead,
        ]
        for trait in TRAITS
    ]
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines) + "\n"
