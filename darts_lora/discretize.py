"""From alpha to one rank a layer: argmax, or the best choice under a parameter budget.
Not here: what the result can do (genotype.py), and how alpha came about."""

from __future__ import annotations

from dataclasses import replace
from typing import Literal, get_args

import numpy as np
import torch
from scipy.optimize import Bounds, LinearConstraint, milp
from scipy.sparse import coo_array, vstack
from torch import Tensor

from darts_lora.base.errors import InputError
from darts_lora.genotype import Genotype
from darts_lora.lora.cost import resolve_budget, unit_costs, usable_table
from darts_lora.supernet import Supernet

Method = Literal["argmax", "budget", "proportional"]

MOST_CHOICES = 2**24  # of a layer and a rank; each takes some 100 bytes
GAP = 1e-4  # of the highest total value, which a choice may lack


def discretize(
    searched: Supernet | Genotype,
    method: Method | None = None,
    *,
    budget_rank: float | None = None,
    budget_parameters: int | None = None,
) -> Genotype:
    """One rank for every layer, from a supernet's alphas.

    Args:
        searched: a supernet, or the genotype of a search: its probabilities give another choice.
        method: "argmax": the most probable rank of each layer; "budget": of all choices within the
            budget the one that shares most parameters, in expectation, with an architecture drawn
            from the probabilities (see shared_parameters); "proportional": ranks within the
            budget in proportion to the expected ones, of nested branches between the candidates
            too; both to 0.01 %. Default: "argmax" where no budget is known; else "proportional"
            where alpha was (SearchConfig.arch_update), or "budget".
        budget_rank, budget_parameters: the budget of this choice; default: the search's own.

    Raises:
        InputError: a method that needs a budget without one, argmax with one, a budget that the
            candidate ranks cannot meet, or a genotype without probabilities.
    """
    genotype = searched if isinstance(searched, Genotype) else Genotype.from_supernet(searched)
    if None in (genotype.probabilities, genotype.shapes, genotype.candidates):
        raise InputError("genotype: holds no probabilities; give one that a search wrote")
    shapes = list(genotype.shapes.values())
    unit, ranks = unit_costs(shapes), usable_table(shapes, genotype.candidates)
    costs = unit[:, None] * ranks
    budget = given = resolve_budget(costs, int(unit.sum()), budget_rank, budget_parameters)
    if given is None:
        budget = genotype.found_by.get("budget_parameters")
    probabilities = torch.tensor(
        [genotype.probabilities[name] for name in genotype.shapes], dtype=torch.float64
    )
    if method is None and budget is not None:
        proportional = genotype.found_by.get("arch_update") == "proportional"
        method = "proportional" if proportional else "budget"
    method = method or "argmax"
    _check_method(method, budget, given)
    if method == "argmax":
        choice = probabilities.argmax(-1).tolist()
    elif method == "budget":
        choice = choose(shared_parameters(probabilities, costs), costs, budget)
    else:
        wanted = (probabilities * costs).sum(-1)
        if genotype.branches != "independent":
            _check_size(len(shapes), max(genotype.candidates))
            ranks = usable_table(shapes, genotype.candidates, between=True)
            costs = unit[:, None] * ranks
        choice = choose(proportional_values(wanted, costs), costs, budget)
    ranks = [int(row[k]) for row, k in zip(ranks, choice, strict=True)]
    derived = replace(
        genotype,
        ranks=dict(zip(genotype.shapes, ranks, strict=True)),
        found_by={**genotype.found_by, "discretize": method, "budget_parameters": budget},
    )
    if isinstance(verdict := derived.found_by.get("verdict"), dict):  # of the ranks before
        own = {"chosen_parameters": derived.num_parameters, "budget_parameters": budget}
        derived.found_by["verdict"] = verdict | own
    return derived


def proportional_values(wanted: Tensor, costs: Tensor) -> Tensor:
    """Values of ascending ranks, (N, R), from their costs and what is `wanted` of each layer, (N,),
    in parameters: about wanted * log(cost), whose best choice within a budget is in proportion to
    what is wanted. What a rank adds counts from its middle: whole ranks are shared out as seats are
    by Sainte-Lague's method."""
    middle = (costs[:, 1:] + costs[:, :-1]) / 2
    gains = wanted[:, None] * costs.diff(dim=-1) / middle
    return torch.cat([torch.zeros_like(costs[:, :1]), gains.cumsum(-1)], -1)


def shared_parameters(probabilities: Tensor, costs: Tensor) -> Tensor:
    """Parameters that each candidate shares, in expectation, with a rank R that is drawn from the
    layer's probabilities: E[min(cost(r), cost(R))], (N, K), from (N, K) of ascending ranks.

    The first parameters of a layer that surely wants some are worth more than the last of one that
    may want many: where a layer is undecided between 1 and 16, it gets what is between, and
    the most probable rank of each layer need not add up to what the search held at the budget.
    """
    wanted = probabilities.flip(-1).cumsum(-1).flip(-1)  # that R is at least this candidate
    return (wanted * costs.diff(dim=-1, prepend=torch.zeros_like(costs[:, :1]))).cumsum(-1)


def choose(values: Tensor, costs: Tensor, budget: float) -> list[int]:
    """Index of the choice of each layer, of the highest total value within the budget, from (N, K)
    values and costs.

    Raises:
        InputError: no choice is within the budget, or a value is infinite or NaN.
    """
    if not values.isfinite().all():
        raise InputError("values: some are infinite or NaN, which no choice can be made from")
    return _best_within_budget(values.numpy(), costs.cpu().numpy(), budget)


def _check_method(method: str, budget: float | None, given: float | None) -> None:
    if method not in get_args(Method):
        raise InputError(f"method={method!r}: must be one of {', '.join(get_args(Method))}")
    if method == "argmax" and given is not None:
        raise InputError(
            "method='argmax': keeps to no budget; leave out budget_rank and budget_parameters"
        )
    if method != "argmax" and budget is None:
        raise InputError(f"method={method!r}: give budget_rank or budget_parameters")


def _check_size(layers: int, largest: int) -> None:
    """A file says how many ranks there are to choose from: not more than fit into memory."""
    if layers * largest > MOST_CHOICES:
        raise InputError(
            f"candidates: {layers:,} layers with ranks up to {largest:,} are more than "
            f"{MOST_CHOICES:,} choices; use method=budget, which takes the candidates alone"
        )


def _best_within_budget(values: np.ndarray, costs: np.ndarray, budget: float):
    """A multiple-choice knapsack, solved to GAP as a mixed-integer linear program by HiGHS."""
    layers, candidates = costs.shape
    if costs.min(-1).sum() > budget:
        raise InputError(f"budget_parameters={budget:,.0f}: no choice of ranks is as small")
    values = values / max(np.abs(values).max(), 1e-300)  # HiGHS has absolute tolerances
    index = np.arange(layers * candidates)
    one_each = coo_array((np.ones(index.size), (index // candidates, index)))
    total = coo_array(costs.reshape(1, -1))
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
