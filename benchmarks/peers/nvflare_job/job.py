"""Runs the job in the simulator and checks the saved model: ``job.py ELEMENTS TENSORS SITES ROUNDS``."""

import sys
from pathlib import Path

import torch
from model import values
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
        enable_tensor_disk_offload=True,
    )
    run = recipe.execute(SimEnv(num_clients=sites, workspace_root=str(Path("workspace").resolve())))
    saved = next(Path(run.get_result()).glob("server/**/FL_global_model.pt"))
    found = torch.load(saved, weights_only=False, mmap=True)["model"]
    added = rounds * (sites + 1) / 2
    right = len(found) == tensors and all(
        torch.allclose(found[f"layer{i:03d}"], values(i, elements) + added, rtol=1e-6, atol=0.01)
        for i in range(tensors)
    )
    print("RESULT", "RIGHT" if right else "WRONG")


if __name__ == "__main__":
    main()
