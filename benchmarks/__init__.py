"""Benchmarks: each one proves its result before it reports a time. Run them as ``python -m benchmarks``."""

import sys
from pathlib import Path

# `python -m` looks in the current folder first; in the repository's root lies fedcore without its compiled core.
_ROOT = Path(__file__).resolve().parents[1]
sys.path[:] = [entry for entry in sys.path if Path(entry or ".").resolve() != _ROOT]
