"""A linear layer with several LoRAs, or several of itself, each for rows of its own.
Not here: how they are trained (quality_training.py)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from darts_lora import InputError
from darts_lora.lora.targets import outside


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


class StackedLinear(nn.Module):
    """S linear layers that are trained in full: of S equal parts of the rows each has its own.

    Attributes:
        a, b: weights (S, out, in) and biases (S, out), of the dtype of the activations; no biases:
            (S, 0).
    """

    def __init__(self):
        super().__init__()
        self.a = self.b = None

    def forward(self, x: Tensor) -> Tensor:
        """x (rows, ..., in) -> (rows, ..., out)."""
        y = torch.bmm(x.reshape(len(self.a), -1, x.shape[-1]), self.a.mT)
        if self.b.shape[1]:
            y = y + self.b[:, None]
        return y.view(*x.shape[:-1], -1)


def linear_modules(model: nn.Module, names: list[str]) -> list[str]:
    """The linear modules that are, or are in, these modules of the model.

    Raises:
        InputError: others have parameters there.
    """
    found = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    found = [name for name in found if not outside([name], names)]
    known = {p for name in found for p in model.get_submodule(name).parameters()}
    for name in names:
        if not known.issuperset(model.get_submodule(name).parameters()):
            raise InputError(f"{name}: only linear modules can be trained in full here")
    return found
