"""What the adapters say of the roles of a model's tensors, and what a server optimizer makes of it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import fedcore.client as fl
from fedcore.client.parameters import ModelParameters
from fedcore.client.testing import local_run
from fedcore.model_file import open_model
from fedcore.server.storage.store import Store

BUFFERS = ("1.running_mean", "1.running_var")
MOMENTUM = {"name": "momentum", "learning_rate": 0.5, "momentum": 0.9}


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3), nn.Linear(3, 1))


def test_buffers_and_integers_of_a_model_are_told_from_its_parameters() -> None:
    whole = {
        "1.running_mean": "buffer",
        "1.running_var": "buffer",
        "1.num_batches_tracked": "integer",
    }
    assert ModelParameters(net()).roles == whole
    assert ModelParameters(nn.DataParallel(net())).roles == whole
    partly = net()
    partly[0].requires_grad_(False)
    assert ModelParameters(partly).roles == whole


def test_a_tensor_that_is_tied_to_a_parameter_is_a_parameter() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("a_view", torch.zeros(2, 3))
            self.inside = nn.Linear(3, 2)
            self.outside = nn.Linear(3, 2)
            self.outside.weight = self.inside.weight
            self.a_view = self.inside.weight.data
            self.register_buffer("scale", torch.ones(2))
            self.register_buffer("passing", torch.ones(2), persistent=False)

    found = ModelParameters(Tied())
    assert "a_view" in found.names, "it travels under its first name"
    assert found.roles == {"scale": "buffer"}


def test_buffers_of_a_module_that_peft_saves_are_buffers() -> None:
    peft = pytest.importorskip("peft")
    adapted = peft.get_peft_model(
        net(), peft.LoraConfig(r=1, target_modules=["0"], modules_to_save=["1"])
    )
    found = ModelParameters(adapted)
    assert len(found.names) == 7
    assert {name.rpartition(".")[2]: role for name, role in found.roles.items()} == {
        "running_mean": "buffer", "running_var": "buffer", "num_batches_tracked": "integer",
    }  # fmt: skip


def test_running_statistics_keep_the_plain_mean_under_momentum(tmp_path: Path) -> None:
    model, sent = net(), []
    settings = {"aggregation": {"optimizer": MOMENTUM}}
    with local_run(tmp_path, settings=settings) as local:
        fl.init(model)
        while fl.is_running():
            fl.load(fl.receive())
            if fl.is_train():
                optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
                (model(torch.randn(8, 4)) ** 2).sum().backward()
                optimizer.step()
                sent.append({k: v.clone() for k, v in model.state_dict().items()})
            fl.send(weight=3)
        assert local.result().ok
    for version, update in enumerate(sent, 1):
        made = open_model(local.folder / f"models/round-{version:04d}.safetensors")
        kept = {k: bytes(view) == update[k].numpy().tobytes() for k, view in made.views().items()}
        assert all(kept[name] for name in BUFFERS)
        assert not kept["0.weight"]
        assert not kept["1.weight"]
    assert len(sent) == 2


def test_trainers_say_the_roles_of_a_model_too(tmp_path: Path) -> None:
    lightning = pytest.importorskip("lightning")
    import fedcore.client.lightning as adapter

    class Model(lightning.LightningModule):  # type: ignore[misc, name-defined]
        def __init__(self) -> None:
            super().__init__()
            self.net = net()

        def training_step(self, batch: Any, _: int) -> torch.Tensor:
            return (self.net(batch[0]) ** 2).sum()

        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.parameters(), lr=0.1)

    data = torch.utils.data.TensorDataset(torch.randn(8, 4))
    with local_run(tmp_path, settings={"run": {"name": "local", "rounds": 1}}) as local:
        trainer = lightning.Trainer(
            accelerator="cpu", max_epochs=1, logger=False, enable_checkpointing=False,
            enable_progress_bar=False, enable_model_summary=False,
        )  # fmt: skip
        adapter.patch(trainer)
        model = Model()
        while adapter.is_running():
            trainer.fit(model, torch.utils.data.DataLoader(data, batch_size=4))
        assert local.result().ok
    store = Store(local.folder, None)
    assert store.buffers() == tuple(f"net.{name}" for name in BUFFERS)
    store.close()
