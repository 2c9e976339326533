"""The genotype at the end of a search, and how it was found.
Not here: the loop (search.py) or a user's trainer (trainer.py) that goes through it."""

from __future__ import annotations

from darts_lora.alpha.verdict import verdict
from darts_lora.architect import Architect
from darts_lora.discretize import discretize
from darts_lora.genotype import Genotype
from darts_lora.supernet import Supernet


def derive_genotype(supernet: Supernet, architect: Architect, run_steps: int) -> Genotype:
    """The genotype at the end of a search; found_by holds how it was found, and the verdict."""
    genotype = discretize(supernet)
    genotype.found_by |= {
        "steps": architect.steps,
        "run_steps": run_steps,
        "seed": supernet.config.seed,
        "verdict": verdict(supernet, architect, genotype.num_parameters),
    }
    return genotype
