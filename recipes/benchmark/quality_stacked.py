"""A linear layer with several LoRAs, each for rows of its own.
Not here: how they are trained (quality_training.py)."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class StackedLora(nn.Module):
    """A frozen linear layer and S LoRAs on it: of S equal parts of the rows each has its own.

    Attributes:
        a, b: (S, R, in) and (S, out, R), of the dtype of the activations.
        gates: (S, 1, R), the scaling in the columns that a LoRA has, 0 in all others.
        each_token: a list that gathers gates for each token (S, tokens, R), which have gradients,
            of every call; None: the tokens share theirs.
    """

    def __init__(self, base_layer: nn.Module):
        super().__init__()
        self.base_layer = base_layer
        self.a = self.b = self.gates = None
        self.each_token: list[Tensor] | None = None

    def forward(self, x: Tensor) -> Tensor:
        """x (..., in) -> (..., out)."""
        y, parts = self.base_layer(x), len(self.a)
        h = torch.bmm(x.reshape(parts, -1, x.shape[-1]), self.a.mT)
        gates = self.gates
        if self.each_token is not None:
            gates = gates.expand_as(h).detach().clone().requires_grad_()
            self.each_token.append(gates)
        h = h * gates
        return torch.baddbmm(y.view(parts, -1, y.shape[-1]), h, self.b.mT).view(y.shape)

    @property
    def weight(self) -> Tensor:
        """The base layer's: some models ask for its dtype or device."""
        return self.base_layer.weight

    @property
    def bias(self) -> Tensor | None:
        """The base layer's."""
        return self.base_layer.bias
