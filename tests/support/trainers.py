"""Small trainers of Lightning and Hugging Face."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch


def lightning_module(package: Any) -> Any:
    class Model(package.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.net = torch.nn.Sequential(
                torch.nn.Linear(4, 8), torch.nn.Tanh(), torch.nn.Linear(8, 1)
            )
            self.rates: list[float] = []

        def training_step(self, batch: Any, _: int) -> torch.Tensor:
            self.rates.append(self.optimizers().param_groups[0]["lr"])
            return torch.nn.functional.mse_loss(self.net(batch[0]), batch[1])

        def validation_step(self, batch: Any, _: int) -> None:
            self.log("val_loss", torch.nn.functional.mse_loss(self.net(batch[0]), batch[1]))

        def configure_optimizers(self) -> Any:
            optimizer = torch.optim.Adam(self.parameters(), lr=1e-2)
            return [optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.5)]

    return Model()


def loader() -> Any:
    inputs = torch.randn(40, 4, generator=torch.Generator().manual_seed(1))
    data = torch.utils.data.TensorDataset(inputs, inputs.sum(1, keepdim=True))
    return torch.utils.data.DataLoader(data, batch_size=8)


def make_trainer(package: Any, **budget: Any) -> Any:
    return package.Trainer(
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **budget,
    )


def hf_trainer(tmp_path: Path, steps: int, **options: Any) -> Any:
    from transformers import Trainer, TrainingArguments

    class Model(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.net = torch.nn.Linear(4, 1)

        def forward(self, inputs: torch.Tensor, labels: torch.Tensor) -> dict[str, torch.Tensor]:
            found = self.net(inputs)
            return {"loss": torch.nn.functional.mse_loss(found, labels), "logits": found}

    rows = torch.randn(16, 4, generator=torch.Generator().manual_seed(1))
    data = [{"inputs": row, "labels": row.sum(0, keepdim=True)} for row in rows]
    arguments = TrainingArguments(
        output_dir=str(tmp_path / "hf"), max_steps=steps, per_device_train_batch_size=16, learning_rate=0.1,
        report_to=[], disable_tqdm=True, use_cpu=True, save_strategy="no", lr_scheduler_type="linear", **options,
    )  # fmt: skip
    return Trainer(Model(), arguments, train_dataset=data, eval_dataset=data)
