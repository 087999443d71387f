"""The initial model: a safetensors file, or a folder as ``save_pretrained`` writes it (sharded or not)."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Final

from fedcore._core import Layout, find_non_finite
from fedcore.errors import ConfigError, LayoutError, NonFiniteError
from fedcore.layout import (
    DEFAULT_CHUNK_BYTES,
    FLOATS,
    ModelFile,
    check_names,
    create_model,
    open_model,
    table,
)
from fedcore.opening import CARD, WEIGHTS

__all__ = ["load_initial"]

_INDEX: Final = "model.safetensors.index.json"
_CARDS: Final = ("adapter_config.json", "config.json", "generation_config.json", CARD)


def load_initial(
    path: Path, target: Path, metadata: Mapping[str, str]
) -> tuple[ModelFile, dict[str, str]]:
    """Copy the initial model into ``target`` in canonical order.

    Returns the new file and the JSON files that describe the model, which lie beside it.

    Raises:
        ConfigError: the path holds no model.
        NonFiniteError: a tensor holds NaN or infinity.
        LayoutError: a file is no valid safetensors file, or two shards hold the same tensor.
    """
    sources = [open_model(file) for file in _find(path)]
    specs = [entry for source in sources for entry in table(source.layout)]
    check_names(name for name, *_ in specs)
    model = create_model(target, Layout(specs, DEFAULT_CHUNK_BYTES), metadata)
    views = {name: (source, view) for source in sources for name, view in source.views().items()}
    dtypes = {name: dtype for name, dtype, _ in specs}

    def read(name: str) -> memoryview:
        source, view = views[name]
        source.release()  # what was read before; the model's size must not show in memory
        element = find_non_finite(dtypes[name], view) if dtypes[name] in FLOATS else -1
        if element >= 0:
            raise NonFiniteError(
                f"the initial model {source.path} has NaN or infinity in tensor {name!r}, element {element}"
            )
        return view

    model.fill(read)
    for source in sources:
        source.file.check_whole()
    folder = path if path.is_dir() else path.parent
    cards = {
        name: (folder / name).read_text(encoding="utf-8")
        for name in _CARDS
        if (folder / name).is_file()
    }
    return model, cards


def _find(path: Path) -> list[Path]:
    if path.is_file():
        return [path]
    if not path.is_dir():
        raise ConfigError(f"model.initial: {path} does not exist")
    for name in WEIGHTS:
        if (path / name).is_file():
            return [path / name]
    if not (path / _INDEX).is_file():
        raise ConfigError(f"model.initial: {path} holds none of {', '.join((*WEIGHTS, _INDEX))}")
    try:
        shards = json.loads((path / _INDEX).read_text(encoding="utf-8"))["weight_map"].values()
        names = sorted({str(name) for name in shards})
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise LayoutError(f"{path / _INDEX}: not a shard index ({error})") from None
    for name in names:
        if Path(name).name != name or not (path / name).is_file():
            raise LayoutError(f"{path / _INDEX}: the shard {name!r} is not in its folder")
    return [path / name for name in names]
