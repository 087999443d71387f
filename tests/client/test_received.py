"""A downloaded model is read tensor by tensor, and is not in memory beside the site's own."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from fedcore._core import Layout
from fedcore.client.sharding import put
from fedcore.model_file import ModelFile, create_model
from fedcore.site.received import Received

MIB = 1 << 20
TENSORS = 8


def downloaded(folder: Path) -> ModelFile:
    layout = Layout([(f"t{i}", "F32", [MIB // 4]) for i in range(TENSORS)])
    file = create_model(folder / "m.safetensors", layout)
    for i in range(TENSORS):
        file.file.write(file.data_offset + file.offsets[f"t{i}"], np.full(MIB // 4, i, np.float32))
    file.release()
    return file


def resident(path: Path) -> int:
    """Return how many bytes of a mapped file are in this process's memory."""
    found, inside = 0, False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if line.startswith("Rss:") and inside:
            found += int(line.split()[1]) << 10
        elif "-" in line.split(" ", 1)[0]:
            inside = line.endswith(str(path))
    return found


def test_only_the_tensor_that_was_looked_up_last_is_in_memory(tmp_path: Path) -> None:
    file = downloaded(tmp_path)
    tensors, most = Received(file), 0
    views = []
    for i, (name, view) in enumerate(tensors.items()):
        assert name == f"t{i}"
        assert view.readonly
        assert np.all(np.frombuffer(view, np.float32) == i)
        most = max(most, resident(file.path))
        views.append(view)
    assert MIB <= most < 2 * MIB
    tensors.release()
    assert resident(file.path) < MIB // 4
    for i, view in enumerate(views):
        assert np.all(np.frombuffer(view, np.float32) == i), "and can be read again"


def test_a_tensor_is_put_into_any_other() -> None:
    value = torch.arange(6, dtype=torch.float32).reshape(2, 3)
    for target in (
        torch.zeros(2, 3),
        torch.zeros(3, 2).T,
        torch.zeros(2, 3, dtype=torch.bfloat16),
        torch.zeros(4, 3)[1:3],
    ):
        put(target, value)
        assert torch.equal(target, value.to(target.dtype))
    scalar, nothing = torch.zeros(()), torch.zeros(0, 3)
    put(scalar, torch.tensor(2.0))
    put(nothing, torch.zeros(0, 3))
    assert scalar == 2
