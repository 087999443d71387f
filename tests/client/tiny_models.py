"""Small models with random weights, their loss, and the folder that a run makes of one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from fedcore._core import Layout
from fedcore.client.parameters import ModelParameters
from fedcore.files.opening import weights_name
from fedcore.layout import DEFAULT_CHUNK_BYTES
from fedcore.model_file import create_model
from fedcore.server.storage.readme import readme

ROWS = torch.randint(3, 60, (4, 12), generator=torch.Generator().manual_seed(3))


def llama(**options: Any) -> Any:
    """Return a model with the same weights each time."""
    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            **{
                "vocab_size": 64, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
                "num_attention_heads": 4, "num_key_value_heads": 4, "pad_token_id": 0, **options,
            }
        )
    )  # fmt: skip


def loss(model: Any, rows: torch.Tensor = ROWS, **options: Any) -> float:
    """Return the loss of next tokens; not by the model's own, which some adapters compute with an extra term."""
    model.eval()
    with torch.no_grad():
        logits = model(input_ids=rows, **options).logits[:, -rows.shape[1] :].float()
    return float(
        torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), rows[:, 1:].flatten())
    )


def train(model: Any, steps: int = 3, rows: torch.Tensor = ROWS, **options: Any) -> None:
    """Change all that is trained."""
    model.train()
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=3e-2)
    for _ in range(steps):
        optimizer.zero_grad()
        model(input_ids=rows, labels=rows, **options).loss.backward()
        optimizer.step()


def write_result(model: Any, folder: Path) -> dict[str, str]:
    """Write what a run's ``best/`` holds if this is its model; returns the files beside the weights."""
    parameters = ModelParameters(model)
    files = parameters.files
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in {**files, "README.md": readme(files, 1, "0" * 32)}.items():
        (folder / name).write_text(text, encoding="utf-8")
    layout = Layout(
        [(name, dtype, list(shape)) for name, dtype, shape in parameters.specs], DEFAULT_CHUNK_BYTES
    )
    create_model(folder / weights_name(files), layout).fill(parameters.read)
    return files
