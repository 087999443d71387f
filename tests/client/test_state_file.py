"""What a trainer keeps between processes is read back as it was, or not at all."""

from __future__ import annotations

import math
import random
from collections import OrderedDict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fedcore.client.state_file import read_state, write_state

VALUES: list[Any] = [
    None,
    True,
    -3,
    1 << 80,
    0.1,
    math.inf,
    "text \n ü",
    b"\0\xff",
    [1, [2.5, "x"]],
    (1, (), [None]),
    {0: {"exp_avg": 1.5}, "a": (1,), (1, 2): []},
    random.getstate(),
]


@pytest.mark.parametrize("value", VALUES)
def test_values_come_back_as_they_were(tmp_path: Path, value: Any) -> None:
    write_state(tmp_path / "s", value)
    found = read_state(tmp_path / "s")
    assert (found, type(found)) == (value, type(value))


@pytest.mark.parametrize(
    "tensor",
    [
        torch.randn(3, 5),
        torch.tensor(7.0),
        torch.empty(0, 4),
        torch.randn(4, 6).t(),
        torch.ones(3, dtype=torch.bfloat16),
        torch.tensor([True, False]),
        torch.arange(5),
        torch.nn.Parameter(torch.randn(2)),
        torch.tensor([1 + 2j]),
    ],
)
def test_tensors_come_back_to_the_bit(tmp_path: Path, tensor: torch.Tensor) -> None:
    write_state(tmp_path / "s", {"before": 1, "t": tensor, "u": torch.ones(1), "n": np.float32(2)})
    found = read_state(tmp_path / "s")
    assert found["t"].dtype == tensor.dtype
    assert found["t"].shape == tensor.shape
    assert torch.equal(found["t"], tensor.detach())
    assert (float(found["u"]), found["n"], found["before"]) == (1.0, 2.0, 1)


def test_an_optimizer_goes_on_from_its_state_as_if_it_had_not_stopped(tmp_path: Path) -> None:
    def trained(steps: int, path: Path | None = None) -> torch.Tensor:
        torch.manual_seed(0)
        layer = torch.nn.Linear(4, 4)
        optimizer = torch.optim.AdamW(layer.parameters(), lr=0.1)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.1, total_steps=20)
        for step in range(steps):
            if step == 3 and path is not None:
                write_state(path, (optimizer.state_dict(), schedule.state_dict()))
                optimizer = torch.optim.AdamW(layer.parameters(), lr=9.0)
                schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.1, total_steps=20)
                for part, state in zip((optimizer, schedule), read_state(path), strict=True):
                    part.load_state_dict(OrderedDict(state))
            optimizer.zero_grad()
            layer(torch.ones(4)).sum().backward()
            optimizer.step()
            schedule.step()
        return layer.weight.detach()

    assert torch.equal(trained(6), trained(6, tmp_path / "s"))


def test_what_is_torn_or_of_another_kind_is_not_read(tmp_path: Path) -> None:
    path = tmp_path / "s"
    write_state(path, {"w": torch.randn(100), "x": [1, 2]})
    whole = path.read_bytes()
    for at in (0, 5, 6, 10, 14, 40, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:at])
        with pytest.raises(ValueError, match=r"it is (damaged|no file of a trainer's state)"):
            read_state(path)
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :])
        with pytest.raises(ValueError, match=r"it is (damaged|no file of a trainer's state)"):
            read_state(path)
    with pytest.raises(TypeError, match="a function can't be kept"):
        write_state(path, {"lambda": lambda: 0})
    with pytest.raises(TypeError, match="a Tensor can't be kept"):
        write_state(path, torch.eye(2).to_sparse())
