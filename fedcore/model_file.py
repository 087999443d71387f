"""Model files: ``safetensors`` files whose data section is the flat bytes of a layout.

Format: https://github.com/huggingface/safetensors (8-byte little-endian header length, a JSON header, then the
data without holes or overlaps).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from typing_extensions import Buffer

from ._core import FlatWriter, Layout, MappedFile, chunk_checksums
from .errors import LayoutError, StorageError
from .layout import ITEMSIZE, check_names
from .protocol import DEFAULT_CHUNK_BYTES, RESERVED_NAME, shown

__all__ = ["ModelFile", "Reader", "check_booleans", "create_model", "open_model", "reopen_model"]

_MAX_DIMS: Final = 16  # as many as a message describes
MAX_HEADER: Final = 100_000_000  # the limit that the format's own parser sets
_PAGE: Final = 4096
_HASH_BLOCK: Final = 8 << 20

Reader = Callable[[str], Buffer]
"""Returns the raw bytes (row-major, little-endian) of the tensor of that name."""


@dataclass(frozen=True)
class ModelFile:
    """A mapped ``safetensors`` file.

    Attributes:
        path: where it lies (a scratch file may have been unlinked since).
        file: the mapping; views of it keep it alive.
        data_offset: first byte of the data section.
        layout: the canonical layout of its tensors.
        offsets: byte offset of each tensor within the data section, as the file has it.
        metadata: the header's ``__metadata__``.
    """

    path: Path
    file: MappedFile
    data_offset: int
    layout: Layout
    offsets: Mapping[str, int]
    metadata: Mapping[str, str]

    @property
    def canonical(self) -> bool:
        """Whether the data section is the layout's flat bytes, so that chunks can be served from it."""
        return all(self.offsets[name] == offset for name, _, _, offset, _ in self.layout.tensors)

    def view(self, name: str) -> memoryview:
        """Return the raw bytes of one tensor; writable if the file is."""
        for tensor, _, _, _, nbytes in self.layout.tensors:
            if tensor == name:
                return self.file.view(self.data_offset + self.offsets[name], nbytes)
        raise LayoutError(f"{self.path.name} holds no tensor {name!r}")

    def views(self) -> dict[str, memoryview]:
        """Return the raw bytes of every tensor, in canonical order."""
        return {
            name: self.file.view(self.data_offset + self.offsets[name], nbytes)
            for name, _, _, _, nbytes in self.layout.tensors
        }

    def fill(self, read: Reader) -> list[int]:
        """Write every tensor, one after the other, past the mapping: no page of it becomes resident.

        The file must be canonical. Returns the CRC-32C of every chunk, as `checksums` would.

        Raises:
            LayoutError: ``read`` gave fewer or more bytes than a tensor has.
            StorageError: the file can't be written.
        """
        layout = self.layout
        writer = FlatWriter(self.file, self.data_offset, layout.total_bytes, layout.chunk_bytes)
        for name, _, _, _, nbytes in layout.tensors:
            data = read(name)
            with memoryview(data) as given:
                if given.nbytes != nbytes:
                    raise LayoutError(
                        f"tensor {name!r} has {nbytes} bytes, but {given.nbytes} were given"
                    )
            if nbytes:
                writer.write(data)
        return writer.checksums()

    def checksums(self) -> list[int]:
        """Return the CRC-32C of every chunk of the layout's flat bytes; the file must be canonical."""
        return chunk_checksums(
            self.file, self.data_offset, self.layout.total_bytes, self.layout.chunk_bytes
        )

    def release(self) -> None:
        """Drop the mapped pages from this process's memory; the file keeps the bytes."""
        self.file.release(0, self.file.size)

    def sha256(self) -> str:
        """Return the SHA-256 (hex) of the flat bytes in canonical order, whatever the file's own order."""
        digest = hashlib.sha256()
        for name, _, _, _, nbytes in self.layout.tensors:
            start = self.data_offset + self.offsets[name]
            for at in range(start, start + nbytes, _HASH_BLOCK):
                length = min(_HASH_BLOCK, start + nbytes - at)
                digest.update(self.file.view(at, length))
                self.file.release(
                    at, length
                )  # the model's size must not show in this process's memory
        self.file.check_whole()
        return digest.hexdigest()


