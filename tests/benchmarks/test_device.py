"""The benchmark of a device: nothing is timed that it did not compute, or that is not the CPU's bits."""

from __future__ import annotations

import ctypes
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from benchmarks import device
from benchmarks.encodings import Work
from fedcore import _core, _device
from fedcore.errors import ConfigError, FedcoreError

from ..support.benchmarking import command

SIZE = 1 << 20
FINITE, DECLINED = 0, 2


class Mean(ctypes.Structure):
    """FcMean of csrc/kernels/device.h."""

    _fields_ = (
        ("dtype", ctypes.c_int),
        ("k", ctypes.c_size_t),
        ("inputs", ctypes.POINTER(ctypes.c_void_p)),
        ("encodings", ctypes.POINTER(ctypes.c_ubyte)),
        ("weights", ctypes.POINTER(ctypes.c_double)),
        ("total", ctypes.c_double),
        ("base", ctypes.c_void_p),
        ("out", ctypes.c_void_p),
        ("count", ctypes.c_size_t),
    )


_FUNCTION = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_void_p, ctypes.POINTER(Mean))


class Table(ctypes.Structure):
    """FcDevice of csrc/kernels/device.h."""

    _fields_ = (("self", ctypes.c_void_p), ("mean", _FUNCTION))


class Device:
    """Stands for a GPU, as fedcore._cuda.open_device() gives one; ``mean`` says what became of a block."""

    name = "a device of its own kind"
    failure = ""

    def __init__(self, mean: Callable[[Mean], int]) -> None:
        self.blocks = 0
        self.seen: list[tuple[int, ...]] = []
        self._mean = mean
        self._table = Table(None, _FUNCTION(self._run))
        self.name = b"fedcore.device.v2"

    def _run(self, _: Any, block: Any) -> int:
        mean = block.contents
        verdict = self._mean(mean)
        self.blocks += verdict != DECLINED
        self.seen.append(tuple(mean.encodings[: mean.k]) if mean.encodings else ())
        return verdict

    def capsule(self) -> Any:
        new = ctypes.pythonapi.PyCapsule_New
        new.restype, new.argtypes = (
            ctypes.py_object,
            (ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p),
        )
        return new(ctypes.addressof(self._table), self.name, None)


@pytest.fixture
def install(monkeypatch: pytest.MonkeyPatch) -> Any:
    def use(mean: Callable[[Mean], int]) -> Device:
        found = Device(mean)
        monkeypatch.setattr(_device, "open_gpu", lambda source: found)
        return found

    yield use
    _device.use_device("cpu")


def test_the_cpu_beside_itself_has_a_row_for_every_case(tmp_path: Path) -> None:
    path = tmp_path / "result.json"
    result = command(
        "device", "--device", "cpu", "--size", "1MiB", "--repeats", "1", "--json", str(path)
    )
    assert result.returncode == 0, result.stdout + result.stderr
    assert "Mean of 4 updates of 1 MiB on CPU" in result.stdout
    found = json.loads(path.read_text())
    assert found["device"] == "CPU"
    assert [(row["tensors"], row["update"]) for row in found["rows"]] == [
        (tensors, encoding) for tensors, encodings in device.CASES.items() for encoding in encodings
    ]
    for row in found["rows"]:
        assert row["cpu_gb_s"] > 0
        assert row["device_over_cpu"] == row["device_gb_s"] / row["cpu_gb_s"]
    assert found["machine"]["cores"] >= 1


def test_without_a_gpu_it_says_so_and_measures_nothing(tmp_path: Path) -> None:
    try:
        found = _device.use_device("cuda")
    except ConfigError as error:
        missing = str(error)
    else:
        _device.use_device("cpu")
        assert found != "CPU", "what was asked for was not used"
        pytest.skip("there is a GPU")
    path = tmp_path / "result.json"
    result = command("device", "--json", str(path))
    assert result.returncode == 1
    assert result.stdout == ""
    assert result.stderr.strip() == f"error: {missing}"
    assert not path.exists()


@pytest.mark.parametrize("encoding", ["raw", "nf4"])
def test_a_device_that_is_wrong_is_not_timed(install: Any, encoding: str) -> None:
    install(lambda mean: FINITE)  # and writes nothing
    with pytest.raises(
        ArithmeticError, match=f"{encoding}: the mean of LoRA, fp32 on cuda is wrong"
    ):
        device.measure(Work("LoRA, fp32", SIZE), encoding, 2, "cuda", 1)
    assert _device.device_blocks() == 0, "the CPU is in use again"


def test_a_device_that_leaves_chunks_to_the_cpu_is_not_timed(install: Any) -> None:
    found = install(lambda mean: DECLINED)
    with pytest.raises(FedcoreError, match="int8: of 1 chunks the device computed 0"):
        device.measure(Work("LoRA, fp32", SIZE), "int8", 3, "cuda", 1)
    assert found.seen == [(3, 3, 3)], "the updates were offered as they travelled"


def test_an_unknown_device_is_refused() -> None:
    result = command("device", "--device", "tpu")
    assert result.returncode == 1
    assert "--device=tpu: expected one of auto, cpu, cuda" in result.stderr


def test_a_device_of_another_version_is_refused(install: Any) -> None:
    found = install(lambda mean: DECLINED)
    found.name = b"fedcore.device.v1"
    with pytest.raises(ConfigError, match=r"fedcore\.device\.v2"):
        _core.set_device(found.capsule())
