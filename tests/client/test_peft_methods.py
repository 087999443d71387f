"""Every method of the installed PEFT: sites of other seeds agree on one model, which opens to the same loss."""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from peft import PeftModel, PeftType, get_peft_model
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING

from fedcore.client.parameters import ModelParameters
from fedcore.errors import LayoutError
from fedcore.files.opening import read_card

from .tiny_models import ROWS, llama, loss, train, write_result

ROOT = Path(__file__).parents[2]
KIND: dict[str, Any] = {"task_type": "CAUSAL_LM"}
LINEAR: dict[str, Any] = {"target_modules": ["q_proj", "v_proj"], **KIND}
TASKS: dict[str, Any] = {"task_ids": torch.zeros(len(ROWS), dtype=torch.long)}
"""What the methods that tell tasks apart want in each call."""

FAST = ("LORA", "ADALORA", "SHIRA", "IA3", "VERA", "OFT", "PREFIX_TUNING", "TRAINABLE_TOKENS")
REFUSED = {"XLORA"}
OPTIONS: dict[str, dict[str, Any]] = {
    "ADALORA": {"init_r": 4, "target_r": 2, "total_step": 4, "tinit": 1, "tfinal": 1, "deltaT": 1, **LINEAR},
    "ADAPTION_PROMPT": {"adapter_len": 4, "adapter_layers": 2, **KIND},
    "BOFT": {"boft_block_size": 4, **LINEAR},
    "C3A": {"block_size": 8, **LINEAR},
    "CARTRIDGE": {"num_virtual_tokens": 4, **KIND},
    "CPT": {
        "cpt_token_ids": [1, 2, 3, 4], "cpt_mask": [1] * 4, "cpt_tokens_type_mask": [1, 2, 3, 4], **KIND,
    },
    "FOURIERFT": {"n_frequency": 20, **LINEAR},
    "IA3": {"target_modules": ["k_proj", "down_proj"], "feedforward_modules": ["down_proj"], **KIND},
    "LN_TUNING": {"target_modules": ["norm"], **KIND},
    "MULTITASK_PROMPT_TUNING": {"num_virtual_tokens": 4, "num_tasks": 2, **KIND},
    "MISS": {"r": 4, **LINEAR},
    "OFT": {"oft_block_size": 4, "r": 0, **LINEAR},
    "POLY": {"r": 4, "n_tasks": 2, "n_skills": 2, "n_splits": 2, **LINEAR},
    "PREFIX_TUNING": {"num_virtual_tokens": 4, **KIND},
    "PROMPT_TUNING": {"num_virtual_tokens": 4, **KIND},
    "P_TUNING": {"num_virtual_tokens": 4, "encoder_hidden_size": 8, **KIND},
    "ROAD": {"group_size": 8, **LINEAR},
    "SHADOW": KIND,
    "SHIRA": {"r": 4, **LINEAR},
    "TRAINABLE_TOKENS": {"token_indices": [5, 6], "target_modules": ["embed_tokens"], **KIND},
    "VBLORA": {"r": 4, "num_vectors": 20, "vector_length": 8, **LINEAR},
    "WAVEFT": {"n_frequency": 20, **LINEAR},
}  # fmt: skip
METHODS = {
    kind.value: lambda kind=kind: PEFT_TYPE_TO_CONFIG_MAPPING[kind](
        **OPTIONS.get(kind.value, LINEAR)
    )
    for kind in PEFT_TYPE_TO_CONFIG_MAPPING
    if kind.value not in REFUSED
}
LORA: dict[str, dict[str, Any]] = {
    "dora": {"use_dora": True},
    "rank-stabilised": {"use_rslora": True},
    "pissa": {"init_lora_weights": "pissa"},
    "olora": {"init_lora_weights": "olora"},
    "bias": {"bias": "all"},
    "whole head": {"modules_to_save": ["lm_head"]},
    "new tokens": {"trainable_token_indices": [60, 61]},
    "embeddings": {"target_modules": ["q_proj", "embed_tokens"]},
    "ranks by pattern": {"rank_pattern": {"q_proj": 3}},
}


VARIANTS: dict[str, Callable[[], Any]] = {
    "hra, orthogonal vectors": lambda: peft.HRAConfig(r=3, apply_GS=True, **LINEAR),
    "vera without projections": lambda: peft.VeraConfig(r=4, save_projection=False, **LINEAR),
    "randlora without projections": lambda: peft.RandLoraConfig(
        r=4, save_projection=False, **LINEAR
    ),
    "lora with its own bias": lambda: peft.LoraConfig(r=2, lora_bias=True, **LINEAR),
}
"""Options of other methods that change what is computed or saved."""


@pytest.fixture(autouse=True)
def _offline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


def adapted(make: Callable[[], Any], seed: int) -> Any:
    base = llama()
    torch.manual_seed(seed)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return get_peft_model(base, make())


