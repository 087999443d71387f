"""Rules in Python, by the name of their class."""

from __future__ import annotations

import importlib
import inspect
import random
from array import array
from collections.abc import Callable, Sequence
from typing import Final

from fedcore import _core
from fedcore.errors import ConfigError

from .contract import PythonRule
from .registry import Rule, find_rule

__all__ = ["check_rule", "load_rule"]

_ELEMENTS: Final = 70_000  # more than a piece
_MOST: Final = (1 << 31) - 1  # of a version, and of the sources that a rule needs


def load_rule(name: str) -> Rule:
    """Return the rule of a name, or import the rule ``package.module:Class``.

    Raises:
        ConfigError: there is no rule of that name, no such module or class, it is no `PythonRule`, or NumPy is
            missing.
    """
    module, dot, class_name = name.rpartition(".")
    if dot and ":" not in name:
        raise ConfigError(
            f"no rule is named {name!r}; a rule of your own has a colon before its class: {module}:{class_name}"
        )
    return _import(name) if ":" in name else find_rule(name)


def _import(name: str) -> Rule:
    module_name, _, class_name = name.partition(":")
    try:
        import numpy as np

        found = getattr(importlib.import_module(module_name), class_name)
    except (ImportError, AttributeError, ValueError) as error:
        raise ConfigError(f"the rule {name!r} can't be imported: {error}") from error
    except Exception as error:  # whatever the module does as it is imported
        what = f"{type(error).__name__}: {error}"
        raise ConfigError(f"the rule {name!r} can't be imported: {what}") from error
    if not (isinstance(found, type) and issubclass(found, PythonRule)):
        raise ConfigError(f"the rule {name!r} is no subclass of fedcore.rules.PythonRule")
    chosen: type[PythonRule] = found
    _check_class(name, chosen)

    def make(weights: list[float]) -> Callable[[memoryview, memoryview], None]:
        combiner = chosen(np.array(weights))

        def combine(values: memoryview, out: memoryview) -> None:
            combiner.combine(np.asarray(values), np.asarray(out))

        return combine

    documented = (chosen.__doc__ or "").strip() or class_name
    return Rule(
        name=name,
        version=chosen.version,
        summary=documented.splitlines()[0],
        weighted=chosen.weighted,
        symmetric=chosen.symmetric,
        folds=False,
        least=chosen.least,
        sparse=False,
        python=_core.PythonRule(
            name, chosen.version, chosen.weighted, chosen.symmetric, chosen.least, make
        ),
    )


def _check_class(name: str, chosen: type[PythonRule]) -> None:
    """Raise ConfigError unless the class has all that an object of it needs."""
    if inspect.isabstract(chosen):
        raise ConfigError(f"the rule {name!r} has no method 'combine'")
    for attribute in ("version", "least"):
        value = getattr(chosen, attribute)
        if type(value) is not int or not 1 <= value <= _MOST:
            raise ConfigError(
                f"the rule {name!r}: {attribute}: expected an integer above 0, got {value!r}"
            )
    for attribute in ("weighted", "symmetric"):
        value = getattr(chosen, attribute)
        if type(value) is not bool:
            raise ConfigError(
                f"the rule {name!r}: {attribute}: expected True or False, got {value!r}"
            )


def check_rule(rule: Rule, sources: int = 5) -> None:
    """Check that a rule keeps the contract on random numbers, as far as that shows it.

    Args:
        rule: what `find_rule` returns for its name.
        sources: how many sources are combined; at least ``rule.least``.

    Raises:
        ConfigError: it says which promise is broken.
        NonFiniteError: a result is NaN or infinity, or an element was left out.
    """
    dice = random.Random(7)
    scales = [10.0 ** dice.randint(-3, 3) for _ in range(_ELEMENTS)]
    inputs = [array("d", [dice.gauss(0, 1) * s for s in scales]) for _ in range(sources)]
    weights = [1 + 3 * k for k in range(sources)]
    whole = _combined(rule, inputs, weights)
    cut = 1234
    parts = _combined(rule, [x[:cut] for x in inputs], weights) + _combined(
        rule, [x[cut:] for x in inputs], weights
    )
    if parts.tobytes() != whole.tobytes():
        raise ConfigError(f"the rule {rule.name!r} depends on how elements are cut into pieces")
    if _combined(rule, inputs, weights).tobytes() != whole.tobytes():
        raise ConfigError(f"the rule {rule.name!r} gives another result the second time")
    turned = _combined(rule, inputs[::-1], weights[::-1])
    if rule.symmetric and turned.tobytes() != whole.tobytes():
        raise ConfigError(f"the rule {rule.name!r} is symmetric, and another order changes it")
    equal = _combined(rule, inputs, [1] * sources)
    if not rule.weighted and equal.tobytes() != whole.tobytes():
        raise ConfigError(f"the rule {rule.name!r} does not weigh, and weights change it")


def _combined(rule: Rule, inputs: Sequence[array[float]], weights: Sequence[int]) -> array[float]:
    out = array("d", bytes(8 * len(inputs[0])))
    _core.combine_wide(rule.core, "F64", inputs, weights, out)
    return out
