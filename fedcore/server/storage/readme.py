"""The ``README.md`` of ``best/`` and ``final/``: the lines that open the model, and what a reader has to know."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Final

from fedcore.files.opening import Card, read_card, weights_name

__all__ = ["README", "notes", "readme"]

README: Final = "README.md"

_ADAPTER: Final = "adapter_config.json"
_CONFIG: Final = "config.json"
_TOKENIZER: Final = ("tokenizer.json", "tokenizer_config.json")
_BASE: Final = "the model that the sites trained"


def notes(files: Mapping[str, str]) -> list[str]:
    """Return what has to be known of a folder with these files before it is used, a sentence or two each."""
    card = read_card(files)
    found = []
    if card is not None and card.closed is not None:
        found.append(
            f"it does not open by itself: {card.closed}; README.md in it has the lines that open it"
        )
    if (_CONFIG in files or _ADAPTER in files) and not any(name in files for name in _TOKENIZER):
        found.append(
            "it has no tokenizer and no processor, and a loader would make up an empty one: take that of "
            f"{_base(files, card) or _BASE}"
        )
    return found + list(card.notes if card is not None else ())


def readme(files: Mapping[str, str], version: int, run_id: str, *, averaged: bool = False) -> str:
    """Return the text for a folder with these files; ``averaged``: its model is the average up to that version."""
    card = read_card(files)
    weights = f"{weights_name(files)}"
    what = "the average (EMA) of the models up to version" if averaged else "version"
    lines = [
        "# Model of a federated run",
        "",
        f"`{weights}` holds {what} {version} of the run {run_id}, made with fedcore.",
        "",
        "```python",
        *_lines(files, card, weights),
        "```",
        "",
    ]
    said = notes(files)
    return "\n".join(lines) + "".join(f"\n- {note[:1].upper()}{note[1:]}\n" for note in said)


def _lines(files: Mapping[str, str], card: Card | None, weights: str) -> list[str]:
    base = _base(files, card) or _BASE
    if card is not None and card.closed is not None:
        return [
            "import fedcore.client as fl",
            "",
            f"model = ...  # {card.cls}, built as the training script builds it, from {base}",
            'fl.restore(model, "THIS FOLDER")  # puts what was trained into it, by name',
            'model.save_pretrained("ANOTHER FOLDER")  # if its library is to open it from now on',
        ]
    if _ADAPTER in files:
        return [
            "from peft import PeftModel",
            "from transformers import AutoModelForCausalLM  # or the class that the sites trained",
            "",
            f'base = AutoModelForCausalLM.from_pretrained("{base}")',
            'model = PeftModel.from_pretrained(base, "THIS FOLDER")',
        ]
    if _CONFIG in files:
        cls = _architecture(files[_CONFIG])
        return [
            f"from transformers import {cls}",
            "",
            f'model = {cls}.from_pretrained("THIS FOLDER")',
        ]
    return [
        "import fedcore.client as fl",
        "",
        "model = ...  # built as the training script builds it",
        'fl.restore(model, "THIS FOLDER")',
        "",
        "# or, where all of the model travelled:",
        "import safetensors.torch",
        "",
        f'safetensors.torch.load_model(model, "THIS FOLDER/{weights}")',
    ]


def _values(text: str | None) -> dict[str, object]:
    try:
        values = json.loads(text or "{}")
    except (ValueError, RecursionError):
        return {}
    return values if isinstance(values, dict) else {}


def _base(files: Mapping[str, str], card: Card | None) -> str | None:
    if card is not None and card.base:
        return card.base
    values = _values(files.get(_ADAPTER)) or _values(files.get(_CONFIG))
    found = values.get("base_model_name_or_path") or values.get("_name_or_path")
    plain = (
        isinstance(found, str)
        and found.isprintable()
        and not set(found) & set("\"'`\\")
        and len(found) < 200
    )
    return found if plain and isinstance(found, str) else None


def _architecture(text: str) -> str:
    found = _values(text).get("architectures")
    name = found[0] if isinstance(found, list) and found else None
    return name if isinstance(name, str) and name.isidentifier() else "AutoModel"
