"""A loop of its own in two processes; the argument says which rank does what wrong."""

from __future__ import annotations

import sys

import torch
import torch.distributed as dist

import fedcore.client as fl


def main() -> None:
    dist.init_process_group("gloo")
    rank, what = dist.get_rank(), sys.argv[1]
    torch.manual_seed(rank)
    net = torch.nn.Linear(3, 1).requires_grad_(what != "frozen")
    fl.init(net)
    passes = 0
    while fl.is_running():
        params = fl.receive()
        net.load_state_dict(params)
        sums = [torch.zeros(1), torch.zeros(1)]
        dist.all_gather(sums, net.weight.detach().sum().reshape(1))
        assert torch.equal(sums[0], sums[1]), "both ranks have rank 0's model"
        assert fl.is_evaluate() == (passes == 3)
        with torch.no_grad():
            net.weight += 1
        if what == "raise" and passes == 1:
            raise ValueError("the labels are missing") if rank == 1 else SystemExit(0)
        if rank == 0 or what == "send":
            if what == "nan" and passes == 1:
                fl.send({"weight": net.weight}, weight=0)
            fl.send(weight=4, metrics={"val_loss": 1.0})
        passes += 1
    print(f"rank {rank} of {dist.get_world_size()}: {passes} passes", flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
