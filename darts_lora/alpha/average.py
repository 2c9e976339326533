"""RunningMean: the weights' mean over their last steps, and its place in the weights' stead.
Not here: what is computed there (architect.py), or when the weights move (weight_step.py)."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor


class RunningMean:
    """Mean of weights over a share of the steps so far.

    Weights that still move at a high rate are off their course by the noise of the last batches,
    and a mean of them is where they would settle if the rate fell (Polyak and Juditsky 1992). Step
    t has a weight that grows with a power of t (polynomial-decay averaging, arXiv 1212.1824).

    Args:
        weights: gives them, the same tensors each time.
        share: of the steps so far, about that over which the mean goes.

    Attributes:
        values: the mean, of each weight's shape, float32 or wider; empty before `update`.
        steps: number of updates.
    """

    def __init__(self, weights: Callable[[], Sequence[Tensor]], share: float):
        self.weights, self.power = weights, 1 / share
        self.values: list[Tensor] = []
        self.steps = 0

    @torch.no_grad()
    def update(self) -> None:
        """Take in the weights as they are now."""
        weights = [w.to(torch.promote_types(w.dtype, torch.float32)) for w in self.weights()]
        self.steps += 1
        if not self.values:
            self.values = [w.clone() for w in weights]
        torch._foreach_lerp_(self.values, weights, (self.power + 1) / (self.steps + self.power))

    def load(self, values: list[Tensor], steps: int) -> None:
        """Go on from the mean after so many updates, wherever `values` are."""
        pairs = zip(values, self.weights() if values else [], strict=True)
        self.values = [value.to(weight.device) for value, weight in pairs]
        self.steps = steps

    @contextlib.contextmanager
    def in_place(self, values: list[Tensor] | None = None):
        """Inside, the weights' tensors hold `values` (default: the mean); behind it what they held
        before, bit for bit."""
        with torch.no_grad():
            weights = _local(self.weights())
            values = _local(self.values if values is None else values)
            kept = torch._foreach_mul(weights, 1)  # a copy in few launches
            torch._foreach_copy_(weights, values)
        try:
            yield
        finally:
            torch._foreach_copy_(weights, kept)


def _local(tensors: Sequence[Tensor]) -> list[Tensor]:
    """This process's part of sharded tensors (FSDP2), in the same memory; others as they are."""
    return [(t.to_local() if isinstance(t, DTensor) else t).detach() for t in tensors]
