"""From alpha to branch probabilities or samples: softmax, gumbel, gumbel_hard; entropy.
Not here: what the samples do to a layer (mixed_linear.py) and who trains alpha (architect.py)."""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor

Relaxation = Literal["gumbel_hard", "gumbel", "softmax"]


def gumbel_noise(alpha: Tensor, rows: int | None) -> Tensor:
    """What `sample` draws, of alpha's dtype: (N, K), or (rows, N, K) where rows are given."""
    shape = alpha.shape if rows is None else (rows, *alpha.shape)
    return -torch.empty(shape, dtype=alpha.dtype, device=alpha.device).exponential_().log()


def sample(
    alpha: Tensor,
    relaxation: Relaxation,
    temperature: Tensor | float,
    rows: int | None,
    noise: Tensor | None = None,
) -> Tensor:
    """One draw of branch weights for every layer, in one stacked operation.

    Args:
        alpha: (N, K) architecture weights.
        relaxation: "softmax" is softmax(alpha / temperature), without noise; "gumbel" adds Gumbel
            noise first (arXiv 1611.01144, eq. 2); "gumbel_hard" is its one-hot argmax, exact in
            the forward pass, with the gradient of the soft sample (straight-through). A hard
            sample has the probability softmax(alpha) at any temperature.
        temperature: above 0, a number or a scalar tensor.
        rows: number of independent draws, one per example; None: one for the whole batch.
        noise: of gumbel_noise, to draw the same again; None: fresh noise.

    Returns:
        (N, K), or (rows, N, K); each row sums to 1. Softmax gives (N, K) always.
    """
    if relaxation == "softmax":
        return (alpha / temperature).softmax(-1)
    noise = gumbel_noise(alpha, rows) if noise is None else noise
    soft = ((alpha + noise) / temperature).softmax(-1)
    if relaxation == "gumbel":
        return soft
    hard = torch.zeros_like(soft).scatter_(-1, soft.argmax(-1, keepdim=True), 1.0)
    # exactly one-hot: the difference is 0.0, not a rounding error that leaks into idle branches
    return hard + (soft - soft.detach()) if soft.requires_grad else hard


def temperature_at(progress: float, temperature: tuple[float, float]) -> float:
    """Geometric interpolation from start to end; `progress` of the search in [0, 1]."""
    start, end = temperature
    return start * (end / start) ** progress


def entropies(probabilities: Tensor) -> Tensor:
    """Of each layer's (N, K) probabilities over log K: 0 (decided) to 1, (N,); 0 where K is 1."""
    most = math.log(probabilities.shape[-1]) or 1.0
    return torch.special.entr(probabilities).sum(-1) / most
