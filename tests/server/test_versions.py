"""What the server knows of its last model does not cost more with every message."""

from __future__ import annotations

from pathlib import Path
from unittest.mock import Mock

import numpy as np
import pytest

from fedcore._core import Exchange, Layout
from fedcore.layout import layout_hash
from fedcore.model_file import create_model
from fedcore.server import versions as module
from fedcore.server.outcome import Outcome
from fedcore.server.storage.store import Store, VersionRow
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
            right = layout_hash(layout)
            for _ in range(100):
                assert known.expected_hash("a", None, 1) == known.layout_hash == right
                assert known.most_tensors() == max(10_000, 2 * count)
                assert known.table_bytes == 128 * count
            assert hashed[-1] is layout
    finally:
        known.close()
        store.close()
    assert len(hashed) == 2


def test_the_first_model_stays_to_be_pulled_after_another_one_is_committed(tmp_path: Path) -> None:
    source = create_model(tmp_path / "initial.safetensors", Layout([("w", "F32", [4])]))
    source.file.sync()
    config = run_config(tmp_path, sites=["a", "b"])
    store = Store(config.run_folder, {})
    known = Versions(config, store, Exchange())
    try:
        known.load_initial(source.path)
        known.publish()
        first = known.first_set()
        assert first == (known.set_id, known.checksum)
        store.announce(1, 0)
        model = create_model(store.scratch(1), source.layout, known.metadata(1))
        np.frombuffer(model.view("w"), np.float32)[:] = 1
        row = VersionRow(1, "", "", model.layout.total_bytes, 0.0, {"a": 1})
        known.commit(row, (model, model.checksums()), {})
        again = known.first_set()
        assert again == known.first_set()
        assert again[0] not in (first[0], known.set_id)
        assert again[1] == first[1] != known.checksum
    finally:
        known.close()
        store.close()


@pytest.mark.parametrize(("finished", "kept"), [(False, {0, 3}), (True, {3})])
def test_a_comparison_keeps_its_first_model_until_it_is_over(
    finished: bool, kept: set[int]
) -> None:
    store = Mock(last_version=3, finished=finished, prune=Mock(return_value=[]))
    config = Mock()
    config.server.keep_versions, config.run.task = 1, "compare"
    config.selection.metric, config.selection.keep_best = None, 1
    Outcome.prune(Mock(_store=store, _config=config, best=None))
    store.prune.assert_called_once_with(kept)
