"""The rules that combine updates, by name: what command lines, the core's callers and documentation ask."""

from __future__ import annotations

from .registry import RULES, Rule, find_rule

__all__ = ["RULES", "Rule", "find_rule"]
