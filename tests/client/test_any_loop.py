"""Loops of any framework: arrays by NumPy's protocols, a pass as a block, an error told."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file

import fedcore.client as fl
from fedcore.client.arrays import Arrays
from fedcore.errors import LayoutError, WeightError
from fedcore.monitor.ask import ask_status
from fedcore.server.outcome import RunResult


class OnlyDlpack:
    """An array as a framework without NumPy's own protocol gives it."""

    def __init__(self, values: np.ndarray) -> None:
        self._values = values

    def __dlpack__(self, **options: Any) -> Any:
        return self._values.__dlpack__(**options)

    def __dlpack_device__(self) -> tuple[int, int]:
        return self._values.__dlpack_device__()


class OnlyArray:
    def __init__(self, values: np.ndarray) -> None:
        self._values = values

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        return self._values


@pytest.mark.parametrize("wrap", [OnlyDlpack, OnlyArray])
def test_arrays_travel_by_dlpack_or_by_numpys_protocol(
    wrap: Any, run: Future[RunResult], tmp_path: Path
) -> None:
    start = np.arange(6, dtype=np.float32).reshape(2, 3)
    fl.init({"w": wrap(start)})
    while fl.is_running():
        params = fl.receive()
        fl.send({"w": wrap(params["w"] * 2)}, weight=1)
    assert run.result(200).ok
    final = load_file(tmp_path / "runs/t/final/model.safetensors")
    assert np.array_equal(final["w"], start * 8)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_jax_loop_trains_as_it_does_alone(
    dtype: str, run: Future[RunResult], tmp_path: Path
) -> None:
    jax = pytest.importorskip(
        "jax", reason="JAX is not installed: it comes with the extra `slow`", exc_type=ImportError
    )
    jnp = jax.numpy
    inputs = jax.random.normal(jax.random.key(0), (16, 4), dtype)
    labels = inputs.sum(1)

    def loss(params: Any) -> Any:
        return ((inputs @ params["w"] + params["b"] - labels) ** 2).mean()

    def step(params: Any) -> Any:
        return jax.tree.map(lambda p, g: p - 0.1 * g, params, jax.grad(loss)(params))

    start = {"w": jnp.arange(4, dtype=dtype) / 8, "b": jnp.zeros((), dtype)}
    fl.init(start)
    while fl.is_running():
        params = jax.tree.map(jnp.asarray, fl.receive())
        score = float(loss(params))
        fl.send(step(params), weight=16, metrics={"val_loss": score})
    assert run.result(200).ok
    alone = start
    for _ in range(3):
        alone = step(alone)
    last = stored(tmp_path / "runs/t/final/model.safetensors", dtype)
    for name, value in alone.items():
        assert np.array_equal(last[name], np.asarray(value, np.float32)), name


def stored(path: Path, dtype: str) -> dict[str, Any]:
    """Return a file's tensors as fp32; the dtype has to be the one expected."""
    from safetensors.torch import load_file as load_torch

    found = load_torch(path)
    assert {str(value.dtype) for value in found.values()} == {f"torch.{dtype}"}
    return {name: value.float().numpy() for name, value in found.items()}


def test_bfloat16_arrays_keep_their_bits() -> None:
    ml_dtypes = pytest.importorskip("ml_dtypes")
    arrays = Arrays({"w": np.array([1.5, -2.0], ml_dtypes.bfloat16)})
    assert arrays.specs == [("w", "BF16", [2])]
    assert bytes(arrays.read("w")) == bytes.fromhex("c03f00c0")


def test_an_array_that_cannot_travel_is_named() -> None:
    with pytest.raises(
        LayoutError, match="tensor 'w' has dtype complex64; expected one of float64"
    ):
        Arrays({"w": np.zeros(2, np.complex64)})


