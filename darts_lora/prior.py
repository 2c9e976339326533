"""What is known of alpha before a search: layers of one type and of one depth want like ranks.
Not here: the gradient that it is applied to, or alpha's optimizer (architect.py)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

NEAR = 1 / 6  # of a stack's depth: over it, likeness falls to 1 / e


def kernel(names: Sequence[str]) -> Tensor:
    """How alike layers are, (N, N) float64, positive semidefinite, from their module names.

    A name has a type, its parts without the block's number, and a place: the stack of blocks and
    the number in it. Four terms of weight 1: the same type, a near place in the same stack, both,
    and being the same layer.
    """
    parts = [name.split(".") for name in names]
    types = [".".join("*" if part.isdecimal() else part for part in name) for name in parts]
    places = [_place(name) for name in parts]
    stacks = [stack for stack, _ in places]
    depth = torch.tensor([number for _, number in places], dtype=torch.float64)
    same_type, same_stack = _equal(types), _equal(stacks)
    sizes = {s: 1 + max(n for t, n in places if t == s) for s in set(stacks)}
    scale = torch.tensor([sizes[s] * NEAR for s in stacks], dtype=torch.float64)
    near = same_stack * torch.exp(-(depth[:, None] - depth).abs() / scale)
    return same_type + near + same_type * near + torch.eye(len(names), dtype=torch.float64)


def smoother(names: Sequence[str], noise: float) -> Tensor:
    """What turns a noisy gradient of alpha, (N, K), into its posterior mean, (N, N) float32.

    The true gradients of one candidate over the layers are taken for a Gaussian process with the
    covariance of `kernel`, the observed ones have independent noise beside them (Rasmussen and
    Williams, Gaussian Processes for Machine Learning, eq. 2.23).

    Args:
        names: of the layers.
        noise: its variance, in units of the variance of each of the kernel's terms; 0: no noise,
            so each layer's gradient stays as it is.
    """
    identity = torch.eye(len(names), dtype=torch.float64)
    if noise == 0:
        return identity.float()  # to the last bit
    likeness = kernel(names)
    return torch.linalg.solve(likeness + noise * identity, likeness).float()


def _place(parts: list[str]) -> tuple[str, int]:
    """(stack, number of the block); a layer that is in no numbered block is a stack of its own."""
    for position, part in enumerate(parts):
        if part.isdecimal():
            return ".".join(parts[:position]), int(part)
    return ".".join(parts), 0


def _equal(labels: list[str]) -> Tensor:
    numbers = torch.tensor([labels.index(label) for label in labels])
    return (numbers[:, None] == numbers).double()
