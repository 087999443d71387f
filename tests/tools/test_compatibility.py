"""What goes together in a run file: the page, the function and the reading of the file say the same."""

from __future__ import annotations

import itertools
import re
from pathlib import Path
from typing import Any

import pytest

from fedcore.config import parse_run
from fedcore.errors import ConfigError
from fedcore.protocol import UPDATE_ENCODINGS
from fedcore.rules import RULES
from fedcore.rules.compatibility import TASKS, Choices, conflicts
from fedcore.rules.finishers import FINISHERS
from fedcore.rules.page import page
from fedcore.rules.several import SEVERAL

ROOT = Path(__file__).parents[2]


def test_the_page_is_what_the_registries_make() -> None:
    """Else: .venv/bin/python -P -m fedcore.rules.page > docs/compatibility.md"""
    assert (ROOT / "docs/compatibility.md").read_text(encoding="utf-8") == page()


def test_the_page_has_each_rule_encoding_optimizer_and_task() -> None:
    rows = re.findall(r"^\| `([\w-]+)` \|.*", page(), re.M)
    assert {*RULES, *SEVERAL, *TASKS} <= {*rows}
    for name in (*UPDATE_ENCODINGS, *FINISHERS):
        assert f"`{name}`" in page()


def run_of(rule: str, update: str, optimizer: str | None, task: str) -> dict[str, Any]:
    values: dict[str, Any] = {
        "run": {"name": "t", "task": task, **({"rounds": 1} if task == "train" else {})},
        "participants": {"sites": [f"s{i}" for i in range(9)]},
        "aggregation": {"rule": rule},
        "transfer": {"update": update},
        "model": {"initial": "m.safetensors"},
    }
    if optimizer is not None:
        values["aggregation"]["optimizer"] = {"name": optimizer}
    return values


def read(values: dict[str, Any]) -> str:
    """Return why a run file is refused; an empty text if it is not."""
    try:
        parse_run(values)
    except ConfigError as error:
        return str(error)
    return ""


def test_a_run_file_is_refused_exactly_where_two_choices_do_not_go_together() -> None:
    optimizers = (None, "adam", "momentum")
    every = itertools.product((*RULES, "module:Class", "krum"), UPDATE_ENCODINGS, optimizers, TASKS)
    refused = 0
    for rule, update, optimizer, task in every:
        found = conflicts(Choices(task=task, rule=rule, update=update, optimizer=optimizer))
        message = read(run_of(rule, update, optimizer, task))
        assert message == "\n".join(f"run file: {conflict.text}" for conflict in found)
        wanted = (
            (update == "top-k" and rule != "mean")
            or (task != "train" and (rule != "mean" or optimizer is not None))
            or (task == "compare" and update != "raw")
        )
        assert bool(message) == wanted
        refused += wanted
    assert refused > 100


def test_a_refusal_has_the_reason_and_what_would_work_and_all_come_at_once() -> None:
    message = read(run_of("median", "top-k", "adam", "compare"))
    assert len(message.splitlines()) == 4
    assert "use update = 'raw', 'bf16', 'fp16', 'int8' or 'nf4', or rule = 'mean'" in message
    assert "expected 'raw'" in message
    assert "aggregation.optimizer: it is for run.task = 'train', not 'compare'" in message


@pytest.mark.parametrize("update", UPDATE_ENCODINGS)
def test_what_a_refusal_names_as_working_does(update: str) -> None:
    found = conflicts(Choices(rule="median", update=update))
    if update != "top-k":
        assert not found
    for name in re.findall(r"rule = '(\w+)'$", "".join(conflict.reason for conflict in found)):
        assert not conflicts(Choices(rule=name, update=update))


def test_a_refusal_of_weights_names_each_rule_that_weighs_and_no_other() -> None:
    (found,) = conflicts(Choices(rule="krum", weights="examples"))
    named = set(re.findall(r"'([\w-]+)'", found.reason.partition("use rule = ")[2]))
    weighs = {
        name for name in (*RULES, *SEVERAL) if not conflicts(Choices(rule=name, weights="examples"))
    }
    assert named == weighs
    assert "rfa" in named
