"""What an adapter has is refused, named or taken as the table of methods says."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from peft import IA3Config, get_peft_model

from fedcore.adapters.groups import parse_config
from fedcore.adapters.refusals import METHODS, TRAITS, Method, check_adapter
from fedcore.errors import ConfigError, LayoutError

from .tiny_adapters import MODULES, adapted, llama, save, tensors_of

A, B = "base_model.model.x.lora_A.weight", "base_model.model.x.lora_B.weight"
PLAIN = [(A, "F32", [2, 4]), (B, "F32", [4, 2])]
SAVED: dict[str, dict[str, Any]] = {
    "dora": {"use_dora": True},
    "changed-base": {"init_lora_weights": "pissa"},
    "embeddings": {"target_modules": [*MODULES, "embed_tokens"]},
    "target_parameters": {"target_parameters": ["mlp.up_proj.weight"]},
    "lora_bias": {"lora_bias": True},
    "modules_to_save": {"modules_to_save": ["lm_head"]},
    "trainable_token_indices": {"trainable_token_indices": [1, 2]},
    "layer_replication": {"layer_replication": [[0, 2], [1, 2]]},
    "rslora": {"use_rslora": True},
    "negative-alpha": {"lora_alpha": -4},
    "zero-alpha": {"lora_alpha": 0},
    "patterns": {"rank_pattern": {"q_proj": 2}},
}
WRITTEN: dict[str, dict[str, Any]] = {
    "variants": {"kasa_config": {"x": 1}},
    "tied": {"ensure_weight_tying": True},
    "bias": {"bias": "lora_only"},
    "fan_in_fan_out": {"fan_in_fan_out": True},
}
NAMED = {
    "convolutions": [(A, "F32", [2, 4, 3, 3]), (B, "F32", [4, 2, 1, 1])],
    "unknown": [("base_model.model.x.lora_diag", "F32", [2])],
}


def check(config: Any, tensors: Any, method: Method, **options: Any) -> list[str]:
    return check_adapter(config, tensors, method, where="north", **options)


def expect(name: str, config: Any, tensors: Any) -> None:
    trait = next(trait for trait in TRAITS if trait.name == name)
    for method in METHODS:
        if trait.by(method) == "refused":
            with pytest.raises(ConfigError) as caught:
                check(config, tensors, method)
            assert str(caught.value).startswith(f"north: the method {method!r} refuses ")
            assert f": {trait.why}. What works: {trait.instead}" in str(caught.value)
        else:
            notes = check(config, tensors, method)
            assert [trait.why in note for note in notes] == [True] * (
                trait.by(method) == "averaged"
            )


@pytest.mark.parametrize("name", SAVED)
def test_what_peft_saved_is_taken_or_refused_by_name(name: str, tmp_path: Path) -> None:
    save(adapted(1, **SAVED[name]), tmp_path)
    config = parse_config((tmp_path / "adapter_config.json").read_text(), "north")
    expect(name, config, tensors_of(tmp_path))


@pytest.mark.parametrize("name", WRITTEN)
def test_what_a_configuration_says_is_taken_or_refused_by_name(name: str) -> None:
    expect(name, {"peft_type": "LORA", "lora_alpha": 4, **WRITTEN[name]}, PLAIN)


@pytest.mark.parametrize("name", NAMED)
def test_tensors_outside_the_groups_are_taken_or_refused_by_name(name: str) -> None:
    groups = [(n.replace(".x.", ".y."), d, s) for n, d, s in PLAIN]
    expect(name, {"peft_type": "LORA"}, [*groups, *NAMED[name]])


def test_each_trait_has_a_test() -> None:
    assert {t.name for t in TRAITS} == {*SAVED, *WRITTEN, *NAMED, "other-methods"}


def test_another_method_of_peft_is_refused(tmp_path: Path) -> None:
    model = get_peft_model(llama(), IA3Config(task_type="CAUSAL_LM"))
    save(model, tmp_path)
    config = parse_config((tmp_path / "adapter_config.json").read_text(), "north")
    expect("other-methods", config, tensors_of(tmp_path))


def test_dora_is_averaged_where_the_user_allows_it() -> None:
    config = {"peft_type": "LORA", "use_dora": True}
    notes = check(config, PLAIN, "exact", allow=["dora"])
    assert "use_dora = True is averaged tensor by tensor, which is not exact" in notes[0]
    with pytest.raises(ConfigError, match=r"What works: .* \(--allow dora\)$"):
        check(config, PLAIN, "exact", allow=())
    with pytest.raises(ConfigError, match="average the factors$"):
        check(config, PLAIN, "exact")


def test_plain_lora_is_taken_without_a_note_by_each_method(tmp_path: Path) -> None:
    save(adapted(1), tmp_path)
    config = parse_config((tmp_path / "adapter_config.json").read_text(), "north")
    assert [check(config, tensors_of(tmp_path), method) for method in METHODS] == [[]] * 5


def test_a_file_without_factors_is_refused() -> None:
    with pytest.raises(LayoutError, match="north: it holds no factors of LoRA"):
        check({"peft_type": "LORA"}, [("x.weight", "F32", [2])], "factors")
    with pytest.raises(LayoutError, match=r"north: the adapter holds .* and no "):
        check({"peft_type": "LORA"}, PLAIN[:1], "factors")


@pytest.mark.parametrize("value", [[[]], {"a": [1]}, "x" * 5000, 1e308, -1, "\x1b[2J"])
@pytest.mark.parametrize("key", ["use_dora", "init_lora_weights", "alpha_pattern", "lora_alpha"])
def test_no_value_of_a_configuration_breaks_the_check(key: str, value: Any) -> None:
    notes = check({"peft_type": "LORA", key: value}, PLAIN, "factors")
    assert all(note.isprintable() and len(note) < 1000 for note in notes)
