"""Sentences with a human rating of their sentiment, from four domains, and how they are shared out.

The texts are those of Hutto and Gilbert, "VADER" (ICWSM 2014): each was rated from -4 to 4 by at least 20 people.
"""

from __future__ import annotations

import html
import io
import random
import tarfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from fedcore.demo.assets import Asset, Member
from fedcore.errors import ConfigError

from .hub import load_columns

__all__ = ["DOMAINS", "VADER", "Pool", "Text", "load_texts", "load_vader", "make_pool"]

_TAR: Final = "additional_resources/hutto_ICWSM_2014.tar.gz"
_ROOT: Final = "vaderSentiment-0.5/"

VADER: Final = Asset(
    name="vader",
    requirement="vaderSentiment==0.5",
    archive="vaderSentiment-0.5.zip",
    sha256="5d97c37f3ef6e24eef331122e055dbedafeb6a56abfce0608b326701116ea49a",
    size=2_448_964,
    licence="MIT",
    root=_ROOT,
    members=(
        Member(
            _ROOT + _TAR,
            "d5bb07d87474b3eb8d30b4deccbc23f19d742a6c5718fbacc65485b70b95c5fa",
            2_338_514,
        ),
    ),
    source=True,
)

#: A site's name and the stem of its file.
DOMAINS: Final = {
    "movie": "movieReviewSnippets",
    "amazon": "amazonReviewSnippets",
    "nyt": "nytEditorialSnippets",
    "tweets": "tweets",
}
_LEAST_RATING: Final = 0.5


@dataclass(frozen=True)
class Text:
    """One labelled text.

    Attributes:
        group: texts of one group (sentences of one review) stay on one side of the split.
    """

    text: str
    label: str
    source: str
    group: str


@dataclass(frozen=True)
class Pool:
    """All training rows, all test rows, and the names of the classes and the sources in a fixed order."""

    train: tuple[Text, ...]
    test: tuple[Text, ...]
    labels: tuple[str, ...]
    sources: tuple[str, ...]


def load_vader(folder: Path) -> list[Text]:
    """Read the rated texts of all four domains; those rated between -0.5 and 0.5 are left out."""
    texts: list[Text] = []
    with tarfile.open(folder / _TAR) as archive:
        for domain, stem in DOMAINS.items():
            file = archive.extractfile(f"hutto_ICWSM_2014/{stem}_GroundTruth.txt")
            assert file is not None
            texts += vader_rows(io.TextIOWrapper(file, encoding="utf-8"), domain)
    return texts


def vader_rows(lines: Iterator[str] | io.TextIOBase, domain: str) -> Iterator[Text]:
    for number, line in enumerate(lines, start=1):
        cells = line.rstrip("\n").split("\t")
        if len(cells) != 3:
            raise ValueError(f"{domain}, line {number}: {len(cells)} columns, expected 3")
        name, rating, text = cells
        if abs(float(rating)) >= _LEAST_RATING:
            label = "positive" if float(rating) > 0 else "negative"
            # Sentences are numbered DOCUMENT_SENTENCE where they come from a longer text.
            yield Text(html.unescape(text), label, domain, f"{domain}/{name.partition('_')[0]}")


def load_texts(name: str, split: str, columns: Sequence[str]) -> list[Text]:
    """Read a data set by name: its columns with the text, the label and the source, in this order."""
    rows = load_columns(name, split, columns)
    return [
        Text(text, label, source, group=str(number))
        for number, (text, label, source) in enumerate(rows)
    ]


def make_pool(texts: Sequence[Text], train_rows: int, test_rows: int, seed: int) -> Pool:
    """Draw the same number of training and of test rows from every source.

    No text and no group is on both sides.

    Raises:
        ConfigError: a source holds too few rows.
    """
    sources = tuple(dict.fromkeys(text.source for text in texts))
    train: list[Text] = []
    test: list[Text] = []
    seen: set[str] = set()
    for source in sources:
        groups: dict[str, list[Text]] = {}
        for text in texts:
            key = text.text.casefold()
            if text.source == source and key not in seen:
                seen.add(key)
                groups.setdefault(text.group, []).append(text)
        order = list(groups.values())
        random.Random(f"{seed}/pool/{source}").shuffle(order)
        tested, trained = _fill(order, test_rows), _fill(order, train_rows)
        if len(trained) < train_rows:
            raise ConfigError(
                f"source {source}: {train_rows} training and {test_rows} test rows wanted, "
                f"{len(tested) + len(trained)} found"
            )
        test += tested
        train += trained
    labels = tuple(sorted({text.label for text in (*train, *test)}))
    return Pool(tuple(train), tuple(test), labels, sources)


def _fill(groups: list[list[Text]], rows: int) -> list[Text]:
    """Take whole groups off the end until there are enough rows; what is over is dropped."""
    taken: list[Text] = []
    while groups and len(taken) < rows:
        taken += groups.pop()
    return taken[:rows]
