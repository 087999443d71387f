"""``with_nvflare.py FOLDER RULE``, in NVFlare's environment: what its server does with the sites' differences.

``adam``: the aggregator that its FedOpt recipe has, then the recipe's update of the model by torch.optim.Adam.
``small-steps``: the same by SGD on a bf16 model, round after round, each site one step of bf16 above the model.
"""

import json
import sys
import time
from pathlib import Path

import numpy as np
import torch
from nvflare.app_common.aggregators.weighted_aggregation_helper import WeightedAggregationHelper
from nvflare.app_opt.pt.fedopt import PTFedOptModelShareableGenerator

ROUNDS, RATE = 10, 0.1


def peak():
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith("VmHWM")).split()[1]) * 1024


def generator(model, kind, **options):
    made = PTFedOptModelShareableGenerator(source_model=model)
    made.model, made.device = model, torch.device("cpu")
    made.optimizer = kind(model.parameters(), **options)
    return made


def module(parts):
    model = torch.nn.Module()
    for name, part in parts.items():
        model.register_parameter(name, torch.nn.Parameter(part))
    return model


def split(values, tensors):
    return {f"t{i:02d}": part for i, part in enumerate(np.split(values, tensors))}


def adam(folder, plan):
    base = np.fromfile(folder / "base.f32", np.float32)
    parts = split(base, plan["tensors"])
    made = generator(
        module({name: torch.from_numpy(part.copy()) for name, part in parts.items()}),
        torch.optim.Adam,
        lr=0.01,
        betas=(0.9, 0.99),
        eps=0.001,
    )
    sites = [
        split(np.fromfile(folder / f"{name}.f32", np.float32) - base, plan["tensors"])
        for name in plan["updates"]
    ]
    begin = time.perf_counter()
    helper = WeightedAggregationHelper()
    for number, site in enumerate(sites):
        helper.add(site, 1.0, f"site-{number}", 0)
    weights, _ = made.server_update(helper.get_result())
    seconds = time.perf_counter() - begin
    most = peak()
    out = np.concatenate([weights[name].detach().numpy() for name in parts])
    out.tofile(folder / "out.raw")
    return {"seconds": [seconds], "peak": most, "dtype": str(out.dtype)}


def small_steps():
    model = module({"t00": torch.ones(1024, dtype=torch.bfloat16)})
    made = generator(model, torch.optim.SGD, lr=RATE)
    for _ in range(ROUNDS):
        helper = WeightedAggregationHelper()
        for number in range(3):
            helper.add(
                {"t00": torch.full((1024,), 2.0**-7, dtype=torch.bfloat16)},
                1.0,
                f"site-{number}",
                0,
            )
        weights, _ = made.server_update(helper.get_result())
    return {"seconds": [], "value": float(weights["t00"][0])}


def main():
    folder, rule = Path(sys.argv[1]), sys.argv[2]
    if rule == "small-steps":
        print(json.dumps(small_steps()))
        return
    print(json.dumps(adam(folder, json.loads((folder / "plan.json").read_text()))))


main()
