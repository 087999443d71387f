"""The causal task: its rows, and its model on a tiny random Llama."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import torch
from torch.nn import functional

from fedcore.demo.catalogue import read_task
from fedcore.demo.causal import SOURCES, CausalTask, Exchange, build_sites
from fedcore.demo.causal_model import CausalLearner, tokenise
from fedcore.demo.conversion import convert
from fedcore.demo.learning import take
from fedcore.demo.tasks import batch_order, write_sites

from .tiny_gguf import LAYERS, write_llama

TASK = CausalTask(
    seed=5,
    train_rows=10,
    val_rows=3,
    test_rows=4,
    max_prompt_words=7,
    lora_layers=2,
    max_tokens=40,
    eval_batch_size=3,
    batch_size=4,
    learning_rate=1e-2,
)


def sources(folder: Path, rows: int = 40) -> Path:
    """Write files in the shape of the real ones; every question comes twice, in other letters."""
    shapes = {
        "finance": lambda n: {
            "question": f"How do I  save {n}?",
            "answer": f"Buy\n{n} bonds. " * 9,
        },
        "school": lambda n: {
            "passage": f"Ann has {n}.",
            "question": "How many?",
            "answer": f"{n} pens",
        },
        "clinic": lambda n: {"question": f"does {n} help?", "passage": "...", "answer": "maybe"},
    }
    for name, source in SOURCES.items():
        path = folder / source.file
        path.parent.mkdir(parents=True, exist_ok=True)
        lines = [shapes[name](n) for n in range(rows)]
        lines += [{k: v.upper() for k, v in line.items()} for line in lines]
        lines.append(shapes[name]("a number of words that is too long for it"))
        path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    return folder


def test_each_site_draws_from_its_own_source_and_no_question_comes_twice(tmp_path: Path) -> None:
    folder = sources(tmp_path)
    sites = build_sites(folder, TASK)
    assert sites == build_sites(folder, TASK)
    assert sites != build_sites(folder, dataclasses.replace(TASK, seed=6))
    assert tuple(sites) == TASK.sites
    seen: set[str] = set()
    for name, site in sites.items():
        assert [len(site.train), len(site.val), len(site.test)] == [10, 3, 4]
        for row in (*site.train, *site.val, *site.test):
            question = row.prompt.casefold()
            assert question not in seen
            assert len(question.split()) <= 7
            assert row.prompt == " ".join(row.prompt.split())
            seen.add(question)
        starts = {"finance": "how do i save", "school": "ann has", "clinic": "does"}
        assert all(row.prompt.casefold().startswith(starts[name]) for row in site.test)
    assert {row.response.casefold() for row in sites["clinic"].train} == {"maybe"}


def test_a_source_that_is_too_small_or_damaged_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="finance: 17 rows wanted, 16 found"):
        build_sites(sources(tmp_path, rows=16), TASK)
    path = sources(tmp_path, rows=17) / "ASDiv" / "test.jsonl"
    lines = path.read_text().splitlines()
    for damaged in ('{"passage": "Ann"', '{"passage": "Ann", "question": "?"}', "[]"):
        path.write_text("\n".join([*lines[:4], damaged, *lines[5:]]))
        with pytest.raises(ValueError, match=r"test\.jsonl, line 5: no question and answer"):
            build_sites(tmp_path, TASK)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    return convert(write_llama(folder / "a.gguf"), folder / "model")


@pytest.fixture
def learner(tmp_path: Path, model: Path) -> CausalLearner:
    data = tmp_path / "data"
    write_sites(build_sites(sources(tmp_path), TASK), data, TASK)
    assert read_task(data) == TASK
    learner = CausalLearner(TASK, data, model)
    for site in TASK.sites:
        told: list[tuple[int, int]] = []
        learner.prepare(site, lambda *n, told=told: told.append(n))
        assert told == [(n, 7) for n in range(1, 8)]
    return learner


def test_a_long_question_leaves_room_for_the_response(model: Path) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model)
    tokens, prompt = tokenise(tokenizer, Exchange("x" * 90, "yes"), TASK)
    # 40 tokens, of which 8 are kept for the response: "yes" and the end of the turn fill 4 of them.
    assert (prompt, len(tokens)) == (32, 36)
    assert tokenizer.decode(tokens[prompt:]) == "yes<|im_end|>"
    start, end = tokenizer.convert_tokens_to_ids(["<|im_start|>", "<|im_end|>"])
    assert tokens[0] == tokens[tokens.index(end) + 2] == start
    tokens, prompt = tokenise(tokenizer, Exchange("x", "y" * 90), TASK)
    assert len(tokens) == 40
    assert tokenizer.decode(tokens[:prompt]).startswith("<|im_start|>user\nx<|im_end|>\n")


def test_scores_from_kept_states_are_those_of_the_whole_model(learner: CausalLearner) -> None:
    adapted = learner.adapter()
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:
                parameter.normal_(0, 0.1)
    rows = learner.rows(["school", "clinic"], "test")
    score = learner.score(adapted, rows)
    expected = []
    with torch.inference_mode():
        for row in rows:
            logits = adapted(input_ids=torch.tensor([row.tokens])).logits[0]
            answer = torch.tensor(row.tokens[row.prompt :])
            expected.append(functional.cross_entropy(logits[row.prompt - 1 : -1], answer))
    assert score.each == pytest.approx(torch.stack(expected), abs=1e-5)
    assert score.loss == score.value == pytest.approx(float(torch.stack(expected).mean()), abs=1e-5)
    with adapted.disable_adapter():
        assert abs(learner.score(adapted, rows).loss - score.loss) > 1e-3


def test_training_changes_the_last_layers_adapter_alone_and_lowers_the_loss(
    learner: CausalLearner,
) -> None:
    adapted = learner.adapter()
    before = {name: value.clone() for name, value in adapted.state_dict().items()}
    rows = learner.rows(["clinic"], "train")
    told: list[tuple[int, float]] = []
    start = learner.score(adapted, rows).loss
    losses = learner.train(
        adapted, rows, take(batch_order(len(rows), 4, "x"), 12), 1e-2, lambda *n: told.append(n)
    )
    assert told == list(enumerate(losses, start=1))
    assert learner.score(adapted, rows).loss < start - 0.5
    changed = {n for n, v in adapted.state_dict().items() if not torch.equal(v, before[n])}
    last = {str(LAYERS - 2), str(LAYERS - 1)}
    trained = {n for n, parameter in adapted.named_parameters() if parameter.requires_grad}
    for names in (changed, trained):
        assert {n.partition("layers.")[2].partition(".")[0] for n in names} == last
        assert all("lora_" in name for name in names)
    assert len(adapted.get_base_model().model.layers) == LAYERS


def test_every_site_starts_from_the_same_adapter_and_a_saved_one_opens_as_usual(
    learner: CausalLearner, tmp_path: Path, model: Path
) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    adapted = learner.adapter()
    rows = learner.rows(TASK.sites, "test")
    learner.train(adapted, rows, take(batch_order(len(rows), 4, "x"), 3), 1e-2)
    expected = learner.score(adapted, rows).each
    adapted.save_pretrained(tmp_path / "adapter")
    opened = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(model), tmp_path / "adapter"
    )
    assert torch.equal(learner.score(opened, rows).each, expected)
    other = CausalLearner(TASK, tmp_path / "data", model)
    first, second = (
        one.adapter().state_dict() for one in (other, CausalLearner(TASK, tmp_path / "data", model))
    )
    assert all(torch.equal(first[name], second[name]) for name in first)
