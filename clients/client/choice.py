"""Which of a model's tensors travel, where a script or a site says so by name.

A pattern is a tensor's name in which ``*`` stands for any characters, dots included. What travels matches one of
the ``include`` patterns, where there are any, and no ``exclude`` pattern. The script's patterns and those
of ``FEDCORE_INCLUDE`` and ``FEDCORE_EXCLUDE`` both hold, so the environment can only make less travel. What does
not travel belongs to each site, and is trained there alone.
"""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Iterable, Sequence

from fedcore.errors import ConfigError, LayoutError

__all__ = ["beside", "choose", "forget_choice", "stays", "travelling"]

_chosen: tuple[tuple[str, ...], tuple[str, ...]] = ((), ())
_beside: tuple[str, ...] = ()


def choose(include: Iterable[str] | str = (), exclude: Iterable[str] | str = ()) -> None:
    """Set the script's patterns for this process, instead of earlier ones.

    Raises:
        ConfigError: a pattern is empty or no text.
    """
    global _chosen  # noqa: PLW0603 - one session per process is the contract
    _chosen = _patterns("include", include), _patterns("exclude", exclude)


def beside(names: Iterable[str]) -> None:
    """Say what else a site trains: names outside of its model, which patterns may match as well."""
    global _beside  # noqa: PLW0603 - one session per process is the contract
    _beside = tuple(names)


def stays(name: str) -> bool:
    """Whether a name given to `beside` is one that the patterns leave at its site."""
    for include, exclude in (_chosen, _from_environment()):
        if include and not any(_compiled(pattern).fullmatch(name) for pattern in include):
            return True
        if any(_compiled(pattern).fullmatch(name) for pattern in exclude):
            return True
    return False


def forget_choice() -> None:
    """Let all tensors travel again, but for what the environment says."""
    choose()
    beside(())


def travelling(names: Sequence[str]) -> list[str]:
    """Return those of ``names`` that travel, in their order.

    Raises:
        ConfigError: a pattern matches no name; the nearest names are given.
        LayoutError: none of them travels.
    """
    kept = list(names)
    for include, exclude in (_chosen, _from_environment()):
        if include:
            wanted = {name for pattern in include for name in _matches(pattern, names, "include")}
            kept = [name for name in kept if name in wanted]
        for pattern in exclude:
            left_out = _matches(pattern, names, "exclude")
            kept = [name for name in kept if name not in left_out]
    if names and not kept:
        raise LayoutError(
            f"include and exclude leave none of the {len(names)} tensors, so there is nothing to send"
        )
    return kept


def _from_environment() -> tuple[tuple[str, ...], tuple[str, ...]]:
    include, exclude = (
        [part.strip() for part in os.environ.get(name, "").split(",") if part.strip()]
        for name in ("FEDCORE_INCLUDE", "FEDCORE_EXCLUDE")
    )
    return tuple(include), tuple(exclude)


def _patterns(argument: str, given: Iterable[str] | str) -> tuple[str, ...]:
    patterns = (given,) if isinstance(given, str) else tuple(given)
    for pattern in patterns:
        if not isinstance(pattern, str) or not pattern:
            raise ConfigError(
                f"{argument}: expected names of tensors in which * stands for any characters, got {pattern!r}"
            )
    return patterns


def _compiled(pattern: str) -> re.Pattern[str]:
    return re.compile(".*".join(map(re.escape, pattern.split("*"))), re.DOTALL)


def _matches(pattern: str, names: Sequence[str], argument: str) -> set[str]:
    compiled = _compiled(pattern)
    found = {name for name in names if compiled.fullmatch(name)}
    if not found and not any(compiled.fullmatch(name) for name in _beside):
        near = difflib.get_close_matches(pattern, names, 3, 0.4) or list(names[:3])
        raise ConfigError(
            f"{argument}: {pattern!r} matches none of the {len(names)} tensors, such as "
            f"{', '.join(map(repr, near))}; * stands for any characters"
        )
    return found
