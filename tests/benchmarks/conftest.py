"""The benchmarks are not installed: they are found beside the tests."""

from __future__ import annotations

import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))
import benchmarks  # noqa: E402, F401 - it takes the root, where fedcore lies uncompiled, off the path again
