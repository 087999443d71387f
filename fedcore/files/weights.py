"""A model as it lies on disk: a safetensors file, a folder with one, or the shards of one."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from fedcore._core import Layout
from fedcore.errors import ConfigError, LayoutError
from fedcore.layout import DEFAULT_CHUNK_BYTES, table
from fedcore.model_file import ModelFile, open_model

from .opening import WEIGHTS

__all__ = ["Weights", "find_weights", "open_weights"]

_INDEX: Final = "model.safetensors.index.json"


@dataclass(frozen=True)
class Weights:
    """The tensors of a model, which lie in one file or several.

    Attributes:
        path: what was named.
        files: the mapped files.
        layout: of all tensors.
        where: in which file each tensor lies.
    """

    path: Path
    files: tuple[ModelFile, ...]
    layout: Layout
    where: dict[str, ModelFile]

    def offset(self, name: str) -> int:
        """Return at which byte of its file a tensor begins."""
        file = self.where[name]
        return file.data_offset + file.offsets[name]

    def view(self, name: str, nbytes: int) -> memoryview:
        """Return the raw bytes of a tensor."""
        return self.where[name].file.view(self.offset(name), nbytes)

    def views(self) -> dict[str, memoryview]:
        """Return the raw bytes of every tensor, in canonical order."""
        return {name: self.view(name, nbytes) for name, _, _, _, nbytes in self.layout.tensors}

    def release(self) -> None:
        """Drop the mapped pages from this process's memory."""
        for file in self.files:
            file.release()


def open_weights(path: Path, what: str = "") -> Weights:
    """Map a model for reading; ``what`` begins the messages on what is not there.

    Raises:
        ConfigError: nothing is there, or the folder holds no model.
        LayoutError: a file is no valid safetensors file, or two shards hold the same tensor.
        StorageError: a file can't be read.
    """
    files = tuple(open_model(file) for file in find_weights(path, what))
    specs = [entry for file in files for entry in table(file.layout)]
    layout = files[0].layout if len(files) == 1 else Layout(specs, DEFAULT_CHUNK_BYTES)
    return Weights(path, files, layout, {name: file for file in files for name in file.offsets})


def find_weights(path: Path, what: str = "") -> Sequence[Path]:
    """Return the safetensors files of a model: of a run folder, those of its ``best/`` or ``final/``.

    Raises:
        ConfigError: nothing is there, or the folder holds no model; ``what`` begins the message.
        LayoutError: the index of the shards is damaged, or a shard is missing.
    """
    begin = f"{what}: " if what else ""
    if path.is_file():
        return [path]
    if not path.is_dir():
        kind = "is not a regular file" if path.exists() else "does not exist"
        raise ConfigError(f"{begin}{path} {kind}")
    if (path / "run.sqlite").is_file():
        for name in ("best", "final"):
            if (path / name).is_dir():
                return find_weights(path / name, what)
        raise ConfigError(
            f"{begin}{path} is a run folder without best/ and final/: name one of its models"
        )
    for name in WEIGHTS:
        if (path / name).is_file():
            return [path / name]
    if (path / _INDEX).is_file():
        return _shards(path)
    found = sorted(path.glob("*.safetensors"))
    if len(found) == 1:
        return found
    several = f"{len(found)} .safetensors files, and " if found else ""
    raise ConfigError(f"{begin}{path} holds {several}none of {', '.join((*WEIGHTS, _INDEX))}")


def _shards(path: Path) -> list[Path]:
    index = path / _INDEX
    try:
        shards = json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()
        names = sorted({str(name) for name in shards})
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise LayoutError(f"{index}: not a shard index ({error})") from None
    if not names:
        raise LayoutError(f"{index}: it names no shard")
    for name in names:
        if Path(name).name != name or not (path / name).is_file():
            raise LayoutError(f"{index}: the shard {name!r} is not in its folder")
    return [path / name for name in names]
