"""The choice of a device, and the means of a GPU where there is one."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

import fedcore
from fedcore import _core, _device
from fedcore.errors import ConfigError, NonFiniteError

ROOT = Path(__file__).parents[2]
TORCH = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


@pytest.fixture(autouse=True)
def back_to_the_cpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.delenv("FEDCORE_DEVICE", raising=False)
    yield
    _device.use_device("cpu")


@pytest.fixture
def without_module(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "fedcore._cuda", None)
    monkeypatch.delattr(fedcore, "_cuda", raising=False)


@pytest.fixture
def without_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    module = SimpleNamespace(device_count=lambda: (0, "no CUDA-capable device is detected"))
    monkeypatch.setitem(sys.modules, "fedcore._cuda", module)
    monkeypatch.setattr(fedcore, "_cuda", module, raising=False)


@pytest.mark.parametrize("choice", [None, "auto", "cpu"])
def test_all_but_cuda_is_the_cpu_and_loads_nothing(
    choice: str | None, without_module: None
) -> None:
    assert _device.use_device(choice) == "CPU"
    assert _device.device_failure() == ""


def test_an_unknown_device_is_refused_by_its_source(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match=r"--device=tpu: expected one of auto, cpu, cuda"):
        _device.use_device("tpu")
    monkeypatch.setenv("FEDCORE_DEVICE", "gpu")
    with pytest.raises(ConfigError, match=r"FEDCORE_DEVICE=gpu: expected one of auto, cpu, cuda"):
        _device.use_device()


def test_cuda_without_its_module_is_a_clear_error(
    monkeypatch: pytest.MonkeyPatch, without_module: None
) -> None:
    monkeypatch.setenv("FEDCORE_DEVICE", "cuda")
    with pytest.raises(ConfigError, match=r"FEDCORE_DEVICE=cuda: .*built without CUDA.*nvcc"):
        _device.use_device()


def test_cuda_without_a_gpu_is_a_clear_error(without_gpu: None) -> None:
    with pytest.raises(ConfigError, match=r"--device=cuda: no GPU.*no CUDA-capable device.*cpu"):
        _device.use_device("cuda")


def test_the_option_wins_over_the_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FEDCORE_DEVICE", "nonsense")
    assert _device.use_device("cpu") == "CPU"


@pytest.mark.skipif(shutil.which("cmake") is None, reason="cmake is not on the path")
def test_a_broken_nvcc_only_leaves_the_module_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    nvcc = tmp_path / "nvcc"
    nvcc.write_text("#!/bin/sh\necho 'nvcc fatal: broken' >&2\nexit 1\n")
    nvcc.chmod(0o755)
    monkeypatch.setenv("CUDACXX", str(nvcc))
    command = ["cmake", "-S", ROOT, "-DFEDCORE_BUILD_MODULES=OFF"]
    done = subprocess.run(
        [*command, "-DFEDCORE_CUDA=AUTO", "-B", tmp_path / "auto"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "fedcore is built without CUDA" in done.stdout
    done = subprocess.run(
        [*command, "-DFEDCORE_CUDA=ON", "-B", tmp_path / "on"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode != 0
    assert "FEDCORE_CUDA=ON, but" in done.stderr


@pytest.mark.skipif(shutil.which("cmake") is None, reason="cmake is not on the path")
def test_what_is_built_does_not_depend_on_whether_nvcc_is_there(tmp_path: Path) -> None:
    command = ["cmake", "-S", ROOT, "-B", tmp_path, "-DFEDCORE_BUILD_MODULES=OFF", "-LA", "-N"]
    cache = subprocess.run(command, capture_output=True, text=True, check=False).stdout
    done = subprocess.run(command[:-2], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "CUDA" not in done.stdout, "it is not even looked for"
    assert "FEDCORE_CUDA:STRING=ON" not in cache


def gpu_or_skip() -> Any:
    try:
        _device.use_device("cuda")
    except ConfigError as error:
        pytest.skip(str(error))
    from fedcore import _cuda

    return _cuda.open_device()


@pytest.mark.parametrize("dtype", TORCH)
@pytest.mark.parametrize("count", [1, 1027, 3_000_001])
def test_a_gpu_gives_the_bits_of_the_cpu(dtype: str, count: int) -> None:
    gpu = gpu_or_skip()
    before = gpu.blocks
    random = np.random.default_rng(count)
    bits = [random.integers(0, 256, count * TORCH[dtype].itemsize, np.uint8) for _ in range(5)]
    for values in bits:
        values[TORCH[dtype].itemsize - 1 :: TORCH[dtype].itemsize] &= 0xBF  # finite
    weights = [1, 77, 16777215, 3, 1000]
    found, expected = bytearray(bits[0].nbytes), bytearray(bits[0].nbytes)
    _core.mean(dtype, bits, weights, found)
    assert (_device.device_failure(), gpu.blocks) == ("", before + 1)
    _device.use_device("cpu")
    _core.mean(dtype, bits, weights, expected)
    assert found == expected


def test_a_gpu_names_a_value_that_is_not_finite() -> None:
    gpu_or_skip()
    values = np.ones(100_000, np.float32)
    broken = values.copy()
    broken[77_777] = np.inf
    with pytest.raises(NonFiniteError, match="input 1, element 77777"):
        _core.mean("F32", [values, broken], [1, 1], bytearray(values.nbytes))
