"""``fedcore aggregate``: the same bytes in any order, and errors that name file and tensor."""

from __future__ import annotations

import fcntl
import itertools
import json
import os
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from fedcore.cli.app import main
from fedcore.errors import ConfigError, LayoutError, NonFiniteError, StorageError, WeightError
from fedcore.files.average import aggregate_files


def write(folder: Path, name: str, seed: int, **extra: np.ndarray) -> Path:
    random = np.random.default_rng(seed)
    values = {f"t{i}": random.standard_normal((i, 3)).astype(np.float32) for i in range(1, 4)}
    path = folder / name
    save_file({**values, "big": random.standard_normal(400_001), **extra}, path)
    return path


def test_order_and_threads_do_not_change_the_result(tmp_path: Path) -> None:
    files = [(write(tmp_path, f"{i}.safetensors", i), w) for i, w in enumerate((3, 3, 16777215))]
    hashes = set()
    for number, order in enumerate(itertools.permutations(files)):
        out = tmp_path / f"out{number}.safetensors"
        result = aggregate_files(
            [f for f, _ in order], [w for _, w in order], out, threads=1 + number % 4
        )
        hashes.add(result.sha256())
    assert len(hashes) == 1


def test_the_command_writes_the_mean(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    a, b = (write(tmp_path, f"{i}.safetensors", i) for i in (1, 2))
    out = tmp_path / "out.safetensors"
    with pytest.raises(SystemExit) as ended:
        main(["aggregate", str(a), str(b), "--weights", "1,3", "-o", str(out)])
    assert ended.value.code == 0
    assert "5 tensors" in capsys.readouterr().out or out.exists()
    found, x, y = load_file(out), load_file(a), load_file(b)
    for name in x:
        expected = (x[name].astype(np.float64) + 3 * y[name].astype(np.float64)) / 4
        np.testing.assert_allclose(found[name], expected, rtol=1e-6)
        assert found[name].dtype == x[name].dtype


def test_what_is_wrong_is_named_and_no_file_is_left(tmp_path: Path) -> None:
    a = write(tmp_path, "a.safetensors", 1)
    out = tmp_path / "out.safetensors"
    broken = write(tmp_path, "b.safetensors", 2, nan=np.array([1, np.nan], np.float32))
    with pytest.raises(LayoutError, match=r"tensor 'nan'.*a.safetensors does not have it"):
        aggregate_files([a, broken], None, out)
    other = write(tmp_path, "c.safetensors", 3, nan=np.array([1, 2], np.float32))
    with pytest.raises(
        NonFiniteError, match=r"b.safetensors: NaN or infinity in tensor 'nan', element 1"
    ):
        aggregate_files([other, broken], None, out)
    with pytest.raises(WeightError, match="2 files and 1 weights"):
        aggregate_files([a, other], [1], out)
    with pytest.raises(ConfigError, match="one of the inputs"):
        aggregate_files([a], None, a, force=True)
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "a.safetensors",
        "b.safetensors",
        "c.safetensors",
    ]
    aggregate_files([a], None, out)
    with pytest.raises(StorageError, match="--force"):
        aggregate_files([a], None, out)


def test_integers_that_differ_are_refused(tmp_path: Path) -> None:
    a, b = (write(tmp_path, f"{i}.safetensors", i, n=np.array(i)) for i in (1, 2))
    with pytest.raises(LayoutError, match="'n' is I64 and differs"):
        aggregate_files([a, b], None, tmp_path / "out.safetensors")


def exact_mean(values: list[float], weights: list[int], dtype: type[np.floating]) -> np.floating:
    """The nearest number of ``dtype`` to the exact rational mean, ties to even."""
    exact = sum(Fraction(v) * w for v, w in zip(values, weights, strict=True)) / sum(weights)
    near = dtype(float(exact))
    candidates = [np.nextafter(near, dtype(-np.inf)), near, np.nextafter(near, dtype(np.inf))]
    finite = [c for c in candidates if np.isfinite(c)]
    bits = f"u{np.dtype(dtype).itemsize}"
    return min(finite, key=lambda c: (abs(Fraction(float(c)) - exact), int(c.view(bits)) & 1))


