"""The rules that combine updates, by name: what command lines, the core's callers and documentation ask."""

from __future__ import annotations

from .contract import PythonRule
from .options import Option
from .registry import DEFAULT_RULE, RULES, Rule, find_rule

__all__ = ["DEFAULT_RULE", "RULES", "Option", "PythonRule", "Rule", "find_rule"]
