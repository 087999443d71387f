"""Models of very many tensors, such as an adapter for each expert of a large mixture."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from fedcore import protocol
from fedcore._core import Layout
from fedcore.errors import LayoutError
from fedcore.model_file import create_model
from fedcore.server.service import Server
from fedcore.site.session import Session
from fedcore.site.settings import SiteSettings

from ..support.runs import run, run_config


def specs(count: int) -> list[tuple[str, str, list[int]]]:
    return [
        (f"layers.{i // 128}.experts.{i % 128}.lora_A.weight", "F32", [2]) for i in range(count)
    ]


def train(address: str, count: int) -> int:
    """Train in each round; the tensors are checked on the way."""
    with closing(Session(SiteSettings(server=address, site="a"))) as session:
        rounds = 0
        while session.is_running():
            before = session.offered_specs()
            assert before is None or len(before) == count
            model = session.begin(specs(count), {}, lambda _: bytes(8))
            if model.trains:
                value = np.full(2, model.round, np.float32).tobytes()
                session.submit(lambda _, value=value: value, 1)
                rounds += 1
            else:
                session.end_task()
    return rounds


def rounds_of(tmp_path: Path, count: int) -> int:
    """Let one site train ``count`` tensors over two rounds, and check them; returns how many rounds it trained."""
    server = Server(run_config(tmp_path, sites=["a"], rounds=2, round_deadline="5min"))
    with ThreadPoolExecutor(2) as pool:
        result, done = pool.submit(server.run), pool.submit(train, server.endpoint, count)
        try:
            trained = done.result(500)
            assert result.result(200).ok
        finally:
            server.stop()
    final = load_file(tmp_path / "runs/t/final/model.safetensors")
    assert len(final) == count
    assert all((value == 2).all() for value in final.values())
    return trained


def test_a_model_whose_table_travels_packed_goes_through_its_rounds(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert protocol.packs(specs(10_000))
    monkeypatch.setattr("fedcore.protocol.tables.PACK_FROM", 100)
    assert protocol.packs(specs(600))
    assert rounds_of(tmp_path, 600) == 2


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_an_adapter_for_each_expert_of_a_large_mixture_goes_through_its_rounds(
    tmp_path: Path,
) -> None:
    assert rounds_of(tmp_path, 138_240) == 2


def test_more_tensors_than_a_model_file_describes_are_refused_with_the_limit(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("fedcore.model_file.MAX_HEADER", 100_000)
    with pytest.raises(
        LayoutError, match=r"of 2,000 tensors take .* may have 100,000: choose fewer"
    ):
        create_model(None, Layout(specs(2000), 4096))


def test_a_site_with_more_tensors_than_a_message_describes_names_the_limit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    server = Server(run_config(tmp_path, sites=["a", "b"], rounds=2, min_results=1))
    monkeypatch.setattr(protocol, "MAX_TENSORS", 5)

    def site() -> int:
        with closing(Session(SiteSettings(server=server.endpoint, site="b"))) as session:
            assert session.is_running()
            with pytest.raises(LayoutError, match="has 6 tensors that travel, and at most 5 may"):
                session.begin(specs(6), {}, lambda _: bytes(8))
        monkeypatch.undo()
        return train(server.endpoint, 3)

    assert run(server, site)[0].ok
