"""Files from elsewhere: a run file names nothing outside its folder, a model file is checked before it is used."""

from __future__ import annotations

import io
import json
import pickle
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest

from fedcore.config import load_run_file
from fedcore.errors import ConfigError, LayoutError
from fedcore.files.inspection import inspect_file, lines
from fedcore.model_file import open_model
from fedcore.server.initial import load_initial


def run_file(folder: Path, extra: str) -> Path:
    path = folder / "run.toml"
    path.write_text(f'[participants]\ncount = 1\n[run]\nname = "t"\nrounds = 1\n{extra}\n')
    return path


OUTSIDE = [
    'dir = "/tmp"',
    'dir = "../elsewhere"',
    '[model]\ninitial = "/etc"',
    '[model]\ninitial = "link/model.safetensors"',
    '[server]\nkeys = "../kits/server"',
    '[server]\nspill_dir = "runs/../../x"',
    '[simulate]\nscript = "/usr/bin/env"',
]


@pytest.mark.parametrize("extra", OUTSIDE)
def test_a_run_file_names_nothing_outside_its_folder(tmp_path: Path, extra: str) -> None:
    home = tmp_path / "home"
    home.mkdir()
    (home / "link").symlink_to(tmp_path)
    with pytest.raises(ConfigError, match="leads out of the run file's folder"):
        load_run_file(run_file(home, extra))


def test_what_is_inside_its_folder_or_on_the_command_line_may_be_named(tmp_path: Path) -> None:
    inside = run_file(tmp_path, 'dir = "runs/deep"\n[server]\nkeys = "kits/../kits/server"')
    assert load_run_file(inside).run_folder == tmp_path / "runs/deep/t"
    given = load_run_file(run_file(tmp_path, 'dir = "/nowhere"'), ["run.dir=/elsewhere"])
    assert given.run_folder == Path("/elsewhere/t")


def safetensors(header: bytes, data: int, length: int | None = None) -> bytes:
    return (len(header) if length is None else length).to_bytes(8, "little") + header + bytes(data)


def entries(**tensors: tuple[str, list[int], int, int]) -> bytes:
    return json.dumps(
        {
            name: {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}
            for name, (dtype, shape, begin, end) in tensors.items()
        }
    ).encode()


def pickled() -> bytes:
    return pickle.dumps({"w": [1.0] * 100})


def zipped() -> bytes:
    """What torch.save writes: a zip file with a pickle in it."""
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as archive:
        archive.writestr("model/data.pkl", pickled())
    return out.getvalue()


HOSTILE: dict[str, Callable[[], bytes]] = {
    "a hole": lambda: safetensors(entries(a=("F32", [1], 0, 4), b=("F32", [1], 8, 12)), 12),
    "an overlap": lambda: safetensors(entries(a=("F32", [2], 0, 8), b=("F32", [2], 4, 12)), 12),
    "two at one place": lambda: safetensors(entries(a=("F32", [1], 0, 4), b=("F32", [1], 0, 4)), 4),
    "bytes behind the last": lambda: safetensors(entries(a=("F32", [1], 0, 4)), 8),
    "beyond the file": lambda: safetensors(entries(a=("F32", [1 << 40], 0, 1 << 42)), 4),
    "backwards": lambda: safetensors(entries(a=("F32", [1], 4, 0)), 4),
    "negative": lambda: safetensors(entries(a=("F32", [-1], 0, 4)), 4),
    "shape and bytes differ": lambda: safetensors(entries(a=("F32", [3], 0, 4)), 4),
    "a product beyond 64 bits": lambda: safetensors(entries(a=("I8", [1 << 32] * 3, 0, 4)), 4),
    "sixty-five dimensions": lambda: safetensors(entries(a=("I8", [1] * 65, 0, 1)), 1),
    "an unknown dtype": lambda: safetensors(entries(a=("PICKLE", [1], 0, 4)), 4),
    "one name twice": lambda: safetensors(
        entries(a=("F32", [1], 0, 4))[:-1] + b"," + entries(a=("F32", [1], 4, 8))[1:], 8
    ),
    "a header of 2 GB": lambda: safetensors(b"{}", 0, 2 << 30),
    "a header of 2^63": lambda: safetensors(b"{}", 0, 1 << 63),
    "a header that never ends": lambda: safetensors(b"[" * 1_000_000, 0),
    "a number of a million digits": lambda: safetensors(b'{"a":' + b"9" * 1_000_000 + b"}", 0),
    "a name twice": lambda: safetensors(
        b'{"w":{"dtype":"F32","shape":[1],"data_offsets":[0,4]},'
        b'"w":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}',
        4,
    ),
    "a member twice": lambda: safetensors(
        b'{"w":{"dtype":"F32","dtype":"F32","shape":[1],"data_offsets":[0,4]}}', 4
    ),
    "no tensors": lambda: safetensors(b"{}", 0) + b"    ",
    "a header after a line break": lambda: safetensors(
        b'\n{"w":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}', 4
    ),
    "a header before a line break": lambda: safetensors(
        b'{"w":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}\n', 4
    ),
    "metadata that is no text": lambda: safetensors(
        b'{"__metadata__":{"a":1},"w":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}', 4
    ),
    "a pickle": pickled,
    "a file of torch.save": zipped,
}


@pytest.mark.parametrize("kind", HOSTILE)
def test_a_hostile_model_file_is_refused(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(HOSTILE[kind]())
    with pytest.raises(LayoutError, match="model.safetensors|dimensions|tensor"):
        open_model(path)


def test_a_model_file_steers_no_terminal(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    name = "\x1b[31mw\n"
    path.write_bytes(safetensors(entries(**{name: ("F32", [1], 0, 4)}), 4))
    assert any("\\x1b[31mw " in line for line in lines(inspect_file(path)))
    assert all(line.isprintable() for line in lines(inspect_file(path)))
    path.write_bytes(safetensors(entries(w=("\x1b[31m", [1], 0, 4)), 4))
    with pytest.raises(LayoutError) as refused:
        open_model(path)
    assert str(refused.value).isprintable()


def test_files_that_are_nested_without_end_are_refused(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors.index.json").write_text("[" * 100_000)
    with pytest.raises(LayoutError, match="not a shard index"):
        load_initial(tmp_path, tmp_path / "new", {})
    with pytest.raises(ConfigError, match="not valid TOML"):
        load_run_file(run_file(tmp_path, f"seed = {'[' * 100_000}"))


def test_a_header_of_two_gigabytes_is_refused_though_the_file_has_them(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    with path.open("wb") as file:
        file.write((2 << 30).to_bytes(8, "little") + b"{")
        file.truncate((2 << 30) + 100)
    with pytest.raises(LayoutError, match=r"header length 2147483648"):
        open_model(path)
