"""Trainable parameters of a choice, the expected cost of alpha, and budgets.
Not here: the choice itself (discretize.py)."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import Tensor

from darts_lora.base.errors import InputError


def parameters_per_rank(*shape: int) -> int:
    """Trainable parameters that one unit of rank costs: of a linear layer (in, out), of a layer of
    experts (experts, in, out), where each expert has its own A and B."""
    *experts, inside, outside = shape
    return math.prod(experts) * (inside + outside)


def usable_ranks(shape: tuple[int, ...], ranks: Iterable[int]) -> list[int]:
    """What each of the ascending candidates `ranks` comes to on a layer of this shape: itself, or,
    where it is above the layer's smaller side, the largest candidate that is not (0: none)."""
    ranks, smaller = list(ranks), min(shape[-2:])
    largest = max((rank for rank in ranks if rank <= smaller), default=0)
    return [min(rank, largest) for rank in ranks]


def usable_table(shapes: Iterable[tuple[int, ...]], candidates: Iterable[int]) -> Tensor:
    """usable_ranks of each layer, (N, K) float64."""
    candidates = list(candidates)
    rows = [usable_ranks(shape, candidates) for shape in shapes]
    return torch.tensor(rows, dtype=torch.float64)


def unit_costs(shapes: Iterable[tuple[int, ...]]) -> Tensor:
    """parameters_per_rank of each layer, (N,) float64."""
    return torch.tensor([parameters_per_rank(*shape) for shape in shapes], dtype=torch.float64)


def rank_costs(shapes: Iterable[tuple[int, ...]], ranks: Iterable[int]) -> Tensor:
    """Trainable parameters of each rank on each layer, (N, K) float64, as if all ranks fitted."""
    return unit_costs(shapes)[:, None] * torch.tensor(list(ranks), dtype=torch.float64)


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
    option, value = "budget_parameters", budget_parameters or 0.0
    budget = value
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
