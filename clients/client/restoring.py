"""Put what came out of a run into a model of any kind, by name and without a server."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from fedcore.errors import LayoutError
from fedcore.files.opening import weights_file
from fedcore.layout import compare_layouts, table
from fedcore.model_file import open_model

__all__ = ["restore"]


def restore(model: Any, folder: str | Path) -> None:
    """Put the model of a run into ``model``, which is built as the training script builds it.

    It takes what `fl.patch` and `fl.init` take: whole and partly frozen models, PEFT adapters, Lightning modules,
    sentence-transformers, wrapped or not. What did not travel stays as it is.

    Args:
        model: a ``torch.nn.Module``.
        folder: ``best/`` or ``final/`` of a run, or a .safetensors file such as ``models/round-0003.safetensors``.

    Raises:
        ConfigError: there is no such model.
        LayoutError: ``model`` lacks a tensor, or has it in another dtype or shape; each one is named.
    """
    from .parameters import AllTensors

    path = Path(folder)
    file = open_model(weights_file(path))
    specs = table(file.layout)
    differences = []
    for place in _places(model):
        found = AllTensors(place)
        wanted = {name for name, *_ in specs}
        ours = [spec for spec in found.specs if spec[0] in wanted]
        difference = compare_layouts(ours, specs, "this model", str(path))
        if difference is None:
            found.load(specs, file.views())
            return
        differences.append((len(wanted) - len(ours), difference))
    raise LayoutError(
        f"{path} does not fit this model: {min(differences, key=lambda one: one[0])[1]}; build the model as the "
        "training script does, with the same adapter and in the same dtype"
    )


def _places(model: Any) -> Iterator[Any]:
    """Yield the modules whose names the file may have: those that could have been trained alone, then all."""
    from .parameters import is_known, unwrap

    root = unwrap(model)
    yield root
    yield from (module for module in root.modules() if module is not root and is_known(module))
