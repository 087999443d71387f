"""Runs the job in the simulator and checks the saved model: ``job.py ELEMENTS TENSORS SITES ROUNDS``."""

import os
import sys
from pathlib import Path

import torch
from nvflare.app_opt.pt.recipes.fedavg import FedAvgRecipe
from nvflare.client.config import ExchangeFormat
from nvflare.recipe import SimEnv


def main() -> None:
    elements, tensors, sites, rounds = (int(argument) for argument in sys.argv[1:])
    recipe = FedAvgRecipe(
        name="bench",
        model={"class_path": "model.Model", "args": {"tensors": tensors, "elements": elements}},
        min_clients=sites,
        num_rounds=rounds,
        train_script="client.py",
        server_expected_format=ExchangeFormat.PYTORCH,
        enable_tensor_disk_offload=os.environ.get("NVFLARE_OFFLOAD") == "1",
    )
    run = recipe.execute(SimEnv(num_clients=sites, workspace_root=str(Path("workspace").resolve())))
    saved = next(Path(run.get_result()).glob("server/**/FL_global_model.pt"))
    values = torch.load(saved, weights_only=False, mmap=True)["model"]
    right = len(values) == tensors and all(
        value.numel() == elements and bool((value == rounds).all()) for value in values.values()
    )
    print("RESULT", "RIGHT" if right else "WRONG")


if __name__ == "__main__":
    main()
