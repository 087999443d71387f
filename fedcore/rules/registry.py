"""The registry of rules. A rule is a source file in ``csrc/reduce/`` and an entry here."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Final, TypeAlias

from fedcore.errors import ConfigError
from fedcore.weighing import EXAMPLES, Weighing

from .deciding import SeveralPasses
from .options import Option, complete

if TYPE_CHECKING:
    from fedcore._core import LoraRule, PythonRule, WeighedRule

__all__ = ["DEFAULT_RULE", "RULES", "CoreRule", "Rule", "find_rule", "weighed"]

DEFAULT_RULE: Final = "mean"

CoreRule: TypeAlias = "str | tuple[str, dict[str, float]] | PythonRule | WeighedRule | LoraRule"
"""What the compiled core knows a rule by: its name, its name and settings, or what calls it."""


@dataclass(frozen=True, slots=True)
class Rule:
    """What is known of a rule without the compiled core, whose own traits a test compares with these.

    Attributes:
        name: how the command line names it.
        version: changes when the same inputs give other bits.
        summary: what it computes, in a phrase.
        weighted: weights change the result.
        symmetric: the order of the sources does not change the result.
        folds: it can take one source after the other, with sums between them.
        least: sources that it needs at least, with its settings.
        least_with: how many those are for settings, where it is not always the same.
        sparse: it may be used where updates leave most of their values out (top-k).
        options: the numbers that it can be given, by name.
        settings: the numbers that it has been given, one for each option.
        python: what calls it, where it is a class of Python.
        code: a digest of its source, where it is a class of Python.
        weighing: what makes the weights of its sources.
        several: what decides from their distances what they weigh, where it is a rule of several passes.
    """

    name: str
    version: int
    summary: str
    weighted: bool
    symmetric: bool
    folds: bool
    least: int
    sparse: bool
    options: Mapping[str, Option] = field(default_factory=dict)
    settings: Mapping[str, float] = field(default_factory=dict)
    least_with: Callable[[Mapping[str, float]], int] | None = None
    python: PythonRule | None = None
    code: str = ""
    weighing: Weighing = EXAMPLES
    several: SeveralPasses | None = None

    @property
    def core(self) -> CoreRule:
        """What the compiled core knows it by."""
        if self.several is not None:
            return DEFAULT_RULE
        known: CoreRule = self.name
        if self.python is not None:
            known = self.python
        elif self.options:
            known = (self.name, dict(self.settings))
        return weighed(known, self.weighing)

    @property
    def recorded(self) -> str:
        """Name, version and settings, as the header of a model file has them."""
        numbers = [f"{name}={value.hex()}" for name, value in self.settings.items()]
        return " ".join([self.name, str(self.version), *numbers])

    def having(self, settings: Mapping[str, float]) -> Rule:
        """Return the rule with these values of some of its options, and the defaults of the others.

        Raises:
            ValueError: it has no such option, or an option does not take the value.
        """
        values = complete(self.options, settings, self.name)
        least = self.least if self.least_with is None else self.least_with(values)
        return replace(self, settings=values, least=least)

    def key(self) -> dict[str, object]:
        """Return what the bytes of a result depend on beside the rule's name and the updates."""
        return {"rule": self.version, "rule_settings": dict(self.settings), "rule_code": self.code}


RULES: Final[dict[str, Rule]] = {
    rule.name: rule
    for rule in (
        Rule(
            name="mean",
            version=1,
            summary="the mean, weighted by numbers of training examples",
            weighted=True,
            symmetric=False,
            folds=True,
            least=1,
            sparse=True,
        ),
        Rule(
            name="median",
            version=1,
            summary="the median of each element; weights do not count",
            weighted=False,
            symmetric=True,
            folds=False,
            least=1,
            sparse=False,
        ),
        Rule(
            name="trimmed-mean",
            version=1,
            summary="the mean of each element without its lowest and highest values; weights do not count",
            weighted=False,
            symmetric=True,
            folds=False,
            least=3,
            least_with=lambda settings: 2 * int(settings["trim"]) + 1,
            sparse=False,
            options={
                "trim": Option(1, 1, 1e6, "values that are left out at either end", whole=True)
            },
        ),
    )
}


def weighed(rule: CoreRule, weighing: Weighing) -> CoreRule:
    """Return a rule whose sources have these weights."""
    if weighing == EXAMPLES:
        return rule
    from fedcore._core import WeighedRule

    return WeighedRule(rule, weighing.equal, weighing.millionths)


def find_rule(name: str) -> Rule:
    """Return the rule of that name. Raises ConfigError, which names the known rules."""
    rule = RULES.get(name)
    if rule is None:
        raise ConfigError(f"no rule is named {name!r}; expected one of {', '.join(RULES)}")
    return rule
