"""What a round costs a site beside its training."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from benchmarks import adapter
from fedcore._core import Layout
from fedcore.errors import FedcoreError
from fedcore.model_file import create_model

MIB = 1 << 20


WINDOW_MIB = 16  # under way in one direction, never in both at once
TENSOR_MIB = 4  # read out one by one, 24 of them
CODE_MIB = 28  # sockets, threads, modules and arenas of the allocator, whatever the adapter's size


def test_an_adapters_rounds_are_timed_and_the_site_takes_the_update_and_a_window() -> None:
    result = adapter.measure(96 * MIB, 2)
    assert result["bytes"] == 96 * MIB
    for name in ("round_samples_s", "receive_s", "submit_s", "wait_s", "site_cpu_samples_s"):
        assert len(result[name]) == 2
        assert all(seconds > 0 for seconds in result[name])
    assert 0 < result["peak_bytes_above_held"] < (96 + WINDOW_MIB + TENSOR_MIB + CODE_MIB) * MIB


@pytest.mark.parametrize("right", [True, False])
def test_a_wrong_result_is_not_timed(right: bool, tmp_path: Path) -> None:
    layout = Layout([("a", "F32", [5]), ("b", "F32", [7])])
    for name, added in (("first", 0), ("last", 3)):
        file = create_model(tmp_path / name, layout)
        for view in file.views().values():
            np.frombuffer(view, np.float32)[:] = 0.1 + added
        file.file.sync()
    values = np.frombuffer(file.view("b"), np.float32)
    expected = np.float32(0.1)
    for _ in range(3):
        expected += np.float32(1)
    for view in file.views().values():
        np.frombuffer(view, np.float32)[:] = expected
    if right:
        adapter.check_result(tmp_path / "first", tmp_path / "last", 3)
        return
    values[6] = np.nextafter(expected, np.float32(9))
    with pytest.raises(FedcoreError, match="b is wrong"):
        adapter.check_result(tmp_path / "first", tmp_path / "last", 3)
