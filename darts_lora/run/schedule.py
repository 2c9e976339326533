"""The genotype at the end of a search, and how it was found.
Not here: the loop (search.py) or a user's trainer (trainer.py) that goes through it."""

from __future__ import annotations

from typing import Any

from darts_lora.alpha.prediction import at_budget, predicted_sizes
from darts_lora.alpha.sizes import recommended
from darts_lora.alpha.verdict import verdict
from darts_lora.architect import Architect
from darts_lora.discretize import discretize
from darts_lora.genotype import Genotype
from darts_lora.lora.relaxation import distribution
from darts_lora.supernet import Supernet


def derive_genotype(supernet: Supernet, architect: Architect, run_steps: int) -> Genotype:
    """The genotype at the end of a search; found_by holds how it was found, and the verdict.

    Without a budget, that of the recommended size becomes the supernet's, and alpha is set anew for
    it; found_by holds "sizes", what is predicted of each (sizes.py; None: too little was measured).
    """
    share = min(architect.steps / run_steps, 1.0)
    sizes = {"sizes": _recommend(supernet, architect, share)} if supernet.sizes else {}
    genotype = discretize(supernet)
    genotype.found_by |= sizes | {
        "steps": architect.steps,
        "run_steps": run_steps,
        "seed": supernet.config.seed,
        "verdict": verdict(supernet, architect, genotype.num_parameters),
    }
    return genotype


def _recommend(supernet: Supernet, architect: Architect, share: float) -> dict[str, Any] | None:
    """What is predicted of each size; the recommended one becomes the budget."""
    sizes = predicted_sizes(supernet, architect, supernet.config.tolerance, share)
    if sizes is not None:
        place = sizes["points"].index(recommended(sizes))
        there = at_budget(supernet, architect.measured, place)
        supernet.budget = there.values.budget
        architect.values, architect.measured = there.values, there.measured
        table = there.values.table(there.measured)
        alpha, supernet.price = distribution(table, supernet.costs, supernet.budget)
        supernet.alpha.data.copy_(alpha)
    return sizes
