"""What the server knows of its last model does not cost more with every message."""

from __future__ import annotations

from pathlib import Path

import pytest

from fedcore._core import Exchange, Layout
from fedcore.layout import layout_hash
from fedcore.model_file import create_model
from fedcore.server import versions as module
from fedcore.server.storage.store import Store
from fedcore.server.versions import Versions

from ..support.runs import run_config


def test_a_layout_of_many_tensors_is_hashed_once_and_again_for_another_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hashed: list[Layout] = []
    monkeypatch.setattr(
        module, "layout_hash", lambda layout: (hashed.append(layout), layout_hash(layout))[1]
    )
    config = run_config(tmp_path, count=2)
    store = Store(config.run_folder, {})
    known = Versions(config, store, Exchange())
    try:
        for count in (6000, 6001):
            layout = Layout([(f"w{i:05d}", "F32", [1]) for i in range(count)])
            assert layout.tensor_count == count
            known.model = create_model(None, layout)
            for _ in range(100):
                assert known.expected_hash(None) == known.layout_hash == layout_hash(layout)
                assert known.most_tensors() == max(10_000, 2 * count)
                assert known.table_bytes == 128 * count
            assert hashed[-1] is layout
    finally:
        known.close()
        store.close()
    assert len(hashed) == 2
