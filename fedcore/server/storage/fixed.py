"""Which settings of a run file stay as they are once a model is committed."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from fedcore.errors import ConfigError

__all__ = ["check_fixed"]

# Keys of a run file that make it another run when they change, once a model is committed.
_FIXED: Final = (
    "run.task", "model.initial", "participants.sites", "participants.count", "aggregation.rule",
    "aggregation.options", "aggregation.weights", "aggregation.max_share", "aggregation.optimizer",
    "aggregation.ema", "aggregation.lora", "aggregation.max_rank", "aggregation.base",
    "selection.metric", "selection.mode", "selection.average", "selection.max_share",
    "transfer.update", "transfer.top_k", "transfer.lossless",
)  # fmt: skip


def _shown(value: object) -> str:
    return "not given" if value is None else repr(value)


def check_fixed(folder: Path, recorded: str | None, settings: Mapping[str, Any]) -> None:
    """Compare the settings of a run file with those that a run was begun with.

    Args:
        folder: the run folder, for the message.
        recorded: the earlier settings, as the journal has them; None: any will do.
        settings: those of now, by section and key.

    Raises:
        ConfigError: one that makes it another run differs.
    """
    if recorded is None:
        return
    before = json.loads(recorded)
    before.get("run", {}).setdefault("task", "train")
    before.get("aggregation", {}).setdefault("options", {})
    before.get("selection", {}).setdefault("average", "mean")
    for key in _FIXED:
        section, _, name = key.partition(".")
        old, new = before.get(section, {}).get(name), settings.get(section, {}).get(name)
        if old != new:
            raise ConfigError(
                f"run folder {folder} holds a run with another {key}: it was {_shown(old)} and is now "
                f"{_shown(new)}; give this run another name (run.name), or remove the folder"
            )
