"""The learning task of ``fedcore demo``: its data and its settings.

Standard library only, so that it can be imported before torch is; the model
and the training live in :mod:`fedcore.demo.modeling`.

The story: three discussion forums want to sort incoming messages into the
same topics. Every forum mostly sees messages about its own topics and hardly
any about the others', and none may hand its messages to the others.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from types import MappingProxyType

SPLITS = ("train", "val", "test")


@dataclass(frozen=True)
class Example:
    """One message and the topic it belongs to."""

    text: str
    label: str


@dataclass(frozen=True)
class SiteData:
    """What one site holds: three lists of examples that share no row."""

    train: tuple[Example, ...]
    val: tuple[Example, ...]
    test: tuple[Example, ...]


@dataclass(frozen=True)
class EncoderTask:
    """Every setting of the encoder demo. The seed decides all that is random."""

    seed: int = 0
    # Data
    train_rows: int = 360
    val_rows: int = 100
    test_rows: int = 200
    own_share: float = 0.9
    min_words: int = 20
    # Model
    layers: int = 6
    lora_layers: int = 2
    lora_rank: int = 8
    lora_alpha: int = 16
    head_scale: float = 10.0
    max_tokens: int = 40
    # Training
    rounds: int = 5
    steps_per_round: int = 12
    batch_size: int = 16
    learning_rate: float = 2e-3
    eval_batch_size: int = 50

    @property
    def total_steps(self) -> int:
        """Optimiser steps a site takes in a whole run."""
        return self.rounds * self.steps_per_round


#: Which topics (20 Newsgroups names) each site is mostly about.
SITE_TOPICS: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {
        "technology": (
            "comp.graphics",
            "comp.windows.x",
            "sci.crypt",
            "sci.electronics",
        ),
        "leisure": (
            "rec.autos",
            "rec.motorcycles",
            "rec.sport.baseball",
            "rec.sport.hockey",
        ),
        "world": (
            "sci.med",
            "sci.space",
            "soc.religion.christian",
            "talk.politics.mideast",
        ),
    }
)


def topic_names(site_topics: Mapping[str, tuple[str, ...]] = SITE_TOPICS) -> tuple[str, ...]:
    """All topics, sorted: a topic's position is its class number."""
    return tuple(sorted(topic for topics in site_topics.values() for topic in topics))


def read_tab(path: Path) -> Iterator[Example]:
    """Yield the examples of an Orange ``.tab`` file with two columns.

    The file opens with three header lines (names, types, roles); blank lines
    between rows are skipped.

    Raises:
        ValueError: a row does not hold exactly a label and a text.
    """
    with path.open(encoding="utf-8", newline="\n") as file:
        for number, line in enumerate(file, start=1):
            if number <= 3 or not line.strip():
                continue
            cells = line.strip().split("\t")
            if len(cells) == 1:  # a label whose text is empty
                continue
            if len(cells) != 2:
                raise ValueError(f"{path.name}, line {number}: {len(cells)} columns, expected 2")
            yield Example(text=cells[1], label=cells[0])


def _by_topic(
    examples: Iterator[Example], topics: tuple[str, ...], min_words: int, seen: set[str]
) -> dict[str, list[Example]]:
    """Group the usable examples by topic; a text already in ``seen`` is left out."""
    groups: dict[str, list[Example]] = {topic: [] for topic in topics}
    for example in examples:
        if example.label not in groups or example.text in seen:
            continue
        if len(example.text.split()) < min_words:
            continue
        seen.add(example.text)
        groups[example.label].append(example)
    return groups


def _shares(
    rows: int, own: tuple[str, ...], other: tuple[str, ...], own_share: float
) -> dict[str, int]:
    """How many of ``rows`` go to each topic: even within own and within other topics."""
    own_rows = round(rows * own_share)
    counts: dict[str, int] = {}
    for topics, total in ((own, own_rows), (other, rows - own_rows)):
        base, extra = divmod(total, len(topics))
        counts |= {topic: base + (index < extra) for index, topic in enumerate(topics)}
    return counts


def _draw(pools: dict[str, list[Example]], counts: Mapping[str, int], what: str) -> list[Example]:
    """Take ``counts`` examples off the end of each topic's pool."""
    taken: list[Example] = []
    for topic, count in counts.items():
        if count > len(pools[topic]):
            raise ValueError(f"{what}: {count} rows of {topic} wanted, {len(pools[topic])} left")
        taken += [pools[topic].pop() for _ in range(count)]
    return taken


def build_sites(
    train_file: Path,
    test_file: Path,
    task: EncoderTask,
    site_topics: Mapping[str, tuple[str, ...]] = SITE_TOPICS,
) -> dict[str, SiteData]:
    """Split the newsgroup messages over the sites.

    Training and validation rows come from the data set's own training half and
    test rows from its own test half, which is later in time. No message is
    used twice.
    """
    topics = topic_names(site_topics)
    rng = random.Random(f"{task.seed}/data")
    seen: set[str] = set()
    early = _by_topic(read_tab(train_file), topics, task.min_words, seen)
    late = _by_topic(read_tab(test_file), topics, task.min_words, seen)
    for pools in (early, late):
        for topic in topics:
            rng.shuffle(pools[topic])

    sites: dict[str, SiteData] = {}
    for name, own in site_topics.items():
        # The few foreign rows are shared out in random order, so that no foreign
        # topic is always the one that gets the left-over row.
        other = [topic for topic in topics if topic not in own]
        rng.shuffle(other)
        parts: dict[str, tuple[Example, ...]] = {}
        for split, rows, pools in (
            ("train", task.train_rows, early),
            ("val", task.val_rows, early),
            ("test", task.test_rows, late),
        ):
            counts = _shares(rows, own, tuple(other), task.own_share)
            part = _draw(pools, counts, f"{name}/{split}")
            rng.shuffle(part)
            parts[split] = tuple(part)
        sites[name] = SiteData(**parts)
    return sites


def write_sites(sites: Mapping[str, SiteData], folder: Path, task: EncoderTask) -> None:
    """Write ``folder/SITE/{train,val,test}.jsonl`` and ``folder/task.json``."""
    for name, site in sites.items():
        (folder / name).mkdir(parents=True, exist_ok=True)
        for split in SPLITS:
            rows = [
                json.dumps(asdict(example), ensure_ascii=False) for example in getattr(site, split)
            ]
            (folder / name / f"{split}.jsonl").write_text("\n".join(rows) + "\n", encoding="utf-8")
    (folder / "task.json").write_text(json.dumps(asdict(task), indent=2) + "\n", encoding="utf-8")


def read_rows(path: Path) -> list[Example]:
    """Read a file that :func:`write_sites` wrote."""
    with path.open(encoding="utf-8") as file:
        return [Example(**json.loads(line)) for line in file if line.strip()]


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
