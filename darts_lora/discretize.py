"""From alpha to one rank a layer: argmax, or the best choice under a parameter budget.
Not here: what the result can do (genotype.py), and how alpha came about."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, Literal, get_args

import torch

from darts_lora.alpha.choice import choose
from darts_lora.alpha.sizes import recommended
from darts_lora.base.bounds import is_real
from darts_lora.base.errors import InputError
from darts_lora.genotype import Genotype
from darts_lora.lora.cost import resolve_budget, unit_costs, usable_table
from darts_lora.supernet import Supernet

Method = Literal["argmax", "budget"]


def discretize(
    searched: Supernet | Genotype,
    method: Method | None = None,
    *,
    budget_rank: float | None = None,
    budget_parameters: int | None = None,
    tolerance: float | None = None,
) -> Genotype:
    """One of the candidate ranks for every layer, from a supernet's alphas.

    Args:
        searched: a supernet, or the genotype of a search: its probabilities give another choice.
        method: "argmax": the most probable rank of each layer; "budget": of all choices within the
            budget the most probable one, each parameter that it saves counted at the price that
            alpha has it at (relaxation.py), to 0.01 %. Default: "argmax" where no budget is known.
        budget_rank, budget_parameters: the budget of this choice; default: the search's own.
        tolerance: in their place: the budget that the search recommends at this tolerance.

    Raises:
        InputError: a method that needs a budget without one, argmax with one, a budget that the
            candidate ranks cannot meet, a tolerance beside a budget or of a search that recommended
            none, or a genotype without probabilities.
    """
    genotype = searched if isinstance(searched, Genotype) else Genotype.from_supernet(searched)
    if None in (genotype.probabilities, genotype.shapes, genotype.candidates):
        raise InputError("genotype: holds no probabilities; give one that a search wrote")
    shapes = list(genotype.shapes.values())
    unit, ranks = unit_costs(shapes), usable_table(shapes, genotype.candidates)
    costs = unit[:, None] * ranks
    sizes = genotype.found_by.get("sizes")
    if tolerance is not None:
        _check_tolerance(tolerance, sizes, budget_rank, budget_parameters)
        sizes = sizes | {"tolerance": tolerance}
        budget_parameters = recommended(sizes)["parameters"]
    budget = given = resolve_budget(costs, int(unit.sum()), budget_rank, budget_parameters)
    if given is None:
        budget = genotype.found_by.get("budget_parameters")
    probabilities = torch.tensor(
        [genotype.probabilities[name] for name in genotype.shapes], dtype=torch.float64
    )
    method = method or ("argmax" if budget is None else "budget")
    _check_method(method, budget, given)
    if method == "argmax":
        choice = probabilities.argmax(-1).tolist()
    elif budget >= costs.max(-1).values.sum():  # all fits; no price tells one choice from another
        choice = costs.argmax(-1).tolist()
    else:
        values = probabilities.clamp_min(1e-300).log() + genotype.found_by.get("price", 0) * costs
        choice = choose(values, costs, budget)
    chosen = [int(row[k]) for row, k in zip(ranks, choice, strict=True)]
    derived = replace(
        genotype,
        ranks=dict(zip(genotype.shapes, chosen, strict=True)),
        found_by={**genotype.found_by, "discretize": method, "budget_parameters": budget},
    )
    if sizes is not None:
        derived.found_by["sizes"] = sizes
    if isinstance(verdict := derived.found_by.get("verdict"), dict):  # of the ranks before
        own = {"chosen_parameters": derived.num_parameters, "budget_parameters": budget}
        derived.found_by["verdict"] = verdict | own
    return derived


def _check_tolerance(
    tolerance: float, sizes: Any, budget_rank: float | None, budget_parameters: int | None
) -> None:
    if not (is_real(tolerance) and 0 <= tolerance < 1):
        raise InputError(f"tolerance={tolerance!r:.100}: must be a number in [0, 1)")
    budgets = {"budget_rank": budget_rank, "budget_parameters": budget_parameters}
    for option, value in budgets.items():
        if value is not None:
            raise InputError(f"tolerance={tolerance} and {option}={value}: give one of them")
    if sizes is None:
        raise InputError(
            f"tolerance={tolerance}: the search recommended no size, as it had a budget or was too "
            "short; search without a budget, or give budget_rank"
        )


def _check_method(method: str, budget: float | None, given: float | None) -> None:
    if method not in get_args(Method):
        raise InputError(f"method={method!r}: must be one of {', '.join(get_args(Method))}")
    if method == "argmax" and given is not None:
        raise InputError(
            "method='argmax': keeps to no budget; leave out budget_rank and budget_parameters"
        )
    if method != "argmax" and budget is None:
        raise InputError(f"method={method!r}: give budget_rank or budget_parameters")
