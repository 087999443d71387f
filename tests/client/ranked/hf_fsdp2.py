"""A transformers script whose model accelerate shards by FSDP2 over as many processes as torchrun starts.

accelerate has FSDP for accelerators alone and leaves it out, without a word, where it trains on CPUs. What it does
then is nothing but choose another type of training, which is put right here; all that follows is its own.
"""

from __future__ import annotations

import sys
from typing import Any

import torch
from accelerate import DistributedType, FullyShardedDataParallelPlugin, PartialState
from peft import LoraConfig, get_peft_model
from torch.distributed.tensor import DTensor
from transformers import Trainer, TrainingArguments

import fedcore.client.hf as fl


class Model(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net = torch.nn.Linear(4, 1)

    def forward(self, inputs: torch.Tensor, labels: torch.Tensor) -> dict[str, torch.Tensor]:
        found = self.net(inputs)
        return {"loss": torch.nn.functional.mse_loss(found, labels), "logits": found}


def shard(trainer: Any) -> None:
    """Have accelerate take these processes as it would take accelerators."""
    plugin = FullyShardedDataParallelPlugin(fsdp_version=2, cpu_ram_efficient_loading=False)
    state = trainer.accelerator.state
    state.fsdp_plugin = plugin
    state.distributed_type = PartialState._shared_state["distributed_type"] = DistributedType.FSDP
    trainer.is_fsdp_enabled = True
    assert trainer.accelerator.is_fsdp2


def main() -> None:
    rows = torch.randn(16, 4, generator=torch.Generator().manual_seed(1))
    data: Any = [{"inputs": row, "labels": row.sum(0, keepdim=True)} for row in rows]
    half = sys.argv[2:] == ["bf16"]
    arguments = TrainingArguments(
        output_dir=sys.argv[1], max_steps=5, per_device_train_batch_size=8, learning_rate=0.1, max_grad_norm=0.0,
        report_to=[], disable_tqdm=True, use_cpu=True, save_strategy="no", lr_scheduler_type="linear",
        bf16=half,
    )  # fmt: skip
    model: Any = Model()
    if half:  # accelerate makes the weights fp32 when it shards them
        model.to(torch.bfloat16)
    if sys.argv[2:] == ["lora"]:
        model = get_peft_model(model, LoraConfig(r=2, target_modules=["net"]))
    trainer = Trainer(model, arguments, train_dataset=data, eval_dataset=data)
    shard(trainer)
    fl.patch(trainer)
    passes = 0
    while fl.is_running():
        trainer.evaluate()
        trainer.train()
        if fl.system_info()["version"] != 3:
            assert all(isinstance(p, DTensor) for p in trainer.model.parameters()), "parts"
        passes += 1
    rank, size = torch.distributed.get_rank(), torch.distributed.get_world_size()
    print(f"rank {rank} of {size}: {passes} passes", flush=True)
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
