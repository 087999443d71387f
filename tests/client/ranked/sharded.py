"""A model of FSDP2 in two processes: whole tensors leave and come, each rank keeps its part."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from fedcore.client.counting import ExampleCounter
from fedcore.client.parameters import ModelParameters
from fedcore.client.torch import current_site


def net() -> torch.nn.Module:
    torch.manual_seed(0)
    return torch.nn.Sequential(
        torch.nn.Linear(4, 8), torch.nn.Tanh(), torch.nn.Linear(8, 3), torch.nn.Linear(3, 1)
    )


def main() -> None:
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    model = net()
    mesh = init_device_mesh("cpu", (2,))
    fully_shard(model[0], mesh=mesh)
    fully_shard(model, mesh=mesh)
    assert ModelParameters(model).sharded
    assert ModelParameters(model).specs == ModelParameters(net()).specs
    inputs = torch.randn(16, 4, generator=torch.Generator().manual_seed(1))
    part = inputs[rank::2]
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    site, passes = current_site(), 0
    while site.is_running():
        task = site.receive(model)
        assert task is not None
        loss = torch.nn.functional.mse_loss(model(part), part.sum(1, keepdim=True))
        site.score_parts({"val_loss": loss.item()}, len(part))
        passes += 1
        if task.kind == "evaluate":
            site.end()
            continue
        counter = ExampleCounter()
        for _ in range(5):
            counter.add(part)
            optimizer.zero_grad()
            torch.nn.functional.mse_loss(model(part), part.sum(1, keepdim=True)).backward()
            optimizer.step()
        site.submit(model, counter, {})
    print(f"rank {rank} of {dist.get_world_size()}: {passes} passes", flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
