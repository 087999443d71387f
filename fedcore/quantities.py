"""Durations and sizes as people write them in run files, variables and options."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Final

__all__ = ["parse_duration", "parse_size"]

_SECONDS: Final = {"ms": 0.001, "s": 1.0, "min": 60.0, "h": 3600.0, "d": 86400.0}
_BYTES: Final = {
    "B": 1,
    "KiB": 1 << 10,
    "MiB": 1 << 20,
    "GiB": 1 << 30,
    "KB": 10**3,
    "MB": 10**6,
    "GB": 10**9,
}


def parse_duration(text: object) -> float:
    """Return the seconds in a text such as ``"500ms"``, ``"30s"``, ``"5min"`` or ``"2h"``.

    Raises:
        ValueError: the value is no such text, or the duration is not positive.
    """
    return _quantity(text, _SECONDS, "a duration such as '500ms', '30s', '5min' or '2h'")


def parse_size(text: object) -> int:
    """Return the bytes in a text such as ``"64KiB"``, ``"256MiB"`` or ``"2GB"``.

    Raises:
        ValueError: the value is no such text, or the size is not positive.
    """
    return int(_quantity(text, _BYTES, "a size such as '64KiB', '256MiB' or '2GiB'"))


def _quantity(text: object, units: Mapping[str, float], expected: str) -> float:
    match = (
        re.fullmatch(r"\s*([0-9]+(?:\.[0-9]+)?)\s*([A-Za-z]+)\s*", text)
        if isinstance(text, str)
        else None
    )
    if match is None or match[2] not in units or float(match[1]) == 0:
        raise ValueError(f"expected {expected}, got {text!r}")
    return float(match[1]) * units[match[2]]
