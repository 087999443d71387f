"""Groups and scales are those that PEFT has."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from fedcore.adapters.groups import Group, find_groups, parse_config, scale_of
from fedcore.errors import ConfigError, LayoutError

from .tiny_adapters import adapted, save, tensors_of

A, B = "base_model.model.x.lora_A.weight", "base_model.model.x.lora_B.weight"
PATTERNS: dict[str, Any] = {
    # PEFT sorts the keys in the file: the first that matches must be the same before.
    "rank_pattern": {"layers.1.*v_proj": 16, r"layers\.0\.self_attn\.q_proj": 8, "v_proj": 2},
    "alpha_pattern": {"down_proj": -3, "^model.layers.1.self_attn.q_proj": 5},
}


@pytest.mark.parametrize(
    "options",
    [{}, {"use_rslora": True}, PATTERNS, {**PATTERNS, "use_rslora": True}, {"lora_alpha": -2}],
    ids=["plain", "rslora", "patterns", "rslora-patterns", "negative"],
)
def test_ranks_and_scales_are_those_that_peft_uses(options: Any, tmp_path: Path) -> None:
    model = adapted(1, **options)
    save(model, tmp_path)
    config = parse_config((tmp_path / "adapter_config.json").read_text(), "here")
    groups, others = find_groups(tensors_of(tmp_path))
    layers = {
        name.removeprefix("base_model.model."): module
        for name, module in model.named_modules()
        if hasattr(module, "lora_A")
    }
    assert [group.module for group in groups] == sorted(layers)
    assert others == []
    for group in groups:
        layer = layers[group.module]
        assert (group.rank, scale_of(config, group)) == (
            layer.r["default"],
            layer.scaling["default"],
        )
        assert group.shape == tuple(layer.base_layer.weight.shape)


@pytest.mark.parametrize(
    ("tensors", "text"),
    [
        ([(A, "F32", [2, 4])], "no 'base_model.model.x.lora_B.weight'"),
        ([(B, "F32", [4, 2])], "no 'base_model.model.x.lora_A.weight'"),
        ([(A, "F32", [2, 4]), (B, "F32", [4, 3])], r"A is \[2, 4\] and B is \[4, 3\]"),
        ([(A, "F32", [2, 4]), (B, "F32", [4, 2, 1, 1])], "do not fit"),
        ([(A, "F32", [0, 4]), (B, "F32", [4, 0])], "do not fit"),
        ([(A, "I8", [2, 4]), (B, "I8", [4, 2])], "is I8, and no float"),
    ],
)
def test_half_a_group_or_one_that_does_not_fit_is_refused(tensors: Any, text: str) -> None:
    with pytest.raises(LayoutError, match=text):
        find_groups(tensors)


@pytest.mark.parametrize(
    ("config", "text"),
    [
        ({"r": 8, "lora_alpha": 8}, "the rank 8, and its tensors have 4"),
        ({"r": 4}, "lora_alpha is None, expected a number"),
        ({"r": True, "lora_alpha": 8}, "r is True"),
        ({"r": 4, "lora_alpha": float("nan")}, "lora_alpha is nan"),
        ({"r": 10**400, "lora_alpha": 8}, "r is 1000"),
        ({"r": 4, "lora_alpha": 8, "alpha_pattern": {"x": -(10**400)}}, "is -1000"),
        ({"r": 4, "lora_alpha": 8, "alpha_pattern": {"(": 1}}, "no regular expression"),
        ({"r": 4, "lora_alpha": 8, "rank_pattern": [1]}, "rank_pattern is no table"),
    ],
)
def test_a_configuration_that_is_not_the_adapters_is_refused(config: Any, text: str) -> None:
    with pytest.raises(ConfigError, match=text):
        scale_of(config, Group("x", A, B, 4, 6, 6))


def test_rslora_is_whatever_peft_takes_for_true() -> None:
    config = {"r": 4, "lora_alpha": 8, "use_rslora": 1}
    assert scale_of(config, Group("x", A, B, 4, 6, 6)) == 4


@pytest.mark.parametrize("text", ["", "[]", "[" * 5000, '{"a": '])
def test_a_configuration_that_is_no_json_object_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="here: not the adapter_config.json"):
        parse_config(text, "here")
