"""What comes out of a run opens with its own library to the model that was scored, or says how it opens."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import (
    LoraConfig,
    PeftModel,
    get_peft_model,
    inject_adapter_in_model,
)
from safetensors.torch import load_file, load_model
from torch import nn
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    LlamaForCausalLM,
    MarianConfig,
    MarianMTModel,
)

import fedcore.client as fl
import fedcore.client.hf as fl_hf
from fedcore.client.choice import choose, forget_choice
from fedcore.config import parse_run
from fedcore.errors import ConfigError, LayoutError
from fedcore.files.opening import read_card
from fedcore.server.initial import load_initial
from fedcore.server.outcome import RunResult
from fedcore.server.service import Server

from .tiny_models import ROWS, llama, loss, train, write_result


@contextlib.contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


LORA: dict[str, Any] = {"r": 2, "target_modules": ["q_proj", "v_proj"]}


def whole_in_float32() -> Any:
    model = llama(dtype="bfloat16")
    return model.float()


def resized() -> Any:
    model = llama()
    model.resize_token_embeddings(70)
    return model


def untied_by_hand() -> Any:
    model = llama(tie_word_embeddings=True)
    model.lm_head.weight = nn.Parameter(model.lm_head.weight.detach().clone())
    return model


def in_bfloat16() -> Any:
    with default_dtype(torch.bfloat16):
        return llama()


WHOLE: dict[str, Callable[[], Any]] = {
    "plain": llama,
    "tied": lambda: llama(tie_word_embeddings=True),
    "untied by hand": untied_by_hand,
    "in float32 though loaded in bfloat16": whole_in_float32,
    "in bfloat16": in_bfloat16,
    "resized embeddings": resized,
    "compiled": lambda: torch.compile(llama()),
}


@pytest.mark.parametrize("kind", WHOLE)
def test_a_whole_transformers_model_opens_as_it_was_scored(kind: str, tmp_path: Path) -> None:
    model = WHOLE[kind]()
    inner = getattr(model, "_orig_mod", model)
    train(inner)
    files = write_result(model, tmp_path)
    assert read_card(files) is None
    opened = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert loss(opened) == loss(inner)
    again = WHOLE[kind]()
    fl.restore(again, tmp_path)
    assert loss(getattr(again, "_orig_mod", again)) == loss(inner)


def test_what_a_class_freezes_itself_travels_with_a_model_trained_whole(tmp_path: Path) -> None:
    def build() -> Any:
        torch.manual_seed(0)
        return MarianMTModel(
            MarianConfig(
                vocab_size=32, d_model=16, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2,
                decoder_attention_heads=2, encoder_ffn_dim=16, decoder_ffn_dim=16, max_position_embeddings=16,
                pad_token_id=0, decoder_start_token_id=0, eos_token_id=1, forced_eos_token_id=1,
            )
        )  # fmt: skip

    model, rows = build(), torch.arange(2, 12)[None]
    assert any(not p.requires_grad for p in model.parameters()), "sinusoidal positions"
    with torch.no_grad():
        model.model.shared.weight.add_(0.5)
    assert read_card(write_result(model, tmp_path / "whole")) is None
    model.eval()
    opened = MarianMTModel.from_pretrained(tmp_path / "whole").eval()
    with torch.no_grad():
        assert opened(input_ids=rows, labels=rows).loss == model(input_ids=rows, labels=rows).loss
    model.model.encoder.requires_grad_(False)
    card = read_card(write_result(model, tmp_path / "partly"))
    assert card is not None
    assert card.closed is not None


def test_an_adapter_on_a_resized_vocabulary_says_what_is_not_in_the_folder(tmp_path: Path) -> None:
    llama().save_pretrained(tmp_path / "base")
    for name, options in (
        ("without", {}),
        ("with", {"modules_to_save": ["embed_tokens", "lm_head"]}),
    ):
        base = LlamaForCausalLM.from_pretrained(tmp_path / "base")
        base.resize_token_embeddings(70)
        card = read_card(
            write_result(get_peft_model(base, LoraConfig(**LORA, **options)), tmp_path / name)
        )
        assert (card is None) == (name == "with")
    assert "from 64 to 70 tokens" in (tmp_path / "without" / "README.md").read_text(
        encoding="utf-8"
    )


def test_dtypes_that_from_pretrained_would_change_are_noted(tmp_path: Path) -> None:
    cast, mixed_ = llama().bfloat16(), llama()
    mixed_.model.layers[0].bfloat16()
    for name, model, said in (("cast", cast, "inv_freq"), ("mixed", mixed_, "several dtypes")):
        card = read_card(write_result(model, tmp_path / name))
        assert card is not None
        assert card.closed is None
        assert said in card.notes[0]
    opened = AutoModelForCausalLM.from_pretrained(tmp_path / "mixed")
    assert all(
        torch.equal(a, b.float())
        for a, b in zip(opened.parameters(), mixed_.parameters(), strict=True)
    ), "the widest dtype holds all values"


def frozen_body() -> Any:
    model = llama()
    model.model.requires_grad_(False)
    return model


def tied_by_hand() -> Any:
    model = llama()
    model.lm_head.weight = model.model.embed_tokens.weight
    return model


def other_head() -> Any:
    model = llama()
    model.lm_head = nn.Sequential(nn.Linear(32, 16), nn.Linear(16, 64))
    return model


def injected() -> Any:
    return inject_adapter_in_model(LoraConfig(**LORA), llama())


def mixed() -> Any:
    model = get_peft_model(llama(), LoraConfig(**LORA), mixed=True)
    model.add_adapter("second", LoraConfig(r=3, target_modules=["o_proj"]))
    model.set_adapter(["default", "second"])
    return model


CLOSED: dict[str, Callable[[], Any]] = {
    "frozen body": frozen_body,
    "tied by hand": tied_by_hand,
    "another head": other_head,
    "injected adapter": injected,
    "mixed adapters": mixed,
}


@pytest.mark.parametrize("kind", CLOSED)
def test_a_model_that_would_open_as_another_one_refuses_and_says_how(
    kind: str, tmp_path: Path
) -> None:
    torch.manual_seed(1)
    model = CLOSED[kind]()
    train(model)
    files = write_result(model, tmp_path)
    card = read_card(files)
    assert card is not None
    assert card.closed is not None
    for loader in (LlamaForCausalLM, AutoModelForCausalLM, AutoModel):
        with pytest.raises(OSError, match="no file named model.safetensors"):
            loader.from_pretrained(tmp_path)
    text = (tmp_path / "README.md").read_text(encoding="utf-8")
    assert "fl.restore(model, " in text
    assert card.closed[:40] in text
    torch.manual_seed(1)
    again = CLOSED[kind]()
    assert loss(again) != loss(model)
    fl.restore(again, tmp_path)
    assert loss(again) == loss(model)


def test_restored_into_the_base_a_partly_frozen_model_opens_from_then_on(tmp_path: Path) -> None:
    model = frozen_body()
    train(model)
    write_result(model, tmp_path / "best")
    base = llama()
    fl.restore(base, tmp_path / "best")
    base.save_pretrained(tmp_path / "whole")
    assert loss(AutoModelForCausalLM.from_pretrained(tmp_path / "whole")) == loss(model)


def test_a_choice_of_tensors_refuses_to_open_too(tmp_path: Path) -> None:
    whole, adapter = llama(), get_peft_model(llama(), LoraConfig(**LORA))
    for name, model in (("whole", whole), ("adapter", adapter)):
        try:
            choose(exclude="*layers.1*")
            files = write_result(model, tmp_path / name)
        finally:
            forget_choice()
        card = read_card(files)
        assert card is not None
        assert "did not travel" in str(card.closed)
    with pytest.raises(OSError, match="no file named"):
        LlamaForCausalLM.from_pretrained(tmp_path / "whole")
    with pytest.raises(ValueError, match="adapter"):
        PeftModel.from_pretrained(llama(), str(tmp_path / "adapter"))
    fl.restore(llama(), tmp_path / "whole")
    fl.restore(get_peft_model(llama(), LoraConfig(**LORA)), tmp_path / "adapter")


def test_an_adapter_of_transformers_own_opens_by_every_way(tmp_path: Path) -> None:
    model = llama()
    model.add_adapter(LoraConfig(**LORA), adapter_name="clinic")
    train(model)
    assert read_card(write_result(model, tmp_path)) is None
    opened = llama()
    opened.load_adapter(str(tmp_path))
    assert loss(opened) == loss(model)
    assert loss(PeftModel.from_pretrained(llama(), tmp_path)) == loss(model)
    again = get_peft_model(llama(), LoraConfig(**LORA))
    fl.restore(again, tmp_path)
    assert loss(again) == loss(model)


def test_what_is_trained_beside_an_adapter_of_transformers_own_is_refused() -> None:
    model = llama()
    model.add_adapter(LoraConfig(**LORA))
    model.lm_head.requires_grad_(True)
    with pytest.raises(LayoutError, match="lm_head"):
        fl_hf_parameters(model)


def fl_hf_parameters(model: Any) -> Any:
    from fedcore.client.parameters import ModelParameters

    return ModelParameters(model)


class SentenceTransformer(nn.Sequential):
    """Built as the class of that name is: a transformers model, a pooling and perhaps a layer of its own."""


class CrossEncoder(nn.Sequential):
    """Another class of sentence-transformers."""


@pytest.mark.parametrize("cls", [SentenceTransformer, CrossEncoder])
@pytest.mark.parametrize("dense", [False, True], ids=["pooling", "dense"])
def test_a_sentence_transformer_refuses_to_open_and_says_how(
    cls: type[nn.Module], dense: bool, tmp_path: Path
) -> None:
    def build() -> Any:
        body = nn.Module()
        body.auto_model = llama().model
        return cls(body, nn.Identity(), *([nn.Linear(32, 8)] if dense else []))

    model = build()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.5)
    write_result(model, tmp_path)
    with pytest.raises((OSError, ValueError), match=r"no file named|in its config\.json"):
        AutoModel.from_pretrained(tmp_path)
    assert cls.__name__ in (tmp_path / "README.md").read_text(encoding="utf-8")
    again = build()
    fl.restore(again, tmp_path)
    assert all(
        torch.equal(a, b) for a, b in zip(again.parameters(), model.parameters(), strict=True)
    )


def test_a_module_of_any_kind_opens_strictly_or_says_what_is_missing(tmp_path: Path) -> None:
    def build() -> Any:
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3), nn.Linear(3, 1))

    model, partly = build(), build()
    for trained in (model, partly):
        nn.init.ones_(trained[2].weight)
    write_result(model, tmp_path / "whole")
    opened = build()
    opened.load_state_dict(load_file(tmp_path / "whole" / "model.safetensors"))
    assert torch.equal(opened[2].weight, model[2].weight)
    load_model(opened, tmp_path / "whole" / "model.safetensors")
    partly[0].requires_grad_(False)
    write_result(partly, tmp_path / "partly")
    with pytest.raises(RuntimeError, match=r'Missing key\(s\).*"0.weight"'):
        opened.load_state_dict(load_file(tmp_path / "partly" / "model.safetensors"))
    again = build()
    fl.restore(again, tmp_path / "partly")
    assert torch.equal(again[2].weight, partly[2].weight)


def test_inside_a_lightning_module_a_model_opens_by_itself(tmp_path: Path) -> None:
    from lightning import LightningModule

    module = LightningModule()
    module.net = llama()
    train(module.net)
    write_result(module, tmp_path / "inner")
    assert loss(AutoModelForCausalLM.from_pretrained(tmp_path / "inner")) == loss(module.net)
    module.head = nn.Linear(2, 2)
    write_result(module, tmp_path / "both")
    again = LightningModule()
    again.net, again.head = llama(), nn.Linear(2, 2)
    fl.restore(again, tmp_path / "both")
    assert loss(again.net) == loss(module.net)


def test_restore_names_what_does_not_fit(tmp_path: Path) -> None:
    write_result(llama(), tmp_path)
    with pytest.raises(LayoutError, match=r"'lm_head.weight'.*BF16.*same dtype"):
        fl.restore(llama().bfloat16(), tmp_path)
    with pytest.raises(ConfigError, match=r"holds no model of a run.*trained\.safetensors"):
        fl.restore(llama(), tmp_path / "nowhere")


def test_a_run_goes_on_from_a_result_that_does_not_open_by_itself(tmp_path: Path) -> None:
    files = write_result(frozen_body(), tmp_path / "best")
    _, cards = load_initial(tmp_path / "best", tmp_path / "copy.safetensors", {})
    assert cards == files


def test_a_site_says_that_an_initial_model_of_the_server_does_not_open(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def build() -> Any:
        body = nn.Module()
        body.auto_model = llama().model
        return SentenceTransformer(body, nn.Identity())

    build()[0].auto_model.save_pretrained(tmp_path / "initial")
    config = parse_run(
        {
            "run": {"name": "t", "rounds": 1},
            "participants": {"sites": ["a"], "round_deadline": "300s", "idle_timeout": "60s"},
            "model": {"initial": "initial"},
            "server": {"listen": "tcp://127.0.0.1:0", "insecure": True},
        },
        folder=tmp_path,
    )
    server = Server(config)
    for name, value in (("SERVER", server.endpoint), ("SITE", "a"), ("INSECURE", "1")):
        monkeypatch.setenv(f"FEDCORE_{name}", value)
    with ThreadPoolExecutor(1) as pool:
        result = pool.submit(server.run)
        try:
            fl.init(build())
            while fl.is_running():
                fl.receive()
                fl.send(weight=1)
            assert result.result(200).ok
        finally:
            fl.shutdown()
            server.stop()
    assert (tmp_path / "runs/t/final/config.json").is_file()
    with pytest.raises(OSError, match="no file named model.safetensors"):
        AutoModel.from_pretrained(tmp_path / "runs/t/final")


def test_an_adapter_on_tied_weights_warns_of_merging(tmp_path: Path) -> None:
    config = LoraConfig(r=2, target_modules=["embed_tokens", "lm_head"])
    model = get_peft_model(llama(tie_word_embeddings=True), config)
    train(model)
    card = read_card(write_result(model, tmp_path))
    assert card is not None
    assert "merge_and_unload" in card.notes[0]
    assert "merge_and_unload" in (tmp_path / "README.md").read_text(encoding="utf-8")
    opened = PeftModel.from_pretrained(llama(tie_word_embeddings=True), tmp_path)
    assert loss(opened) == loss(model)
    assert read_card(write_result(get_peft_model(llama(), config), tmp_path / "apart")) is None


def test_a_run_of_a_partly_frozen_model_says_how_its_result_opens(
    run: Future[RunResult], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    from transformers import Trainer, TrainingArguments

    model = frozen_body()
    arguments = TrainingArguments(
        output_dir=str(tmp_path / "hf"), max_steps=2, learning_rate=1e-2, report_to=[], disable_tqdm=True,
        use_cpu=True, save_strategy="no",
    )  # fmt: skip
    rows: Any = [{"input_ids": row, "labels": row} for row in ROWS]
    trainer = Trainer(model, arguments, train_dataset=rows, eval_dataset=rows)
    fl_hf.patch(trainer)
    with caplog.at_level("INFO", "fedcore.server"):
        while fl_hf.is_running():
            trainer.evaluate()
            scored = loss(model)
            trainer.train()
        assert run.result(200).ok
    final = tmp_path / "runs/t/final"
    with pytest.raises(OSError, match="no file named model.safetensors"):
        LlamaForCausalLM.from_pretrained(final)
    opened = llama()
    fl.restore(opened, final)
    assert loss(opened) == scored
    said = [
        record.getMessage() for record in caplog.records if "before you use" in record.getMessage()
    ]
    assert len(said) == 2
    assert "did not travel" in said[0]
    assert "no tokenizer" in said[1]
