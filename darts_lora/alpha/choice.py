"""The best choice of one candidate for each layer within a budget.
Not here: what candidates are worth (values.py), what becomes of the choice (discretize.py)."""

from __future__ import annotations

import numpy as np
from scipy.optimize import Bounds, LinearConstraint, milp
from scipy.sparse import coo_array, vstack
from torch import Tensor

from darts_lora.base.errors import InputError
from darts_lora.base.quiet import without_native_lines

GAP = 1e-4  # of the highest total value, which a choice may lack


def choose(values: Tensor, costs: Tensor, budget: float) -> list[int]:
    """Index of the choice of each layer, of the highest total value within the budget, from (N, K)
    values and costs.

    Raises:
        InputError: no choice is within the budget, or a value is infinite or NaN.
    """
    if not values.isfinite().all():
        raise InputError("values: some are infinite or NaN, which no choice can be made from")
    return _best_within_budget(values.numpy(), costs.cpu().numpy(), budget)


def _best_within_budget(values: np.ndarray, costs: np.ndarray, budget: float):
    """A multiple-choice knapsack, solved to GAP as a mixed-integer linear program by HiGHS."""
    layers, candidates = costs.shape
    if costs.min(-1).sum() > budget:
        raise InputError(f"budget_parameters={budget:,.0f}: no choice of ranks is as small")
    values = values / max(np.abs(values).max(), 1e-300)  # HiGHS has absolute tolerances
    index = np.arange(layers * candidates)
    one_each = coo_array((np.ones(index.size), (index // candidates, index)))
    total = coo_array(costs.reshape(1, -1))
    with without_native_lines():
        solution = milp(
            c=-values.reshape(-1),
            integrality=np.ones(index.size),
            bounds=Bounds(0, _may_be_best(-values, costs, budget).reshape(-1)),
            constraints=LinearConstraint(
                vstack([one_each, total]).tocsr(),
                lb=np.append(np.ones(layers), -np.inf),
                ub=np.append(np.ones(layers), budget),
            ),
            options={"mip_rel_gap": GAP},
        )
    if solution.x is None:
        raise InputError(
            f"budget_parameters={budget:,.0f}: no choice of ranks meets it ({solution.message})"
        )
    return solution.x.reshape(layers, candidates).argmax(-1).tolist()


def _may_be_best(losses: np.ndarray, costs: np.ndarray, budget: float) -> np.ndarray:
    """Which candidates can be part of the best choice, (N, K) of 0.0 and 1.0.

    With a price for each parameter, every layer's best candidate alone gives a bound that no choice
    within the budget goes below. A candidate that is worse than that by more than the distance from
    the bound to a choice at hand is out (reduced cost fixing). Of thousands of layers, the choice
    at hand is so near the bound that it alone is left, and the program has nothing to do.
    """
    rows = np.arange(len(losses))
    low, high = 0.0, 1.0  # the price: too low, and high enough to be within the budget
    while costs[rows, (losses + high * costs).argmin(-1)].sum() > budget:
        low, high = high, 2 * high
    for _ in range(100):
        price = (low + high) / 2
        within = costs[rows, (losses + price * costs).argmin(-1)].sum() <= budget
        low, high = (low, price) if within else (price, high)
    priced = losses + high * costs
    bound = priced.min(-1).sum() - high * budget
    choice = priced.argmin(-1)
    while True:  # spend what is left of the budget where a parameter helps most
        left = budget - costs[rows, choice].sum()
        extra = costs - costs[rows, choice][:, None]
        gains = (losses[rows, choice][:, None] - losses) / np.where(extra > 0, extra, np.inf)
        gains[extra > left] = 0
        layer, candidate = np.unravel_index(gains.argmax(), gains.shape)
        if gains[layer, candidate] <= 0:
            break
        choice[layer] = candidate
    distance = losses[rows, choice].sum() - bound
    if distance <= GAP * abs(bound):
        return np.eye(losses.shape[1])[choice]
    rounding = 1e-12 * (1 + np.abs(losses).sum() + high * budget)
    return (priced - priced.min(-1, keepdims=True) <= distance + rounding).astype(float)
