"""FedAvg that notes when each round begins, and checks its result."""

import json
import time
from pathlib import Path
from typing import Any

import numpy as np
from flwr.app import Array, ArrayRecord, Context
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import FedAvg

app = ServerApp()
marks: list[float] = []


class TimedFedAvg(FedAvg):
    def configure_train(self, *args: Any, **kwargs: Any) -> Any:
        marks.append(time.time())
        return super().configure_train(*args, **kwargs)


def values(tensor: int, elements: int) -> "np.ndarray[Any, Any]":
    drawn = np.random.default_rng(tensor).integers(0, 1 << 16, elements, np.uint16)
    return drawn.astype(np.float32)


@app.main()
def main(grid: Grid, context: Context) -> None:
    config = context.run_config
    sites, rounds = int(config["sites"]), int(config["rounds"])
    names = [f"layer{i:03d}" for i in range(int(config["tensors"]))]
    shape = int(config["elements"])
    start = ArrayRecord({name: Array(values(i, shape)) for i, name in enumerate(names)})
    strategy = TimedFedAvg(
        fraction_train=1.0, fraction_evaluate=0.0, min_train_nodes=sites, min_available_nodes=sites
    )
    result = strategy.start(grid=grid, initial_arrays=start, num_rounds=rounds)
    marks.append(time.time())
    added = rounds * (sites + 1) / 2
    right = set(result.arrays) == set(names) and all(
        np.allclose(result.arrays[name].numpy(), values(i, shape) + added, rtol=1e-6, atol=0.01)
        for i, name in enumerate(names)
    )
    Path(str(config["result"])).write_text(json.dumps({"marks": marks, "right": right}))
