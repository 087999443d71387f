"""``module.load_state_dict(fl.receive(), strict=False)``: what it takes, and an error where it would take nothing.

Tensors travel under the names of the plain class. A module that is wrapped (compiled, in DistributedDataParallel),
or holds wrapped ones, has longer names in its own ``state_dict``. ``strict=False`` drops names that do not fit
without a word, so the module that `fl.init` was given takes both.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

from fedcore.errors import LayoutError

__all__ = ["LoadingHooks"]


class LoadingHooks:
    """What `fl.init` adds to the module that it is given, until `remove`.

    Args:
        module: what the script loads received tensors into.
        own: the travelling name of each name in the module's own ``state_dict``, where they differ.
        names: all names that travel.
    """

    def __init__(self, module: Any, own: Mapping[str, str], names: list[str]) -> None:
        longer = {plain: name for name, plain in own.items()}
        self._handles = [
            module.register_load_state_dict_pre_hook(functools.partial(_lengthen, longer)),
            module.register_load_state_dict_post_hook(
                functools.partial(_refuse_dropped, frozenset(names))
            ),
        ]

    def remove(self) -> None:
        """Leave the module as it was."""
        for handle in self._handles:
            handle.remove()


def _lengthen(
    longer: Mapping[str, str], _: Any, state: dict[str, Any], prefix: str, *__: Any
) -> None:
    for plain, name in longer.items():
        if prefix + plain in state and prefix + name not in state:
            state[prefix + name] = state.pop(prefix + plain)


def _refuse_dropped(names: frozenset[str], _: Any, found: Any) -> None:
    dropped = sorted(names.intersection(found.unexpected_keys))
    if dropped:
        raise LayoutError(
            f"load_state_dict dropped {len(dropped)} of the {len(names)} tensors that were received, such as "
            f"{dropped[0]!r}: they travel under other names than those of the module's state_dict; put them into "
            "the module with fl.load(params)"
        )
