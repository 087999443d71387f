"""Which tasks the demo has: the settings and the learner of each, by name.

What a task needs is imported when it is asked for, so that choosing one loads neither torch nor the other's parts.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .tasks import KINDS, Task

if TYPE_CHECKING:
    from .learning import Learner


def task_class(kind: str) -> type[Task]:
    """Return the settings class of a task by its name."""
    if kind == "encoder":
        from .encoder import EncoderTask

        return EncoderTask
    if kind == "causal":
        from .causal import CausalTask

        return CausalTask
    raise ValueError(f"{kind!r} is no task; there are {', '.join(KINDS)}")


def read_task(folder: Path) -> Task:
    """Read the settings that :func:`write_sites` wrote."""
    text = json.loads((folder / "task.json").read_text(encoding="utf-8"))
    return task_class(text["task"])(**text["settings"])


def load_learner(task: Task, data: Path, model: Path) -> Learner[Any]:
    """Return the learner of a task."""
    if task.kind == "causal":
        from .causal import CausalTask
        from .causal_model import CausalLearner

        assert isinstance(task, CausalTask)
        return CausalLearner(task, data, model)
    from .encoder import EncoderTask
    from .encoder_model import EncoderLearner

    assert isinstance(task, EncoderTask)
    return EncoderLearner(task, data, model)
