"""The ``adapter_config.json`` of adapters that are made of others."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Mapping
from typing import Any

from .groups import CONFIG, parse_config

__all__ = ["config_of_ranks", "config_text", "set_ranks"]


def config_of_ranks(card: str, ranks: Mapping[str, int]) -> str:
    """Return the text of an ``adapter_config.json`` for factors of these ranks, whose scale is 1.

    Args:
        card: the text of the file of an adapter of other ranks and scales.
        ranks: by module.

    Raises:
        ConfigError: the text is no JSON object.
    """
    config = parse_config(card, CONFIG)
    set_ranks(config, ranks, dict.fromkeys(ranks, 1.0))
    return config_text(config)


def set_ranks(
    config: dict[str, Any], ranks: Mapping[str, int], scales: Mapping[str, float]
) -> None:
    """Put ranks and scales into a configuration, and take out what drew the first values."""
    config.update(_ranks_and_alphas(ranks, scales), init_lora_weights=True)
    for key in ("eva_config", "corda_config", "lora_ga_config"):
        if key in config:
            config[key] = None
    if config.get("loftq_config"):
        config["loftq_config"] = {}


def config_text(config: Mapping[str, Any]) -> str:
    """Return a configuration as a file has it."""
    return json.dumps(config, indent=2, sort_keys=True) + "\n"


def _ranks_and_alphas(ranks: Mapping[str, int], scales: Mapping[str, float]) -> dict[str, Any]:
    """Return the entries by which PEFT has these ranks and scales: patterns only where modules differ."""
    alphas = {module: scales[module] * rank for module, rank in ranks.items()}
    rank = max(Counter(ranks.values()).items(), key=lambda entry: (entry[1], entry[0]))[0]
    alpha = max(Counter(alphas.values()).items(), key=lambda entry: (entry[1], entry[0]))[0]
    return {
        "r": rank,
        "lora_alpha": _number(alpha),
        "use_rslora": False,
        "rank_pattern": {_pattern(m): r for m, r in ranks.items() if r != rank},
        "alpha_pattern": {_pattern(m): _number(a) for m, a in alphas.items() if a != alpha},
    }


def _pattern(module: str) -> str:
    return "^" + re.escape(module)


def _number(value: float) -> float:
    return int(value) if value == int(value) else value
