"""Distributions over candidate ranks as logits: the even one, that of values and a price; entropy.
Not here: what candidates are worth (values.py), what gates do in a layer (mixed_linear.py)."""

from __future__ import annotations

import math

import torch
from torch import Tensor

SPREAD = 8  # temperatures of alpha in the values' mean range
LOWEST = -60.0  # of alpha below a layer's best: its probability is still a float32 above 0


def even(ranks: Tensor, costs: Tensor, budget: float) -> Tensor:
    """Logits, (N, K) float64: as much entropy as a mean rank allows that is alike on all layers
    and costs the budget.

    Args:
        ranks, costs: (N, K), of each candidate on each layer.
        budget: expected parameters.
    """
    places = ranks / ranks.max(-1, keepdim=True).values.clamp_min(1)
    alpha = -_price(torch.zeros_like(costs), places, costs, budget) * places
    return alpha - alpha.mean(-1, keepdim=True)


def distribution(values: Tensor, costs: Tensor, budget: float) -> tuple[Tensor, float]:
    """alpha, (N, K) float64, and the price of a parameter in it: softmax(alpha) has the most
    entropy of all distributions of its expected value that cost the budget.

    Args:
        values, costs: (N, K), of each candidate on each layer.
        budget: expected parameters.

    Returns:
        value / temperature - price * cost, each layer's best at 0; and the price.
    """
    spread = (values.max(-1).values - values.min(-1).values).mean()
    scaled = values * (SPREAD / spread) if spread > 0 else torch.zeros_like(values)
    price = _price(scaled, costs, costs, budget)
    alpha = scaled - price * costs
    return (alpha - alpha.max(-1, keepdim=True).values).clamp_min(LOWEST), price


def entropies(probabilities: Tensor) -> Tensor:
    """Of each layer's (N, K) probabilities over log K: 0 (decided) to 1, (N,); 0 where K is 1."""
    most = math.log(probabilities.shape[-1]) or 1.0
    return torch.special.entr(probabilities).sum(-1) / most


def _price(scaled: Tensor, tilt: Tensor, costs: Tensor, budget: float) -> float:
    """The price p at which softmax(scaled - p * tilt) costs the budget, by bisection."""

    def expected(price: float) -> float:
        return float(((scaled - price * tilt).softmax(-1) * costs).sum())

    low, high = -1.0, 1.0
    while expected(high) > budget and high < 1e6:
        high *= 2
    while expected(low) < budget and low > -1e6:
        low *= 2
    for _ in range(100):
        price = (low + high) / 2
        low, high = (price, high) if expected(price) > budget else (low, price)
    return (low + high) / 2
