"""A Lightning script whose model FSDP2 shards over two processes; the argument is the package."""

from __future__ import annotations

import importlib
import sys
from datetime import timedelta
from typing import Any

import torch
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor

import fedcore.client.lightning as fl

package: Any = importlib.import_module(sys.argv[1])
strategies: Any = importlib.import_module(f"{sys.argv[1]}.strategies")


class Model(package.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net = torch.nn.Sequential(
            torch.nn.Linear(4, 8), torch.nn.Tanh(), torch.nn.Linear(8, 1)
        )

    def configure_model(self) -> None:
        if not isinstance(self.net, FSDPModule):
            fully_shard(self.net[0], mesh=self.device_mesh["data_parallel"])
            fully_shard(self.net, mesh=self.device_mesh["data_parallel"])

    def training_step(self, batch: Any, _: int) -> torch.Tensor:
        return torch.nn.functional.mse_loss(self.net(batch[0]), batch[1])

    def validation_step(self, batch: Any, _: int) -> None:
        self.log("val_loss", torch.nn.functional.mse_loss(self.net(batch[0]), batch[1]))

    def configure_optimizers(self) -> Any:
        return torch.optim.Adam(self.parameters(), lr=1e-2)


def loader() -> Any:
    inputs = torch.randn(16, 4, generator=torch.Generator().manual_seed(1))
    data = torch.utils.data.TensorDataset(inputs, inputs.sum(1, keepdim=True))
    return torch.utils.data.DataLoader(data, batch_size=8)


def main() -> None:
    trainer = package.Trainer(
        accelerator="cpu", devices=2, max_epochs=5, logger=False, enable_checkpointing=False,
        strategy=strategies.ModelParallelStrategy(
            data_parallel_size=2, tensor_parallel_size=1, timeout=timedelta(seconds=123)
        ),
        enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    fl.patch(trainer)
    group: Any = torch.distributed.group.WORLD
    given = group._get_backend(torch.device("cpu")).options._timeout
    assert given == timedelta(seconds=123), given
    model = Model()
    passes = 0
    while fl.is_running():
        trainer.validate(model, loader(), verbose=False)
        trainer.fit(model, loader())
        assert all(isinstance(p, DTensor) for p in model.parameters()), "each rank holds a part"
        passes += 1
    print(f"rank {trainer.global_rank} of {trainer.world_size}: {passes} passes", flush=True)


if __name__ == "__main__":
    main()