@pytest.mark.parametrize("dtype", [np.float64, np.float32, np.float16])
def test_every_element_is_the_correctly_rounded_mean(
    dtype: type[np.floating], tmp_path: Path
) -> None:
    random = np.random.default_rng(11)
    weights = [1, 999_983, 16_777_215]
    inputs = [(random.standard_normal((20, 50)) * 100).astype(dtype) for _ in weights]
    paths = []
    for number, values in enumerate(inputs):
        paths.append(tmp_path / f"{number}.safetensors")
        save_file({"w": values}, paths[-1])
    out = tmp_path / "out.safetensors"
    aggregate_files(paths, weights, out)
    found = load_file(out)["w"]
    assert found.dtype == dtype
    for at in np.ndindex(20, 50):
        assert found[at] == exact_mean([float(x[at]) for x in inputs], weights, dtype)


def test_the_order_of_tensors_within_a_file_does_not_matter(tmp_path: Path) -> None:
    values = {"b": np.arange(5, dtype=np.float32), "a": np.ones((2, 3), np.float16)}
    raw = {name: value.tobytes() for name, value in values.items()}
    for path, order in (("one", "ab"), ("two", "ba")):
        entries, data = {}, b""
        for name in order:
            begin, data = len(data), data + raw[name]
            kind = "F32" if name == "b" else "F16"
            shape = list(values[name].shape)
            entries[name] = {"dtype": kind, "shape": shape, "data_offsets": [begin, len(data)]}
        header = json.dumps(entries).encode()
        (tmp_path / path).write_bytes(len(header).to_bytes(8, "little") + header + data)
    outs = []
    for number, order in enumerate((["one", "two"], ["two", "one"], ["one", "one"])):
        out = tmp_path / f"out{number}"
        aggregate_files([tmp_path / name for name in order], None, out)
        outs.append(out.read_bytes())
    assert outs[0] == outs[1] == outs[2]
    np.testing.assert_array_equal(load_file(tmp_path / "out0")["b"], values["b"])