def values(model: Any) -> dict[str, memoryview]:
    parameters = ModelParameters(model)
    return {name: memoryview(bytes(parameters.read(name))) for name in parameters.names}


def check(make: Callable[[], Any], folder: Path, **options: Any) -> None:
    """Let one site begin, another train from its model, the first load what came of it, and open it."""
    first, second = adapted(make, 1), adapted(make, 2)
    specs = ModelParameters(first).specs
    assert ModelParameters(second).specs == specs
    ModelParameters(second).load(specs, values(first))
    assert loss(second, **options) == loss(first, **options)
    train(second, **options)
    if hasattr(second.base_model, "update_and_allocate"):
        for step in range(1, 5):
            second.base_model.update_and_allocate(step)
    assert ModelParameters(second).specs == specs
    ModelParameters(first).load(specs, values(second))
    assert loss(first, **options) == pytest.approx(loss(second, **options), abs=1e-6)
    write_result(first, folder)
    torch.manual_seed(3)
    opened = PeftModel.from_pretrained(llama(), folder)
    assert loss(opened, **options) == pytest.approx(loss(first, **options), abs=1e-6)
    assert loss(opened, **options) != pytest.approx(loss(llama()), abs=1e-6)


@pytest.mark.parametrize("method", FAST)
def test_an_adapter_of_each_family_opens_as_it_was_scored(method: str, tmp_path: Path) -> None:
    check(METHODS[method], tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("method", sorted(METHODS.keys() - set(FAST)))
def test_an_adapter_of_every_method_opens_as_it_was_scored(method: str, tmp_path: Path) -> None:
    if method == "ADAMSS":
        pytest.importorskip("sklearn", reason="scikit-learn comes with the extra `slow`")
    check(
        METHODS[method],
        tmp_path,
        **(TASKS if method in ("POLY", "MULTITASK_PROMPT_TUNING") else {}),
    )


@pytest.mark.parametrize("option", ["dora", "whole head", "new tokens"])
def test_lora_with_the_options_that_add_tensors_opens_as_it_was_scored(
    option: str, tmp_path: Path
) -> None:
    check(lambda: peft.LoraConfig(**{"r": 2, **LINEAR, **LORA[option]}), tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("option", sorted(LORA))
def test_lora_with_each_option_opens_as_it_was_scored(option: str, tmp_path: Path) -> None:
    check(lambda: peft.LoraConfig(**{"r": 2, **LINEAR, **LORA[option]}), tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("variant", sorted(VARIANTS.keys() - {"hra, orthogonal vectors"}))
def test_options_that_change_what_is_saved_open_as_they_were_scored(
    variant: str, tmp_path: Path
) -> None:
    check(VARIANTS[variant], tmp_path)


def test_vectors_made_orthogonal_in_each_pass_open_as_they_were_scored(tmp_path: Path) -> None:
    check(VARIANTS["hra, orthogonal vectors"], tmp_path)


def test_saving_only_the_largest_weights_of_vblora_is_refused_by_name() -> None:
    options = {**OPTIONS["VBLORA"], "save_only_topk_weights": True}
    with pytest.raises(LayoutError, match=r"VBLORA .* set save_only_topk_weights=False"):
        ModelParameters(adapted(lambda: peft.VBLoRAConfig(**options), 1))


def test_the_table_of_methods_in_the_documentation_is_complete() -> None:
    text = (ROOT / "docs" / "clients.md").read_text(encoding="utf-8")
    rows = dict(re.findall(r"^\| `([A-Z0-9_]+)` \| (\w+)", text, re.MULTILINE))
    assert set(rows) >= METHODS.keys() | REFUSED, "a method of this PEFT is not in the table"
    assert {name for name, state in rows.items() if state == "refused"} == REFUSED
    assert set(OPTIONS) <= {kind.value for kind in PeftType}


def test_an_adapter_whose_base_cannot_be_made_again_does_not_open(tmp_path: Path) -> None:
    model = adapted(lambda: peft.LoraConfig(r=2, init_lora_weights="pissa_niter_2", **LINEAR), 1)
    train(model)
    card = read_card(write_result(model, tmp_path))
    assert card is not None
    assert "init_lora_weights='pissa_niter_2' has changed the base" in str(card.closed)
    with pytest.raises(ValueError):  # noqa: PT011, PEFT's words are its own
        PeftModel.from_pretrained(llama(), tmp_path)


def test_ranks_that_adalora_prunes_travel_whole(tmp_path: Path) -> None:
    model = adapted(METHODS["ADALORA"], 1)
    specs = ModelParameters(model).specs
    train(model)
    for step in range(1, 5):
        model.base_model.update_and_allocate(step)
    assert model.peft_config["default"].rank_pattern, "it has pruned"
    pattern = model.peft_config["default"].rank_pattern
    assert ModelParameters(model).specs == specs
    assert '"rank_pattern": null' in write_result(model, tmp_path)["adapter_config.json"]
    assert model.peft_config["default"].rank_pattern is pattern
