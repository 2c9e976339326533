"""Trainable parameters of a choice, the expected cost of alpha, budgets and their multiplier.
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


class BudgetMultiplier:
    """Lagrange multiplier of `expected parameters <= budget`, by dual ascent with damping.

    The multiplier rises while the expectation is above the budget and falls while it is below, so
    no penalty weight has to be tuned. Its unit is the running ratio of the gradient norms of loss
    and cost: rescaling the loss changes nothing. The damping term, proportional to the violation
    (the augmented Lagrangian's), keeps it from overshooting.

    Args:
        budget: trainable parameters.
        rate: rise a step, per relative violation.
        damping: weight of the current violation.
    """

    def __init__(self, budget: float, rate: float = 0.05, damping: float = 2.0):
        self.budget, self.rate, self.damping = float(budget), rate, damping
        self.value: Tensor | float = 0.0
        self.unit: Tensor | float = 0.0
        self.factor: Tensor | float = 0.0
        self.steps = 0

    def step(self, expected: Tensor, loss_gradient: Tensor, cost_gradient: Tensor) -> Tensor:
        """Update on one architecture step; returns the factor of the gradient of expected / budget.

        Args:
            expected: scalar, expected parameters now.
            loss_gradient, cost_gradient: of the loss and of expected / budget, (N, K).
        """
        self.steps += 1
        ratio = loss_gradient.norm() / cost_gradient.norm().clamp_min(1e-12)
        average = max(1 / self.steps, 0.05)
        self.unit = self.unit + average * (ratio - self.unit)
        violation = expected / self.budget - 1
        self.value = (self.value + self.rate * violation).clamp_min(0)
        self.factor = self.unit * (self.value + self.damping * violation).clamp_min(0)
        return self.factor

    def state_dict(self) -> dict[str, float]:
        """The multiplier's state as plain numbers."""
        numbers = {name: float(getattr(self, name)) for name in ("value", "unit", "factor")}
        return {**numbers, "steps": self.steps}

    def load_state_dict(self, state: dict[str, float]) -> None:
        """Restore what state_dict gave."""
        for name in ("value", "unit", "factor"):
            setattr(self, name, torch.tensor(state[name]))
        self.steps = int(state["steps"])