def create_model(
    path: Path | str | None, layout: Layout, metadata: Mapping[str, str] | None = None
) -> ModelFile:
    """Create and map a model file of zeros for ``layout``; ``path=None`` keeps it in memory only.

    The header is padded so that the data section starts on a page: pages of it can be released behind a
    reader, and every tensor is aligned to its item size.

    Raises:
        LayoutError: a tensor has the name that the format keeps for its header, or there are too many for one.
        StorageError: the file exists, or the disk is full (the space is reserved at once).
    """
    head, offsets, meta = _model_head(layout, metadata)
    size = len(head) + layout.total_bytes
    file = MappedFile.anonymous(size) if path is None else MappedFile.create(str(path), size)
    file.view(0, len(head))[:] = head
    return ModelFile(Path(path or ""), file, len(head), layout, offsets, meta)


def reopen_model(
    path: Path, layout: Layout, metadata: Mapping[str, str] | None = None
) -> ModelFile | None:
    """Map a file that `create_model` made with the same arguments, for writing; None if there is no such file."""
    head, offsets, meta = _model_head(layout, metadata)
    try:
        file = MappedFile.open(str(path), writable=True)
    except StorageError:
        return None
    if file.size != len(head) + layout.total_bytes or bytes(file.view(0, len(head))) != head:
        return None
    return ModelFile(path, file, len(head), layout, offsets, meta)


