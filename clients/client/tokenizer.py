"""A tokenizer's fingerprint: sites that train the same model must number the same tokens."""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Iterator
from typing import Any, Final

__all__ = ["tokenizer_fingerprint", "tokenizer_of"]

# Scripts, digits, case, spaces, code and signs of several bytes: where tokenizers of one vocabulary part ways.
_PROBE: Final = (
    "The quick brown Fox jumps over 12 lazy dogs, costs $1,234.56 (+7%), and isn't tired!  Two  spaces,\ttab,\n\n",
    "def add(a, b):\n    return a + b  # x_1 != Y2\nhttps://example.org/a?b=c&d=%20",
    "Größe naïve façade señor Ångström żółć", "Быстрая коричневая лиса", "γρήγορη αλεπού",
    "שועל חום", "الثعلب البني",
    "快速的棕色狐狸 はやい きつね 빠른 여우", "तेज़ लोमड़ी", "🙂🚀 👩‍🔬 ½ № ﬁ … —",
)  # fmt: skip


def tokenizer_fingerprint(tokenizer: Any) -> str:
    """Return a SHA-256 over vocabulary, special tokens, chat template and how a fixed text is encoded.

    Padding and truncation are left out, and so is how a version of the library writes a tokenizer down. The
    tokenizer is left as it was.
    """
    vocabulary = tokenizer.get_vocab()
    with _whole_texts(tokenizer):
        encoded = [tokenizer.encode(text, add_special_tokens=True) for text in _PROBE]
    special = getattr(tokenizer, "special_tokens_map", {})
    about = {
        "vocabulary": sorted((int(index), str(token)) for token, index in vocabulary.items()),
        "special": {k: str(v) for k, v in sorted(special.items())},
        "template": str(getattr(tokenizer, "chat_template", None) or ""),
        "probe": [list(getattr(found, "ids", found)) for found in encoded],
    }
    text = json.dumps(about, ensure_ascii=True)
    return hashlib.sha256(text.encode("ascii")).hexdigest()


@contextlib.contextmanager
def _whole_texts(tokenizer: Any) -> Iterator[None]:
    """Turn off what a tokenizer was told to cut and to fill up, which it remembers and `encode` may change."""
    inner = getattr(tokenizer, "backend_tokenizer", tokenizer)
    noted: dict[str, Any] = getattr(tokenizer, "deprecation_warnings", {})  # what it has warned of
    warned = dict(noted)
    cut, fill = getattr(inner, "truncation", None), getattr(inner, "padding", None)
    try:
        if cut is not None:
            inner.no_truncation()
        if fill is not None:
            inner.no_padding()
        yield
    finally:
        if cut is not None:
            inner.enable_truncation(**cut)
        if fill is not None:
            inner.enable_padding(**fill)
        noted.clear()
        noted.update(warned)


def tokenizer_of(processor: Any) -> Any:
    """Return a processor's tokenizer, or itself if it is one; None for what has none."""
    found = getattr(processor, "tokenizer", processor)
    return found if hasattr(found, "get_vocab") and hasattr(found, "encode") else None
