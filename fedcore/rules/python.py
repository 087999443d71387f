"""Rules in Python, by the name of their class."""

from __future__ import annotations

import functools
import hashlib
import importlib
import inspect
import random
import sys
from array import array
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Final

from fedcore import _core
from fedcore.errors import ConfigError
from fedcore.weighing import EXAMPLES, Weighing

from .contract import PythonRule
from .deciding import SeveralPasses
from .options import Option, complete
from .registry import Rule, find_rule
from .several import SEVERAL

__all__ = ["check_rule", "load_rule"]

_ELEMENTS: Final = 70_000  # more than a piece
_MOST: Final = (1 << 31) - 1  # of a version, and of the sources that a rule needs


def load_rule(
    name: str, settings: Mapping[str, float] | None = None, weighing: Weighing = EXAMPLES
) -> Rule:
    """Return the rule of a name, or import the rule ``package.module:Class``.

    Args:
        name: of the rule.
        settings: values for some of its options.
        weighing: what makes the weights of its sources.

    Raises:
        ConfigError: there is no rule of that name, no such module or class, it is no `PythonRule`, it does not
            take these settings, or does not weigh and is given a greatest share, or NumPy is missing.
    """
    found = _load(name, settings or {})
    if weighing == EXAMPLES:
        return found
    if not found.weighted and not weighing.equal:
        raise ConfigError(f"the rule {name!r} does not weigh: leave out how updates are weighed")
    return replace(found, weighing=weighing)


def _load(name: str, settings: Mapping[str, float]) -> Rule:
    module, dot, class_name = name.rpartition(".")
    if dot and ":" not in name:
        raise ConfigError(
            f"no rule is named {name!r}; a rule of your own has a colon before its class: {module}:{class_name}"
        )
    if ":" in name:
        return _import(name, settings)
    if name in SEVERAL:
        return _several(SEVERAL[name], settings)
    rule = find_rule(name)
    try:
        return rule.having(settings)
    except ValueError as error:
        raise ConfigError(f"the rule {name!r}: options: {error}") from None


def _several(kind: SeveralPasses, given: Mapping[str, float]) -> Rule:
    settings = kind.having(given)
    return Rule(
        name=kind.name,
        version=kind.version,
        summary=kind.summary,
        weighted=kind.weighted,
        symmetric=False,
        folds=False,
        least=kind.least(settings),
        sparse=False,
        options=kind.options,
        settings=settings,
        several=kind,
    )


def _import(name: str, given: Mapping[str, float]) -> Rule:
    module_name, _, class_name = name.partition(":")
    try:
        import numpy as np

        found = getattr(importlib.import_module(module_name), class_name)
    except (ImportError, AttributeError, ValueError) as error:
        raise ConfigError(
            f"the rule {name!r} can't be imported: {error}; its module has to be installed, or its folder in "
            "PYTHONPATH"
        ) from error
    except Exception as error:  # whatever the module does as it is imported
        what = f"{type(error).__name__}: {error}"
        raise ConfigError(f"the rule {name!r} can't be imported: {what}") from error
    if not (isinstance(found, type) and issubclass(found, PythonRule)):
        raise ConfigError(f"the rule {name!r} is no subclass of fedcore.rules.PythonRule")
    chosen: type[PythonRule] = found
    _check_class(name, chosen)
    settings = _completed(name, chosen.options, given)
    least = _least(name, chosen, settings)

    def make(weights: list[float]) -> Callable[[memoryview, memoryview], None]:
        combiner = chosen(np.array(weights), dict(settings))

        def combine(values: memoryview, out: memoryview) -> None:
            returned: object = combiner.combine(np.asarray(values), np.asarray(out))
            if returned is not None:
                raise TypeError(
                    f"combine returned a value ({type(returned).__name__}); it fills in `out` and returns nothing"
                )

        return combine

    documented = (chosen.__doc__ or "").strip() or class_name
    return Rule(
        name=name,
        version=chosen.version,
        summary=documented.splitlines()[0],
        weighted=chosen.weighted,
        symmetric=chosen.symmetric,
        folds=False,
        least=least,
        sparse=False,
        options=dict(chosen.options),
        settings=settings,
        python=_core.PythonRule(
            name, chosen.version, chosen.weighted, chosen.symmetric, least, make
        ),
        code=_digest(chosen),
    )


def _completed(
    name: str, options: Mapping[str, Option], given: Mapping[str, float]
) -> dict[str, float]:
    try:
        return complete(options, given, name)
    except ValueError as error:
        raise ConfigError(f"the rule {name!r}: options: {error}") from None


def _least(name: str, chosen: type[PythonRule], settings: dict[str, float]) -> int:
    """Return how many sources a rule needs with its settings."""
    try:
        least = chosen.least_with(dict(settings))
    except Exception as error:
        what = f"{type(error).__name__}: {error}"
        raise ConfigError(f"the rule {name!r}: least_with failed: {what}") from error
    _check_count(name, "least_with", least)
    return least


def _check_count(name: str, what: str, value: object) -> None:
    if type(value) is not int or not 1 <= value <= _MOST:
        raise ConfigError(f"the rule {name!r}: {what}: expected an integer above 0, got {value!r}")


@functools.cache
def _digest(chosen: type[PythonRule]) -> str:
    """Return a SHA-256 of the modules that define a class and those that it derives from, as they were imported.

    It is taken once for each class: a file may change afterwards, and what runs does not.
    """
    found = hashlib.sha256()
    modules = {kind.__module__ for kind in chosen.__mro__ if not issubclass(PythonRule, kind)}
    for module in sorted(modules):
        try:
            source = inspect.getsource(sys.modules[module])
        except (OSError, TypeError, KeyError):  # compiled, or typed in: its version alone is known
            source = ""
        found.update(f"{module}\0{source}\0".encode())
    return found.hexdigest()


def _check_class(name: str, chosen: type[PythonRule]) -> None:
    """Raise ConfigError unless the class has all that an object of it needs."""
    if inspect.isabstract(chosen):
        raise ConfigError(f"the rule {name!r} has no method 'combine'")
    for attribute in ("version", "least"):
        _check_count(name, attribute, getattr(chosen, attribute))
    for attribute in ("weighted", "symmetric"):
        value = getattr(chosen, attribute)
        if type(value) is not bool:
            raise ConfigError(
                f"the rule {name!r}: {attribute}: expected True or False, got {value!r}"
            )
    options: object = chosen.options
    if not isinstance(options, Mapping) or not all(
        isinstance(key, str) and isinstance(value, Option) for key, value in options.items()
    ):
        raise ConfigError(f"the rule {name!r}: options: expected a dict of fedcore.rules.Option")


def check_rule(rule: Rule, sources: int | None = None) -> None:
    """Check that a rule keeps the contract on random numbers, as far as that shows it.

    Args:
        rule: what `load_rule` returns for its name.
        sources: how many sources are combined, at least ``rule.least``; None: 5, or as many as it needs.

    Raises:
        ConfigError: it says which promise is broken.
        RuleError: the rule raised something, a result is NaN or infinity, or an element was left out.
    """
    sources = max(5, rule.least) if sources is None else sources
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
