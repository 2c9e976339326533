"""What is known of alpha before a search: what ranks cost, which layers are of one type and depth.
Not here: the gradient that it is applied to, or alpha's optimizer (architect.py)."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from darts_lora.lora.parts import layer_type

NEAR = 1 / 6  # of a stack's depth: over it, likeness falls to 1 / e
VARIANCE = 4  # of each layer by itself, the diagonal of the kernel
LEAST = 0.05  # the least correlation of two halves that is reckoned with: noise stays finite


def kernel(names: Sequence[str]) -> Tensor:
    """How alike layers are, (N, N) float64, positive semidefinite, from their module names.

    A name has a type, its parts without the block's number, and a place: the stack of blocks and
    the number in it. Four terms of weight 1: the same type, a near place in the same stack, both,
    and being the same layer.
    """
    parts = [name.split(".") for name in names]
    types = [layer_type(name) for name in names]
    places = [_place(name) for name in parts]
    stacks = [stack for stack, _ in places]
    depth = torch.tensor([number for _, number in places], dtype=torch.float64)
    same_type, same_stack = _equal(types), _equal(stacks)
    sizes = {s: 1 + max(n for t, n in places if t == s) for s in set(stacks)}
    scale = torch.tensor([sizes[s] * NEAR for s in stacks], dtype=torch.float64)
    near = same_stack * torch.exp(-(depth[:, None] - depth).abs() / scale)
    return same_type + near + same_type * near + torch.eye(len(names), dtype=torch.float64)


class Prior:
    """Makes of a noisy gradient of alpha, (N, K), what alpha is to move by.

    A layer's alpha is taken as a variable whose unit is the root of what a rank costs there: what
    counts of a layer is the loss's gradient over its parameters, and the price of parameters moves
    all layers alike. In alpha itself layers of cheap ranks would lag behind, and end with more.

    Of such variables the true gradients of one candidate over the layers are taken for a Gaussian
    process with the covariance of `kernel`, the observed ones have independent noise beside them
    (Rasmussen and Williams, Gaussian Processes for Machine Learning, eq. 2.23). Its variance is
    estimated from two halves of the steps so far: early in a search layers move with their like,
    later by themselves.

    Args:
        names: of the layers.
        noise: factor on the estimate of the noise's variance; 0: no noise is reckoned with.
        costs: (N,), of one rank, the same for all layers; what counts is how they compare.
    """

    def __init__(self, names: Sequence[str], noise: float, costs: Tensor):
        self.noise = noise
        self.values, self.vectors = torch.linalg.eigh(kernel(names))
        self.unit = (costs.mean() / costs).sqrt()[:, None]

    def posterior(self, gradient_sums: Tensor) -> Callable[[Tensor], Tensor]:
        """What turns a gradient, (N, K), into its posterior mean.

        Args:
            gradient_sums: (2, N, K), gradients so far, summed over even and over odd steps.
        """
        unit = self.unit = self.unit.to(gradient_sums)
        if self.noise == 0:
            return lambda gradient: unit.to(gradient).square() * gradient
        self.values, self.vectors = self.values.to(unit), self.vectors.to(unit)
        noise = self.noise * VARIANCE * noise_to_signal(unit * gradient_sums)
        shares = (self.values / (self.values + noise))[:, None]

        def smooth(gradient: Tensor) -> Tensor:
            vectors, own = self.vectors.to(gradient), unit.to(gradient)
            return own * (vectors @ (shares.to(gradient) * (vectors.T @ (own * gradient))))

        return smooth


def correlation(gradient_sums: Tensor) -> Tensor:
    """Of two halves, (2, N, K), over layers and candidates, each candidate's mean over the layers
    taken out (that part says only what is wanted everywhere); a scalar."""
    even, odd = gradient_sums - gradient_sums.mean(1, keepdim=True)
    return (even * odd).sum() / (even.norm() * odd.norm()).clamp_min(1e-30)


def noise_to_signal(gradient_sums: Tensor) -> Tensor:
    """The variance of noise over that of signal in the sum of two halves, a scalar: the halves have
    the signal in common."""
    common = correlation(gradient_sums).clamp_min(LEAST)
    return (1 - common) / (2 * common)


def _place(parts: list[str]) -> tuple[str, int]:
    """(stack, number of the block); a layer that is in no numbered block is a stack of its own."""
    for position, part in enumerate(parts):
        if part.isdecimal():
            return ".".join(parts[:position]), int(part)
    return ".".join(parts), 0


def _equal(labels: list[str]) -> Tensor:
    numbers = torch.tensor([labels.index(label) for label in labels])
    return (numbers[:, None] == numbers).double()
