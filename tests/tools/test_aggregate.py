"""``fedcore aggregate``: the same bytes in any order, and errors that name file and tensor."""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from fedcore.aggregate import aggregate_files
from fedcore.cli import main
from fedcore.errors import ConfigError, LayoutError, NonFiniteError, StorageError, WeightError


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
    from safetensors.numpy import load_file

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
