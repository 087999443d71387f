"""What travels of a model with an adapter: all that is trained, or a refusal that names the rest."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import (
    AdaLoraConfig,
    IA3Config,
    LNTuningConfig,
    LoraConfig,
    PrefixTuningConfig,
    PromptEncoderConfig,
    PromptTuningConfig,
    TrainableTokensConfig,
    VeraConfig,
    XLoraConfig,
    get_peft_model,
)
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
)

from fedcore.client.parameters import ModelParameters
from fedcore.errors import LayoutError

from .tiny_llama import llama

ATTENTION: dict[str, Any] = {"target_modules": ["c_attn"], "fan_in_fan_out": True}


def adapted(config: Any, name: str = "default") -> Any:
    torch.manual_seed(0)
    base = GPT2LMHeadModel(
        GPT2Config(vocab_size=32, n_positions=16, n_embd=32, n_layer=2, n_head=2)
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return get_peft_model(base, config, adapter_name=name)


def lora(**options: Any) -> LoraConfig:
    return LoraConfig(r=2, task_type="CAUSAL_LM", **ATTENTION, **options)


def test_extra_trainable_parameters_of_a_peft_model_are_refused_by_name() -> None:
    model = adapted(lora())
    model.base_model.model.transformer.ln_f.requires_grad_(True)
    with pytest.raises(LayoutError) as refused:
        ModelParameters(model)
    said = str(refused.value)
    assert "transformer.ln_f.weight, transformer.ln_f.bias" in said
    assert "modules_to_save=['ln_f']" in said
    assert "requires_grad_(False)" in said
    model.base_model.model.transformer.ln_f.requires_grad_(False)
    assert all("lora" in name for name in ModelParameters(model).names)


def test_an_unfrozen_base_below_an_adapter_is_refused_in_few_words() -> None:
    model = adapted(lora())
    model.requires_grad_(True)
    with pytest.raises(LayoutError, match=r"and \d+ more") as refused:
        ModelParameters(model)
    assert len(str(refused.value)) < 1000
    assert "base_layer" not in str(refused.value).partition("modules_to_save")[2]


def test_inside_a_wrapper_extra_parameters_are_refused_too() -> None:
    wrapper = torch.nn.Module()
    wrapper.net = adapted(lora())
    wrapper.net.base_model.model.transformer.ln_f.requires_grad_(True)
    with pytest.raises(LayoutError, match="ln_f"):
        ModelParameters(wrapper)


@pytest.mark.parametrize(
    "config",
    [
        lora(modules_to_save=["ln_f"]),
        lora(bias="all"),
        lora(bias="lora_only"),
        lora(use_dora=True),
        lora(trainable_token_indices=[1, 2]),
        AdaLoraConfig(init_r=4, target_r=2, total_step=10, task_type="CAUSAL_LM", **ATTENTION),
        IA3Config(feedforward_modules=[], task_type="CAUSAL_LM", **ATTENTION),
        VeraConfig(r=4, task_type="CAUSAL_LM", **ATTENTION),
        LNTuningConfig(target_modules=["ln_f"], task_type="CAUSAL_LM"),
        TrainableTokensConfig(token_indices=[1, 2], target_modules=["wte"]),
        PromptTuningConfig(num_virtual_tokens=2, task_type="CAUSAL_LM"),
        PromptEncoderConfig(num_virtual_tokens=2, encoder_hidden_size=8, task_type="CAUSAL_LM"),
        PrefixTuningConfig(num_virtual_tokens=2, task_type="CAUSAL_LM"),
    ],
    ids=lambda config: f"{config.peft_type.value}",
)
def test_what_the_adapters_config_declares_travels(config: Any) -> None:
    parameters = ModelParameters(adapted(config))
    assert parameters.specs
    values = {name: bytes(parameters.read(name)) for name in parameters.names}
    parameters.load(parameters.specs, {name: memoryview(raw) for name, raw in values.items()})


@pytest.mark.parametrize(
    "config",
    [
        PromptTuningConfig(num_virtual_tokens=2, task_type="CAUSAL_LM"),
        PromptEncoderConfig(num_virtual_tokens=2, encoder_hidden_size=8, task_type="CAUSAL_LM"),
        PromptEncoderConfig(
            num_virtual_tokens=2,
            encoder_hidden_size=8,
            encoder_reparameterization_type="LSTM",
            task_type="CAUSAL_LM",
        ),
        PrefixTuningConfig(num_virtual_tokens=2, task_type="CAUSAL_LM"),
        PrefixTuningConfig(
            num_virtual_tokens=2,
            prefix_projection=True,
            encoder_hidden_size=8,
            task_type="CAUSAL_LM",
        ),
    ],
    ids=["prompt", "p-tuning-mlp", "p-tuning-lstm", "prefix", "prefix-projected"],
)
def test_a_prompt_that_was_loaded_is_what_the_model_computes_and_trains(config: Any) -> None:
    model = adapted(config)
    for seed in (1, 2):
        parameters = ModelParameters(model)
        (spec,) = parameters.specs
        random = torch.Generator().manual_seed(seed)
        given = torch.randn(list(spec[2]), generator=random)
        parameters.load(parameters.specs, {spec[0]: memoryview(given.numpy().tobytes())})
        found = torch.frombuffer(bytearray(parameters.read(spec[0])), dtype=torch.float32)
        torch.testing.assert_close(found.reshape(given.shape), given)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    tokens = torch.tensor([[1, 2, 3]])
    model(input_ids=tokens, labels=tokens).loss.backward()
    optimizer.step()
    trained = torch.frombuffer(bytearray(ModelParameters(model).read(spec[0])), dtype=torch.float32)
    assert not torch.equal(trained, found), "and it goes on from there"


@pytest.mark.parametrize(
    "config",
    [
        PromptEncoderConfig(num_virtual_tokens=2, encoder_hidden_size=8, task_type="SEQ_CLS"),
        PrefixTuningConfig(num_virtual_tokens=2, prefix_projection=True, task_type="SEQ_CLS"),
    ],
    ids=["p-tuning", "prefix-projected"],
)
def test_a_classifiers_head_beside_a_computed_prompt_is_loaded_too(config: Any) -> None:
    torch.manual_seed(0)
    size = {"hidden_size": 8, "intermediate_size": 8, "num_attention_heads": 2}
    base = BertForSequenceClassification(BertConfig(vocab_size=8, num_hidden_layers=1, **size))
    parameters = ModelParameters(get_peft_model(base, config))
    given = {
        name: torch.randn(shape, generator=torch.Generator().manual_seed(number))
        for number, (name, _, shape) in enumerate(parameters.specs)
    }
    assert any("classifier" in name for name in given)
    views = {name: memoryview(value.numpy().tobytes()) for name, value in given.items()}
    parameters.load(parameters.specs, views)
    for name, value in given.items():
        found = torch.frombuffer(bytearray(parameters.read(name)), dtype=torch.float32)
        torch.testing.assert_close(found.reshape(value.shape), value)


@pytest.mark.parametrize("name", ["mlp", "c_fc", "h", "0", "transformer"])
def test_extras_are_refused_whatever_the_adapter_is_called(name: str) -> None:
    model = adapted(lora(), name)
    model.base_model.model.transformer.h[0].mlp.c_fc.requires_grad_(True)
    with pytest.raises(LayoutError, match=r"transformer\.h\.0\.mlp\.c_fc\.weight") as refused:
        ModelParameters(model)
    assert "modules_to_save=['c_fc']" in str(refused.value)


def test_an_adapter_that_another_ones_name_hides_from_peft_is_refused() -> None:
    model = adapted(lora())
    model.add_adapter("attn", lora())
    with pytest.raises(
        LayoutError, match=r"'attn' is the name of another adapter and of a module"
    ) as refused:
        ModelParameters(model)
    assert "modules_to_save" not in str(refused.value)


def test_a_mixture_of_adapters_is_refused_without_useless_advice(tmp_path: Path) -> None:
    adapter = LoraConfig(r=2, task_type="CAUSAL_LM", target_modules=["q_proj"])
    get_peft_model(llama(), adapter).save_pretrained(tmp_path)
    base = llama()
    base.config.use_cache = False
    mixed = XLoraConfig(
        task_type="CAUSAL_LM", hidden_size=64, xlora_depth=2, adapters={"first": str(tmp_path)}
    )
    with pytest.raises(LayoutError, match=r"does not save them for XLORA.*one adapter") as refused:
        ModelParameters(get_peft_model(base, mixed))
    assert "modules_to_save" not in str(refused.value)


def test_a_second_adapter_that_is_trained_too_is_refused_with_what_helps() -> None:
    model = adapted(lora())
    model.add_adapter("second", lora())
    model.base_model.set_adapter(["default", "second"])
    with pytest.raises(
        LayoutError, match=r"belong to 'second'.*set_adapter\('default'\)"
    ) as refused:
        ModelParameters(model)
    assert "modules_to_save" not in str(refused.value)
    model.set_adapter("default")
    assert ModelParameters(model).names == ModelParameters(adapted(lora())).names


def test_an_adapter_of_any_name_travels_under_the_same_names() -> None:
    named = ModelParameters(adapted(lora(modules_to_save=["ln_f"]), "clinic"))
    assert named.names == ModelParameters(adapted(lora(modules_to_save=["ln_f"]))).names
    assert "adapter_config.json" in named.files
    prompt = ModelParameters(
        adapted(PromptTuningConfig(num_virtual_tokens=2, task_type="CAUSAL_LM"), "clinic")
    )
    values = {name: memoryview(bytes(len(bytes(prompt.read(name))))) for name in prompt.names}
    prompt.load(prompt.specs, values)
    assert all(not any(bytes(prompt.read(name))) for name in prompt.names)
