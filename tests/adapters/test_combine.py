"""Adapters that PEFT saved are combined into one that PEFT opens, and which is what the method promises."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import set_peft_model_state_dict
from safetensors.torch import load_file
from transformers import GPT2Config, GPT2LMHeadModel

from fedcore.adapters.combine import combine_adapters
from fedcore.adapters.report import Figure, Report
from fedcore.errors import ConfigError, LayoutError, NonFiniteError, StorageError, WeightError
from fedcore.files.average import aggregate_files

from .tiny_adapters import MODULES, adapted, llama, logits, opened, save, scaled_products

MIXED: list[dict[str, Any]] = [
    {"r": 4},
    {"r": 8, "lora_alpha": -3},
    {"r": 16, "use_rslora": True, "alpha_pattern": {"v_proj": 5}},
    {"r": 64, "rank_pattern": {"down_proj": 2}},
]
WEIGHTS = [3, 5, 1, 1 << 20]


def sites(tmp_path: Path, options: Sequence[dict[str, Any]], **shared: Any) -> list[Any]:
    """Save one adapter for each dict of options, as tmp_path/0, tmp_path/1, ...; return the models."""
    models = [adapted(seed, **shared, **some) for seed, some in enumerate(options)]
    for number, model in enumerate(models):
        save(model, tmp_path / str(number))
    return models


def folders(tmp_path: Path, models: Sequence[Any]) -> list[Path]:
    return [tmp_path / str(number) for number in range(len(models))]


def mean(values: Sequence[Any], weights: Sequence[int]) -> Any:
    return sum(w * v for w, v in zip(weights, values, strict=True)) / sum(weights)


def mean_products(models: Sequence[Any], weights: Sequence[int]) -> dict[str, torch.Tensor]:
    products = [scaled_products(model) for model in models]
    return {name: mean([p[name] for p in products], weights) for name in products[0]}


def merged(deltas: dict[str, torch.Tensor]) -> Any:
    """Return the base model with dense changes added to its weights."""
    base = llama().eval()
    with torch.no_grad():
        for name, delta in deltas.items():
            weight = base.get_submodule(name).weight
            weight.copy_(weight.double() + delta)
    return base


def best_part(matrix: torch.Tensor, rank: int) -> torch.Tensor:
    u, s, v = torch.linalg.svd(matrix)
    return u[:, :rank] * s[:rank] @ v[:rank]


def check_products(folder: Path, expected: dict[str, torch.Tensor]) -> None:
    found = scaled_products(opened(folder))
    assert found.keys() == expected.keys()
    for name, product in found.items():
        error = (product - expected[name]).norm() / expected[name].norm()
        assert error < 3e-7, (name, error)


def test_exact_is_the_mean_of_models_for_ranks_and_scales_of_all_kinds(tmp_path: Path) -> None:
    models = sites(tmp_path, MIXED)
    out = tmp_path / "out"
    report = combine_adapters(folders(tmp_path, models), WEIGHTS, out, method="exact")
    expected = mean_products(models, WEIGHTS)
    check_products(out, expected)
    torch.testing.assert_close(logits(opened(out)), logits(merged(expected)), atol=2e-5, rtol=2e-5)
    config = json.loads((out / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"], config["use_rslora"]) == (64, 64, False)
    assert (report.mixed, {figure.cut for figure in report.figures}) == (True, {0.0})


def test_exact_has_a_rank_of_its_own_where_modules_need_others(tmp_path: Path) -> None:
    models = sites(tmp_path, [{}, {"rank_pattern": {"q_proj": 1}}], lora_alpha=3)
    out = tmp_path / "out"
    combine_adapters(folders(tmp_path, models), [1, 1], out, method="exact")
    check_products(out, mean_products(models, [1, 1]))
    config = json.loads((out / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"]) == (8, 8)
    assert set(config["rank_pattern"].values()) == {5}
    assert config["alpha_pattern"] == config["rank_pattern"]


def test_exact_of_a_given_rank_is_the_best_part_and_names_what_it_cut(tmp_path: Path) -> None:
    models = sites(tmp_path, MIXED[:3])
    out, weights = tmp_path / "out", WEIGHTS[:3]
    report = combine_adapters(folders(tmp_path, models), weights, out, method="exact", max_rank=6)
    whole = mean_products(models, weights)
    parts = {name: best_part(product, 6) for name, product in whole.items()}
    check_products(out, parts)
    for figure in report.figures:
        cut = (whole[figure.module] - parts[figure.module]).norm()
        assert (figure.rank, figure.width) == (6, 6)
        np.testing.assert_allclose(figure.cut, cut, rtol=1e-9)


@pytest.mark.parametrize("base_rank", [3, 12])
def test_what_a_smaller_site_could_not_hold_of_the_base_stays(
    base_rank: int, tmp_path: Path
) -> None:
    models = sites(tmp_path, [{"r": 4}, {"r": 8}])
    base = adapted(9, r=base_rank)
    save(base, tmp_path / "base")
    out = tmp_path / "out"
    report = combine_adapters(
        folders(tmp_path, models), [3, 1], out, method="exact", base=tmp_path / "base"
    )
    start, products = scaled_products(base), [scaled_products(model) for model in models]
    expected = {
        name: whole
        + 0.75 * (products[0][name] - best_part(whole, 4))
        + 0.25 * (products[1][name] - best_part(whole, 8))
        for name, whole in start.items()
    }
    check_products(out, expected)
    for figure in report.figures:
        change = (expected[figure.module] - start[figure.module]).norm()
        np.testing.assert_allclose(figure.change, change, rtol=1e-9)


def test_the_mean_of_factors_is_bit_for_bit_that_of_the_tensors(tmp_path: Path) -> None:
    models = sites(tmp_path, [{}, {}, {}], modules_to_save=["lm_head"])
    paths, out = folders(tmp_path, models), tmp_path / "out"
    report = combine_adapters(paths, [3, 5, 3], out, method="factors")
    aggregate_files(paths, [3, 5, 3], tmp_path / "mean.safetensors")
    tensors = load_file(out / "adapter_model.safetensors")
    plain = load_file(tmp_path / "mean.safetensors")
    assert tensors.keys() == plain.keys()
    assert all(torch.equal(tensors[name], plain[name]) for name in tensors)
    wrong = scaled_products(opened(out))
    right = mean_products(models, [3, 5, 3])
    for figure in report.figures:
        name = figure.module
        np.testing.assert_allclose(figure.norm, right[name].norm(), rtol=1e-9)
        np.testing.assert_allclose(figure.error, (right[name] - wrong[name]).norm(), rtol=1e-5)
    total = report.values()["total"]
    everything = torch.stack([(right[n] - wrong[n]).norm() for n in right]).norm()
    np.testing.assert_allclose(total["error"], everything, rtol=1e-5)
    assert total["of_norm"] > 0.1


def test_factors_of_mixed_ranks_are_filled_up_with_zeros_and_the_report_says_so(
    tmp_path: Path,
) -> None:
    models = sites(tmp_path, MIXED[:3])
    out, weights = tmp_path / "out", WEIGHTS[:3]
    report = combine_adapters(folders(tmp_path, models), weights, out, method="factors")
    wrong, right = scaled_products(opened(out)), mean_products(models, weights)
    assert report.mixed
    assert "filled up with zeros" in next(report.lines())
    for figure in report.figures:
        error = (right[figure.module] - wrong[figure.module]).norm()
        np.testing.assert_allclose(figure.error, error, rtol=1e-5)
    name = "model.layers.0.self_attn.q_proj"
    layers = [model.base_model.model.get_submodule(name) for model in models]
    a = torch.zeros(16, 64)
    for layer, weight in zip(layers, weights, strict=True):
        a[: layer.r["default"]] += weight * layer.lora_A["default"].weight.detach()
    found = load_file(out / "adapter_model.safetensors")
    torch.testing.assert_close(found[f"base_model.model.{name}.lora_A.weight"], a / sum(weights))


def share_half(models: Sequence[Any], half: str) -> None:
    state = {n: p for n, p in models[0].named_parameters() if f"lora_{half}" in n}
    with torch.no_grad():
        for model in models[1:]:
            for name, parameter in model.named_parameters():
                if name in state:
                    parameter.copy_(state[name])


@pytest.mark.parametrize(
    ("method", "half"), [("freeze-a", "A"), ("alternate", "A"), ("alternate", "B")]
)
@pytest.mark.parametrize("alpha", [8, -3], ids=["one-scale", "two-scales"])
def test_where_one_factor_is_the_same_the_mean_of_the_other_is_exact(
    method: Any, half: str, alpha: int, tmp_path: Path
) -> None:
    models = [adapted(0), adapted(1, lora_alpha=alpha)]
    share_half(models, half)
    for number, model in enumerate(models):
        save(model, tmp_path / str(number))
    out = tmp_path / "out"
    report = combine_adapters(folders(tmp_path, models), [3, 5], out, method=method)
    check_products(out, mean_products(models, [3, 5]))
    assert all(figure.error < 1e-12 for figure in report.figures)
    assert f"{half} is the same at all sites" in report.notes[0]
    same = [load_file(f / "adapter_model.safetensors") for f in (out, tmp_path / "0")]
    assert all(torch.equal(same[0][n], same[1][n]) for n in same[0] if f"lora_{half}" in n)


def test_share_a_goes_below_the_b_of_each_site_and_opens_without_effect(tmp_path: Path) -> None:
    models = sites(tmp_path, [{}, {"lora_alpha": 2}])
    out = tmp_path / "out"
    report = combine_adapters(folders(tmp_path, models), None, out, method="share-a")
    tensors = load_file(out / "adapter_model.safetensors")
    assert all(".lora_A." in name for name in tensors)
    before = {n: p.clone() for n, p in models[1].named_parameters() if "lora" in n}
    others = dict(models[0].named_parameters())
    set_peft_model_state_dict(models[1], tensors)
    for name, parameter in models[1].named_parameters():
        if "lora_A" in name:
            torch.testing.assert_close(parameter, (before[name] + others[name]) / 2)
        elif "lora_B" in name:
            assert torch.equal(parameter, before[name])
    torch.testing.assert_close(logits(opened(out)), logits(llama().eval()), atol=1e-6, rtol=1e-6)
    assert "B stays at its site" in report.notes[0]


@pytest.mark.parametrize(
    "options",
    [
        {"modules_to_save": ["lm_head"]},
        {"lora_bias": True},
        {"layer_replication": [[0, 2], [1, 2]]},
        {"trainable_token_indices": [1, 2]},
    ],
    ids=lambda options: next(iter(options)),
)
def test_what_is_beside_the_factors_comes_out_as_the_mean_of_models(
    options: dict[str, Any], tmp_path: Path
) -> None:
    models = sites(tmp_path, [{}, {"lora_alpha": 2, "r": 2}], **options)
    out = tmp_path / "out"
    combine_adapters(folders(tmp_path, models), [3, 1], out, method="exact")
    check_products(out, mean_products(models, [3, 1]))
    found = load_file(out / "adapter_model.safetensors")
    saved = [load_file(f / "adapter_model.safetensors") for f in folders(tmp_path, models)]
    others = [name for name in found if not name.endswith(("lora_A.weight", "lora_B.weight"))]
    assert bool(others) == ("layer_replication" not in options)
    for name in others:
        scales = [2.0, 1.0] if name.endswith("lora_B.bias") else [1.0, 1.0]
        values = [s * v[name] for s, v in zip(scales, saved, strict=True)]
        torch.testing.assert_close(found[name], mean(values, [3, 1]))


def test_layers_that_keep_their_weight_transposed_come_out_as_the_mean_of_models(
    tmp_path: Path,
) -> None:
    def base() -> Any:
        torch.manual_seed(0)
        return GPT2LMHeadModel(
            GPT2Config(vocab_size=32, n_positions=16, n_embd=16, n_layer=1, n_head=2)
        ).eval()

    options = {"target_modules": ["c_attn"], "fan_in_fan_out": True}
    models = [adapted(seed, base(), r=2 + seed, **options) for seed in range(2)]
    for number, model in enumerate(models):
        save(model, tmp_path / str(number))
    combine_adapters(folders(tmp_path, models), [3, 1], tmp_path / "out", method="exact")
    dense = base()
    with torch.no_grad():
        for name, delta in mean_products(models, [3, 1]).items():
            dense.get_submodule(name).weight += delta.T.float()
    found = opened(tmp_path / "out", base())
    torch.testing.assert_close(logits(found), logits(dense), atol=2e-5, rtol=2e-5)


def test_the_result_depends_neither_on_the_order_of_folders_nor_on_threads(tmp_path: Path) -> None:
    models = sites(tmp_path, [*MIXED[:3], MIXED[0]])
    paths, weights = folders(tmp_path, models), [3, 5, 1, 3]
    results = set()
    for number, order in enumerate([(0, 1, 2, 3), (3, 2, 1, 0), (2, 0, 3, 1)]):
        out = tmp_path / f"out{number}"
        combine_adapters(
            [paths[k] for k in order], [weights[k] for k in order], out,
            method="exact", max_rank=8, threads=number + 1,
        )  # fmt: skip
        results.add(b"".join(sorted(file.read_bytes() for file in out.iterdir())))
    assert len(results) == 1


def test_the_order_of_folders_does_not_count_where_the_configurations_alone_differ(
    tmp_path: Path,
) -> None:
    model, paths = adapted(1), [tmp_path / "a", tmp_path / "b"]
    for path, dropout in zip(paths, (0.1, 0.3), strict=True):
        save(model, path)
        file = path / "adapter_config.json"
        config = json.loads(file.read_text())
        file.write_text(json.dumps({**config, "lora_dropout": dropout}))
    for out, order in (("one", paths), ("two", paths[::-1])):
        combine_adapters(order, None, tmp_path / out, method="exact")
    one, two = (tmp_path / out / "adapter_config.json" for out in ("one", "two"))
    assert one.read_bytes() == two.read_bytes()


def test_factors_of_bfloat16_are_read_exactly(tmp_path: Path) -> None:
    models = [adapted(seed).to(torch.bfloat16) for seed in range(2)]
    for number, model in enumerate(models):
        save(model, tmp_path / str(number))
    out = tmp_path / "out"
    combine_adapters(folders(tmp_path, models), [1, 2], out, method="exact")
    check_products(out, mean_products(models, [1, 2]))


@pytest.mark.parametrize(
    ("changed", "error", "text"),
    [
        ({"target_modules": MODULES[:2]}, LayoutError, "adapts .*down_proj.*choose the same target_modules"),
        ({"use_dora": True}, ConfigError, "the method 'exact' refuses use_dora = True"),
        ({"modules_to_save": ["lm_head"]}, ConfigError, "modules_to_save is None at .* must be the same"),
    ],
    ids=["modules", "refused", "saved"],
)  # fmt: skip
def test_adapters_that_do_not_belong_together_are_refused(
    changed: dict[str, Any], error: type[Exception], text: str, tmp_path: Path
) -> None:
    models = sites(tmp_path, [{}, changed])
    with pytest.raises(error, match=text):
        combine_adapters(folders(tmp_path, models), None, tmp_path / "out", method="exact")
    assert not (tmp_path / "out").exists()


def test_factors_that_must_be_the_same_and_differ_are_refused(tmp_path: Path) -> None:
    paths = folders(tmp_path, sites(tmp_path, [{}, {"r": 2}]))
    for method, text in (
        (
            "freeze-a",
            "needs the same A at all sites, and that of module 'model.layers.0.mlp.down_proj'",
        ),
        ("alternate", "needs the same A or the same B at all sites, and both differ"),
        (
            "share-a",
            "needs one rank, and module 'model.layers.0.mlp.down_proj' has 2 at .* and 4 at",
        ),
    ):
        with pytest.raises(ConfigError, match=text):
            combine_adapters(paths, None, tmp_path / "out", method=method)  # type: ignore[arg-type]


def test_another_base_model_is_refused_unless_it_is_allowed(tmp_path: Path) -> None:
    paths = folders(tmp_path, sites(tmp_path, [{}, {}]))
    for path in paths:
        file = path / "adapter_config.json"
        config = json.loads(file.read_text())
        file.write_text(json.dumps({**config, "base_model_name_or_path": f"hub/{path.name}"}))
    with pytest.raises(ConfigError, match=r"different base models: 'hub/0' at .*--allow bases"):
        combine_adapters(paths, None, tmp_path / "out", method="exact")
    combine_adapters(paths, None, tmp_path / "out", method="exact", allow=["bases"])
    assert (tmp_path / "out/adapter_model.safetensors").is_file()


def test_a_value_that_is_no_number_is_named_and_nothing_is_written(tmp_path: Path) -> None:
    models = [adapted(0), adapted(1)]
    with torch.no_grad():
        layer = models[1].base_model.model.model.layers[0].self_attn.q_proj
        layer.lora_B["default"].weight[1, 2] = float("nan")
    for number, model in enumerate(models):
        save(model, tmp_path / str(number))
    for method in ("exact", "factors"):
        with pytest.raises(NonFiniteError, match=r"1: NaN .*q_proj.lora_B.weight', element 6"):
            combine_adapters(
                folders(tmp_path, models), None, tmp_path / "out", method=method  # type: ignore[arg-type]
            )  # fmt: skip
    assert sorted(path.name for path in tmp_path.iterdir()) == ["0", "1"]


def test_what_a_killed_process_left_of_a_result_goes_with_the_next(tmp_path: Path) -> None:
    save(adapted(0), tmp_path / "a")
    done = subprocess.Popen([sys.executable, "-c", ""])
    assert done.wait() == 0
    left = [tmp_path / f".{name}.{done.pid}.partial" for name in ("out", "another")]
    running = tmp_path / f".out.{os.getppid()}.partial"
    for path in (*left, running):
        path.mkdir()
    combine_adapters([tmp_path / "a"], None, tmp_path / "out", method="exact")
    assert [path.exists() for path in (*left, running)] == [False, True, True]


def test_a_figure_beyond_all_floats_is_no_number_for_programs() -> None:
    huge = Figure("m", math.inf, math.inf, 1.5e308, 0.0, 2, 2)
    found = Report("factors", 2, False, (huge, huge), ()).values()
    assert json.loads(json.dumps(found, allow_nan=False)) == found
    assert found["total"]["norm"] is found["total"]["change"] is found["total"]["of_norm"] is None
    assert (found["modules"][0]["change"], found["total"]["rank"]) == (1.5e308, 2)


def test_what_beginners_do_gets_an_answer_that_helps(tmp_path: Path) -> None:
    save(adapted(0), tmp_path / "good")
    llama().save_pretrained(tmp_path / "whole")
    for name in ("empty", "pickled", "full"):
        (tmp_path / name).mkdir()
    (tmp_path / "pickled/adapter_config.json").write_text("{}")
    (tmp_path / "pickled/adapter_model.bin").write_bytes(b"")
    (tmp_path / "full/notes.txt").write_text("mine")

    def attempt(
        names: Sequence[str], out: str = "out", weights: Any = None, **options: Any
    ) -> None:
        combine_adapters(
            [tmp_path / name for name in names], weights, tmp_path / out,
            **{"method": "exact", **options},
        )  # fmt: skip

    for names, error, text in (
        (["good", "gone"], StorageError, "gone: it does not exist"),
        (["good", "empty"], LayoutError, "empty holds no adapter_config.json: name the folder"),
        (["good", "whole"], ConfigError, "holds a whole model and no adapter"),
        (["good/adapter_model.safetensors"], ConfigError, "is a file: an adapter is a folder"),
        (["pickled"], ConfigError, r"safe_serialization=True. It has adapter_model.bin"),
        ([], ConfigError, "there is no adapter to combine"),
    ):
        with pytest.raises(error, match=text):
            attempt(names)
    for weights, text in (([3], "2 adapters and 1 weights"), ([3, 0], "weight 0 of")):
        with pytest.raises(WeightError, match=text):
            attempt(["good", "good"], weights=weights)
    with pytest.raises(StorageError, match="full exists: name a folder that does not"):
        attempt(["good"], "full")
    with pytest.raises(StorageError, match="there is no folder"):
        attempt(["good"], "no/such")
    with pytest.raises(ConfigError, match="'factors' keeps the sites' ranks"):
        attempt(["good"], method="factors", max_rank=4)
    with pytest.raises(ConfigError, match="the greatest rank is 0"):
        attempt(["good"], max_rank=0)
    with pytest.raises(ConfigError, match="the number of threads is 0"):
        attempt(["good"], threads=0)
    with pytest.raises(ConfigError, match="there is no method 'mean' for adapters"):
        attempt(["good"], method="mean")
    assert (tmp_path / "full/notes.txt").read_text() == "mine"
