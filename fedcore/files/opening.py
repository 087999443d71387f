"""What a folder with a model says of how it opens, as far as the sites and the server share it.

A folder ``best/`` opens with its own library to the model that was scored, or not at all. Where a loader would
fill in what is missing (the frozen part of a model, a tokenizer, layers around it) with something of its own, the
weights lie under a name that no loader looks for, and a card says why.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from fedcore.errors import ConfigError
from fedcore.protocol import shown

__all__ = ["CARD", "CLOSED", "WEIGHTS", "Card", "read_card", "weights_file", "weights_name"]

CARD: Final = "fedcore_model.json"
CLOSED: Final = "trained.safetensors"
"""What the file with the tensors is called where no loader may open it."""
WEIGHTS: Final = ("adapter_model.safetensors", "model.safetensors", CLOSED)
"""What it may be called."""
_ADAPTER: Final = "adapter_config.json"
_WORDS: Final = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_./ -]{0,199}")


@dataclass(frozen=True)
class Card:
    """What a site says of its model, beside its configuration.

    Attributes:
        library: what opens such models: ``transformers``, ``peft``, ``sentence_transformers`` or ``torch``.
        cls: the name of the model's class.
        base: the name of the model that it was made from; None if unknown.
        closed: why the library can't open what travels as the model that is scored; None if it can.
        notes: what else a reader has to know, a sentence each.
    """

    library: str
    cls: str
    base: str | None = None
    closed: str | None = None
    notes: tuple[str, ...] = ()

    def text(self) -> str:
        """Return the card as JSON."""
        values = {
            "library": self.library, "class": self.cls, "base": self.base, "closed": self.closed,
            "notes": list(self.notes),
        }  # fmt: skip
        return json.dumps(values, indent=2, sort_keys=True) + "\n"


def read_card(files: Mapping[str, str]) -> Card | None:
    """Return the card among a model's files; None if there is none, or none that can be used."""
    try:
        values = json.loads(files.get(CARD, "null"))
    except (ValueError, RecursionError):
        return None
    if not isinstance(values, dict):
        return None
    base, closed, notes = values.get("base"), values.get("closed"), values.get("notes")
    return Card(
        _words(values.get("library")) or "torch",
        _words(values.get("class")) or "the model's class",
        _words(base),
        shown(closed, 500) if isinstance(closed, str) else None,
        tuple(shown(note, 500) for note in notes[:8] if isinstance(note, str))
        if isinstance(notes, list)
        else (),
    )


def _words(value: object) -> str | None:
    return value if isinstance(value, str) and _WORDS.fullmatch(value) else None


def weights_name(files: Mapping[str, str]) -> str:
    """Return what the file with the tensors is called beside these files."""
    card = read_card(files)
    if card is not None and card.closed is not None:
        return CLOSED
    return WEIGHTS[0] if _ADAPTER in files else WEIGHTS[1]


def weights_file(path: Path) -> Path:
    """Return the file with the tensors that ``path``, a folder that a run wrote or a file, stands for.

    Raises:
        ConfigError: there is none.
    """
    for file in [path] if path.suffix == ".safetensors" else [path / name for name in WEIGHTS]:
        if file.is_file():
            return file
    raise ConfigError(
        f"{path} holds no model of a run: expected a .safetensors file, or a folder with one of "
        f"{', '.join(WEIGHTS)}"
    )