def test_a_pass_is_one_block_with_arrays(run: Future[RunResult], tmp_path: Path) -> None:
    fl.init({"w": np.zeros(3, np.float32)})
    kinds = []
    while fl.is_running():
        with fl.task() as task:
            kinds.append((task.kind, task.round, task.version))
            task.metrics = {"val_loss": float(task.params["w"][0])}
            task.params = {"w": task.params["w"] + 1}
            task.weight = 2
    result = run.result(200)
    assert kinds == [("train", 1, 0), ("train", 2, 1), ("train", 3, 2), ("evaluate", 3, 3)]
    assert result.best_version == 0
    assert load_file(tmp_path / "runs/t/final/model.safetensors")["w"].tolist() == [3, 3, 3]


def test_a_pass_is_one_block_with_a_module(run: Future[RunResult], tmp_path: Path) -> None:
    model = torch.nn.Linear(2, 1, bias=False)
    torch.nn.init.zeros_(model.weight)
    fl.init(model)
    while fl.is_running():
        with fl.task() as task:
            assert torch.equal(task.params["weight"], model.weight)
            with torch.no_grad():
                model.weight += 1
            task.weight = 1
    assert run.result(200).ok
    assert load_file(tmp_path / "runs/t/final/model.safetensors")["weight"].tolist() == [[3, 3]]


def test_a_block_that_fails_or_sets_no_weight_sends_nothing(run: Future[RunResult]) -> None:
    fl.init({"w": np.zeros(3, np.float32)})
    assert fl.is_running()
    with pytest.raises(ZeroDivisionError), fl.task() as task:
        task.weight = 1 // 0
    with pytest.raises(WeightError, match="set weight in the block"), fl.task():
        pass
    with fl.task() as task:  # the round is still to be done
        task.weight = 1
    assert fl.is_running()
    assert fl.system_info()["round"] == 2


def test_metrics_are_shown_at_the_server_while_the_site_trains(
    run: Future[RunResult], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fedcore.server.status.WATCHER_SECONDS", 0.0)  # nobody watches on
    fl.init({"w": np.zeros(3, np.float32)})
    assert fl.is_running()
    params = fl.receive()
    fl.log({"train_loss": 0.25}, step=3)
    shown: dict[str, float] = {}
    while not shown:  # each answer comes after the message before it, or the time of the test is up
        (site,) = ask_status(os.environ["FEDCORE_SERVER"], 10).sites
        assert site.state == "training"
        shown = site.metrics
    assert shown == {"train_loss": 0.25}
    fl.send(params, weight=1)


def test_an_error_that_ends_a_plain_script_is_shown_at_the_server_without_its_paths(
    tmp_path: Path, fedcore: Callable[..., subprocess.CompletedProcess[str]]
) -> None:
    (tmp_path / "train.py").write_text(
        "import numpy as np\nimport fedcore.client as fl\n"
        "fl.init({'w': np.zeros(3, np.float32)})\n"
        "while fl.is_running():\n    fl.receive()\n    open('secret ward/jane.csv')\n"
    )
    (tmp_path / "run.toml").write_text(
        '[run]\nname = "t"\nrounds = 1\n[participants]\nsites = ["north"]\n'
        '[simulate]\nscript = "train.py"\n'
    )
    done = fedcore("simulate", tmp_path / "run.toml")
    assert done.returncode == 1
    log = (tmp_path / "runs/t/server.log").read_text()
    assert "north reports: FileNotFoundError: [Errno 2] No such file or directory: <path>" in log
    assert "jane" not in log
    assert (
        "jane" in (tmp_path / "runs/t/logs/north.log").read_text()
    )  # at the site it is shown in full


def test_a_script_that_does_not_know_its_server_says_what_to_set_once() -> None:
    program = "import fedcore.client as fl\nfl.init({})\n"
    known = ("FEDCORE_KIT", "FEDCORE_SERVER", "FEDCORE_SITE")
    done = subprocess.run(
        [sys.executable, "-P", "-c", program], capture_output=True, text=True, check=False,
        env={name: value for name, value in os.environ.items() if name not in known},
    )  # fmt: skip
    assert done.returncode == 1
    assert done.stderr.count("Traceback") == 1, done.stderr
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("fedcore.errors.ConfigError: ")
    assert "Set FEDCORE_KIT to the kit folder" in last
