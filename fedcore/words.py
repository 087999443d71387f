"""How counts are written in messages."""

from __future__ import annotations

__all__ = ["plural"]


def plural(count: int, noun: str, nouns: str = "") -> str:
    """Return a count with its noun: ``1 round``, ``2 rounds``; ``nouns`` is a plural that takes more than an s."""
    return f"{count:,} {noun if count == 1 else nouns or noun + 's'}"
