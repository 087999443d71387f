"""``fedcore evaluate``: how a model is opened for the scorer, and what is taken from its results."""

from __future__ import annotations

import importlib.util
import json
import os
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from typer.testing import CliRunner

from fedcore.cache import cache_folder
from fedcore.cli.app import app
from fedcore.errors import ConfigError
from fedcore.evaluate.choices import CHOICES, LOCAL_TASKS, write_tasks
from fedcore.evaluate.scorer import TaskScore, model_arguments, scores_of, task_manager


def test_an_adapter_is_put_on_its_base_and_a_whole_model_stands_alone(tmp_path: Path) -> None:
    assert model_arguments("a/model", None, "auto")["pretrained"] == "a/model"
    assert model_arguments("a/model", "base", "auto")["tokenizer"] == "base"
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(ConfigError, match="--base"):
        model_arguments(str(tmp_path), None, "auto")
    found = model_arguments(str(tmp_path), "base", "bfloat16")
    assert (found["pretrained"], found["peft"]) == ("base", str(tmp_path))
    assert found["dtype"] == "bfloat16"


def test_a_model_that_does_not_open_or_has_no_tokenizer_is_refused(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").touch()
    with pytest.raises(ConfigError, match=r"has no tokenizer.*--base"):
        model_arguments(str(tmp_path), None, "auto")
    assert model_arguments(str(tmp_path), "base", "auto")["tokenizer"] == "base"
    (tmp_path / "trained.safetensors").touch()
    with pytest.raises(ConfigError, match=r"does not open by itself.*README\.md"):
        model_arguments(str(tmp_path), "base", "auto")


def test_downloads_need_no_home_folder_where_another_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_home() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "home", no_home)
    monkeypatch.setenv("FEDCORE_CACHE", str(tmp_path / "downloads"))
    monkeypatch.setenv("XDG_CACHE_HOME", "")
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert cache_folder() == tmp_path / "downloads"
    assert os.environ["XDG_CACHE_HOME"] == str(tmp_path / "downloads"), "for what libraries keep"
    assert cache_folder(tmp_path / "given") == tmp_path / "given"
    monkeypatch.delenv("FEDCORE_CACHE")
    with pytest.raises(ConfigError, match=r"no home folder.*--cache or FEDCORE_CACHE"):
        cache_folder()
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match=r"cannot make.*FEDCORE_CACHE"):
        cache_folder(tmp_path / "file" / "below")


def test_scores_carry_the_scorers_own_errors_and_leave_out_what_a_task_does_not_define() -> None:
    results: dict[str, Any] = {
        "results": {
            "one": {
                "acc,none": 0.5,
                "acc_stderr,none": 0.1,
                "acc_norm,none": 0.25,
                "acc_norm_stderr,none": 0.2,
            },
            "two": {"acc,none": 1, "acc_stderr,none": "N/A"},
        },
        "n-samples": {
            "one": {"original": 90, "effective": 40},
            "two": {"original": 9, "effective": 9},
        },
        "group_subtasks": {"both": ["two", "one"]},
    }
    one = TaskScore("one", 40, 0.5, 0.1, 0.25, 0.2)
    two = TaskScore("two", 9, 1.0, None, None, None)
    assert scores_of(results, ["one", "two"]) == [one, two]
    assert scores_of(results, ["both"]) == [two, one]


def package(folder: Path) -> Path:
    """Files in the shape of the package's: the gold answer is the second option, or true."""
    rows: dict[str, dict[str, str]] = {
        "PIQA/validation.jsonl": {"options": "A. no way \nB. the cat \n"},
        "OpenBookQA/test.jsonl": {"options": "A. a cup\nB. the cat\nC. b\nD. c"},
        "CommonsenseQA/validation.jsonl": {"options": "\nA. a\nB. the cat\nC. c\nD. d\nE. e"},
        "SIQA/test.jsonl": {"options": "A. a\nB. the cat\nC. c", "passage": "Ann came."},
        "BoolQ/dev.jsonl": {"passage": "Cats can swim.", "answer": "True"},
    }
    for name, row in rows.items():
        path = folder / name
        path.parent.mkdir(parents=True)
        full = {"question": "who is  it", "answer": "B. the cat ", **row}
        path.write_text(f"{json.dumps(full)}\n" * 3)
    return folder


def test_every_local_task_has_prompts_choices_and_the_gold_answer(tmp_path: Path) -> None:
    folder = write_tasks(tmp_path / "cache", package(tmp_path / "source"))
    assert {member.path.removeprefix(CHOICES.root) for member in CHOICES.members} == {
        file for file, *_ in LOCAL_TASKS.values()
    }
    for name in LOCAL_TASKS:
        (row, *_) = map(json.loads, (folder / f"{name}.jsonl").read_text().splitlines())
        task = json.loads((folder / f"{name}.yaml").read_text())
        assert task["task"] == name
        assert task["dataset_kwargs"]["data_files"]["test"] == str(folder / f"{name}.jsonl")
        gold = "yes" if name == "local_boolq" else "the cat"
        assert row["choices"][row["gold"]] == gold
        assert not row["query"].endswith(" ")
        # The scorer reads a space before each answer, so none of them has its own.
        assert all(choice == choice.strip() for choice in row["choices"])


