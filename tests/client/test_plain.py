"""The plain loop in a real run with one site: what each call does at its time, and at the wrong one."""

from __future__ import annotations

from concurrent.futures import Future
from typing import Any

import numpy as np
import pytest
import torch

import fedcore.client as fl
from fedcore.errors import ClosedError, LayoutError, WeightError
from fedcore.server.outcome import RunResult

ROUNDS = 3


def values() -> dict[str, np.ndarray]:
    return {"w": np.arange(4, dtype=np.float32)}


def go_through() -> None:
    while fl.is_running():
        fl.send(fl.receive(), weight=1)


def test_the_round_at_hand_is_shown_in_each_pass(run: Future[RunResult]) -> None:
    fl.init(values())
    assert fl.system_info()["round"] == 0
    seen = []
    while fl.is_running():
        before = fl.system_info()
        params = fl.receive()
        after = fl.system_info()
        fl.send(params, weight=1)
        assert before == after == fl.system_info()
        seen.append((after["round"], after["version"]))
    assert seen == [(1, 0), (2, 1), (3, 2), (3, 3)]
    assert fl.system_info()["round"] == ROUNDS


def test_a_run_that_is_over_stays_over(run: Future[RunResult]) -> None:
    fl.init(values())
    go_through()
    assert run.result(200).ok
    assert not fl.is_running()
    with pytest.raises(ClosedError, match="the run is over"):
        fl.receive()
    with pytest.raises(ClosedError, match="the run is over"):
        fl.send(values(), weight=1)
    assert not fl.is_running()


def test_a_pass_sends_once(run: Future[RunResult]) -> None:
    fl.init(values())
    assert fl.is_running()
    fl.send(fl.receive(), weight=1)
    for call in (fl.receive, fl.is_train, fl.is_evaluate, lambda: fl.send(values(), weight=1)):
        with pytest.raises(ClosedError, match=r"sent already.*fl\.is_running\(\)"):
            call()
    rounds = 1
    while fl.is_running():
        evaluating = fl.is_evaluate()
        fl.send(fl.receive(), weight=1)
        with pytest.raises(ClosedError, match="sent already"):
            fl.send(values(), weight=1)
        rounds += not evaluating
    assert rounds == ROUNDS
    assert run.result(200).ok


def test_a_send_that_was_refused_may_be_repeated(run: Future[RunResult]) -> None:
    fl.init(values())
    assert fl.is_running()
    with pytest.raises(WeightError):
        fl.send(fl.receive(), weight=0)
    fl.send(fl.receive(), weight=1)
    go_through()
    assert run.result(200).ok


def test_an_update_under_other_names_is_told_how_to_send_it(run: Future[RunResult]) -> None:
    module = torch.nn.Linear(4, 1)
    wrapped = {f"module.{name}": value for name, value in module.state_dict().items()}
    fl.init(module)
    assert fl.is_running()
    with pytest.raises(
        LayoutError, match=r"'module\.weight' where that has 'bias'.*fl\.load.*without tensors"
    ):
        fl.send(wrapped, weight=1)
    for other in (module, module.parameters()):
        with pytest.raises(LayoutError, match="expected a mapping of names to arrays"):
            fl.send(other, weight=1)  # type: ignore[arg-type]
    fl.send(weight=1)
    fl.shutdown()
    fl.init({"weight": np.zeros((1, 4), np.float32), "bias": np.zeros(1, np.float32)})
    assert fl.is_running()
    with pytest.raises(LayoutError, match=r"'w'.*under the names that fl\.receive\(\) gives"):
        fl.send({"w": np.zeros((1, 4), np.float32)}, weight=1)


@pytest.mark.parametrize("weight", [np.int64(3), np.uint8(3), torch.tensor(3)], ids=repr)
def test_any_integer_is_a_weight(weight: Any, run: Future[RunResult]) -> None:
    fl.init(values())
    while fl.is_running():
        fl.send(fl.receive(), weight=weight)
    assert run.result(200).ok


@pytest.mark.parametrize(
    "weight", [3.0, 2.5, np.float32(3), torch.tensor(3.0), "3", None], ids=repr
)
def test_a_weight_that_is_no_integer_is_refused_with_advice(
    weight: Any, run: Future[RunResult]
) -> None:
    fl.init(values())
    assert fl.is_running()
    with pytest.raises(WeightError, match=r"int\(\.\.\.\)"):
        fl.send(fl.receive(), weight=weight)


@pytest.mark.parametrize("weight", [True, np.True_, torch.tensor(True)], ids=repr)
def test_a_truth_value_is_no_weight(weight: Any, run: Future[RunResult]) -> None:
    fl.init(values())
    assert fl.is_running()
    with pytest.raises(WeightError, match="number of training examples"):
        fl.send(fl.receive(), weight=weight)


def test_patch_of_a_plain_loop_names_the_modules_that_patch_a_trainer() -> None:
    said = "fedcore.client.lightning as fl.*fedcore.client.hf as fl"
    with pytest.raises(AttributeError, match=said):
        fl.patch(object())  # type: ignore[attr-defined]
    assert not hasattr(fl, "patch")


def test_a_name_that_is_nowhere_is_refused_as_of_any_module() -> None:
    with pytest.raises(AttributeError, match=r"'fedcore.client' has no attribute 'pach'"):
        fl.pach  # type: ignore[attr-defined]  # noqa: B018


def test_what_is_listed_is_what_a_script_may_use() -> None:
    import fedcore.client.hf
    import fedcore.client.lightning

    for module in (fl, fedcore.client.hf, fedcore.client.lightning):
        assert dir(module) == sorted(module.__all__)
        assert all(callable(getattr(module, name)) for name in dir(module))
    assert {"init", "receive", "send", "restore"} <= set(dir(fl))


def test_a_number_that_was_left_out_counts_one_and_is_warned_of_once(
    run: Future[RunResult], caplog: pytest.LogCaptureFixture
) -> None:
    fl.init(values())
    while fl.is_running():
        fl.send(fl.receive(), metrics={"val_loss": 1.0})
    assert run.result(200).ok
    said = [record.getMessage() for record in caplog.records if "was given no" in record.message]
    assert said == [
        "a: fl.send() was given no examples: this score weighs 1, whatever the number of validation examples; "
        "state that number",
        "a: fl.send() was given no weight: this update weighs 1, whatever the number of training examples; state "
        "that number",
    ]
