"""A tokenizer's fingerprint tells tokenizers apart that number tokens differently, and no others."""

from __future__ import annotations

from typing import Any

import pytest

from fedcore.client.tokenizer import tokenizer_fingerprint, tokenizer_of

WORDS = ["[UNK]", "[PAD]", "the", "quick", "brown", "def", "return", "spaces"]


def make(words: list[str] = WORDS, *, lower: bool = False, **options: Any) -> Any:
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    inner = Tokenizer(
        models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="[UNK]")
    )
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    if lower:
        inner.normalizer = normalizers.Lowercase()
    return PreTrainedTokenizerFast(tokenizer_object=inner, unk_token="[UNK]", **options)


def test_the_same_tokenizer_has_the_same_fingerprint_however_it_is_used() -> None:
    one, other = make(), make()
    other(["the quick", "brown"], truncation=True, max_length=1)
    other.model_max_length = 7
    assert tokenizer_fingerprint(one) == tokenizer_fingerprint(other)


@pytest.mark.parametrize(
    "other",
    [
        lambda: make(WORDS[:1] + WORDS[:0:-1]),
        lambda: make(lower=True),
        lambda: make(pad_token="[PAD]"),
        lambda: make(chat_template="{{ messages }}"),
    ],
    ids=["order", "case", "special", "template"],
)
def test_another_tokenizer_has_another_fingerprint(other: Any) -> None:
    assert tokenizer_fingerprint(other()) != tokenizer_fingerprint(make())


def test_the_tokenizer_of_a_processor_is_found_and_what_is_none_is_left_alone() -> None:
    class Processor:
        tokenizer = make()

    assert tokenizer_of(Processor()) is Processor.tokenizer
    assert tokenizer_of(Processor.tokenizer) is Processor.tokenizer
    assert tokenizer_of(None) is None
    assert tokenizer_of(object()) is None
