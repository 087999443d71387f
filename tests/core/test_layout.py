"""Layouts, mapped files and model files."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from fedcore._core import FlatWriter, Layout, MappedFile, crc32c
from fedcore.errors import LayoutError, NonFiniteError, StorageError
from fedcore.layout import layout_hash
from fedcore.model_file import create_model, open_model
from fedcore.server.initial import load_initial

SPECS = [
    ("b", "F16", [3]),
    ("a", "F32", [2, 2]),
    ("z", "F64", []),
    ("c", "F32", [0]),
    ("i", "BOOL", [5]),
]


def test_the_canonical_order_is_item_size_then_name() -> None:
    layout = Layout(SPECS, 4096)
    assert [(t[0], t[3]) for t in layout.tensors] == [
        ("z", 0),
        ("a", 8),
        ("c", 24),
        ("b", 24),
        ("i", 30),
    ]
    assert layout.total_bytes == 35
    assert layout.locate(25) == ("b", 0)
    assert layout_hash(layout) == layout_hash(Layout(SPECS[::-1], 8192))


@pytest.mark.parametrize(
    ("specs", "said"),
    [
        ([("a", "F32", [1]), ("a", "F32", [1])], "'a' is there twice"),
        ([("", "F32", [1])], "empty name"),
        ([("a", "F8_E4M3", [1])], "tensor 'a': dtype 'F8_E4M3'"),
        ([("a", "F32", [-1])], "negative dimension"),
        ([("a", "F32", [1 << 40, 1 << 40])], "overflows"),
    ],
)
def test_a_tensor_set_that_cannot_be_described_is_refused(specs: list, said: str) -> None:
    with pytest.raises(LayoutError, match=said):
        Layout(specs, 4096)


@pytest.mark.parametrize("chunk", [0, 1, 4095, 4097])
def test_a_chunk_size_off_the_page_is_refused(chunk: int) -> None:
    with pytest.raises(LayoutError, match="multiple of 4096"):
        Layout(SPECS, chunk)


def test_a_model_file_opens_with_safetensors_and_back(tmp_path: Path) -> None:
    tensors = {
        "a": np.arange(6, dtype=np.float32).reshape(2, 3),
        "h": np.array([1, 2], np.float16),
        "n": np.array(7),
    }
    save_file(tensors, tmp_path / "in.safetensors")
    copy, cards = load_initial(tmp_path / "in.safetensors", tmp_path / "out.safetensors", {})
    assert cards == {}
    assert copy.canonical
    assert copy.data_offset % 4096 == 0
    copy.file.sync()
    back = load_file(tmp_path / "out.safetensors")
    assert {k: v.tolist() for k, v in back.items()} == {k: v.tolist() for k, v in tensors.items()}
    assert open_model(tmp_path / "in.safetensors").sha256() == copy.sha256()


@pytest.mark.parametrize(
    "broken", [b"", b"x" * 9, b"\xff" * 100, (2).to_bytes(8, "little") + b"[]"]
)
def test_a_file_that_is_no_model_is_refused(tmp_path: Path, broken: bytes) -> None:
    (tmp_path / "m").write_bytes(broken)
    with pytest.raises((LayoutError, StorageError)):
        open_model(tmp_path / "m")


def test_holes_in_a_file_are_refused(tmp_path: Path) -> None:
    header = b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[4,8]}}'
    (tmp_path / "m").write_bytes(len(header).to_bytes(8, "little") + header + bytes(8))
    with pytest.raises(LayoutError, match="starts at byte 4"):
        open_model(tmp_path / "m")


def test_a_file_is_never_replaced_and_outlives_its_handle(tmp_path: Path) -> None:
    file = MappedFile.create(str(tmp_path / "f"), 5000)
    view = file.view(10, 4)
    view[:] = b"abcd"
    file.close()
    assert bytes(view) == b"abcd"
    assert (tmp_path / "f").read_bytes()[10:14] == b"abcd"
    with pytest.raises(StorageError, match="cannot create"):
        MappedFile.create(str(tmp_path / "f"), 1)


def test_a_file_opened_for_reading_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "f").write_bytes(b"abc")
    view = MappedFile.open(str(tmp_path / "f")).view()
    assert view.readonly
    with pytest.raises(StorageError, match="outside"):
        MappedFile.open(str(tmp_path / "f")).view(2, 2)


def test_a_model_of_zeros_is_created_in_memory() -> None:
    model = create_model(None, Layout(SPECS, 4096))
    assert bytes(model.view("a")) == bytes(16)
    with pytest.raises(LayoutError, match="no tensor 'q'"):
        model.view("q")


@pytest.mark.parametrize(("dtype", "bad"), [(np.float32, np.nan), (np.float16, -np.inf)])
def test_an_initial_model_with_nan_or_infinity_is_named(
    tmp_path: Path, dtype: type, bad: float
) -> None:
    values = np.zeros(100, dtype)
    values[42] = bad
    save_file({"ok": np.ones(3, np.float64), "w": values}, tmp_path / "in.safetensors")
    with pytest.raises(NonFiniteError, match=r"in\.safetensors has NaN .* tensor 'w', element 42"):
        load_initial(tmp_path / "in.safetensors", tmp_path / "out.safetensors", {})


@pytest.mark.parametrize("sizes", [[9000], [1, 4095, 4096, 808], [4096, 4904], [3] * 3000])
@pytest.mark.parametrize("in_memory", [True, False])
def test_flat_bytes_in_any_pieces_have_the_checksums_of_their_chunks(
    tmp_path: Path, sizes: list[int], in_memory: bool
) -> None:
    data = np.random.default_rng(3).bytes(9000)
    path = str(tmp_path / "f")
    file = MappedFile.anonymous(9100) if in_memory else MappedFile.create(path, 9100)
    writer = FlatWriter(file, 100, 9000, 4096)
    at = 0
    for size in sizes:
        writer.write(data[at : at + size])
        at += size
    assert bytes(file.view(100, 9000)) == data
    assert writer.checksums() == [crc32c(data[i : i + 4096]) for i in (0, 4096, 8192)]


def test_bytes_beyond_the_end_are_not_written_and_missing_ones_have_no_checksum() -> None:
    file = MappedFile.anonymous(200)
    writer = FlatWriter(file, 0, 100, 64)
    writer.write(b"\1" * 90)
    with pytest.raises(LayoutError, match="11 bytes were given where 10 are left"):
        writer.write(b"\1" * 11)
    with pytest.raises(LayoutError, match="10 of 100 bytes were not written"):
        writer.checksums()
    assert bytes(file.view(90, 110)) == bytes(110)
    with pytest.raises(StorageError):
        FlatWriter(file, 101, 100, 64)
    with pytest.raises(LayoutError):
        FlatWriter(file, 0, 100, 0)


@pytest.mark.parametrize("shift", range(0, 64, 7))
@pytest.mark.parametrize("size", [0, 1, 63, 64, 65535, 65536, 65537, 300_001])
def test_bytes_of_any_size_reach_memory_at_any_place(shift: int, size: int) -> None:
    data = np.random.default_rng(4).bytes(size)
    file = MappedFile.anonymous(size + 200)
    file.write(shift, data)
    assert bytes(file.view(shift, size)) == data
    assert not any(file.view(0, shift))
    assert not any(file.view(shift + size, 200 - shift))
