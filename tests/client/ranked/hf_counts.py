"""A transformers script in two processes whose rows do not fill the last batch; prints what both count."""

from __future__ import annotations

import sys
from typing import Any

import torch
from transformers import Trainer, TrainingArguments

from fedcore.client.hf_counting import StepCounter

ROWS = 21


class Stream(torch.utils.data.IterableDataset):  # type: ignore[type-arg]
    def __iter__(self) -> Any:
        return iter([{"rows": torch.full((4,), float(i))} for i in range(ROWS)])


class Model(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net = torch.nn.Linear(4, 1)

    def forward(self, rows: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"loss": self.net(rows).square().mean()}


def main() -> None:
    for name, data in (("rows", list(Stream())), ("stream", Stream())):
        arguments = TrainingArguments(
            output_dir=sys.argv[1], max_steps=3, per_device_train_batch_size=4, report_to=[],
            disable_tqdm=True, use_cpu=True, save_strategy="no",
        )  # fmt: skip
        made: Any = data
        trainer = Trainer(Model(), arguments, train_dataset=made)
        counter = StepCounter(trainer, None)
        counter.attach()
        counter.begin()
        trainer.train()
        counts = [None, None]
        torch.distributed.all_gather_object(counts, counter.counted.total())
        if torch.distributed.get_rank() == 0:
            print(f"{name}: {sum(filter(None, counts))} of {counts}", flush=True)
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
