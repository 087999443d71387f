"""Score a causal language model on multiple-choice tasks, with ``lm-eval`` as the scorer.

The harness (EleutherAI's, package ``lm-eval``) does all of it: prompts, log-likelihoods, accuracy, and the
standard error of each accuracy. Nothing here changes what it reports.
"""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedcore.errors import ConfigError
from fedcore.files.opening import CLOSED

__all__ = ["TaskScore", "evaluate", "model_arguments", "scores_of"]


@dataclass(frozen=True)
class TaskScore:
    """What the harness reports of one task.

    Attributes:
        task: its name.
        rows: how many rows were scored.
        acc: the share of rows whose right answer is the likeliest; None where the task does not define it.
        acc_stderr: the harness's standard error of it.
        acc_norm: the same with likelihoods divided by the answers' lengths in bytes; None where not defined.
        acc_norm_stderr: its standard error.
    """

    task: str
    rows: int
    acc: float | None
    acc_stderr: float | None
    acc_norm: float | None
    acc_norm_stderr: float | None


def model_arguments(model: str, base: str | None, dtype: str) -> dict[str, Any]:
    """Return how the harness opens a model.

    Args:
        model: a folder (also a run's ``best/``) or a name at the Hub.
        base: where the tokenizer is, and for a PEFT adapter the model under it; not needed where ``model``
            has a tokenizer itself.
        dtype: ``float32``, ``bfloat16``, ``float16`` or ``auto``.

    Raises:
        ConfigError: an adapter without a base, a folder without a tokenizer and a base, or one that does not open
            by itself.
    """
    folder = Path(model)
    if (folder / CLOSED).is_file():
        raise ConfigError(
            f"{model} does not open by itself: {folder / 'README.md'} has the lines that make a whole model of "
            "it, which can be scored"
        )
    if (folder / "adapter_config.json").is_file():
        if base is None:
            raise ConfigError(
                f"{model} is an adapter; name the model that it was trained on with --base"
            )
        return {"pretrained": base, "peft": model, "tokenizer": base, "dtype": dtype}
    if base is None and folder.is_dir() and not any(folder.glob("tokenizer*")):
        raise ConfigError(
            f"{model} has no tokenizer, and a loader would make up an empty one; name the model that it was "
            "trained from with --base"
        )
    return {"pretrained": model, "tokenizer": base or model, "dtype": dtype}


def evaluate(
    arguments: dict[str, Any],
    tasks: Sequence[str],
    *,
    limit: int | None = None,
    include: Path | None = None,
    batch_size: int = 8,
    device: str = "cpu",
) -> list[TaskScore]:
    """Score a model, zero-shot.

    Args:
        arguments: what `model_arguments` returned.
        tasks: names that the harness knows, or that the files in ``include`` define.
        limit: rows of each task, from its first; all if None.
        include: a folder with task files (YAML).
        batch_size: sequences at a time.
        device: ``cpu`` or ``cuda``.

    Raises:
        ConfigError: lm-eval is not installed, or there is no such task.
    """
    if importlib.util.find_spec("lm_eval") is None:
        raise ConfigError(
            "scoring needs lm-eval; install it with: pip install 'fedcore-fl[evaluate]'"
        )
    from lm_eval import simple_evaluate

    manager = task_manager(tuple(tasks), include)
    results: Any = simple_evaluate(
        model="hf",
        model_args=arguments,
        tasks=list(tasks),
        num_fewshot=0,
        batch_size=batch_size,
        device=device,
        limit=limit,
        task_manager=manager,
        log_samples=False,
    )
    return scores_of(results, tasks)


@functools.cache
def task_manager(tasks: tuple[str, ...], include: Path | None) -> Any:
    """Return an index that holds the tasks; the harness's own, of thousands of files, is read only where needed.

    Raises:
        ConfigError: there is no such task.
    """
    from lm_eval.tasks import TaskManager

    manager: Any = None
    if include is not None:
        manager = TaskManager(include_path=str(include), include_defaults=False)
    # A group of one's own may have members among the harness's tasks.
    if manager is None or not set(tasks) <= set(manager.all_subtasks):
        manager = TaskManager(include_path=None if include is None else str(include))
    unknown = [task for task in tasks if task not in manager.all_tasks]
    if unknown:
        raise ConfigError(f"lm-eval has no task {', '.join(unknown)}")
    return manager


def scores_of(results: dict[str, Any], tasks: Sequence[str]) -> list[TaskScore]:
    """Take the scores out of the harness's results, in the order of ``tasks``; groups give one line per member."""
    found = []
    for name in tasks:
        for task in results.get("group_subtasks", {}).get(name) or [name]:
            values = results["results"][task]
            found.append(
                TaskScore(
                    task=task,
                    rows=int(results["n-samples"][task]["effective"]),
                    acc=_number(values, "acc,none"),
                    acc_stderr=_number(values, "acc_stderr,none"),
                    acc_norm=_number(values, "acc_norm,none"),
                    acc_norm_stderr=_number(values, "acc_norm_stderr,none"),
                )
            )
    return found


def _number(values: dict[str, Any], key: str) -> float | None:
    value = values.get(key)
    return float(value) if isinstance(value, int | float) else None
