"""The causal task of ``fedcore demo``: its data and its settings.

The story: an adviser on money, a school and a clinic want one assistant that answers the questions of all three in
the way that each expects: at length, with a number and its unit, or with yes, no or maybe. None may hand its
questions to the others.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, ClassVar, Final, Literal

from .assets import QUESTIONS, SMOLLM, ensure
from .conversion import convert
from .tasks import SPLITS, SiteData, Task, write_sites


@dataclass(frozen=True)
class Exchange:
    """One question and the response that is wanted."""

    prompt: str
    response: str


@dataclass(frozen=True)
class Source:
    """Where a site's rows come from."""

    file: str
    read: Callable[[Mapping[str, Any]], Exchange]


#: FiQA: a question about money, a long answer. ASDiv: a word problem for children, a number and its unit.
#: PubMedQA: a title of a medical paper that asks something, and yes, no or maybe.
SOURCES: Final[Mapping[str, Source]] = MappingProxyType(
    {
        "finance": Source("Fiqa/test.jsonl", lambda row: Exchange(row["question"], row["answer"])),
        "school": Source(
            "ASDiv/test.jsonl",
            lambda row: Exchange(f"{row['passage']} {row['question']}", row["answer"]),
        ),
        "clinic": Source(
            "PubMedQA/pqal/test.jsonl", lambda row: Exchange(row["question"], row["answer"])
        ),
    }
)


@dataclass(frozen=True)
class CausalTask(Task):
    """Every setting of the causal demo."""

    kind: ClassVar[str] = "causal"
    sites: ClassVar[tuple[str, ...]] = tuple(SOURCES)
    metric: ClassVar[str] = "loss"
    mode: ClassVar[Literal["min", "max"]] = "min"
    metric_label: ClassVar[str] = "response loss"
    held_out: ClassVar[str] = "questions of all sites"
    download: ClassVar[str] = "113 MB"
    prepares: ClassVar[bool] = True

    # Data
    train_rows: int = 96
    val_rows: int = 24
    test_rows: int = 64
    max_prompt_words: int = 28
    # Model
    lora_layers: int = 6
    lora_rank: int = 8
    lora_alpha: int = 16
    max_tokens: int = 56
    min_response_tokens: int = 8
    # Training
    rounds: int = 6
    steps_per_round: int = 6
    batch_size: int = 8
    learning_rate: float = 4e-3
    eval_batch_size: int = 16

    def fetch(self, cache: Path, data: Path) -> Path:
        """Fetch SmolLM2 and the questions, convert the model once, and share the questions out."""
        gguf = ensure(SMOLLM, cache) / SMOLLM.target(SMOLLM.members[0])
        model = convert(gguf, cache / "smollm2-135m-instruct")
        write_sites(build_sites(ensure(QUESTIONS, cache), self), data, self)
        return model


def read_exchanges(path: Path, read: Callable[[Mapping[str, Any]], Exchange]) -> Iterator[Exchange]:
    """Yield the rows of a JSON-lines file, with runs of white space made one space.

    Raises:
        ValueError: a line holds no object, or one without the question or the answer as a text.
    """
    with path.open(encoding="utf-8") as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            try:
                row = read(json.loads(line))
                exchange = Exchange(" ".join(row.prompt.split()), " ".join(row.response.split()))
            except (KeyError, TypeError, AttributeError, json.JSONDecodeError) as error:
                raise ValueError(
                    f"{path.name}, line {number}: no question and answer ({error})"
                ) from error
            if exchange.prompt and exchange.response:
                yield exchange


def build_sites(
    folder: Path, task: CausalTask, sources: Mapping[str, Source] = SOURCES
) -> dict[str, SiteData[Exchange]]:
    """Draw every site's rows from its own source.

    Long questions are left out. No question is used twice, neither within a site nor at two of them.

    Raises:
        ValueError: a source holds too few questions, or a row that cannot be read.
    """
    seen: set[str] = set()
    sites: dict[str, SiteData[Exchange]] = {}
    counts = dict(zip(SPLITS, (task.train_rows, task.val_rows, task.test_rows), strict=True))
    for name, source in sources.items():
        pool: list[Exchange] = []
        for exchange in read_exchanges(folder / source.file, source.read):
            question = exchange.prompt.casefold()
            if question in seen or len(question.split()) > task.max_prompt_words:
                continue
            seen.add(question)
            pool.append(exchange)
        wanted = sum(counts.values())
        if len(pool) < wanted:
            raise ValueError(f"{name}: {wanted} rows wanted, {len(pool)} found")
        random.Random(f"{task.seed}/data/{name}").shuffle(pool)
        sites[name] = SiteData(
            **{split: tuple(pool.pop() for _ in range(rows)) for split, rows in counts.items()}
        )
    return sites
