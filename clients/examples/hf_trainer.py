"""``transformers.Trainer`` with a LoRA adapter on a tiny causal model: each site counts in steps of its own."""

import os
import tempfile

import torch
from peft import LoraConfig, get_peft_model
from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainingArguments

import fedcore.client.hf as fl

STEP = 1 if os.environ["FEDCORE_SITE"] == "north" else 2


class Counting(torch.utils.data.Dataset):
    """Sequences that count upwards modulo 32."""

    def __init__(self, size: int, seed: int) -> None:
        starts = torch.randint(0, 32, (size, 1), generator=torch.Generator().manual_seed(seed))
        self.rows = (starts + torch.arange(16) * STEP) % 32

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {"input_ids": self.rows[index], "labels": self.rows[index]}


torch.manual_seed(0)
config = GPT2Config(
    vocab_size=32, n_positions=16, n_embd=32, n_layer=1, n_head=2, bos_token_id=0, eos_token_id=0
)
model = get_peft_model(
    GPT2LMHeadModel(config), LoraConfig(r=4, target_modules=["c_attn", "c_fc"], fan_in_fan_out=True)
)

trainer = Trainer(
    model,
    TrainingArguments(
        output_dir=tempfile.mkdtemp(),
        max_steps=20,
        per_device_train_batch_size=16,
        learning_rate=2e-2,
        report_to=[],
        save_strategy="no",
        disable_tqdm=True,
        use_cpu=True,
    ),
    train_dataset=Counting(256, 1),
    eval_dataset=Counting(64, 2),
)

fl.patch(trainer)
while fl.is_running():
    print(fl.system_info())
    trainer.evaluate()
    trainer.train()
