"""Names of tensors: those that no file can hold are refused, and wrappers leave no part in the others."""

from __future__ import annotations

import copy
from collections import OrderedDict
from concurrent.futures import Future
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

import fedcore.client as fl
from fedcore import protocol
from fedcore._core import Layout
from fedcore.client.parameters import ModelParameters
from fedcore.errors import LayoutError
from fedcore.model_file import create_model
from fedcore.server.outcome import RunResult

BAD: dict[Any, str] = {
    "__metadata__": r"'__metadata__'.*rename",
    "": "is empty",
    "a\x00b": r"'a\\x00b' holds '\\x00'.*rename",
    "a\nb": r"'a\\nb' holds '\\n'.*rename",
    "a\ud800": r"'a\\ud800' holds '\\ud800'.*rename",
    "\u202eb": r"holds '\\u202e'",
    "w" * 1025: "1,025 characters, and at most 1,024",
    3: r"3 is int and no text; use a text as its name, such as '3'",
    ("a", 1): "is tuple and no text",
    None: "is NoneType and no text",
}


def test_a_name_that_no_file_holds_is_refused_by_name_with_a_remedy(run: Future[RunResult]) -> None:
    for name, said in BAD.items():
        with pytest.raises(LayoutError, match=said):
            fl.init({"good": np.ones(3, np.float32), name: np.ones(3, np.float32)})


@pytest.mark.parametrize("name", ["__metadata__", "a\nb"], ids=ascii)
def test_a_module_with_such_a_name_is_refused_too(name: str) -> None:
    module = nn.Linear(2, 2)
    module.register_parameter(name, nn.Parameter(torch.ones(2)))
    with pytest.raises(LayoutError, match="rename"):
        ModelParameters(module)


def test_the_server_takes_no_tensor_named_as_the_header_of_its_files() -> None:
    with pytest.raises(ValueError, match="rename the tensor"):
        protocol.Declare(tensors=[("__metadata__", "F32", [3])])
    with pytest.raises(LayoutError, match="__metadata__"):
        create_model(None, Layout([("__metadata__", "F32", [3])], 1 << 20))


class GradSampleModule(nn.Module):
    """Wraps a module as Opacus does."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self._module = module

    def forward(self, *args: Any) -> Any:
        return self._module(*args)


def plain() -> nn.Module:
    torch.manual_seed(0)
    inner = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3))
    return nn.Sequential(OrderedDict(body=inner, module=nn.Linear(3, 1)))


def compiled_inside() -> nn.Module:
    model: Any = plain()
    model.body = torch.compile(model.body)
    return model  # type: ignore[no-any-return]


def wrapped_inside() -> nn.Module:
    model: Any = plain()
    model.body[0] = GradSampleModule(model.body[0])
    model.module = nn.DataParallel(model.module)
    return model  # type: ignore[no-any-return]


def checkpointed_inside() -> nn.Module:
    """Activations are computed again: this wrapper's own part is in no name of a ``state_dict``."""
    model: Any = compiled_inside()
    model.body = checkpoint_wrapper(model.body)
    return model  # type: ignore[no-any-return]


WRAPPED = {
    "checkpointed inside": checkpointed_inside,
    "compiled": lambda: torch.compile(plain()),
    "compiled inside": compiled_inside,
    "wrapped inside": wrapped_inside,
    "wrapped twice": lambda: nn.DataParallel(GradSampleModule(compiled_inside())),
}


@pytest.mark.parametrize("kind", WRAPPED)
@pytest.mark.parametrize("frozen", [False, True], ids=["whole", "partly frozen"])
def test_names_are_those_of_the_plain_class_at_every_depth(kind: str, frozen: bool) -> None:
    model, reference = WRAPPED[kind](), plain()
    if frozen:
        for each in (model, reference):
            next(each.parameters()).requires_grad_(False)
    expected, found = ModelParameters(reference), ModelParameters(model)
    assert found.specs == expected.specs
    assert set(found.names) <= set(reference.state_dict())
    values = {name: memoryview(bytes(found.read(name))[::-1]) for name in found.names}
    for each in (found, expected):
        each.load(expected.specs, copy.copy(values))
        assert all(bytes(each.read(name)) == values[name] for name in values)


def test_a_module_of_ones_own_that_has_one_part_called_module_is_no_wrapper() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.module = nn.Linear(2, 2)

    assert ModelParameters(Net()).names == ["module.weight", "module.bias"]


def test_two_tensors_of_one_plain_name_are_refused() -> None:
    wrapper = GradSampleModule(nn.Linear(2, 2))
    assert ModelParameters(nn.Sequential(wrapper)).names == ["0.weight", "0.bias"]
    odd = nn.Sequential(OrderedDict({"_module": nn.Linear(2, 2), "bias": nn.Linear(2, 2)}))
    assert "_module.weight" in ModelParameters(odd).names, "it holds more than one module"


@pytest.mark.parametrize("kind", ["compiled", "wrapped twice"])
def test_the_documented_line_loads_into_a_wrapped_module(kind: str, run: Future[RunResult]) -> None:
    model = WRAPPED[kind]()
    fl.init(model)
    while fl.is_running():
        params = fl.receive()
        with torch.no_grad():
            for tensor in model.parameters():
                tensor.fill_(7.0)
        left = model.load_state_dict(params, strict=False)
        assert (left.missing_keys, left.unexpected_keys) == ([], [])
        assert torch.equal(list(model.parameters())[-2], params["module.weight"])
        with torch.no_grad():
            list(model.parameters())[-2].fill_(fl.system_info()["round"])
        fl.send(model.state_dict(), weight=1)
    assert run.result(200).ok
    assert params["module.weight"].tolist() == [[3.0, 3.0, 3.0]]


def test_names_that_load_state_dict_would_drop_are_an_error(run: Future[RunResult]) -> None:
    from peft import LoraConfig, get_peft_model

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(3, 3)

    model = get_peft_model(Net(), LoraConfig(r=2, target_modules=["layer"]))  # type: ignore[arg-type]
    fl.init(model)
    assert fl.is_running()
    with pytest.raises(LayoutError, match=r"dropped 2 of the 2 .*fl\.load\(params\)"):
        model.load_state_dict(fl.receive(), strict=False)
    fl.load(fl.receive())
    fl.shutdown()
    assert model.load_state_dict({"other": torch.ones(1)}, strict=False).unexpected_keys