def _model_head(
    layout: Layout, metadata: Mapping[str, str] | None
) -> tuple[bytes, dict[str, int], dict[str, str]]:
    """Return what a model file begins with, where its tensors lie behind that, and its metadata."""
    if any(name == RESERVED_NAME for name, *_ in layout.tensors):
        check_names([RESERVED_NAME])
    meta = {"format": "pt", **(metadata or {})}
    entries: dict[str, object] = {RESERVED_NAME: meta}
    offsets: dict[str, int] = {}
    for name, dtype, shape, offset, nbytes in layout.tensors:
        offsets[name] = offset
        entries[name] = {
            "dtype": dtype,
            "shape": list(shape),
            "data_offsets": [offset, offset + nbytes],
        }
    header = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
    if len(header) > MAX_HEADER - _PAGE:
        raise LayoutError(
            f"the names and shapes of {len(entries) - 1:,} tensors take {len(header):,} bytes, and the header of "
            f"a safetensors file may have {MAX_HEADER:,}: choose fewer tensors (include, exclude), or give them "
            "shorter names"
        )
    length = -(-(8 + len(header)) // _PAGE) * _PAGE - 8
    return length.to_bytes(8, "little") + header.ljust(length), offsets, meta


def open_model(path: Path | str, chunk_bytes: int = DEFAULT_CHUNK_BYTES) -> ModelFile:
    """Map an existing ``safetensors`` file for reading, checking its header strictly.

    Raises:
        StorageError: the file is not there or cannot be mapped.
        LayoutError: the header is no valid ``safetensors`` header, has holes or overlaps, or names a
            dtype that cannot be averaged.
    """
    path = Path(path)
    try:
        size = path.stat().st_size
    except OSError as error:
        raise StorageError(f"cannot open model file {path}: {error.strerror}") from None
    if size < 10:
        raise LayoutError(f"{path}: {size} bytes are too few for a safetensors file")
    file = MappedFile.open(str(path))
    length = int.from_bytes(file.view(0, 8), "little")
    if not 2 <= length <= min(MAX_HEADER, size - 8):
        raise LayoutError(
            f"{path}: not a safetensors file (header length {length} in {size} bytes)"
        )
    header = _parse_header(path, bytes(file.view(8, length)))
    meta = header.pop(RESERVED_NAME, {})
    if not isinstance(meta, dict) or not all(isinstance(value, str) for value in meta.values()):
        raise LayoutError(f"{path}: {RESERVED_NAME} in the header must hold texts by name")
    if not header:
        raise LayoutError(f"{path}: it holds no tensors")
    specs, offsets = _parse_entries(path, header, size - 8 - length)
    return ModelFile(path, file, 8 + length, Layout(specs, chunk_bytes), offsets, meta)


def _parse_header(path: Path, text: bytes) -> dict[str, object]:
    """Return the header: one JSON object that begins with its brace, no name twice, spaces alone after it."""

    def unique(pairs: list[tuple[str, object]]) -> dict[str, object]:
        found = dict(pairs)
        if len(found) < len(pairs):
            names = [name for name, _ in pairs]
            twice = next(name for name in names if names.count(name) > 1)
            raise LayoutError(f"{path}: the header has {shown(twice, 200)!r} twice")
        return found

    trimmed = text.rstrip(b" ")
    if not (trimmed.startswith(b"{") and trimmed.endswith(b"}")):
        raise LayoutError(
            f"{path}: not a safetensors file (the header must begin with {{ and end with }} and spaces)"
        )
    try:
        header = json.loads(trimmed, object_pairs_hook=unique)
    except LayoutError:
        raise
    except (ValueError, RecursionError):
        raise LayoutError(f"{path}: not a safetensors file (the header is not JSON)") from None
    if not isinstance(header, dict):
        raise LayoutError(f"{path}: not a safetensors file (the header is not a JSON object)")
    return header


def check_booleans(path: Path, name: str, dtype: str, data: memoryview) -> None:
    """Raise LayoutError if a tensor of booleans holds a byte that is neither 0 nor 1."""
    if dtype != "BOOL":
        return
    for at in range(0, len(data), _HASH_BLOCK):
        wrong = bytes(data[at : at + _HASH_BLOCK]).translate(None, b"\0\1")
        if wrong:
            raise LayoutError(
                f"{path}: tensor {name!r} is BOOL and holds a byte of value {wrong[0]}, not 0 or 1"
            )


def _parse_entries(
    path: Path, header: Mapping[str, object], data_bytes: int
) -> tuple[list[tuple[str, str, list[int]]], dict[str, int]]:
    specs: list[tuple[str, str, list[int]]] = []
    offsets: dict[str, int] = {}
    spans: list[tuple[int, int, str]] = []
    for name, entry in header.items():
        dtype, shape, begin, end = _parse_entry(path, name, entry)
        count = 1
        for dim in shape:
            count *= dim
        if end - begin != count * ITEMSIZE[dtype]:
            raise LayoutError(
                f"{path}: tensor {name!r} has {end - begin} bytes where {dtype} {shape} needs "
                f"{count * ITEMSIZE[dtype]}"
            )
        specs.append((name, dtype, shape))
        offsets[name] = begin
        spans.append((begin, end, name))
    position = 0
    for begin, end, name in sorted(spans):
        if begin != position:
            raise LayoutError(
                f"{path}: tensor {name!r} starts at byte {begin} where {position} was expected "
                "(holes and overlaps are refused)"
            )
        position = end
    if position != data_bytes:
        raise LayoutError(f"{path}: the tensors end at byte {position} of {data_bytes}")
    return specs, offsets


def _parse_entry(path: Path, name: str, entry: object) -> tuple[str, list[int], int, int]:
    def is_size(value: object) -> bool:
        return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 1 << 62

    if isinstance(entry, dict):
        dtype, shape, span = entry.get("dtype"), entry.get("shape"), entry.get("data_offsets")
        if isinstance(dtype, str) and dtype not in ITEMSIZE:
            raise LayoutError(
                f"{path}: tensor {name!r} has dtype {shown(dtype, 40)}, which cannot be averaged; "
                f"expected one of {', '.join(ITEMSIZE)}"
            )
        if (
            isinstance(dtype, str)
            and isinstance(shape, list)
            and len(shape) <= _MAX_DIMS
            and all(map(is_size, shape))
            and isinstance(span, list)
            and len(span) == 2
            and all(map(is_size, span))
            and span[0] <= span[1]
        ):
            return dtype, shape, span[0], span[1]
    raise LayoutError(f"{path}: the header entry of tensor {name!r} is malformed")
