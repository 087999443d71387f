"""Adapters of a tiny Llama, made and saved by PEFT, with random values in both factors."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

from fedcore.layout import TensorSpec, table
from fedcore.model_file import open_model

MODULES = ["q_proj", "v_proj", "down_proj"]


def llama() -> Any:
    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=32, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=2,
            num_key_value_heads=2, max_position_embeddings=16, bos_token_id=1, eos_token_id=1, pad_token_id=0,
        )
    )  # fmt: skip


def adapted(seed: int, base: Any = None, **options: Any) -> Any:
    """Return a model with an adapter whose factors are all random, B of the size that training gives it."""
    settings: dict[str, Any] = {"r": 4, "lora_alpha": 8, "target_modules": MODULES, **options}
    model = get_peft_model(base or llama(), LoraConfig(task_type="CAUSAL_LM", **settings))
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.copy_(torch.randn_like(parameter) * 0.1)
    return model


def save(model: Any, folder: Path) -> Path:
    # The model has no home that PEFT could ask for its vocabulary.
    model.save_pretrained(str(folder), save_embedding_layers=False)
    return folder


def tensors_of(folder: Path) -> list[TensorSpec]:
    return list(table(open_model(folder / "adapter_model.safetensors").layout))


def scaled_products(model: Any) -> dict[str, torch.Tensor]:
    """Return what PEFT adds to each module's weight, computed from the factors in float64."""
    found = {}
    for name, module in model.named_modules():
        if getattr(module, "lora_A", None) and "default" in module.lora_A:
            a = module.lora_A["default"].weight.detach().double()
            b = module.lora_B["default"].weight.detach().double()
            found[name.removeprefix("base_model.model.")] = module.scaling["default"] * (b @ a)
    return found


def opened(folder: Path, base: Any = None) -> Any:
    return PeftModel.from_pretrained(base or llama(), str(folder)).eval()


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=(torch.arange(12) % 32)[None]).logits
