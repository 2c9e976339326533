"""Ranks within a budget: from gains of ranks, in proportion, uniformly on some layers, by chance.
Not here: where the numbers come from (quality_methods.py, quality_peft.py)."""

from __future__ import annotations

from collections.abc import Collection, Sequence

import torch
from torch import Tensor

from darts_lora import InputError
from darts_lora.discretize import choose
from darts_lora.lora.cost import parameters_per_rank, rank_costs

Plan = dict[str, int]
Shapes = dict[str, tuple[int, int]]


def parameters(plan: Plan, shapes: Shapes) -> int:
    """Trainable parameters of a plan, counted as the search counts them."""
    return sum(rank * parameters_per_rank(*shapes[name]) for name, rank in plan.items())


def largest_gain(
    gains: dict[str, Tensor], shapes: Shapes, candidates: Sequence[int], budget: float
) -> Plan:
    """The candidate ranks of the largest total gain within the budget, by the search's discretizer.

    Args:
        gains: layer -> (R,), what each further unit of rank is worth; R at least the largest
            candidate.
        shapes: layer -> (in, out).
    """
    names = list(shapes)
    cumulative = torch.stack([torch.cat([g.new_zeros(1), g.cumsum(0)]) for g in
                              (gains[name].double().cpu() for name in names)])  # fmt: skip
    value = cumulative[:, list(candidates)]
    # to a scale at which the program's absolute tolerances do not matter
    value = 1e3 * value / value[:, -1].sum().clamp_min(1e-300)
    choice = choose(value, rank_costs([shapes[n] for n in names], candidates), budget)
    return {name: candidates[k] for name, k in zip(names, choice, strict=True)}


def energy_spectrum(matrix: Tensor, rank: int) -> Tensor:
    """Squares of the first `rank` singular values, (rank,) float64: the energy that each further
    unit of rank keeps (Eckart-Young). By the smaller Gram matrix: much faster than the SVD."""
    matrix = matrix.double()
    gram = matrix @ matrix.T if matrix.shape[0] < matrix.shape[1] else matrix.T @ matrix
    values = torch.linalg.eigvalsh(gram).flip(0).clamp_min(0)[:rank]
    return torch.cat([values, values.new_zeros(rank - len(values))])


def product_spectrum(b: Tensor, a: Tensor) -> Tensor:
    """Squares of the singular values of B A, (R,), by QR of both factors: B (out, R), A (R, in)."""
    small = torch.linalg.qr(b.float()).R @ torch.linalg.qr(a.float().T).R.T
    return torch.linalg.svdvals(small).square()


def proportional_gains(score: Tensor, rank: int) -> Tensor:
    """Gains of score * log(1 + r), (rank,): the largest total under a budget gives each layer a
    rank (and 1) in proportion to its score over its cost."""
    r = torch.arange(1, rank + 1, dtype=torch.float64)
    return float(score) * (torch.log1p(r) - torch.log(r))


def random_choice(costs: Tensor, budget: float, generator: torch.Generator) -> list[int]:
    """Raise random layers to random candidates until no raise fits into the budget; an index a
    layer, from (N, K) costs."""
    layers, candidates = costs.shape
    choice = [0] * layers
    total = costs[:, 0].sum()
    for move in torch.randperm(layers * candidates, generator=generator).tolist():
        layer, candidate = divmod(move, candidates)
        raised = total + costs[layer, candidate] - costs[layer, choice[layer]]
        if candidate > choice[layer] and raised <= budget:
            choice[layer], total = candidate, raised
    return choice


def scaled_to_budget(ranks: Plan, shapes: Shapes, capacity: Plan, budget: float) -> Plan:
    """`ranks` times budget over their parameters: rounded down, then up by one where the rest is
    largest, as long as the budget allows (largest remainders).

    For methods that count singular values instead of parameters.
    """
    factor = budget / max(parameters(ranks, shapes), 1)
    plan = {name: min(int(factor * rank), capacity[name]) for name, rank in ranks.items()}
    for name in sorted(ranks, key=lambda n: plan[n] - factor * ranks[n]):
        raised = {**plan, name: plan[name] + 1}
        wanted = plan[name] < min(factor * ranks[name], capacity[name])
        if wanted and parameters(raised, shapes) <= budget:
            plan = raised
    return plan


def uniform_on(names: Collection[str], shapes: Shapes, capacity: Plan, budget: float) -> Plan:
    """The budget shared evenly by the layers in `names`, rank 0 elsewhere: two neighbouring ranks
    in turn, so that the total is reached.

    Raises:
        InputError: no such layer.
    """
    if not names:
        raise InputError("no layer of that kind among the targets")
    plan, share, used = dict.fromkeys(shapes, 0), 0.0, 0
    whole = sum(parameters_per_rank(*shapes[name]) for name in names)
    for name in names:
        cost = parameters_per_rank(*shapes[name])
        share += budget * cost / whole
        plan[name] = min(int((share - used) / cost + 1e-9), capacity[name])
        used += plan[name] * cost
    return plan
