"""What a script gives as metrics: numbers by name, checked before they leave."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from typing import Any

from fedcore.errors import MetricError
from fedcore.protocol import MAX_METRICS, MAX_NAME, shown

__all__ = ["MetricCheck"]

logger = logging.getLogger("fedcore.client")


class MetricCheck:
    """Checks what one session's script gives as metrics, and warns once of each name that has something odd."""

    def __init__(self) -> None:
        self._warned: set[str] = set()

    def __call__(self, metrics: Any, what: str = "metrics") -> dict[str, float]:
        """Return metrics as floats by name. One that is NaN or infinite is kept.

        Args:
            metrics: numbers by name: of Python, or NumPy arrays and torch tensors with one element.
            what: the argument that a message names.

        Raises:
            MetricError: it is no mapping, one is no number, or there are too many.
        """
        if not isinstance(metrics, Mapping):
            raise MetricError(
                f"{what}: expected numbers by name, such as {{'val_loss': 0.7}}, got {type(metrics).__name__}"
            )
        if len(metrics) > MAX_METRICS:
            raise MetricError(
                f"{what}: {len(metrics)} are given; at most {MAX_METRICS} can be sent"
            )
        found = {
            self._name(name, what): _number(name, value, what) for name, value in metrics.items()
        }
        for name, value in found.items():
            if not math.isfinite(value) and name not in self._warned:
                self._warned.add(name)
                logger.warning(
                    "%s: %r is %s; it counts in no mean over the sites", what, name, value
                )
        return found

    def _name(self, name: Any, what: str) -> str:
        """Return a name that a message can have: it costs neither the other metrics nor the update."""
        text = str(name)
        short = shown(text, MAX_NAME) or "unnamed"
        if short != text and short not in self._warned:
            self._warned.add(short)
            logger.warning(
                "%s: a name has 1 to %d printable characters; one of %d is sent as %r",
                what, MAX_NAME, len(text), short[:40],
            )  # fmt: skip
        return short


def _number(name: Any, value: Any, what: str) -> float:
    hint = (
        f"give a number, such as float({value!r})" if isinstance(value, str) else "give one number"
    )
    if isinstance(value, str | bytes):
        raise MetricError(f"{what}: {name!r} is the text {value!r}; {hint}")
    try:
        return float(value)
    except OverflowError:
        raise MetricError(f"{what}: {name!r} is too large for a number of 64 bits") from None
    except (TypeError, ValueError, RuntimeError):  # torch raises RuntimeError for several elements
        kind = type(value).__name__
        raise MetricError(f"{what}: {name!r} is a {kind}, which is no number; {hint}") from None
