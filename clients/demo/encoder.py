"""The encoder task of ``fedcore demo``: its data and its settings.

The story: three discussion forums want to sort incoming messages into the
same topics. Every forum mostly sees messages about its own topics and hardly
any about the others', and none may hand its messages to the others.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import ClassVar, Literal

from .assets import MINILM, NEWSGROUPS, ensure
from .tasks import SiteData, Task, write_sites


@dataclass(frozen=True)
class Example:
    """One message and the topic it belongs to."""

    text: str
    label: str


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


@dataclass(frozen=True)
class EncoderTask(Task):
    """Every setting of the encoder demo."""

    kind: ClassVar[str] = "encoder"
    sites: ClassVar[tuple[str, ...]] = tuple(SITE_TOPICS)
    metric: ClassVar[str] = "accuracy"
    mode: ClassVar[Literal["min", "max"]] = "max"
    metric_label: ClassVar[str] = "accuracy"
    held_out: ClassVar[str] = "texts of all topics"
    download: ClassVar[str] = "122 MB"

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

    def fetch(self, cache: Path, data: Path) -> Path:
        """Fetch MiniLM and 20 Newsgroups, and split the messages over the sites."""
        model, news = ensure(MINILM, cache), ensure(NEWSGROUPS, cache)
        sites = build_sites(news / "20newsgroups-train.tab", news / "20newsgroups-test.tab", self)
        write_sites(sites, data, self)
        return model


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
) -> dict[str, SiteData[Example]]:
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

    sites: dict[str, SiteData[Example]] = {}
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
