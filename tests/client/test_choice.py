"""What a script or a site keeps to itself stays there, and what it sends is what it chose."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import Future
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file

import fedcore.client as fl
from fedcore.client.choice import choose, forget_choice, travelling
from fedcore.client.parameters import ModelParameters
from fedcore.errors import ConfigError, LayoutError
from fedcore.server.outcome import RunResult

NAMES = ["body.0.weight", "body.0.bias", "body.1.weight", "head.weight"]


@pytest.fixture(autouse=True)
def _fresh() -> Iterator[None]:
    yield
    forget_choice()


def test_names_are_chosen_with_stars() -> None:
    assert travelling(NAMES) == NAMES
    choose(include="body.*")
    assert travelling(NAMES) == NAMES[:3]
    choose(exclude=["*.bias", "head.weight"])
    assert travelling(NAMES) == [NAMES[0], NAMES[2]]
    choose(include=["*.weight"], exclude=["body.*"])
    assert travelling(NAMES) == ["head.weight"]


def test_a_site_can_keep_more_than_its_script_but_send_no_more(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    choose(include="body.*")
    monkeypatch.setenv("FEDCORE_EXCLUDE", "*.bias, head.*")
    assert travelling(NAMES) == [NAMES[0], NAMES[2]]
    monkeypatch.setenv("FEDCORE_EXCLUDE", "")
    monkeypatch.setenv("FEDCORE_INCLUDE", "*.weight")
    assert travelling(NAMES) == [NAMES[0], NAMES[2]]


def test_a_pattern_that_matches_nothing_is_refused_with_the_nearest_names() -> None:
    choose(exclude="body.O.bias")
    with pytest.raises(
        ConfigError, match=r"'body\.O\.bias' matches none of the 4.*'body\.0\.bias'"
    ):
        travelling(NAMES)
    choose(exclude="*")
    with pytest.raises(LayoutError, match="leave none of the 4 tensors"):
        travelling(NAMES)
    with pytest.raises(ConfigError, match="include: expected names"):
        choose(include=[""])


def test_what_is_left_out_of_a_module_is_neither_sent_nor_overwritten() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Linear(2, 1))
    choose(exclude="1.*")
    parameters = ModelParameters(model)
    assert parameters.names == ["0.weight", "0.bias"]
    before = model[1].weight.detach().clone()
    zeros = {name: bytes(4 * model.state_dict()[name].numel()) for name in parameters.names}
    parameters.load(parameters.specs, {name: memoryview(raw) for name, raw in zeros.items()})
    assert not model[0].weight.any()
    assert torch.equal(model[1].weight, before)


def test_the_models_of_a_run_hold_what_was_chosen_alone(
    run: Future[RunResult], tmp_path: Path
) -> None:
    fl.init({"body": np.zeros(3, np.float32), "head": np.ones(2, np.float32)}, exclude="head")
    while fl.is_running():
        params = fl.receive()
        assert set(params) == {"body"}
        fl.send({"body": params["body"] + 1, "head": np.full(2, 7, np.float32)}, weight=1)
    assert run.result(200).ok
    assert set(load_file(tmp_path / "runs/t/final/model.safetensors")) == {"body"}


def test_a_site_that_keeps_what_the_runs_model_holds_sends_nothing_at_all(
    run: Future[RunResult], monkeypatch: pytest.MonkeyPatch
) -> None:
    fl.init({"body": np.zeros(3, np.float32), "head": np.ones(2, np.float32)})
    assert fl.is_running()
    params = fl.receive()
    fl.init()  # from here on as a script that takes the server's model
    monkeypatch.setenv("FEDCORE_EXCLUDE", "head")
    with pytest.raises(LayoutError, match="keep 'head' at this site"):
        fl.send(params, weight=1)
