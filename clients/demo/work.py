"""The demo's worker processes: one training arm each, or one site of the federated run.

Started as ``python -m fedcore.demo.work ARM --data FOLDER --model FOLDER [--out FILE]``, where ARM is a site's
name, ``centralised`` or ``evaluate`` (with ``--adapter``); without an arm it is a site of the run that the
environment names.
"""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path
from typing import Any

import torch

from .modeling import Encoded, Encoder, add_lora, evaluate, load_base, take, train_steps
from .tasks import SITE_TOPICS, EncoderTask, batch_order, read_rows, topic_names


class Workplace:
    """The data and the model of one process."""

    def __init__(self, data: Path, model: Path) -> None:
        self.data = data
        self.task = EncoderTask(**json.loads((data / "task.json").read_text(encoding="utf-8")))
        self.topics = topic_names()
        self._encoder = Encoder(model, self.task, self.topics)
        self.base = load_base(model, self.task, self.topics)

    def rows(self, sites: list[str], split: str) -> Encoded:
        """Tokenise one split of some sites."""
        return self._encoder(
            [row for site in sites for row in read_rows(self.data / site / f"{split}.jsonl")]
        )

    def accuracy(self, model: Any, rows: Encoded) -> tuple[float, float, list[bool]]:
        """Return mean loss, accuracy, and which rows are right."""
        loss, right = evaluate(model, rows, self.task.eval_batch_size)
        return loss, float(right.float().mean()), right.tolist()


def baseline(place: Workplace, sites: list[str], name: str) -> dict[str, Any]:
    """Train on some sites' data without a break, for as many steps as a site takes in the run."""
    model = add_lora(place.base, place.task)
    rows = place.rows(sites, "train")
    order = batch_order(len(rows), place.task.batch_size, f"{place.task.seed}/{name}")
    train_steps(model, rows, take(order, place.task.total_steps), place.task.learning_rate)
    _, accuracy, right = place.accuracy(model, place.rows(list(SITE_TOPICS), "test"))
    return {"accuracy": accuracy, "right": right}


def judge(place: Workplace, adapter: Path) -> dict[str, Any]:
    """Open a run's model as any user would, and score it on the test set."""
    from peft import PeftModel

    model = PeftModel.from_pretrained(place.base, str(adapter))
    _, accuracy, right = place.accuracy(model, place.rows(list(SITE_TOPICS), "test"))
    return {"accuracy": accuracy, "right": right}


def federate(place: Workplace) -> None:
    """Be one site of the federated run."""
    import fedcore.client as fl

    site = os.environ["FEDCORE_SITE"]
    model = add_lora(place.base, place.task)
    train, val = place.rows([site], "train"), place.rows([site], "val")
    order = batch_order(len(train), place.task.batch_size, f"{place.task.seed}/{site}")
    fl.init(model)
    while fl.is_running():
        fl.load(fl.receive())
        loss, accuracy, _ = place.accuracy(model, val)
        scores = {"val_loss": loss, "val_accuracy": accuracy}
        if fl.is_evaluate():
            fl.send(metrics=scores, examples=len(val))
            continue
        losses = train_steps(
            model, train, take(order, place.task.steps_per_round), place.task.learning_rate
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
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    place = Workplace(options.data, options.model)
    if options.arm is None:
        federate(place)
        return
    if options.arm == "evaluate":
        result = judge(place, options.adapter)
    else:
        sites = list(SITE_TOPICS) if options.arm == "centralised" else [options.arm]
        result = baseline(place, sites, options.arm)
    options.out.write_text(json.dumps(result), encoding="utf-8")


if __name__ == "__main__":
    main()
