"""A Lightning script: two clusters that each site sees from another side."""

import os

import lightning
import torch

import fedcore.client.lightning as fl

SIDE = 1.0 if os.environ["FEDCORE_SITE"] == "north" else -1.0


class Classifier(lightning.LightningModule):
    """A small network on two-dimensional points."""

    def __init__(self) -> None:
        super().__init__()
        self.net = torch.nn.Sequential(
            torch.nn.Linear(2, 16), torch.nn.ReLU(), torch.nn.Linear(16, 2)
        )

    def training_step(self, batch: list[torch.Tensor], _: int) -> torch.Tensor:
        loss = torch.nn.functional.cross_entropy(self.net(batch[0]), batch[1])
        self.log("train_loss", loss)
        return loss

    def validation_step(self, batch: list[torch.Tensor], _: int) -> None:
        self.log("val_loss", torch.nn.functional.cross_entropy(self.net(batch[0]), batch[1]))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), lr=1e-2)


class Data(lightning.LightningDataModule):
    """Points around (SIDE, 0) and (SIDE, 2)."""

    def loader(self, seed: int, size: int, *, shuffle: bool) -> torch.utils.data.DataLoader:
        random = torch.Generator().manual_seed(seed)
        labels = torch.randint(0, 2, (size,), generator=random)
        centres = torch.stack([torch.full((size,), SIDE), 2.0 * labels], dim=1)
        points = centres + 0.5 * torch.randn(size, 2, generator=random)
        return torch.utils.data.DataLoader(
            torch.utils.data.TensorDataset(points, labels), batch_size=32, shuffle=shuffle
        )

    def train_dataloader(self) -> torch.utils.data.DataLoader:
        return self.loader(1, 256, shuffle=True)

    def val_dataloader(self) -> torch.utils.data.DataLoader:
        return self.loader(2, 64, shuffle=False)


lightning.seed_everything(0)
model, data = Classifier(), Data()
trainer = lightning.Trainer(
    max_epochs=2,
    accelerator="cpu",
    logger=False,
    enable_checkpointing=False,
    enable_progress_bar=False,
    enable_model_summary=False,
)

fl.patch(trainer)
while fl.is_running():
    print(fl.system_info())
    trainer.validate(model, data)
    trainer.fit(model, data)
