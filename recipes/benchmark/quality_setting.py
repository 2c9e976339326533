"""Setting and Found: what a way to choose ranks is given, and what it gives back; ranks within a
budget. Not here: the ways themselves (quality_methods.py, quality_rivals.py, quality_peft.py)."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from quality_rows import EncodedRows
from quality_training import Plan, Retrainer
from torch import Tensor

from darts_lora import InputError, SearchConfig
from darts_lora.architect import search_passes
from darts_lora.discretize import choose
from darts_lora.lora.cost import parameters_per_rank, rank_costs

Shapes = dict[str, tuple[int, int]]
Weights = dict[str, tuple[Tensor, Tensor]]


@dataclass
class Setting:
    """What a method may use to choose ranks; test rows are not among it."""

    retrainer: Retrainer
    rows: EncodedRows
    indices: list[int]
    """Rows that may be used."""
    budget_rank: int
    seed: int
    rate: float | None
    """Learning rate of what the method trains to find ranks, None where it trains nothing."""
    search: SearchConfig
    validation_fraction: float
    """Share of the rows that a search keeps for alpha."""
    kept: Weights = field(default_factory=dict)
    """Where the training of the plan begins: A (r, in) and B (out, r) of the adapted layers. For
    the method to fill in."""

    @property
    def budget(self) -> int:
        """Trainable parameters."""
        uniform = dict.fromkeys(self.retrainer.shapes, self.budget_rank)
        return parameters(uniform, self.retrainer.shapes)

    @property
    def batch_size(self) -> int:
        return self.retrainer.training.batch_size

    def steps_with_search(self) -> tuple[int, int]:
        """Weight steps of a run that begins with a search and has as many passes (batches that go
        forward and backward) as a finetune of the task; and how many of these the search takes."""
        training = self.retrainer.training
        passes, part = training.max_steps, training.validation_batch_size / training.batch_size
        for steps in range(passes, 0, -1):
            searched = max(1, round(self.search.search_fraction * steps))
            more = math.ceil(part * search_passes(searched, self.search.arch_every))
            if steps + more <= passes:
                return steps, searched + more
        raise InputError(f"max_steps={passes}: too few for a search and a step behind it")

    def batches(self, count: int) -> Iterator[dict[str, Tensor]]:
        """The first training batches of this seed."""
        order = self.rows.batches(self.indices, self.batch_size, self.seed).endless()
        return map(self.rows.batch, itertools.islice(order, count))


@dataclass
class Found:
    """A plan, and what else is worth a look at."""

    ranks: Plan
    notes: dict[str, Any] = field(default_factory=dict)
    """For the cell's file. Of a plan that is not trained from scratch with all steps of the task
    taken, run_steps and read, as of a Retraining."""

    @classmethod
    def diverged(cls, setting: Setting, reason: str) -> Found:
        """A learning rate too high is a result: nothing is adapted."""
        return cls(dict.fromkeys(setting.retrainer.shapes, 0), {"diverged": reason})


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


def largest_values(values: dict[str, Tensor], shapes: Shapes, budget: float) -> dict[str, Tensor]:
    """One threshold for the units of rank of all layers: from the largest value down, each that
    still fits into the budget.

    Args:
        values: layer -> (R,), of each unit of rank.

    Returns:
        Layer -> (R,) of bool: which are kept.
    """
    kept = {name: torch.zeros(len(v), dtype=torch.bool) for name, v in values.items()}
    costs = {name: parameters_per_rank(*shapes[name]) for name in values}
    units = [(v, name, i) for name, row in values.items() for i, v in enumerate(row.tolist())]
    for _, name, i in sorted(units, key=lambda unit: -unit[0]):
        if costs[name] <= budget:
            kept[name][i] = True
            budget -= costs[name]
    return kept


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
