"""A script with a LoRA adapter, in a run of each method: each trainer, and what comes out opens with PEFT."""

from __future__ import annotations

import contextlib
import itertools
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model, set_peft_model_state_dict
from safetensors.torch import load_file
from transformers import Trainer, TrainingArguments

import fedcore.client as plain
from fedcore.client import hf, lightning
from fedcore.client.factors import Held
from fedcore.client.parameters import ModelParameters
from fedcore.client.testing import LocalRun, local_run
from fedcore.errors import ClosedError, ConfigError

from ..support.trainers import make_trainer
from .tiny_models import ROWS, llama, loss, train

LORA: dict[str, Any] = {"r": 2, "target_modules": ["q_proj", "v_proj"], "task_type": "CAUSAL_LM"}
METHODS = ["factors", "freeze-a", "alternate", "share-a", "exact"]
DATA: Any = [{"input_ids": row, "labels": row} for row in ROWS]


def adapted(**options: Any) -> Any:
    base = llama()
    torch.manual_seed(1)
    return get_peft_model(base, LoraConfig(**{**LORA, **options}))


def settings(method: str) -> dict[str, Any]:
    rank = {"max_rank": 3} if method == "exact" else {}
    of = {"lora": method, **rank}
    return {"aggregation": of, "selection": {"metric": "loss", "mode": "min"}}


def changed(local: LocalRun) -> list[set[str]]:
    """Return which factors each round has changed."""
    files = sorted((local.folder / "models").glob("round-*"))
    models = [load_file(path) for path in files]
    return [
        {name.split(".")[-2] for name in one if not torch.equal(one[name], two[name])}
        for one, two in itertools.pairwise(models)
    ]


def trained_by(method: str) -> list[set[str]]:
    both = {"lora_A", "lora_B"}
    return {
        "factors": [both] * 2,
        "freeze-a": [{"lora_B"}] * 2,
        "alternate": [{"lora_B"}, {"lora_A"}],
        "share-a": [{"lora_A"}] * 2,
        "exact": [both] * 2,
    }[method]


def step(model: Any, optimizer: torch.optim.Optimizer) -> None:
    optimizer.zero_grad()
    model(input_ids=ROWS, labels=ROWS).loss.backward()
    optimizer.step()


@pytest.mark.parametrize("method", METHODS)
def test_a_plain_loop_with_one_optimizer_trains_what_its_round_combines(
    method: str, tmp_path: Path
) -> None:
    model = adapted()
    optimizer = torch.optim.AdamW(
        [p for p in model.parameters() if p.requires_grad], lr=3e-2, weight_decay=0.1
    )
    scores = []
    with local_run(tmp_path, settings=settings(method)) as local:
        plain.init(model)
        while plain.is_running():
            plain.load(plain.receive())
            scores.append(loss(model))
            if plain.is_train():
                model.train()
                for _ in range(3):
                    step(model, optimizer)
            plain.send(weight=4, metrics={"loss": scores[-1]})
        assert local.result().ok
    assert changed(local) == trained_by(method)
    assert scores == sorted(scores, reverse=True), "it learns in each round"
    versions = json.loads((local.folder / "summary.json").read_text())["versions"]
    recorded = [version["metrics_by_site"]["site"]["loss"] for version in versions]
    assert recorded == pytest.approx(scores)
    opened = PeftModel.from_pretrained(llama(), local.folder / "best")
    if method != "share-a":  # whose B is at the site
        assert loss(opened) == pytest.approx(min(recorded), abs=1e-5)
    step(model, optimizer)  # the script goes on by itself with both factors
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)


@pytest.mark.parametrize("method", METHODS)
def test_a_trainer_of_transformers_trains_what_its_round_combines(
    method: str, tmp_path: Path
) -> None:
    arguments = TrainingArguments(
        str(tmp_path / "out"), max_steps=2, report_to=[], use_cpu=True, disable_tqdm=True,
        learning_rate=3e-2, weight_decay=0.1, save_strategy="no", gradient_checkpointing=True,
    )  # fmt: skip
    trainer = Trainer(adapted(), arguments, train_dataset=DATA, eval_dataset=DATA)
    of = {"aggregation": settings(method)["aggregation"]}
    with local_run(tmp_path, settings=of) as local:
        hf.patch(trainer)
        while hf.is_running():
            trainer.evaluate()
            trainer.train()
        assert local.result().ok
    assert changed(local) == trained_by(method)


@pytest.mark.parametrize("method", METHODS)
def test_a_trainer_of_lightning_trains_what_its_round_combines(method: str, tmp_path: Path) -> None:
    package = pytest.importorskip("lightning.pytorch")

    class Module(package.LightningModule):  # type: ignore[name-defined,misc]
        def __init__(self) -> None:
            super().__init__()
            self.model = adapted()

        def training_step(self, batch: Any, _: int) -> torch.Tensor:
            found: torch.Tensor = self.model(input_ids=batch, labels=batch).loss
            return found

        def validation_step(self, batch: Any, _: int) -> None:
            self.log("loss", self.model(input_ids=batch, labels=batch).loss)

        def configure_optimizers(self) -> Any:
            return torch.optim.AdamW(self.parameters(), lr=3e-2)

    loader = torch.utils.data.DataLoader([*ROWS], batch_size=2)
    trainer, module = make_trainer(package, max_epochs=1), Module()
    with local_run(tmp_path, settings=settings(method)) as local:
        lightning.patch(trainer)
        while lightning.is_running():
            trainer.validate(module, loader, verbose=False)
            trainer.fit(module, loader)
        assert local.result().ok
    assert changed(local) == trained_by(method)


