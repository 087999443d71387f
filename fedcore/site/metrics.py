"""What a script gives as metrics: numbers by name, checked before they leave."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Mapping
from typing import Any, Final

from fedcore.errors import MetricError
from fedcore.protocol import MAX_METRICS, MAX_NAME, shown
from fedcore.security.rate_limit import TokenBucket

__all__ = ["MetricCheck", "MetricLog"]

_LOGS: Final = 20
_LOGS_PER_SECOND: Final = 5.0
_MOST_STEPS: Final = (1 << 53) - 1

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


class MetricLog:
    """Training metrics of a script that may log at each step, under a rate limit.

    Args:
        send: is given the step and the metrics of a message.
    """

    def __init__(self, send: Callable[[int, dict[str, float]], None]) -> None:
        self._send = send
        self._bucket = TokenBucket(_LOGS, _LOGS_PER_SECOND, time.monotonic())
        self._waiting: dict[str, float] = {}
        self._step = self._calls = 0

    def add(self, metrics: Mapping[str, float], step: int | None) -> None:
        """Send metrics, now or with a later message: of each name the last value goes, with the last step."""
        for name, value in metrics.items():
            if name in self._waiting or len(self._waiting) < MAX_METRICS:
                self._waiting[name] = value
        self._calls += 1
        self._step = self._calls if step is None else min(max(0, int(step)), _MOST_STEPS)
        if self._bucket.take(time.monotonic()):
            self.flush()

    def flush(self) -> None:
        """Send what waits."""
        waiting, self._waiting = self._waiting, {}
        if waiting:
            self._send(self._step, waiting)


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
