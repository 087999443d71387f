"""One site of the PEFT experiment as a process of its own, started with a file of settings.

It does what its arm does in one process, with a real server between the sites.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import torch

import fedcore.client as fl

from .classifier import accuracy
from .federation import load_state, state_of
from .peft import Cell, Lab, Settings, Source, shares, site_of
from .sentiment import Text


def main() -> None:
    """Take part in the run that the environment names."""
    given = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    torch.set_num_threads(int(given["threads"]))
    rates = tuple((method, rate) for method, rate in given["settings"].pop("learning_rate"))
    settings = Settings(**given["settings"], learning_rate=rates)
    cell, site = Cell(**given["cell"]), os.environ["FEDCORE_SITE"]
    source = Source(given["model"], [Text(**text) for text in given["texts"]], given["name"])
    lab = Lab(settings, source, cell.seed)
    model = lab.model(cell.method)
    held = shares(lab.pool, cell.split, cell.seed, settings.batch_size)
    # Every row goes through the lower layers by itself, so a site's own rows are enough.
    own = [lab.pool.train[row] for row in held[site]]
    rows = lab.encoder.rows(own, lab.pool.labels)
    trainee = site_of(settings, cell, site, model, rows)
    fl.init(state_of(model))
    while fl.is_running():
        load_state(model, fl.receive())
        if fl.is_evaluate():
            fl.send(metrics={"train_loss": accuracy(model, rows)[0]}, examples=len(rows))
            continue
        trainee.train(settings.steps)
        fl.send(state_of(model), weight=trainee.weight)


if __name__ == "__main__":
    main()
