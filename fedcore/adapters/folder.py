"""Adapter folders, as PEFT saves them."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from fedcore.errors import ConfigError, LayoutError, StorageError
from fedcore.layout import TensorSpec, table
from fedcore.model_file import ModelFile, open_model

from .groups import CONFIG, Group, find_groups, parse_config, scale_of
from .methods import Method
from .refusals import check_adapter

__all__ = ["WEIGHTS", "Adapter", "open_adapter"]

WEIGHTS: Final = "adapter_model.safetensors"
_PICKLED: Final = "adapter_model.bin"
_DTYPES: Final = {"F64": "<f8", "F32": "<f4", "F16": "<f2", "BF16": "<u2"}


@dataclass(frozen=True)
class Adapter:
    """One adapter of LoRA in a folder.

    Attributes:
        path: the folder, as it was named.
        config: the entries of ``adapter_config.json``.
        model: the mapped tensors.
        groups: the factors, by module.
        scales: what B A is multiplied with, by module.
        others: the tensors that are in no group, in canonical order.
        notes: what is averaged without being exact.
    """

    path: Path
    config: dict[str, Any]
    model: ModelFile
    groups: dict[str, Group]
    scales: dict[str, float]
    others: list[TensorSpec]
    notes: list[str]

    def dtype(self, name: str) -> str:
        """Return the dtype of a tensor by its ``safetensors`` name."""
        return next(dtype for tensor, dtype, *_ in self.model.layout.tensors if tensor == name)

    def offset(self, name: str) -> int:
        """Return at which byte of the file a tensor begins."""
        return self.model.data_offset + self.model.offsets[name]

    def array(self, name: str) -> npt.NDArray[Any]:
        """Return a tensor of floats; one of bfloat16 as float32, which holds each of its values."""
        _, dtype, shape, _, nbytes = next(t for t in self.model.layout.tensors if t[0] == name)
        values = np.frombuffer(self.model.file.view(self.offset(name), nbytes), _DTYPES[dtype])
        if dtype == "BF16":
            values = (values.astype(np.uint32) << 16).view(np.float32)
        return values.reshape(shape)

    def release(self, module: str) -> None:
        """Drop the mapped pages of a module's factors from this process's memory."""
        group = self.groups[module]
        for name, _, _, _, nbytes in self.model.layout.tensors:
            if name in (group.a, group.b):
                self.model.file.release(self.offset(name), nbytes)


def open_adapter(path: Path, method: Method, allow: Collection[str] = ()) -> Adapter:
    """Open an adapter's folder, or the ``best/`` of a run's, and check that a method can combine it.

    Raises:
        ConfigError: there is no adapter, or the method refuses what it has; the message says what works.
        LayoutError: the tensors are not those of an adapter.
        StorageError: a file can't be read.
    """
    folder = _find(path)
    where = str(path)
    try:
        text = (folder / CONFIG).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise StorageError(f"cannot read {folder / CONFIG}: {error}") from None
    config = parse_config(text, f"{folder / CONFIG}")
    model = open_model(folder / WEIGHTS)
    specs = table(model.layout)
    notes = check_adapter(config, specs, method, where=where, allow=allow)
    groups, names = find_groups(specs)
    try:
        scales = {group.module: scale_of(config, group) for group in groups}
    except ConfigError as error:
        raise ConfigError(f"{where}: {error}") from None
    return Adapter(
        path, config, model, {group.module: group for group in groups}, scales,
        [spec for spec in specs if spec[0] in set(names)], notes,
    )  # fmt: skip


def _find(path: Path) -> Path:
    if not path.exists():
        raise StorageError(f"cannot open the adapter {path}: it does not exist")
    if not path.is_dir():
        raise ConfigError(
            f"{path} is a file: an adapter is a folder that holds {CONFIG} and {WEIGHTS}, as PEFT saves it"
        )
    folder = path
    if (path / "run.sqlite").is_file():
        folder = next((path / name for name in ("best", "final") if (path / name).is_dir()), path)
    if (folder / CONFIG).is_file() and (folder / WEIGHTS).is_file():
        return folder
    if (folder / CONFIG).is_file():
        pickled = f" It has {_PICKLED}." if (folder / _PICKLED).is_file() else ""
        raise ConfigError(
            f"{path} holds no {WEIGHTS}: save the adapter with safe_serialization=True.{pickled}"
        )
    if (folder / "config.json").is_file():
        raise ConfigError(
            f"{path} holds a whole model and no adapter: average whole models without --lora"
        )
    raise LayoutError(
        f"{path} holds no {CONFIG}: name the folder that save_pretrained of PEFT wrote"
    )
