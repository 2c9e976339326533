"""Trainable parameters of a choice, the expected cost of alpha, and budgets.
Not here: the choice itself (discretize.py)."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from darts_lora.errors import InputError


def parameters_per_rank(in_features: int, out_features: int) -> int:
    """Trainable parameters that one unit of rank costs on a linear layer."""
    return in_features + out_features


def rank_costs(shapes: Iterable[tuple[int, int]], ranks: Iterable[int]) -> Tensor:
    """Trainable parameters of each candidate on each layer, (N, K) float64, from (in, out)."""
    per_rank = torch.tensor([parameters_per_rank(*s) for s in shapes], dtype=torch.float64)
    return per_rank[:, None] * torch.tensor(list(ranks), dtype=torch.float64)


def resolve_budget(
    costs: Tensor, per_rank: int, budget_rank: float | None, budget_parameters: int | None
) -> float | None:
    """The budget in parameters, None where neither is given.

    Args:
        costs: (N, K) from rank_costs.
        per_rank: parameters of a uniform LoRA of rank 1 on the same layers.

    Raises:
        InputError: both are given, or the budget is below the smallest or above the largest choice.
    """
    if budget_rank is not None and budget_parameters is not None:
        raise InputError(
            f"budget_rank={budget_rank} and budget_parameters={budget_parameters}: give one of them"
        )
    if budget_rank is None and budget_parameters is None:
        return None
    option, value = "budget_parameters", budget_parameters
    budget = budget_parameters
    if budget_rank is not None:
        option, value, budget = "budget_rank", budget_rank, budget_rank * per_rank
    smallest, largest = costs.min(1).values.sum().item(), costs.max(1).values.sum().item()
    if not smallest <= budget <= largest:
        low, high = smallest / per_rank, largest / per_rank
        raise InputError(
            f"{option}={value}: {budget:,.0f} parameters are outside what the candidates allow, "
            f"{smallest:,.0f} to {largest:,.0f} parameters (uniform rank {low:g} to {high:g})"
        )
    return float(budget)
