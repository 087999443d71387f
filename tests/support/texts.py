"""Small labelled texts and questions with answers, made from a seed."""

from __future__ import annotations

import random

from benchmarks.experiments.sentiment import Text
from fedcore.demo.causal import Exchange

SOURCES = ("movie", "amazon", "nyt", "tweets")
WORDS = ("good", "fine", "bad", "awful", *SOURCES, "film", "day")


def texts(rows: int = 40) -> list[Text]:
    draw = random.Random(3)
    found = []
    for source in SOURCES:
        for number in range(rows):
            positive = draw.random() < 0.5
            words = [draw.choice(WORDS[:2] if positive else WORDS[2:4]), source]
            words += draw.choices(WORDS, k=4)
            text = f"{' '.join(words)} {number}"
            label = "positive" if positive else "negative"
            found.append(Text(text, label, source, f"{source}/{number // 2}"))
    return found


def exchanges(word: str, rows: int = 11) -> list[Exchange]:
    return [Exchange(f"{word} {number}", f"{word[0]}{number} {word}") for number in range(rows)]
