"""What an experiment leaves behind: JSON, a figure, and tables as text for a page."""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from fedcore.errors import ConfigError

from ..report import console, write
from .figures import draw_peft, draw_sft, draw_steady, draw_swing
from .peft import SKEWED
from .summary import (
    liar_rows,
    lora_rows,
    optimizer_rows,
    peft_rows,
    second_half,
    spread,
    steady_rows,
    swing_rows,
)

if TYPE_CHECKING:
    from .liars import LiarSettings
    from .lora import LoraSettings
    from .optimizers import OptimizerSettings
    from .peft import Settings, Source
    from .swing import SwingSettings

__all__ = [
    "SftRun",
    "liars_report",
    "lora_report",
    "markdown",
    "optimizers_report",
    "peft_report",
    "score_arms",
    "sft_report",
    "swing_report",
]

#: Tasks of which no package holds rows with gold labels; their columns stay empty where no hub is reached.
_NOT_HERE: Final = ("hellaswag", "winogrande")


@dataclass
class SftRun:
    """The arms of one seed: their curves, and the scores of base and arms where they were scored."""

    curves: Mapping[str, Any]
    scores: Mapping[str, Any] = field(default_factory=dict)


def markdown(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a table of a page; all columns but the first stand to the right."""
    lines = ["| " + " | ".join(head) + " |", "|---" + "|---:" * (len(head) - 1) + "|"]
    return "\n".join([*lines, *("| " + " | ".join(row) + " |" for row in rows)]) + "\n"


def _spread(found: Mapping[str, Any] | None) -> str:
    if found is None:
        return "-"
    error = found["stdev"]
    return f"{found['mean']:.3f}" + ("" if error is None else f" ± {error:.3f}")


def _lead(row: Mapping[str, Any]) -> list[str]:
    beaten = f"{row['seeds_beaten']} of {len(row['seeds'])}"
    return [f"{row['lead']:+.3f} ± {row['lead_error']:.3f}", beaten]


def _peft_tables(rows: Sequence[Mapping[str, Any]], steady: Sequence[Mapping[str, Any]]) -> str:
    head = [
        "method, sites",
        "seeds",
        "mean site alone",
        "best site alone",
        "federated",
        "centralised",
    ]
    head += ["lead over the best", "seeds in which it beats every site"]
    lines = []
    for row in rows:
        split = "natural" if row["split"] == "natural" else f"alpha {row['split']}"
        cells = [f"{row['method']}, {split}", str(len(row["seeds"]))]
        cells += [_spread(row[key]) for key in ("alone", "best_alone", "federated", "centralised")]
        cells += _lead(row)
        lines.append(cells)
    text = markdown(head, lines)
    if len(steady) > 1:
        head = [
            "averaging",
            "seeds",
            "rounds of steps",
            "last round",
            "lowest after round 1",
            "lost on the way",
            "lead over the best site alone",
            "seeds in which it beats every site",
        ]
        lines = [
            [
                row["steady"],
                str(len(row["seeds"])),
                f"{row['rounds']} of {row['steps_per_round']}",
                *(_spread(row[k]) for k in ("federated", "lowest", "swing")),
                *_lead(row),
            ]
            for row in steady
        ]
        text += "\n" + markdown(head, lines)
    return text


def peft_report(
    folder: Path,
    cells: Mapping[str, Any],
    settings: Settings,
    source: Source,
    confirmed: Mapping[str, Any] | None,
) -> None:
    """Write ``peft.json``, ``peft.png``, ``steady.png`` and ``peft.md``, and print the tables."""
    rows, steady = peft_rows(cells), steady_rows(cells, SKEWED)
    tables = _peft_tables(rows, steady)
    (folder / "peft.md").write_text(tables, encoding="utf-8")
    console.print(tables, highlight=False, soft_wrap=True)
    if confirmed is not None:
        same = "bit for bit" if confirmed["equal"] else f"to {confirmed['largest_difference']:.2g}"
        console.print(f"with a real server and a process for each site, the same model {same}")
    draw_peft(cells, folder / "peft.png")
    draw_steady(cells, SKEWED, folder / "steady.png")
    kept = {name: {k: v for k, v in cell.items() if k != "right"} for name, cell in cells.items()}
    write(
        folder / "peft.json",
        {
            "settings": asdict(settings),
            "model": Path(str(source.model)).name,
            "data": source.name,
            "rows": rows,
            "steady": steady,
            "confirmed": confirmed,
            "cells": kept,
        },
    )


def swing_report(
    folder: Path,
    found: Mapping[str, Sequence[Any]],
    settings: SwingSettings,
    source: Source,
) -> None:
    """Write ``swing.json``, ``swing.png`` and ``swing.md``, and print the table."""
    rows = swing_rows(found)
    head = ["averaging", "seeds", "sites a round", "rounds of steps", "last"]
    head += ["mean of the second half", "mean move", "largest drop"]
    lines = [
        [
            row["way"],
            str(len(row["seeds"])),
            str(row["sampled"]),
            f"{row['rounds']} of {row['steps_per_round']}",
            *(_spread(row[key]) for key in ("last", "mean", "move", "drop")),
        ]
        for row in rows
    ]
    table = markdown(head, lines)
    (folder / "swing.md").write_text(table, encoding="utf-8")
    console.print(table, highlight=False, soft_wrap=True)
    draw_swing(found, folder / "swing.png")
    write(folder / "swing.json", {**_made_from(settings, source), "rows": rows, "runs": found})


def liars_report(
    folder: Path,
    found: Sequence[Mapping[str, Any]],
    settings: LiarSettings,
    source: Source,
) -> None:
    """Write ``liars.json`` and ``liars.md``, and print the table."""
    rows = liar_rows(found)
    cells = {(row["rule"], row["attack"]): row["accuracy"] for row in rows}
    attacks = list(dict.fromkeys(row["attack"] for row in rows))
    lines = [
        [rule, *(_within(cells[rule, attack]) for attack in attacks)]
        for rule in dict.fromkeys(row["rule"] for row in rows)
    ]
    table = markdown(["rule", *attacks], lines)
    (folder / "liars.md").write_text(table, encoding="utf-8")
    console.print(table, highlight=False, soft_wrap=True)
    write(folder / "liars.json", {**_made_from(settings, source), "rows": rows, "runs": found})


def lora_report(
    folder: Path,
    found: Sequence[Mapping[str, Any]],
    settings: LoraSettings,
    source: Source,
) -> None:
    """Write ``lora.json`` and ``lora.md``, and print the table."""
    rows = lora_rows(found)
    head = ["data", "ranks", "way", "rate", "accuracy", "beside factors", "averaging error"]
    head += ["KiB sent a round", "KiB got a round"]
    lines = [
        [
            row["split"],
            row["ranks"],
            row["way"],
            f"{row['rate']:g}",
            _within(row["accuracy"]),
            _within(row["lead"], signed=True),
            f"{row['averaging_error']['median']:.2f}" if row["way"] == "factors" else "",
            f"{row['bytes_up'] / 1024:,.0f}",
            f"{row['bytes_down'] / 1024:,.0f}",
        ]
        for row in rows
    ]
    table = markdown(head, lines)
    (folder / "lora.md").write_text(table, encoding="utf-8")
    console.print(table, highlight=False, soft_wrap=True)
    write(folder / "lora.json", {**_made_from(settings, source), "rows": rows, "runs": found})


def optimizers_report(
    folder: Path,
    tried: Mapping[str, Any],
    found: Mapping[str, Sequence[Any]],
    settings: OptimizerSettings,
    source: Source,
) -> None:
    """Write ``optimizers.json`` and ``optimizers.md``, and print the tables.

    Args:
        folder: where they are written.
        tried: the result of each try on the seed for choosing.
        found: the results of each optimizer's chosen try, one for each seed.
        settings: of all runs, which are those of ``source``.
        source: the model and the texts.
    """
    rows = optimizer_rows(found)
    head = ["optimizer", "chosen", "second half", "over the mean", "last", "mean move"]
    head.append("largest drop")
    lines = [
        [
            row["optimizer"],
            row["try"],
            _within(row["mean"], digits=3),
            _within(row["lead"], signed=True),
            *(_within(row[key], digits=3) for key in ("last", "move", "drop")),
        ]
        for row in rows
    ]
    halves = {name: statistics.fmean(second_half(result)) for name, result in tried.items()}
    tables = markdown(head, lines) + "\n"
    tables += markdown(["tried", "second half"], [[k, f"{v:.3f}"] for k, v in halves.items()])
    (folder / "optimizers.md").write_text(tables, encoding="utf-8")
    console.print(tables, highlight=False, soft_wrap=True)
    content = {**_made_from(settings, source), "rows": rows, "tried": tried, "runs": found}
    write(folder / "optimizers.json", content)


def _made_from(settings: Settings, source: Source) -> dict[str, Any]:
    """Return what a report says of its settings, model and data."""
    model = Path(str(source.model)).name
    return {"settings": asdict(settings), "model": model, "data": source.name}


def _within(found: Mapping[str, Any], *, signed: bool = False, digits: int = 2) -> str:
    half, mean = found["half_interval"], found["mean"]
    shown = f"{mean:+.3f}" if signed else f"{mean:.{digits}f}"
    return shown + ("" if half is None else f" ± {half:.3f}" if signed else f" ± {half:.{digits}f}")


def _rounds(path: Path) -> int | None:
    """Return after how many rounds an arm was scored; older files of scores do not say."""
    rounds: int | None = json.loads(path.read_text(encoding="utf-8")).get("rounds")
    return rounds


def score_arms(
    folder: Path,
    seed: int,
    base: Path | str,
    curves: Mapping[str, Any],
    *,
    tasks: Sequence[str],
    limit: int,
    cache: Path,
    notice: Callable[[str], None],
) -> dict[str, Any]:
    """Score the base model and every arm as ``fedcore evaluate`` does, an arm again once it has other rounds.

    The base has no seed: it is scored once for all of them.

    Raises:
        ConfigError: the folder holds scores of other tasks or another limit.
    """
    from fedcore.evaluate.choices import write_tasks
    from fedcore.evaluate.scorer import evaluate, model_arguments

    found: dict[str, Any] = {}
    for arm in ("base", *curves):
        path = folder / ("" if arm == "base" else f"seed-{seed}") / "scores" / f"{arm}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        rounds = 0 if arm == "base" else curves[arm]["rounds"]
        if not path.is_file() or (arm != "base" and _rounds(path) != rounds):
            local = any(task.startswith("local_") for task in tasks)
            model = str(base) if arm == "base" else str(folder / f"seed-{seed}" / "arms" / arm)
            begun, cpu = time.monotonic(), time.process_time()
            scores = evaluate(
                model_arguments(model, str(base), "bfloat16"),
                tasks,
                limit=limit,
                include=write_tasks(cache) if local else None,
            )
            content = {
                "tasks": list(tasks),
                "limit": limit,
                "rounds": rounds,
                "dtype": "bfloat16",
                "scores": [asdict(score) for score in scores],
                "seconds": time.monotonic() - begun,
                "cpu_seconds": time.process_time() - cpu,
            }
            path.write_text(json.dumps(content) + "\n", encoding="utf-8")
            notice(f"{arm}: scored, {content['seconds']:.0f} s")
        found[arm] = json.loads(path.read_text(encoding="utf-8"))
        if (found[arm]["tasks"], found[arm]["limit"]) != (list(tasks), limit):
            raise ConfigError(f"{path} holds other tasks or another limit; remove it")
    return found


def _arm_label(arm: str) -> str:
    return arm if arm in ("base", "centralised", "federated") else f"{arm} alone"


def _score_table(runs: Sequence[Mapping[str, Any]]) -> str:
    """Return the scores of base and arms, the mean over the seeds that were scored.

    The error is lm-eval's own, over the rows of a task. All seeds are scored on the same rows, so that more seeds
    do not make it smaller.
    """
    tasks = [(s["task"], s["acc_norm"] is not None) for s in runs[0]["base"]["scores"]]
    columns = [
        (task, key) for task, norm in tasks for key in ("acc", "acc_norm") if key == "acc" or norm
    ]
    empty = [task for task in _NOT_HERE if task not in dict(tasks)]
    head = [
        "model",
        *(f"{task} {key}" for task, key in columns),
        *(f"{task}: not run" for task in empty),
    ]
    lines = []
    for arm in runs[0]:
        by_task = [{score["task"]: score for score in run[arm]["scores"]} for run in runs]
        cells = [_arm_label(arm)]
        for task, key in columns:
            value = statistics.fmean(found[task][key] for found in by_task)
            errors = [found[task][f"{key}_stderr"] for found in by_task]
            error = "" if None in errors else f" ± {statistics.fmean(errors):.2f}"
            cells.append(f"{value:.2f}{error}")
        lines.append([*cells, *("" for _ in empty)])
    return markdown(head, lines)


def _loss_table(runs: Sequence[Mapping[str, Any]]) -> str:
    """Return the losses of all arms, mean and standard deviation over the seeds."""
    sites = list(runs[0]["federated"]["settings"]["sites"])
    begin = [curves["federated"]["points"][0]["loss"] for curves in runs]
    ends = {arm: [curves[arm]["points"][-1]["loss"] for curves in runs] for arm in runs[0]}
    lines = []
    for arm, losses in {"base": begin, **ends}.items():
        means = [statistics.fmean(loss.values()) for loss in losses]
        cells = [_spread(spread([loss[site] for loss in losses])) for site in sites]
        lines.append([_arm_label(arm), *cells, _spread(spread(means))])
    return markdown(["validation loss after the last round", *sites, "mean"], lines)


def sft_report(folder: Path, runs: Mapping[int, SftRun], base: str, limit: int) -> None:
    """Write ``sft.json``, ``sft.png`` and ``sft.md``, and print the tables."""
    tables = _loss_table([run.curves for run in runs.values()])
    scored = [run.scores for run in runs.values() if run.scores]
    if scored:
        tables += "\n" + _score_table(scored)
    (folder / "sft.md").write_text(tables, encoding="utf-8")
    console.print(tables, highlight=False, soft_wrap=True)
    draw_sft({seed: run.curves for seed, run in runs.items()}, folder / "sft.png")
    write(
        folder / "sft.json",
        {
            "model": Path(base).name if Path(base).is_dir() else base,
            "limit": limit,
            "seeds": {seed: asdict(run) for seed, run in runs.items()},
        },
    )