def test_an_adapter_that_is_not_linear_in_its_factors_is_refused_by_name() -> None:
    with pytest.raises(ConfigError, match="'freeze-a' refuses use_dora = True: the") as refused:
        ModelParameters(adapted(use_dora=True)).pairs("freeze-a")
    assert "--allow" not in str(refused.value), "a run has no such option"


def test_a_bound_of_factors_is_refused_where_products_are_combined(tmp_path: Path) -> None:
    with contextlib.ExitStack() as stack:
        stack.enter_context(local_run(tmp_path, settings=settings("exact"), clip=0.5))
        plain.init(adapted())
        assert plain.is_running()
        with pytest.raises(ConfigError, match="FEDCORE_CLIP bounds how far each factor"):
            plain.receive()


def test_what_a_mean_of_factors_does_not_get_right_is_said(
    caplog: pytest.LogCaptureFixture,
) -> None:
    parameters = ModelParameters(adapted(use_dora=True))
    assert len(parameters.pairs("factors")) == 4
    assert caplog.text.count("use_dora = True") == 1
    assert "the magnitudes of DoRA are not linear" in caplog.text


def test_each_adapted_module_has_its_two_factors() -> None:
    parameters = ModelParameters(adapted(modules_to_save=["lm_head"]))
    assert parameters.pairs(None) == ()
    pairs, names = parameters.pairs("alternate"), set(parameters.names)
    assert [b for _, b in pairs] == [a.replace("lora_A", "lora_B") for a, _ in pairs]
    assert names - {name for pair in pairs for name in pair} == {"base_model.model.lm_head.weight"}


def test_what_is_held_has_no_gradient_when_an_optimizer_steps() -> None:
    model, held = adapted(), Held()
    parameters = ModelParameters(model)
    parameters.hold(held, [a for a, _ in parameters.pairs("freeze-a")])
    model.set_adapter("default")  # sets requires_grad anew
    model(input_ids=ROWS, labels=ROWS).loss.backward()
    with_gradient = {n.split(".")[-3] for n, p in model.named_parameters() if p.grad is not None}
    assert with_gradient == {"lora_B"}
    held.remove()
    model(input_ids=ROWS, labels=ROWS).loss.backward()
    with_gradient = {n.split(".")[-3] for n, p in model.named_parameters() if p.grad is not None}
    assert with_gradient == {"lora_A", "lora_B"}


def test_a_script_that_receives_at_once_takes_part_with_its_factors(tmp_path: Path) -> None:
    with local_run(tmp_path, settings=settings("freeze-a")) as local:
        plain.init(adapted())
        plain.load(plain.receive())
        plain.send(weight=4)
        while plain.is_running():
            plain.load(plain.receive())
            plain.send(weight=4)
        assert local.result().ok


def test_a_model_that_took_part_in_an_exact_run_is_plain_in_the_next(tmp_path: Path) -> None:
    torch.manual_seed(6)
    whole = adapted(r=6, init_lora_weights=False)
    whole.save_pretrained(tmp_path / "initial")
    model, scores = adapted(), []
    exact = settings("exact")
    exact["aggregation"]["max_rank"] = 8
    exact["model"] = {"initial": str(tmp_path / "initial")}
    for number, setting in enumerate([exact, settings("freeze-a")]):
        model.load_state_dict(adapted().state_dict())
        with local_run(tmp_path / str(number), settings=setting) as local:
            plain.init(model)
            while plain.is_running():
                plain.load(plain.receive())
                scores.append(loss(model))
                plain.send(weight=4, metrics={"loss": scores[-1]})
            assert local.result().ok
    assert scores[0] == pytest.approx(loss(whole), abs=1e-5)
    assert scores[-1] == loss(llama()), "B is 0"


@pytest.mark.parametrize("method", ["exact", "share-a"])
def test_an_adapter_that_was_filled_by_other_means_is_refused(method: str, tmp_path: Path) -> None:
    """PEFT would take the factors as they are: without the site's scale, or with the B of the first model."""
    model, of = adapted(r=4, lora_alpha=2), settings(method)
    if method == "exact":
        of["aggregation"]["max_rank"] = 4
    with local_run(tmp_path, settings=of):
        plain.init(model)
        assert plain.is_running()
        set_peft_model_state_dict(model, plain.receive())
        with pytest.raises(ClosedError, match="fl.load"):
            plain.send(weight=4, metrics={"loss": loss(model)})
        plain.load(plain.receive())
        plain.send(weight=4, metrics={"loss": loss(model)})
        plain.shutdown()


def test_a_plain_loop_that_begins_with_a_new_model_keeps_its_own_b(tmp_path: Path) -> None:
    scores: list[list[float]] = [[], []]
    for number, found in enumerate(scores):
        model = adapted()
        with local_run(tmp_path / str(number), settings=settings("share-a")) as local:
            plain.init(model)
            while plain.is_running():
                if number:
                    model = adapted()
                    plain.init(model)
                plain.load(plain.receive())
                found.append(loss(model))
                if plain.is_train():
                    train(model)
                plain.send(weight=4, metrics={"loss": found[-1]})
            assert local.result().ok
    assert scores[0] == scores[1]
    assert len(set(scores[0])) == len(scores[0])
