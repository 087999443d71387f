"""A model of equally large fp32 tensors with the benchmark's first values."""

import numpy as np
import torch


def values(tensor: int, elements: int) -> torch.Tensor:
    drawn = np.random.default_rng(tensor).integers(0, 1 << 16, elements, np.uint16)
    return torch.from_numpy(drawn.astype(np.float32))


class Model(torch.nn.Module):
    def __init__(self, tensors: int, elements: int) -> None:
        super().__init__()
        for i in range(tensors):
            self.register_parameter(f"layer{i:03d}", torch.nn.Parameter(values(i, elements)))
