"""The names of the methods by which adapters are combined; docs/lora.md says what each does."""

from __future__ import annotations

from typing import Final, Literal, TypeAlias, get_args

__all__ = ["BASES", "METHODS", "Method"]

Method: TypeAlias = Literal["factors", "freeze-a", "alternate", "share-a", "exact"]
METHODS: Final[tuple[Method, ...]] = get_args(Method)
BASES: Final = "bases"
"""What a user allows by whom the same base model has two names."""
