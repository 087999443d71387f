"""Rules in Python: with the mathematics of those in the core, with an option, and some that fail."""

from __future__ import annotations

import gc
import threading
import time
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import ClassVar

import numpy as np

from fedcore.rules import Option, PythonRule

__all__ = ["Busy", "Held", "Mean", "Median", "Trimmed", "named"]


def named(kind: type[PythonRule]) -> str:
    """Return what a run file calls a class."""
    return f"{kind.__module__}:{kind.__qualname__}"


class Median(PythonRule):
    """the median, by NumPy"""

    weighted = False
    symmetric = True

    def combine(self, values: np.ndarray, out: np.ndarray) -> None:
        np.median(values, axis=0, out=out)


class Held(Median):
    """the median, by a class that waits in each piece until a test lets it go on"""

    entered: ClassVar[threading.Event] = threading.Event()
    free: ClassVar[threading.Event] = threading.Event()

    @classmethod
    def hold(cls) -> None:
        """Let it wait from now on."""
        cls.entered.clear()
        cls.free.clear()

    def combine(self, values: np.ndarray, out: np.ndarray) -> None:
        self.entered.set()
        if not self.free.wait(200):
            raise TimeoutError("the test does not let the rule go on")
        super().combine(values, out)


class Mean(PythonRule):
    """the weighted mean, source after source"""

    def combine(self, values: np.ndarray, out: np.ndarray) -> None:
        out[:] = 0
        for row, weight in zip(values, self.weights, strict=True):
            out += row * weight
        out /= self.weights.sum()


class Trimmed(Median):
    """the mean without the lowest and the highest values"""

    options: ClassVar[Mapping[str, Option]] = {
        "trim": Option(1, 1, 100, "values left out at either end", whole=True)
    }

    @classmethod
    def least_with(cls, settings: Mapping[str, float]) -> int:
        return 2 * int(settings["trim"]) + 1

    def combine(self, values: np.ndarray, out: np.ndarray) -> None:
        trim = int(self.settings["trim"])
        out[:] = np.sort(values, axis=0)[trim : len(values) - trim].mean(axis=0)


class Busy(Median):
    """the median, by a class that prints, starts threads, collects garbage and takes its time"""

    def combine(self, values: np.ndarray, out: np.ndarray) -> None:
        print(f"{len(values)} sources")
        with ThreadPoolExecutor(2) as pool:
            halves = [slice(0, len(out) // 2), slice(len(out) // 2, None)]
            done = [pool.submit(np.median, values[:, half], axis=0) for half in halves]
            for half, part in zip(halves, done, strict=True):
                out[half] = part.result()
        gc.collect()
        time.sleep(0.01)  # it is slow, as a rule may be; nothing waits for it
