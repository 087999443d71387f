"""The demo's worker processes: one training arm each, or one site of the federated run.

Started as ``python -m fedcore.demo.work ARM --data FOLDER --model FOLDER [--out FILE]``, where ARM is a site's
name, ``centralised``, ``evaluate`` (with ``--adapter``) or ``prepare`` (with ``--site``); without an arm it is a
site of the run that the environment names.
"""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path
from typing import Any

import torch

from .catalogue import load_learner, read_task
from .learning import Learner, Notice, Score, take
from .progress import tell
from .tasks import Task, batch_order


class Workplace:
    """The task and the learner of one process."""

    def __init__(self, data: Path, model: Path) -> None:
        self.task: Task = read_task(data)
        self.learner: Learner[Any] = load_learner(self.task, data, model)

    def test(self, model: Any) -> dict[str, Any]:
        """Score a model on the held-out rows of all sites: over all, site by site, row by row."""
        score = self.learner.score(model, self.learner.rows(self.task.sites, "test"))
        parts = torch.split(score.each.double(), self.task.test_rows)
        return {
            "value": score.value,
            "by_site": {s: float(p.mean()) for s, p in zip(self.task.sites, parts, strict=True)},
            "each": score.each.tolist(),
        }

    def metrics(self, score: Score) -> dict[str, float]:
        """What a site tells of the global model."""
        return {"val_loss": score.loss, f"val_{self.task.metric}": score.value}


def baseline(place: Workplace, sites: tuple[str, ...], name: str, notice: Notice) -> dict[str, Any]:
    """Train on some sites' data without a break, for as many steps as a site takes in the run."""
    task, learner = place.task, place.learner
    model = learner.adapter()
    rows = learner.rows(sites, "train")
    order = batch_order(len(rows), task.batch_size, f"{task.seed}/{name}")
    learner.train(model, rows, take(order, task.total_steps), task.learning_rate, notice)
    return place.test(model)


def judge(place: Workplace, adapter: Path) -> dict[str, Any]:
    """Open a run's model as any user would, and score it on the test set."""
    from peft import PeftModel

    return place.test(PeftModel.from_pretrained(place.learner.base, str(adapter)))


def federate(place: Workplace) -> None:
    """Be one site of the federated run."""
    import fedcore.client as fl

    site = os.environ["FEDCORE_SITE"]
    task, learner = place.task, place.learner
    model = learner.adapter()
    train, val = learner.rows([site], "train"), learner.rows([site], "val")
    order = batch_order(len(train), task.batch_size, f"{task.seed}/{site}")
    fl.init(model)
    while fl.is_running():
        fl.load(fl.receive())
        scores = place.metrics(learner.score(model, val))
        if fl.is_evaluate():
            fl.send(metrics=scores, examples=len(val))
            continue
        losses = learner.train(
            model,
            train,
            take(order, task.steps_per_round),
            task.learning_rate,
            lambda step, loss: fl.log({"train_loss": loss}, step=step),
        )
        fl.send(
            weight=len(train),
            metrics=scores,
            examples=len(val),
            train_metrics={"train_loss": sum(losses) / len(losses)},
        )


def main() -> None:
    """Run the arm that the command line names."""
    parser = argparse.ArgumentParser()
    parser.add_argument("arm", nargs="?")
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--adapter", type=Path)
    parser.add_argument("--site")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    place = Workplace(options.data, options.model)
    if options.arm is None:
        federate(place)
        return
    result: dict[str, Any] = {}
    if options.arm == "prepare":
        place.learner.prepare(options.site, lambda done, of: tell(options.out, done, of, None))
    elif options.arm == "evaluate":
        result = judge(place, options.adapter)
    else:
        sites = place.task.sites if options.arm == "centralised" else (options.arm,)
        total = place.task.total_steps

        def notice(step: int, loss: float) -> None:
            tell(options.out, step, total, loss)

        result = baseline(place, sites, options.arm, notice)
    options.out.write_text(json.dumps(result), encoding="utf-8")


if __name__ == "__main__":
    main()
