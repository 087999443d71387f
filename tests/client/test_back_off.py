"""A site whose downloads come with wrong bytes does not ask at full speed for ever."""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest

from fedcore import protocol
from fedcore.site import waits as module
from fedcore.site.waits import Waits


def test_each_spoiled_download_in_a_row_is_waited_for_longer_up_to_a_minute(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    now = [0.0]
    monkeypatch.setattr(module, "time", SimpleNamespace(monotonic=lambda: now[0]))
    task = protocol.Task(kind="evaluate", round=1, rounds=1, version=1)
    machine = SimpleNamespace(task=task, finish=None)
    connection: Any = SimpleNamespace(machine=machine)
    waits = Waits("a", connection)

    def turns() -> Iterator[None]:
        while True:
            yield None
            now[0] += 0.5

    waited = []
    for _ in range(9):
        began = now[0]
        waits._back_off(turns(), task)
        waited.append(now[0] - began)
    assert waited == [1, 2, 4, 8, 16, 32, 60, 60, 60]

    model = {"id": "0" * 32, "layout": "0" * 64, "tensors": [("w", "F32", [1])]}
    machine.task = protocol.Task.model_validate(
        {"kind": "evaluate", "round": 1, "rounds": 1, "version": 1, "sets": [model]}, strict=False
    )
    began = now[0]
    waits._back_off(turns(), task)
    assert now[0] == began, "another model is there: it is asked for at once"