def test_an_interruption_leaves_no_file(tmp_path: Path) -> None:
    paths = [write(tmp_path, f"{i}.safetensors", i) for i in (1, 2)]

    def interrupt(done: int, total: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        aggregate_files(paths, None, tmp_path / "out.safetensors", progress=interrupt)
    assert sorted(tmp_path.iterdir()) == paths


def test_progress_reaches_the_end(tmp_path: Path) -> None:
    paths = [write(tmp_path, f"{i}.safetensors", i) for i in (1, 2)]
    seen: list[tuple[int, int]] = []
    result = aggregate_files(
        paths, None, tmp_path / "out", progress=lambda done, total: seen.append((done, total))
    )
    total = result.layout.total_bytes
    assert seen[-1] == (total, total)


def test_a_link_to_an_input_is_not_overwritten(tmp_path: Path) -> None:
    path = write(tmp_path, "a.safetensors", 1)
    before = path.read_bytes()
    link = tmp_path / "link"
    link.symlink_to(path)
    with pytest.raises(ConfigError, match="one of the inputs"):
        aggregate_files([path], None, link, force=True)
    assert path.read_bytes() == before


@pytest.mark.parametrize("weight", [0, -1, 1 << 64, 2.0, True])
def test_a_weight_that_is_none_is_refused_with_its_file(weight: object, tmp_path: Path) -> None:
    path = write(tmp_path, "a.safetensors", 1)
    with pytest.raises(
        WeightError, match=r"a\.safetensors: expected an integer from 1 to 2\*\*64 - 1"
    ):
        aggregate_files([path], [weight], tmp_path / "out")  # type: ignore[list-item]


# --- what is named, and what is replaced ---


def sharded(folder: Path, seed: int) -> Path:
    """The tensors that `write` makes, in two shards as ``save_pretrained`` leaves them."""
    folder.mkdir()
    whole = load_file(write(folder, "whole", seed))
    (folder / "whole").unlink()
    where = {name: f"model-0000{1 + n % 2}.safetensors" for n, name in enumerate(sorted(whole))}
    for shard in set(where.values()):
        save_file({n: whole[n] for n, at in where.items() if at == shard}, folder / shard)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": where}))
    return folder


def test_folders_and_shards_give_the_bytes_that_their_files_give(tmp_path: Path) -> None:
    files = [write(tmp_path, f"{i}.safetensors", i) for i in (1, 2)]
    expected = aggregate_files(files, [3, 5], tmp_path / "files").sha256()
    run = tmp_path / "run"
    (run / "best").mkdir(parents=True)
    (run / "run.sqlite").touch()
    (run / "best" / "adapter_model.safetensors").write_bytes(files[1].read_bytes())
    shards = sharded(tmp_path / "sharded", 1)
    seen: list[tuple[int, int]] = []
    for number, second in enumerate((run, run / "best", sharded(tmp_path / "other", 2))):
        out = tmp_path / f"out{number}"
        found = aggregate_files([shards, second], [3, 5], out, progress=lambda *at: seen.append(at))
        assert found.sha256() == expected
        assert seen[-1][0] == seen[-1][1]
    with pytest.raises(ConfigError, match="one of the inputs"):
        aggregate_files([shards], None, shards / "model-00001.safetensors", force=True)
    (run / "best").rename(tmp_path / "elsewhere")
    with pytest.raises(ConfigError, match="run folder without best/ and final/"):
        aggregate_files([run], None, tmp_path / "none")


def test_a_boolean_that_is_neither_0_nor_1_is_refused(tmp_path: Path) -> None:
    path = write(tmp_path, "a.safetensors", 1, flags=np.array([True, True, True]))
    path.write_bytes(path.read_bytes().replace(b"\1\1\1", b"\1\2\1"))
    with pytest.raises(LayoutError, match="'flags' is BOOL and holds a byte of value 2"):
        aggregate_files([path], None, tmp_path / "out")


def test_what_is_no_regular_file_is_never_replaced(tmp_path: Path) -> None:
    path = write(tmp_path, "a.safetensors", 1)
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "folder").mkdir()
    (tmp_path / "circle").symlink_to(tmp_path / "circle")
    for name, kind in (
        ("pipe", "a named pipe"),
        ("folder", "a folder"),
        ("circle", "cannot write"),
    ):
        before = (tmp_path / name).lstat().st_ino
        with pytest.raises(StorageError, match=kind):
            aggregate_files([path], None, tmp_path / name, force=True)
        assert (tmp_path / name).lstat().st_ino == before
    with pytest.raises(StorageError, match="/dev/full: it is a device"):
        aggregate_files([path], None, Path("/dev/full"), force=True)
    assert len(list(tmp_path.iterdir())) == 4


def test_a_file_that_is_replaced_keeps_its_mode_and_the_link_to_it(tmp_path: Path) -> None:
    path = write(tmp_path, "a.safetensors", 1)
    (tmp_path / "real").write_text("old")
    (tmp_path / "real").chmod(0o640)
    (tmp_path / "link").symlink_to("real")
    aggregate_files([path], None, tmp_path / "link", force=True)
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "real").stat().st_mode & 0o777 == 0o640
    assert load_file(tmp_path / "real").keys() == load_file(path).keys()


def test_what_a_killed_process_left_is_removed_and_a_running_ones_is_not(tmp_path: Path) -> None:
    path, out = write(tmp_path, "a.safetensors", 1), tmp_path / "out"
    left, running = (tmp_path / f".out.{pid}.partial" for pid in (11, 12))
    for partial in (left, running):
        partial.write_bytes(b"part of a mean")
        partial.with_name(f"{partial.name}.lock").touch()
    with running.with_name(f"{running.name}.lock").open() as lock:
        fcntl.flock(lock, fcntl.LOCK_SH)
        aggregate_files([path], None, out)
    assert not left.exists()
    assert not left.with_name(f"{left.name}.lock").exists()
    assert running.read_bytes() == b"part of a mean"
