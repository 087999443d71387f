"""What a site says of the base that never leaves it: equal for equal bases, and different where a tensor is."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from peft import LoraConfig, PromptTuningConfig, get_peft_model
from torch import nn

from fedcore.client.base import frozen_groups
from fedcore.client.parameters import ModelParameters
from fedcore.files.frozen import Comparison, FrozenGroup, compare_frozen

from .tiny_llama import llama


def lora(base: Any, **options: Any) -> Any:
    settings = {"r": 2, "target_modules": ["q_proj", "v_proj"], "task_type": "CAUSAL_LM", **options}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return get_peft_model(base, LoraConfig(**settings))


def frozen(model: nn.Module) -> list[FrozenGroup]:
    return ModelParameters(model).frozen()


def grown(seed: int) -> Any:
    base = llama()
    torch.manual_seed(seed)
    base.resize_token_embeddings(66, mean_resizing=False)
    return base


def test_one_base_is_the_same_in_every_dtype_and_whatever_the_adapter_holds() -> None:
    there = frozen(lora(llama().to(torch.bfloat16)))
    assert there
    torch.manual_seed(9)
    for dtype in (torch.bfloat16, torch.float32, torch.float64):
        here = lora(llama().to(torch.bfloat16).to(dtype), lora_dropout=0.1)
        assert frozen(here) == there
    half = compare_frozen(frozen(lora(llama().to(torch.bfloat16).to(torch.float16))), there)
    assert not half.differs


@pytest.mark.parametrize("name", ["default", "mlp", "q_proj", "0"])
def test_neither_wrappers_nor_the_adapters_name_are_in_the_names_of_the_base(name: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        config = LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM")
        model = get_peft_model(llama(), config, adapter_name=name)
    holder = nn.Module()
    holder.inner = model
    found = {name for name, form, _, _ in frozen(holder) if form != "config"}
    assert found == {
        name.replace("layers.0", "layers.*")
        for name, _ in llama().named_parameters()
        if "layers.1" not in name
    }


def test_a_prompt_is_no_part_of_the_base_and_the_base_has_its_own_names() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        config = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
        found = frozen(get_peft_model(llama(), config))
    assert found == frozen(lora(llama()))


@pytest.mark.parametrize(
    ("other", "named"),
    [
        (lambda: lora(grown(2)), ["lm_head.weight", "model.embed_tokens.weight"]),
        (
            lambda: lora(grown(1), init_lora_weights="olora"),
            [f"model.layers.*.self_attn.{name}_proj.weight" for name in "qv"],
        ),
    ],
    ids=["rows of other seeds", "a start that changes the base"],
)
def test_a_tensor_of_the_base_that_differs_is_named(
    other: Callable[[], Any], named: list[str]
) -> None:
    there = frozen(lora(grown(1)))
    assert compare_frozen(frozen(lora(grown(1))), there).differs == []
    found = compare_frozen(frozen(other()), there)
    assert found.differs == named
    assert found.skipped == []


def test_a_setting_of_the_base_that_changes_what_it_computes_is_named() -> None:
    other = llama()
    other.config.rms_norm_eps = 0.5
    other.config.use_cache = False
    found = compare_frozen(frozen(lora(other)), frozen(lora(llama())))
    assert found.differs == ["config rms_norm_eps"]


def test_an_unused_head_and_an_inactive_adapter_are_not_compared() -> None:
    def headed(seed: int) -> Any:
        base = llama()
        torch.manual_seed(seed)
        nn.init.normal_(base.lm_head.weight)
        model = lora(base, modules_to_save=["lm_head"])
        model.add_adapter("reference", LoraConfig(r=2, target_modules=["q_proj"]))
        return model

    assert frozen(headed(1)) == frozen(headed(2))


def test_a_quantised_copy_is_compared_in_what_the_quantiser_leaves_alone() -> None:
    bits = pytest.importorskip("bitsandbytes")

    def quantised(model: Any) -> Any:
        base = copy.deepcopy(model)
        for layer in base.model.layers:
            for part in (layer.self_attn, layer.mlp):
                for name, linear in list(part.named_children()):
                    if isinstance(linear, nn.Linear):
                        small = bits.nn.Linear4bit(
                            linear.in_features, linear.out_features, bias=False, quant_type="nf4"
                        )
                        small.load_state_dict(linear.state_dict())
                        setattr(part, name, small.to("cpu"))
        return lora(base)

    other = llama()
    with torch.no_grad():
        other.model.norm.weight.mul_(1.5)
        other.model.layers[0].self_attn.q_proj.weight.mul_(-1)
    assert frozen(quantised(llama())) == frozen(quantised(llama()))
    same = compare_frozen(frozen(quantised(llama())), frozen(lora(llama())))
    assert same.differs == []
    assert any("q_proj.weight (bitsandbytes" in name for name in same.skipped)
    assert not any("norm" in name or "embed" in name for name in same.skipped)
    mixed = compare_frozen(frozen(quantised(other)), frozen(lora(llama())))
    assert mixed.differs == ["model.norm.weight"]
    alike = compare_frozen(frozen(quantised(other)), frozen(quantised(llama())))
    assert alike.differs == ["model.layers.*.self_attn.q_proj.weight", "model.norm.weight"]


def test_what_is_trained_whole_has_no_base_and_what_is_partly_frozen_has() -> None:
    whole = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3), nn.Linear(3, 2))
    assert frozen(whole) == []
    whole[0].requires_grad_(False)
    assert [name for name, *_ in frozen(whole)] == ["0.bias", "0.weight"]


def test_a_large_tensor_is_sampled_and_the_last_rows_of_an_embedding_are_all_read() -> None:
    def model(row: int, value: float) -> nn.Module:
        torch.manual_seed(0)
        made = nn.ModuleDict({"table": nn.Embedding(300_000, 64), "head": nn.Linear(2, 2)})
        made.requires_grad_(False)
        made["head"].requires_grad_(True)
        with torch.no_grad():
            made["table"].weight[row, 1] = value
        return made

    whole = frozen(model(0, 1.0))
    assert compare_frozen(frozen(model(299_000, 1.0)), whole).differs == ["table.weight"]
    assert compare_frozen(frozen(model(0, 2.0)), whole).differs == ["table.weight"]
    assert compare_frozen(frozen(model(0, 1.0)), whole).differs == []


def test_there_are_never_more_groups_than_a_message_holds() -> None:
    made = nn.ModuleDict(
        {f"part{place}": nn.ModuleDict({"x": nn.Linear(1, 1)}) for place in range(400)}
    )
    made.requires_grad_(False)
    made["part7"].requires_grad_(True)
    found = frozen_groups(made, {}, made)
    assert 0 < len(found) <= 256
    assert sum(count for _, _, count, _ in found) == 798


def test_what_cannot_be_read_or_is_missing_is_told_from_what_differs() -> None:
    def group(name: str, form: str = "float", digest: str = "0" * 32) -> FrozenGroup:
        return (name, form, 1, digest)

    there = [group("a"), group("b"), group("config x", "config")]
    assert compare_frozen([group("a"), group("b", digest="")], there) == Comparison(
        2, [], ["b (its values can't be read)"]
    )
    assert compare_frozen([group("a")], there).differs == ["b (at one site only)"]
    packed = [group("a"), group("b.packed", "a quantiser of its own")]
    assert compare_frozen(packed, there).differs == []
    assert compare_frozen([group("a", "float16", "1" * 32), group("b")], there).skipped == [
        "a (float16 and float)"
    ]
