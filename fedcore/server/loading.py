"""Functions that a run file names as ``"package.module:function"``."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

from fedcore.errors import ConfigError

__all__ = ["load_function"]


def load_function(name: str, setting: str) -> Callable[..., Any]:
    """Return what a name such as ``"package.module:function"`` stands for.

    Args:
        setting: the key of the run file, for messages.

    Raises:
        ConfigError: the module can't be imported, or has no such function.
    """
    module, _, path = name.partition(":")
    try:
        found: object = importlib.import_module(module)
    except Exception as error:  # whatever the module does as it is imported
        raise ConfigError(
            f"{setting}: cannot import {module!r} of {name!r}: {type(error).__name__}: {error}; the module has to "
            "be installed, or its folder in PYTHONPATH"
        ) from error
    for part in path.split("."):
        found = getattr(found, part, None)
    if not callable(found):
        raise ConfigError(f"{setting}: {name!r} is no function: {module} has no such one")
    return found
