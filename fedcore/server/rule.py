"""The rule of a run."""

from __future__ import annotations

from fedcore.config import RunConfig
from fedcore.errors import ConfigError
from fedcore.rules import Rule
from fedcore.rules.compatibility import too_few
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
    few = too_few(rule.name, rule.least, config.participants.quorum)
    if few is not None:
        raise ConfigError(few.text)
