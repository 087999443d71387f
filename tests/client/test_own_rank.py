"""A site's adapter of its own rank computes what the whole version does, and trains and sends its own part."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model, get_peft_model_state_dict
from transformers import Trainer, TrainingArguments

from fedcore.client.own_rank import OwnRank, drop_remainders
from fedcore.client.parameters import ModelParameters

from .tiny_models import ROWS, llama, train

RANK = 5
LORA: dict[str, Any] = {"target_modules": ["q_proj", "down_proj"], "task_type": "CAUSAL_LM"}
SITES: dict[str, dict[str, Any]] = {
    "a lower rank": {"r": 2, "lora_alpha": 16},
    "the same rank": {"r": 5, "lora_alpha": 3},
    "a higher rank": {"r": 8, "lora_alpha": 8},
    "rank-stabilised": {"r": 3, "lora_alpha": 7, "use_rslora": True},
    "a negative scale": {"r": 3, "lora_alpha": -4},
    "ranks by pattern": {"r": 3, "rank_pattern": {"down_proj": 1}, "alpha_pattern": {"q_proj": 9}},
    "a module that is saved whole": {"r": 2, "modules_to_save": ["lm_head"]},
}
Version = dict[str, torch.Tensor]


def adapted(base: Any = None, **options: Any) -> Any:
    base = llama() if base is None else base
    torch.manual_seed(1)
    return get_peft_model(base, LoraConfig(**{**LORA, **options}))


def own(model: Any) -> tuple[OwnRank, tuple[tuple[str, str], ...]]:
    parameters = ModelParameters(model)
    pairs = parameters.pairs("freeze-a")
    tensors = dict(zip(parameters.names, map(parameters.tensor, parameters.names), strict=True))
    return OwnRank(model, tensors, pairs), pairs


def version(pairs: tuple[tuple[str, str], ...], model: Any, zeros: int = 0) -> Version:
    """Return factors as a server keeps them; the last ``zeros`` singular values of each are 0."""
    torch.manual_seed(7)
    found: Version = {}
    shapes = {name: tensor.shape for name, tensor in get_peft_model_state_dict(model).items()}
    for a, b in pairs:
        rows, columns = shapes[b][0], shapes[a][1]
        u, s, v = torch.linalg.svd(torch.randn(rows, columns, dtype=torch.float64) / 8)
        s[RANK - zeros :] = 0
        v[RANK - zeros :] = 0
        found[a] = v[:RANK].float()
        found[b] = (u[:, :RANK] * s[:RANK]).float()
    return found


def logits(model: Any) -> torch.Tensor:
    model.eval()
    with torch.no_grad():
        found: torch.Tensor = model(input_ids=ROWS).logits
    return found


def opened(
    factors: dict[str, torch.Tensor], pairs: tuple[tuple[str, str], ...], base: Any = None
) -> Any:
    """Return a PEFT model that has these factors with scale 1, whatever their ranks."""
    ranks = {a.split(".")[-3]: len(factors[a]) for a, _ in pairs}
    model = adapted(base, r=1, lora_alpha=1, rank_pattern=ranks, alpha_pattern=ranks)
    state = {
        name.replace(".weight", ".default.weight"): factors[name] for pair in pairs for name in pair
    }
    assert not model.load_state_dict(state, strict=False).unexpected_keys
    return model


@pytest.mark.parametrize("site", SITES)
def test_a_site_of_any_rank_scores_the_whole_version(site: str) -> None:
    model = adapted(**SITES[site])
    part, pairs = own(model)
    of = version(pairs, model)
    part.load(of, 3)
    torch.testing.assert_close(logits(model), logits(opened(of, pairs)), atol=1e-5, rtol=1e-4)
    for a, b in pairs:
        rank = len(part.read(a))
        best = of[b][:, :rank] @ of[a][:rank]
        torch.testing.assert_close(part.read(b) @ part.read(a), best, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("site", ["a lower rank", "a higher rank"])
def test_training_moves_the_sites_own_part_alone(site: str) -> None:
    model = adapted(**SITES[site], lora_dropout=0.5)
    before, state = [n for n, _ in model.named_parameters()], get_peft_model_state_dict(model)
    part, pairs = own(model)
    of = version(pairs, model)
    part.load(of, 3)
    sent = {name: part.read(name).clone() for pair in pairs for name in pair}
    rest = {a: part.whole(a)[1][len(part.read(a)) :].clone() for a, _ in pairs}
    train(model)
    assert all(not torch.equal(part.read(name), sent[name]) for name in sent)
    factors = {}
    for a, b in pairs:
        factors[b], factors[a] = part.whole(a)
        assert torch.equal(factors[a][len(part.read(a)) :], rest[a])
    torch.testing.assert_close(logits(model), logits(opened(factors, pairs)), atol=1e-5, rtol=1e-4)
    assert [n for n, _ in model.named_parameters()] == before
    assert get_peft_model_state_dict(model).keys() == state.keys()


def test_dropout_does_not_touch_the_remainder() -> None:
    model = adapted(r=1, lora_dropout=0.9)
    part, pairs = own(model)
    of = version(pairs, model)
    part.load({**of, **{b: of[b] * torch.tensor([0.0, 1, 1, 1, 1]) for _, b in pairs}}, 3)
    model.train()
    with torch.no_grad():
        found = [model(input_ids=ROWS).logits for _ in range(2)]
    assert torch.equal(*found)


def quantised(bits: Any) -> Any:
    model = llama(hidden_size=64)  # a block of the quantiser
    for layer in model.model.layers:
        of = layer.self_attn.q_proj
        small = bits.nn.Linear4bit(of.in_features, of.out_features, bias=False, quant_type="nf4")
        small.load_state_dict(of.state_dict())
        layer.self_attn.q_proj = small.to("cpu")
    return model


def test_the_base_may_be_quantised() -> None:
    bits = pytest.importorskip("bitsandbytes")
    model = adapted(quantised(bits), r=2, target_modules=["q_proj"])
    part, pairs = own(model)
    of = version(pairs, model)
    part.load(of, 3)
    wanted = opened(of, pairs, quantised(bits))
    assert not torch.equal(logits(model), logits(quantised(bits)))
    torch.testing.assert_close(logits(model), logits(wanted), atol=1e-4, rtol=1e-3)


def test_without_its_adapter_the_model_is_the_base() -> None:
    model = adapted(r=2)
    part, pairs = own(model)
    part.load(version(pairs, model), 3)
    with model.disable_adapter():
        assert torch.equal(logits(model), logits(llama()))
    assert not torch.equal(logits(model), logits(llama()))
    part.remove()
    part.load({name: torch.zeros_like(t) for name, t in version(pairs, model).items()}, 3)
    assert torch.equal(logits(model), logits(llama()))


def test_rows_that_a_version_does_not_fill_are_drawn_from_the_seed() -> None:
    model = adapted(r=4)
    part, pairs = own(model)
    of, drawn = version(pairs, model, zeros=3), []
    for seed in (3, 3, 4):
        part.load(of, seed)
        drawn.append([part.read(a)[2:].clone() for a, _ in pairs])
        for a, b in pairs:
            assert torch.equal(part.read(a)[:2], of[a][:2])
            assert not part.read(b)[:, 2:].any()
            assert 0 < part.read(a)[2:].abs().max() <= of[a].shape[1] ** -0.5
    assert all(map(torch.equal, drawn[0], drawn[1]))
    assert not any(map(torch.equal, drawn[0], drawn[2]))
    train(model, steps=2)
    assert all(part.read(b)[:, 2:].any() for _, b in pairs), "they have a gradient"


def test_the_next_version_takes_the_place_of_the_one_before() -> None:
    model = adapted(r=2)
    part, pairs = own(model)
    of = version(pairs, model)
    part.load(of, 3)
    first = logits(model)
    part.load({name: -tensor if "lora_B" in name else tensor for name, tensor in of.items()}, 4)
    assert not torch.allclose(logits(model), first, atol=1e-4)
    part.load(of, 5)
    assert torch.equal(logits(model), first)
    assert torch.equal(logits(copy.deepcopy(model)), first)


def test_a_trainer_and_its_checkpoints_leave_the_remainder_where_it_is(tmp_path: Path) -> None:
    model = adapted(r=2)
    part, pairs = own(model)
    part.load(version(pairs, model), 3)
    arguments = TrainingArguments(
        str(tmp_path / "out"), max_steps=2, report_to=[], use_cpu=True, disable_tqdm=True,
        save_steps=1, gradient_checkpointing=True, learning_rate=1e-2,
    )  # fmt: skip
    rows: Any = [{"input_ids": row, "labels": row} for row in ROWS]
    trainer = Trainer(model, arguments, train_dataset=rows)
    trainer.train()
    held = {id(p) for group in trainer.optimizer.param_groups for p in group["params"]}
    assert held == {id(p) for p in model.parameters() if p.requires_grad}
    trainer.train(resume_from_checkpoint=str(tmp_path / "out/checkpoint-1"))
    factors = {
        name: tensor for a, b in pairs for name, tensor in zip((b, a), part.whole(a), strict=True)
    }
    torch.testing.assert_close(logits(model), logits(opened(factors, pairs)), atol=1e-5, rtol=1e-4)


def test_another_adapter_of_the_model_has_no_part_of_the_version() -> None:
    model, plain = adapted(r=2), adapted(r=2)
    part, pairs = own(model)
    part.load(version(pairs, model), 3)
    for one in (model, plain):
        torch.manual_seed(5)
        one.add_adapter("reference", LoraConfig(r=2, init_lora_weights=False, **LORA))
        one.set_adapter("reference")
    assert torch.equal(logits(model), logits(plain))


def test_a_copy_of_a_model_takes_part_with_its_own_remainder_alone() -> None:
    model = adapted(r=2)
    part, pairs = own(model)
    of = version(pairs, model)
    part.load(of, 3)
    copied = copy.deepcopy(model)
    again, _ = own(copied)
    again.load(of, 3)
    assert torch.equal(logits(copied), logits(model))
    drop_remainders(copied)
    again.load({name: torch.zeros_like(tensor) for name, tensor in of.items()}, 3)
    assert torch.equal(logits(copied), logits(llama()))
