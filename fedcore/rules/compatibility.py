"""Which choices of a run file go together: the one place that decides it.

The configuration asks it when a run file is read, and `page.py` makes docs/compatibility.md from it. Each check
looks at one pair of choices, and says why they do not go together and what would.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Final, Literal, TypeAlias, get_args

from fedcore.protocol import UPDATE_ENCODINGS
from fedcore.weighing import Weighing

from .deciding import SeveralPasses
from .registry import DEFAULT_RULE, RULES, Rule
from .several import SEVERAL

__all__ = ["TASKS", "Choices", "Conflict", "Task", "conflicts", "too_few"]

Task: TypeAlias = Literal["train", "evaluate", "infer", "compare"]
TASKS: Final[tuple[str, ...]] = get_args(Task)


@dataclass(frozen=True, slots=True)
class Choices:
    """What a run file chooses.

    Attributes:
        task: ``run.task``.
        rule: ``aggregation.rule``: a name, or ``package.module:Class``.
        options: the numbers that the rule is given.
        update: ``transfer.update``.
        optimizer: the name in ``aggregation.optimizer``, if there is one.
        weights: ``aggregation.weights``, if it is given.
        max_share: ``aggregation.max_share``.
        ema: ``aggregation.ema``.
        lora: ``aggregation.lora``.
        score_share: ``selection.max_share``.
        quorum: how many updates will do in a round; None: as many as any rule needs.
        sample: whether ``participants.sample`` is given.
        early: whether ``selection.patience`` or ``selection.target`` is.
    """

    task: str = "train"
    rule: str = DEFAULT_RULE
    options: Mapping[str, float] = field(default_factory=dict)
    update: str = "raw"
    optimizer: str | None = None
    weights: str | None = None
    max_share: float | None = None
    ema: float | None = None
    lora: str | None = None
    score_share: float | None = None
    quorum: int | None = None
    sample: bool = False
    early: bool = False

    @property
    def known_rule(self) -> Rule | SeveralPasses | None:
        """The rule; None where it is in Python, which the server asks."""
        return RULES.get(self.rule) or SEVERAL.get(self.rule)

    def against(self, key: str, value: object, other: str, reason: str) -> Conflict:
        """Return the conflict of a key that has a value with a choice of the same name, such as ``rule``."""
        names = {"rule": "aggregation.rule", "task": "run.task", "lora": "aggregation.lora"}
        clash = f"{value!r} does not go with {names[other]} = {getattr(self, other)!r}"
        return Conflict(key, reason, clash)


@dataclass(frozen=True, slots=True)
class Conflict:
    """Choices that do not go together.

    Attributes:
        key: the key of the run file that would have to change.
        reason: why it can't be, and what would work.
        clash: what is chosen, in a phrase that follows the key; empty where the reason says so.
    """

    key: str
    reason: str
    clash: str = ""

    @property
    def text(self) -> str:
        """The message for whoever wrote the run file."""
        return ": ".join(filter(None, (self.key, self.clash, self.reason)))


def _rule_and_encoding(choices: Choices) -> Conflict | None:
    sparse = [name for name, rule in RULES.items() if rule.sparse]
    if choices.update != "top-k" or choices.rule in sparse:
        return None
    others = _names(name for name in UPDATE_ENCODINGS if name != "top-k")
    reason = "it leaves out most values of an update, and what is left out would decide the result"
    works = f"use update = {others}, or rule = {_names(sparse)}"
    return choices.against("transfer.update", "top-k", "rule", f"{reason}; {works}")


def _rule_and_weights(choices: Choices) -> Conflict | None:
    if choices.weights != "examples" or _weighs(choices):
        return None
    return choices.against("aggregation.weights", "examples", "rule", _UNWEIGHTED)


def _rule_and_share(choices: Choices) -> Conflict | None:
    if choices.max_share is None or _weighs(choices):
        return None
    return choices.against("aggregation.max_share", choices.max_share, "rule", _UNWEIGHTED)


def _weighs(choices: Choices) -> bool:
    rule = choices.known_rule
    return rule is None or rule.weighted


def _equal_and_share(choices: Choices) -> Conflict | None:
    if choices.weights != "equal" or choices.max_share is None:
        return None
    reason = "equal weights have no greater share than others; leave it out"
    return Conflict("aggregation.max_share", reason)


def _task_and_rule(choices: Choices) -> Conflict | None:
    return _for_training(choices, "aggregation.rule", choices.rule != DEFAULT_RULE)


def _task_and_optimizer(choices: Choices) -> Conflict | None:
    return _for_training(choices, "aggregation.optimizer", choices.optimizer is not None)


def _task_and_ema(choices: Choices) -> Conflict | None:
    return _for_training(choices, "aggregation.ema", choices.ema is not None)


def _task_and_lora(choices: Choices) -> Conflict | None:
    return _for_training(choices, "aggregation.lora", choices.lora is not None)


def _lora_and_optimizer(choices: Choices) -> Conflict | None:
    if choices.lora in (None, "factors") or choices.optimizer is None:
        return None
    if choices.lora == "exact":
        reason = "an optimizer's state is of factors, which turn from round to round; leave one out"
    else:
        reason = "a round holds one factor of each adapter, and the optimizer has a state of both; leave one out"
    return Conflict("aggregation.optimizer", reason, "it does not go with aggregation.lora")


def _lora_and_ema(choices: Choices) -> Conflict | None:
    if choices.lora in (None, "factors") or choices.ema is None:
        return None
    reason = "the average of the factors is not that of their products; leave one out"
    return Conflict("aggregation.ema", reason, "it does not go with aggregation.lora")


def _lora_and_rule(choices: Choices) -> Conflict | None:
    if choices.lora not in ("factors", "exact") or choices.rule == DEFAULT_RULE:
        return None
    reason = f"it is about weighted means; use rule = {DEFAULT_RULE!r}, or lora = 'freeze-a'"
    return choices.against("aggregation.rule", choices.rule, "lora", reason)


def _lora_and_encoding(choices: Choices) -> Conflict | None:
    if choices.lora == "exact" and choices.update != "raw":
        reason = (
            "what an encoding loses of a factor is added to the next update, of which the factors are turned; use "
            "update = 'raw', or lora = 'freeze-a'"
        )
        return choices.against("transfer.update", choices.update, "lora", reason)
    if choices.lora != "alternate" or choices.update == "raw":
        return None
    reason = (
        "what an encoding loses of a factor is added to the next update, which holds the other one; use update = "
        "'raw', or lora = 'freeze-a'"
    )
    return choices.against("transfer.update", choices.update, "lora", reason)


def _task_and_weights(choices: Choices) -> Conflict | None:
    return _for_training(choices, "aggregation.weights", choices.weights is not None)


def _task_and_share(choices: Choices) -> Conflict | None:
    return _for_training(choices, "aggregation.max_share", choices.max_share is not None)


def _task_and_sample(choices: Choices) -> Conflict | None:
    return _for_training(choices, "participants.sample", choices.sample)


def _task_and_early_end(choices: Choices) -> Conflict | None:
    if choices.task == "train" or not choices.early:
        return None
    clash = f"patience and target are for run.task = 'train', not {choices.task!r}"
    return Conflict("selection", "no other task has rounds; leave them out", clash)


def _for_training(choices: Choices, key: str, given: bool) -> Conflict | None:
    if choices.task == "train" or not given:
        return None
    clash = f"it is for run.task = 'train', not {choices.task!r}"
    return Conflict(key, "no other task combines updates; leave it out", clash)


def _task_and_encoding(choices: Choices) -> Conflict | None:
    if choices.task != "compare" or choices.update == "raw":
        return None
    reason = "the sites' models are compared as they are; expected 'raw'"
    return choices.against("transfer.update", choices.update, "task", reason)


def _rule_and_quorum(choices: Choices) -> Conflict | None:
    rule = choices.known_rule
    if rule is None or choices.quorum is None:
        return None
    if isinstance(rule, SeveralPasses):
        return _decides_of(rule, rule.having(choices.options), choices.quorum)
    return too_few(rule.name, rule.having(choices.options).least, choices.quorum)


def _decides_of(rule: SeveralPasses, options: Mapping[str, float], quorum: int) -> Conflict | None:
    numbers = ", ".join(f"{name} = {value:g}" for name, value in options.items())
    words = f" ({rule.least_words}; {numbers})" if rule.least_words else ""
    few = too_few(rule.name, rule.least(options), quorum, words)
    if few is None:
        try:
            rule.fits(quorum, options)
        except ValueError as error:
            reason = f"{quorum} updates in a round would do for aggregation.rule = {rule.name!r}"
            return Conflict("participants.min_results", f"{reason}, and of so many, {error}")
    return few


def too_few(rule: str, least: int, quorum: int, words: str = "") -> Conflict | None:
    """Return why so many updates in a round do not do for a rule that needs ``least``; None if they do.

    ``words`` say where that number comes from.
    """
    if quorum >= least:
        return None
    return Conflict(
        "participants.min_results",
        f"aggregation.rule = {rule!r} needs {least} or more updates in a round{words}, and {quorum} would do",
    )


def _share_and_quorum(choices: Choices) -> Conflict | None:
    return _share_too_small(choices, "aggregation", choices.max_share, "updates in a round")


def _score_share_and_quorum(choices: Choices) -> Conflict | None:
    return _share_too_small(choices, "selection", choices.score_share, "scores of a model")


def _share_too_small(
    choices: Choices, section: str, share: float | None, of: str
) -> Conflict | None:
    least = 1 if share is None else Weighing(max_share=share).least
    if choices.quorum is None or choices.quorum >= least:
        return None
    return Conflict(
        "participants.min_results",
        f"{section}.max_share = {share} needs {least} or more {of}, and {choices.quorum} would do: one of them "
        "has a greater share, whatever it weighs",
    )


def _names(names: Iterable[str]) -> str:
    *others, last = map(repr, names)
    return f"{', '.join(others)} or {last}" if others else last


_ALL: Final[tuple[Rule | SeveralPasses, ...]] = (*RULES.values(), *SEVERAL.values())
_UNWEIGHTED: Final = "weights do not count in it; leave it out, or use rule = " + _names(
    rule.name for rule in _ALL if rule.weighted
)

_CHECKS: Final[tuple[Callable[[Choices], Conflict | None], ...]] = (
    _rule_and_encoding,
    _rule_and_weights,
    _rule_and_share,
    _equal_and_share,
    _rule_and_quorum,
    _share_and_quorum,
    _score_share_and_quorum,
    _task_and_rule,
    _task_and_optimizer,
    _task_and_ema,
    _task_and_lora,
    _task_and_weights,
    _task_and_share,
    _task_and_sample,
    _task_and_early_end,
    _task_and_encoding,
    _lora_and_optimizer,
    _lora_and_ema,
    _lora_and_rule,
    _lora_and_encoding,
)


def conflicts(choices: Choices) -> list[Conflict]:
    """Return what does not go together, in a fixed order; nothing if all does."""
    return [found for check in _CHECKS if (found := check(choices)) is not None]
