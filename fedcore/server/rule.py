"""The rule of a run."""

from __future__ import annotations

from fedcore.config import RunConfig
from fedcore.errors import ConfigError
from fedcore.rules import Rule
from fedcore.rules.python import load_rule

__all__ = ["check_rule_fits", "rule_of"]


def rule_of(config: RunConfig) -> Rule:
    """Return the rule of a run, with its settings and what makes its weights.

    Raises:
        ConfigError: it can't be imported, does not take the settings, or does not weigh.
    """
    chosen = config.aggregation
    return load_rule(chosen.rule, chosen.options, chosen.weighing)


def check_rule_fits(config: RunConfig) -> None:
    """Check what the run file alone does not say of a rule in Python.

    Raises:
        ConfigError: it can't be imported, does not take the settings, does not weigh, or needs more updates than a
            round may have.
    """
    rule = rule_of(config)
    if config.participants.quorum < rule.least:
        raise ConfigError(
            f"participants.min_results: aggregation.rule = {rule.name!r} needs {rule.least} or more updates in a "
            f"round, and {config.participants.quorum} would do"
        )
