"""Functions that a run file names as ``"package.module:function"``, and what goes wrong in them."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable
from typing import Any

from fedcore.errors import ConfigError

__all__ = ["describe", "load_function"]


def describe(error: BaseException) -> str:
    """Return the type of an error of code that is not ours, and its text, if it has one that can be had."""
    name = type(error).__name__
    try:
        return f"{name}: {error}"
    except Exception:
        return name


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
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # whatever the module does as it is imported
        raise ConfigError(
            f"{setting}: cannot import {module!r} of {name!r}: {describe(error)}; the module has to "
            "be installed, or its folder in PYTHONPATH"
        ) from error
    for part in path.split("."):
        found = getattr(found, part, None)
    if not callable(found):
        raise ConfigError(f"{setting}: {name!r} is no function: {module} has no function {path!r}")
    if inspect.iscoroutinefunction(found):
        raise ConfigError(f"{setting}: {name!r} is an async function; expected a plain one")
    return found
