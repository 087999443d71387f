"""A tokenizer's fingerprint tells tokenizers apart that number tokens differently, and no others."""

from __future__ import annotations

from collections.abc import Callable
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


@pytest.mark.parametrize("raw", [True, False], ids=["raw", "fast"])
@pytest.mark.parametrize(
    "told",
    [
        lambda inner: inner.enable_truncation(3, stride=1),
        lambda inner: inner.enable_padding(length=40, pad_id=1, pad_token="[PAD]"),
        lambda inner: (inner.enable_truncation(2), inner.enable_padding(pad_to_multiple_of=8)),
    ],
    ids=["truncation", "padding", "both"],
)
def test_what_a_tokenizer_cuts_and_fills_up_counts_for_nothing_and_stays(
    *, raw: bool, told: Callable[[Any], Any]
) -> None:
    one, other = make(), make()
    inner = other.backend_tokenizer
    told(inner)
    before = (inner.truncation, inner.padding, inner.to_str())
    given = [tokenizer.backend_tokenizer if raw else tokenizer for tokenizer in (one, other)]
    assert tokenizer_fingerprint(given[0]) == tokenizer_fingerprint(given[1])
    assert (inner.truncation, inner.padding, inner.to_str()) == before
    assert before[:2] != (None, None)
    assert "sequence-length" not in str(getattr(other, "deprecation_warnings", ""))


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
