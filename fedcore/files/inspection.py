"""What would leave a site, as ``fedcore inspect`` shows it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from math import log2, prod
from pathlib import Path

from pydantic import BaseModel, ConfigDict

from fedcore._core import Layout
from fedcore.layout import DEFAULT_CHUNK_BYTES, FLOATS, ITEMSIZE, TensorSpec, table
from fedcore.protocol import Role, Transfer, shown
from fedcore.words import plural

from .frozen import FrozenGroup
from .weights import open_weights

__all__ = ["Inspection", "describe", "inspect_file", "lines"]


class Inspection(BaseModel):
    """The tensors that travel, in the order of their bytes, and the files that go with the first message.

    Attributes:
        tensors: name, dtype and shape of each.
        files: texts by name, such as ``adapter_config.json``.
        fingerprints: digests by name of what all sites must have alike.
        frozen: digests of groups of tensors that do not travel; see `fedcore.files.frozen`.
        roles: what tensors are to the model, but for parameters (`fedcore.roles`); None: it is not known.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    tensors: list[tuple[str, str, list[int]]]
    files: dict[str, str] = {}
    fingerprints: dict[str, str] = {}
    frozen: list[FrozenGroup] = []
    roles: dict[str, Role] | None = None

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors, unencoded."""
        return sum(_size(dtype, shape) for _, dtype, shape in self.tensors)


def describe(
    specs: Sequence[TensorSpec],
    files: Mapping[str, str],
    fingerprints: Mapping[str, str] | None = None,
    frozen: Sequence[FrozenGroup] = (),
    *,
    roles: Mapping[str, Role] | None = None,
) -> Inspection:
    """Describe what a site declares and sends; LayoutError if the tensors make no layout."""
    layout = Layout([(n, d, list(s)) for n, d, s in specs], DEFAULT_CHUNK_BYTES)
    return Inspection(
        tensors=table(layout),
        files=dict(files),
        fingerprints=dict(fingerprints or {}),
        frozen=list(frozen),
        roles=None if roles is None else dict(roles),
    )


def inspect_file(path: Path) -> Inspection:
    """Describe a safetensors file, or the model in a folder, as if its tensors were to travel.

    Raises:
        ConfigError: there is no such file, or the folder holds no model.
        StorageError, LayoutError: it is no valid safetensors file.
    """
    weights = open_weights(path)
    cards = {
        card.name: card.read_text(encoding="utf-8")
        for card in sorted(weights.files[0].path.parent.glob("*config.json"))
    }
    return describe(table(weights.layout), cards if path.is_dir() else {})


def lines(found: Inspection, transfer: Transfer | None = None) -> Iterator[str]:
    """Yield the lines of a plain table: each tensor with its dtype, shape, bytes and encoding, and what else goes.

    Args:
        found: what is shown.
        transfer: how updates travel in the run; raw if None.
    """
    transfer = Transfer() if transfer is None else transfer
    rows = [
        (shown(name, 1024), dtype, "x".join(map(str, shape)) or "scalar", f"{_size(dtype, shape):,}",
         transfer.update if _is_encoded(dtype, transfer) else "raw")
        for name, dtype, shape in found.tensors
    ]  # fmt: skip
    header = ("tensor", "dtype", "shape", "bytes", "goes as")
    widths = [max(len(row[place]) for row in (header, *rows)) for place in range(5)]
    for row in (header, *rows):
        cells = [row[0].ljust(widths[0]), row[1].ljust(widths[1]), row[2].rjust(widths[2])]
        yield "  ".join((*cells, row[3].rjust(widths[3]), row[4]))
    yield ""
    unit = plural(len(rows), "tensor")
    size = f"{found.nbytes:,} bytes"
    if transfer.update != "raw":
        encoded = sum(_encoded_size(dtype, shape, transfer) for _, dtype, shape in found.tensors)
        size += f", about {round(encoded):,} as {transfer.update}"
    if transfer.lossless:
        size += ", less where compression pays"
    yield f"each round: {unit}, {size}; the number of examples; metrics by name; texts of errors"
    beside = [
        f"{shown(name, 200)} ({len(text.encode()):,} bytes)" for name, text in found.files.items()
    ]
    beside += [f"the digest of the {name}" for name in found.fingerprints]
    if found.frozen:
        beside.append(f"{len(found.frozen)} digests of what is frozen")
    known = "names, dtypes and shapes" if found.roles is None else "names, dtypes, shapes and roles"
    yield f"once: {known} of the tensors{''.join(', ' + part for part in beside)}"
    yield "nothing else leaves; no server was contacted"


def _size(dtype: str, shape: Sequence[int]) -> int:
    return ITEMSIZE[dtype] * prod(shape)


def _is_encoded(dtype: str, transfer: Transfer) -> bool:
    half = transfer.update in ("bf16", "fp16") and dtype in ("F16", "BF16")
    return transfer.update != "raw" and dtype in FLOATS and not half


def _encoded_size(dtype: str, shape: Sequence[int], transfer: Transfer) -> float:
    """Return about how many bytes a tensor takes; docs/protocol.md has the formats."""
    per_element = {
        "bf16": 2.0,
        "fp16": 2.0,
        "int8": 1 + 4 / 128,
        "nf4": 1 / 2 + 1 / 64 + 4 / (64 * 256),
        "top-k": transfer.top_k * (4 + max(1.0, -log2(transfer.top_k) / 7)),
    }
    if not _is_encoded(dtype, transfer):
        return _size(dtype, shape)
    return min(_size(dtype, shape), prod(shape) * per_element[transfer.update])
