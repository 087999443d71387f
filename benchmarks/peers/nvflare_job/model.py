"""A model of equal fp32 tensors."""

import torch


class Model(torch.nn.Module):
    def __init__(self, tensors: int, elements: int) -> None:
        super().__init__()
        for i in range(tensors):
            self.register_parameter(f"layer{i:03d}", torch.nn.Parameter(torch.zeros(elements)))
