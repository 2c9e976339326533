"""Small models that several test files search.
Not here: tests."""

import torch
from torch import nn


class Residual(nn.Module):
    """`depth` residual layers of one width: blocks.0 ... blocks.{depth - 1}."""

    def __init__(self, width: int = 16, depth: int = 4):
        super().__init__()
        self.blocks = nn.ModuleList(nn.Linear(width, width) for _ in range(depth))

    def forward(self, x):
        for block in self.blocks:
            x = x + torch.tanh(block(x))
        return x


def residual(width: int = 16, depth: int = 4, seed: int = 0) -> Residual:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return Residual(width, depth)


def randomise(supernet, seed: int = 0) -> None:
    """Give B and alpha values that a search could have given them."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for layer in supernet.layers.values():
            for parameter in (layer.lora_B, layer.alpha):
                parameter.normal_(generator=generator)
