"""Benchmarks prove their results, measure what they say, and leave no process behind."""

from __future__ import annotations

import inspect
import json
import os
import select
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from benchmarks import kernels, optimizers, rules
from benchmarks.__main__ import app
from benchmarks.kernel_commands import app as kernel_app
from benchmarks.limits import Limits
from benchmarks.processes import Family
from benchmarks.round_trip import check_result, fedcore_rounds, values
from benchmarks.workload import TENSORS, Work
from fedcore import _core
from fedcore.errors import FedcoreError
from fedcore.model_file import create_model
from fedcore.rules.finishers import FINISHERS

from ..support.benchmarking import ROOT, command

MIB = 1 << 20


def test_the_help_names_every_benchmark() -> None:
    result = command("--help")
    assert result.returncode == 0
    names = (
        "kernels",
        "lora",
        "optimizers",
        "rules",
        "rule-peers",
        "reduce",
        "round-trip",
        "memory",
        "floor",
        "encodings",
        "device",
        "adapter",
        "encryption",
        "experiments",
    )
    for name in names:
        assert name in result.stdout
    for command_ in [*app.registered_commands, *kernel_app.registered_commands]:
        assert command_.callback is not None
        assert "json_file" in inspect.signature(command_.callback).parameters, command_.callback


def test_a_round_trip_prints_a_table_and_writes_its_figures(tmp_path: Path) -> None:
    path = tmp_path / "result.json"
    result = command(
        "round-trip", "--size", "2MiB", "--sites", "2", "--rounds", "2", "--json", str(path)
    )
    assert result.returncode == 0, result.stdout + result.stderr
    assert "raw TCP" in result.stdout
    found = json.loads(path.read_text())
    assert (found["sites"], found["rounds"], found["peers"]) == (2, 2, {})
    assert len(found["round_samples_s"]) == 2
    assert len(found["limit_samples_s"]) == len(found["zeromq_samples_s"]) == 4
    assert found["round_over_limit"] == found["round_s"] / found["limit_s"]
    assert 10 * MIB < found["server_peak_rss_bytes"] < 512 * MIB
    assert found["machine"]["cores"] >= 1


def test_an_unknown_peer_is_refused_by_name() -> None:
    result = command("round-trip", "--peers", "nobody")
    assert result.returncode != 0
    assert "nobody" in result.stderr
    assert "nvflare, flower" in result.stderr


def test_a_site_with_plain_dicts_gives_the_right_model_too() -> None:
    assert fedcore_rounds(Work(MIB, 2, 2), client="plain")["round_s"] > 0


@pytest.mark.parametrize(("added", "right"), [(4.5, True), (4.0, False)])
def test_a_wrong_aggregate_gives_no_time(tmp_path: Path, added: float, right: bool) -> None:
    work = Work(TENSORS * 40, 2, 3)
    layout = _core.Layout([(f"t{i:03d}", "F32", [work.elements]) for i in range(TENSORS)])
    model = create_model(tmp_path / "m.safetensors", layout)
    for index, view in enumerate(model.views().values()):
        np.frombuffer(view, np.float32)[:] = values(index, work.elements) + np.float32(added)
    model.file.sync()
    if right:
        check_result(tmp_path / "m.safetensors", work)
    else:
        with pytest.raises(FedcoreError, match="the aggregate is wrong"):
            check_result(tmp_path / "m.safetensors", work)


def test_every_kernel_is_checked_and_timed_on_every_instruction_set() -> None:
    before, level = _core.simd_level(), _core.simd_levels()[0]
    _core.set_simd_level(level)
    try:
        rows = kernels.sweep(64 << 10, 3, 1)
        assert _core.simd_level() == level
    finally:
        _core.set_simd_level(before)
    assert {(row["simd"], row["dtype"]) for row in rows} == {
        (simd, dtype) for simd in _core.simd_levels() for dtype in kernels.DTYPES
    }


def test_every_optimizer_is_timed_on_every_instruction_set() -> None:
    before = _core.simd_level()
    rows = optimizers.sweep(64 << 10, 1)
    assert _core.simd_level() == before
    assert len(rows) == 2 * len(FINISHERS) * len(_core.simd_levels())
    assert all(row["moved_over_memcpy_moved"] > 0 for row in rows)


