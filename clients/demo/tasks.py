"""What the demo's tasks have in common: their settings, the files of a site's data, the order of batches.

Imported before torch is, so it needs the standard library alone. A task is a module with the settings and the
data (:mod:`.encoder`, :mod:`.causal`) and one with the model (:mod:`.encoder_model`, :mod:`.causal_model`).
"""

from __future__ import annotations

import json
import random
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, ClassVar, Final, Generic, Literal, TypeVar

SPLITS: Final = ("train", "val", "test")
KINDS: Final = ("encoder", "causal")

Row = TypeVar("Row")


@dataclass(frozen=True)
class SiteData(Generic[Row]):
    """What one site holds: three lists of examples that share no row."""

    train: tuple[Row, ...]
    val: tuple[Row, ...]
    test: tuple[Row, ...]


@dataclass(frozen=True)
class Task(ABC):
    """Every setting of a task. The seed decides all that is random."""

    #: What ``fedcore demo --task`` calls it.
    kind: ClassVar[str]
    sites: ClassVar[tuple[str, ...]]
    #: What is measured on the held-out rows, and whether less or more of it is better. The sites score the global
    #: model by ``val_METRIC``.
    metric: ClassVar[str]
    mode: ClassVar[Literal["min", "max"]]
    #: How the metric, the held-out rows and the download are called where a person reads them.
    metric_label: ClassVar[str]
    held_out: ClassVar[str]
    download: ClassVar[str]
    #: Whether the learner has work to do once, before any training.
    prepares: ClassVar[bool] = False

    seed: int = 0
    train_rows: int = 0
    val_rows: int = 0
    test_rows: int = 0
    rounds: int = 1
    steps_per_round: int = 1
    batch_size: int = 16
    learning_rate: float = 1e-3
    eval_batch_size: int = 50

    @property
    def total_steps(self) -> int:
        """Optimiser steps a site takes in a whole run."""
        return self.rounds * self.steps_per_round

    @abstractmethod
    def fetch(self, cache: Path, data: Path) -> Path:
        """Fetch what the task needs, write the sites' data below ``data``, and return the model's folder."""


def write_sites(sites: Mapping[str, SiteData[Any]], folder: Path, task: Task) -> None:
    """Write ``folder/SITE/{train,val,test}.jsonl`` and ``folder/task.json``."""
    for name, site in sites.items():
        (folder / name).mkdir(parents=True, exist_ok=True)
        for split in SPLITS:
            rows = [
                json.dumps(asdict(example), ensure_ascii=False) for example in getattr(site, split)
            ]
            (folder / name / f"{split}.jsonl").write_text("\n".join(rows) + "\n", encoding="utf-8")
    settings = {"task": task.kind, "settings": asdict(task)}
    (folder / "task.json").write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")


def read_rows(path: Path, kind: type[Row]) -> list[Row]:
    """Read a file that :func:`write_sites` wrote."""
    with path.open(encoding="utf-8") as file:
        return [kind(**json.loads(line)) for line in file if line.strip()]


def batch_order(rows: int, batch_size: int, seed: str) -> Iterator[list[int]]:
    """Yield batches of row numbers without end, in a new order every epoch."""
    if rows < 1 or batch_size < 1:
        raise ValueError(f"{rows} rows in batches of {batch_size}: both must be at least 1")
    rng = random.Random(seed)
    waiting: list[int] = []
    while True:
        while len(waiting) < batch_size:
            epoch = list(range(rows))
            rng.shuffle(epoch)
            waiting += epoch
        yield waiting[:batch_size]
        del waiting[:batch_size]
