"""The initial model: a safetensors file, or a folder as ``save_pretrained`` writes it (sharded or not)."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Final

from fedcore._core import Layout, find_non_finite
from fedcore.errors import NonFiniteError
from fedcore.files.opening import CARD
from fedcore.files.weights import open_weights
from fedcore.layout import DEFAULT_CHUNK_BYTES, FLOATS, check_names, table
from fedcore.model_file import ModelFile, check_booleans, create_model

__all__ = ["load_initial"]

_CARDS: Final = ("adapter_config.json", "config.json", "generation_config.json", CARD)


def load_initial(
    path: Path, target: Path, metadata: Mapping[str, str], chunk_bytes: int = DEFAULT_CHUNK_BYTES
) -> tuple[ModelFile, dict[str, str]]:
    """Copy the initial model into ``target`` in canonical order, for chunks of ``chunk_bytes``.

    Returns the new file and the JSON files that describe the model, which lie beside it.

    Raises:
        ConfigError: the path holds no model.
        NonFiniteError: a tensor holds NaN or infinity.
        LayoutError: a file is no valid safetensors file, or two shards hold the same tensor.
    """
    weights = open_weights(path, "model.initial")
    check_names(name for name, *_ in table(weights.layout))
    tensors = table(weights.layout)
    layout = Layout([(n, d, s) for n, d, s in tensors], chunk_bytes)
    model = create_model(target, layout, metadata)
    views = weights.views()
    dtypes = {name: dtype for name, dtype, _ in tensors}

    def read(name: str) -> memoryview:
        source, view = weights.where[name], views[name]
        source.release()  # what was read before; the model's size must not show in memory
        element = find_non_finite(dtypes[name], view) if dtypes[name] in FLOATS else -1
        if element >= 0:
            raise NonFiniteError(
                f"the initial model {source.path} has NaN or infinity in tensor {name!r}, element {element}"
            )
        check_booleans(source.path, name, dtypes[name], view)
        return view

    model.fill(read)
    for source in weights.files:
        source.file.check_whole()
    folder = weights.files[0].path.parent
    cards = {
        name: (folder / name).read_text(encoding="utf-8")
        for name in _CARDS
        if (folder / name).is_file()
    }
    return model, cards