def test_every_rule_is_checked_and_timed_on_every_instruction_set() -> None:
    before = _core.simd_level()
    rows = rules.sweep(64 << 10, (3,), (1, 2), 1)
    assert _core.simd_level() == before
    assert len(rows) == len(rules.RULES) * len(rules.DTYPES) * 2 * len(_core.simd_levels())
    assert all(row["moved_over_memcpy_moved"] > 0 for row in rows)


@pytest.mark.parametrize("dtype", rules.DTYPES)
@pytest.mark.parametrize("rule", rules.RULES)
def test_a_rule_that_is_wrong_is_not_timed(dtype: str, rule: str) -> None:
    wrong = {"median": "trimmed-mean", "trimmed-mean": "median", "pairs": "pairs"}[rule]
    case = rules.Case(wrong, dtype, 5, 4096)
    case.run(1)
    case.rule = rule
    case.squares = [1.0] * 10
    with pytest.raises(ArithmeticError, match=rule):
        case.check()


@pytest.mark.parametrize("dtype", kernels.DTYPES)
def test_a_kernel_that_is_off_by_its_last_bit_is_not_timed(
    monkeypatch: pytest.MonkeyPatch, dtype: str
) -> None:
    right = kernels.numpy_mean

    def mean(dtype: str, inputs: Any, weights: Any, out: Any) -> None:
        right(dtype, inputs, weights, out)
        if inputs[0] is not inputs[1]:
            out.view(np.uint8)[0 if dtype != "F64" else 5] ^= 1

    monkeypatch.setattr(kernels, "numpy_mean", mean)
    inputs = kernels.inputs_of(dtype, 4096, 2)
    with pytest.raises(ArithmeticError, match=dtype):
        kernels.validate(dtype, inputs, [3, 4])


def test_the_limits_are_medians_of_all_samples() -> None:
    limits = Limits(3 * MIB + 5)
    limits.sample(3)
    found = limits.result()
    assert found["limit_s"] == sorted(limits.tcp)[1] > 0
    assert found["zeromq_s"] == sorted(limits.zeromq)[1] > 0


_FORKS = """
import os, subprocess, sys
subprocess.Popen([sys.executable, "-c", sys.argv[1], *sys.argv[2:]], start_new_session=True)
"""
_HOLDS_MEMORY = """
import os, signal, sys
held = b"x" * (64 << 20)
signal.signal(signal.SIGTERM, signal.SIG_IGN)
open(sys.argv[1], "w").write(str(os.getpid()))
while True:
    signal.pause()
"""


def test_what_a_process_started_in_a_session_of_its_own_is_measured_and_ended(
    tmp_path: Path,
) -> None:
    fifo = tmp_path / "pid"
    os.mkfifo(fifo)
    with Family() as family:
        start = [sys.executable, "-c", _FORKS, _HOLDS_MEMORY, str(fifo)]
        family.start(start, tmp_path / "log", {}, tmp_path)
        pid = int(fifo.read_text())
        family.sample()
        assert 64 * MIB < family.peaks[pid] < 512 * MIB
        assert family.peak("signal.pause") >= family.peaks[pid]
    status = Path(f"/proc/{pid}/status")
    assert not status.exists() or "State:\tZ" in status.read_text()  # dead, if not yet reaped


_BENCHMARK = """
import signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job ignores it
from pathlib import Path
sys.path.insert(0, sys.argv[1])
import benchmarks
from benchmarks.processes import Family
with Family() as family:
    child = family.start(
        [sys.executable, "-c", "import time; print(1, flush=True); time.sleep(600)"],
        Path(sys.argv[2]), {}, Path(sys.argv[2]).parent,
    )
    print(child.pid, flush=True)
    child.wait()
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_no_process_outlives_a_benchmark_however_it_ends(
    tmp_path: Path, number: signal.Signals
) -> None:
    start = [sys.executable, "-c", _BENCHMARK, str(ROOT), str(tmp_path / "log")]
    with subprocess.Popen(start, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as running:
        assert running.stdout is not None
        pid = int(running.stdout.readline())
        ended = os.pidfd_open(pid)
        running.send_signal(number)
        assert select.select([ended], [], [], 30)[0], "it still runs"
        os.close(ended)


def test_strangers_are_neither_measured_nor_ended() -> None:
    start = [sys.executable, "-c", "input()"]
    with Family() as family:
        stranger = subprocess.Popen(start, stdin=subprocess.PIPE)
        for _ in range(3):
            family.sample()
        assert stranger.pid not in family.peaks
        assert os.getpid() not in family.peaks
    assert stranger.poll() is None
    stranger.communicate(b"\n")
    assert stranger.returncode == 0
