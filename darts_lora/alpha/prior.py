"""What is known of layers before a search: which are of one type, and near each other.
Not here: what is measured of them (architect.py), or what it is worth (values.py)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from darts_lora.lora.parts import layer_type

NEAR = 1 / 6  # of a stack's depth: over it, likeness falls to 1 / e
NOISE = 1.0  # variance of a measurement's noise over that of what is measured


def smoother(names: Sequence[str], noise: float = NOISE) -> Tensor:
    """What turns measurements of the layers into their posterior means, (N, N) float64.

    What is measured is taken for a Gaussian process over the layers with the covariance of
    `kernel` and independent noise (Rasmussen and Williams, Gaussian Processes for Machine Learning,
    eq. 2.23): a layer is drawn towards those of its type and of near blocks.

    Args:
        names: module names of the layers.
        noise: variance of the noise over that of a layer by itself.
    """
    covariance = kernel(names)
    return torch.linalg.solve(
        covariance + noise * torch.eye(len(names), dtype=torch.float64), covariance
    )


def kernel(names: Sequence[str]) -> Tensor:
    """How alike layers are, (N, N) float64, positive semidefinite, 1 on the diagonal.

    A name has a type, its parts without the block's number, and a place: the stack of blocks and
    the number in it. Four terms of equal weight: the same type, a near place in the same stack,
    both, and being the same layer.
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
    own = torch.eye(len(names), dtype=torch.float64)
    return (same_type + near + same_type * near + own) / 4


def _place(parts: list[str]) -> tuple[str, int]:
    """(stack, number of the block); a layer that is in no numbered block is a stack of its own."""
    for position, part in enumerate(parts):
        if part.isdecimal():
            return ".".join(parts[:position]), int(part)
    return ".".join(parts), 0


def _equal(labels: list[str]) -> Tensor:
    numbers = torch.tensor([labels.index(label) for label in labels])
    return (numbers[:, None] == numbers).double()