def test_a_row_without_its_gold_answer_is_named(tmp_path: Path) -> None:
    source = package(tmp_path / "source")
    path = source / "PIQA" / "validation.jsonl"
    path.write_text(path.read_text() + '{"question": "q", "options": "A. a\\nB. b"}\n')
    with pytest.raises(ValueError, match=r"validation\.jsonl, line 4: 'answer'"):
        write_tasks(tmp_path / "cache", source)


def test_without_the_scorer_the_command_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    found = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *a: None if name == "lm_eval" else found(name, *a)
    )
    result = CliRunner().invoke(app, ["evaluate", "model", "--tasks", "piqa"])
    assert result.exit_code == 2
    assert "fedcore-fl[evaluate]" in result.output


def test_options_of_the_scorer_without_tasks_are_refused_by_name() -> None:
    result = CliRunner().invoke(app, ["evaluate", "runs/x", "--base", "b", "--limit", "3"])
    assert result.exit_code == 2
    assert "--base, --limit" in result.output
    result = CliRunner().invoke(app, ["evaluate", "--tasks", "piqa"])
    assert result.exit_code == 2
    assert "name the model" in result.output


@pytest.mark.parametrize("name", ["config.json", "adapter_config.json", "model.safetensors"])
def test_a_model_without_tasks_is_refused_with_the_option_that_scores_it(
    tmp_path: Path, name: str
) -> None:
    (tmp_path / "best").mkdir()
    (tmp_path / "best" / name).write_text("{}")
    result = CliRunner().invoke(app, ["evaluate", str(tmp_path / "best")])
    assert result.exit_code == 2
    assert "give --tasks" in result.output


def test_the_scorers_own_tasks_are_read_only_where_one_is_asked_for_and_once(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    read: list[bool] = []

    class TaskManager:
        def __init__(self, *, include_path: str | None, include_defaults: bool = True) -> None:
            read.append(include_defaults)
            self.all_subtasks = ["local_piqa"] if include_path else []
            self.all_subtasks += ["hellaswag"] if include_defaults else []
            groups = ["mine"] if include_path else []
            self.all_tasks = [*self.all_subtasks, *groups]

    monkeypatch.setitem(sys.modules, "lm_eval", ModuleType("lm_eval"))
    tasks = ModuleType("lm_eval.tasks")
    tasks.TaskManager = TaskManager  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "lm_eval.tasks", tasks)
    task_manager.cache_clear()
    task_manager(("local_piqa",), tmp_path)
    assert read == [False]
    for _ in range(2):
        task_manager(("local_piqa", "hellaswag"), tmp_path)
    assert read == [False, False, True]
    task_manager(("mine",), tmp_path)  # its members may be the scorer's
    task_manager(("hellaswag",), None)
    assert read[3:] == [False, True, True]
    with pytest.raises(ConfigError, match="lm-eval has no task hela, swag"):
        task_manager(("hela", "hellaswag", "swag"), tmp_path)
    task_manager.cache_clear()


@pytest.mark.slow
def test_a_model_that_knows_the_answers_scores_full_marks(tmp_path: Path) -> None:
    """A tiny Llama is trained on the rows' right answers, then scored by the command; needs lm-eval."""
    pytest.importorskip("lm_eval")
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from fedcore.demo.conversion import convert

    from .tiny_gguf import write_llama

    base = convert(write_llama(tmp_path / "tiny.gguf"), tmp_path / "tiny")
    source, cache = package(tmp_path / "source"), tmp_path / "cache"
    tasks = write_tasks(cache, source)
    tokenizer = AutoTokenizer.from_pretrained(base)
    model = AutoModelForCausalLM.from_pretrained(base)
    texts = []
    for name in LOCAL_TASKS:
        row = json.loads((tasks / f"{name}.jsonl").read_text().splitlines()[0])
        texts.append(f"{row['query']} {row['choices'][row['gold']]}")
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    torch.set_num_threads(1)
    for _ in range(40):
        for text in texts:
            ids = torch.tensor([tokenizer(text)["input_ids"]])
            optimizer.zero_grad()
            model(input_ids=ids, labels=ids).loss.backward()
            optimizer.step()
    model.save_pretrained(tmp_path / "taught")
    scores = []
    for folder in ("tiny", "taught"):
        out = tmp_path / f"{folder}.json"
        arguments = ["evaluate", str(tmp_path / folder), "--base", str(base), "--out", str(out)]
        arguments += ["--include", str(tasks), "--tasks", ",".join(LOCAL_TASKS), "--limit", "2"]
        result = CliRunner().invoke(app, arguments)
        assert result.exit_code == 0, result.output
        scores.append(json.loads(out.read_text())["scores"])
    assert sum(row["acc"] for row in scores[1]) == len(LOCAL_TASKS)
    assert sum(row["acc"] for row in scores[0]) < len(LOCAL_TASKS)
    assert all(row["rows"] == 2 for row in scores[1])
