"""The phases of a run: warm-up, search, handover; temperature, when alpha moves, the genotype.
Not here: the loop (search.py) or a user's trainer (trainer.py) that goes through them."""

from __future__ import annotations

import math

import torch
from transformers import get_scheduler

from darts_lora.alpha.verdict import verdict
from darts_lora.architect import Architect
from darts_lora.base.errors import InputError
from darts_lora.discretize import discretize
from darts_lora.genotype import Genotype
from darts_lora.lora.relaxation import temperature_at
from darts_lora.supernet import Supernet

SEARCH_FRACTION = 0.125  # the default of search_fraction under a budget


class Schedule:
    """Which phase a step of a search is in: warm-up with alpha as it begins, then the search.

    Args:
        supernet: its config gives search_fraction, warmup_steps, arch_every, the temperatures.
        run_steps: weight steps of the whole run.

    Attributes:
        steps: weight steps of the search.

    Raises:
        InputError: the warm-up leaves no step for alpha.
    """

    def __init__(self, supernet: Supernet, run_steps: int):
        self.supernet, self.run_steps, config = supernet, run_steps, supernet.config
        descends = supernet.arch_update == "gradient"
        fraction, warmup = config.search_fraction, config.warmup_steps
        if fraction is None:
            fraction = 1.0 if descends else SEARCH_FRACTION
        self.steps = max(1, round(fraction * run_steps))
        if warmup is None:
            warmup = self.steps // 4 if descends else 0
        self.warmup_steps = warmup
        if warmup >= self.steps:
            raise InputError(
                f"warmup_steps={warmup}: must be below the search's {self.steps} steps "
                f"(search_fraction={fraction:g} of max_steps={run_steps}), or alpha never moves"
            )

    def enter(self, step: int) -> None:
        """Set relaxation and temperature of the supernet for weight step `step` (from 0)."""
        config, searched = self.supernet.config, step - self.warmup_steps
        progress = max(searched, 0) / max(self.steps - self.warmup_steps - 1, 1)
        self.supernet.relaxation = config.relaxation if searched >= 0 else "gumbel_hard"
        self.supernet.temperature = temperature_at(progress, config.temperature)

    def trains_alpha(self, step: int) -> bool:
        """Whether an architecture step follows weight step `step`."""
        searched = step - self.warmup_steps
        return searched >= 0 and searched % self.supernet.config.arch_every == 0

    def arch_scheduler(self, optimizer: torch.optim.Optimizer):
        """The scheduler of alpha's learning rate, over the architecture steps."""
        config = self.supernet.config
        steps = math.ceil((self.steps - self.warmup_steps) / config.arch_every)
        return get_scheduler(config.arch_lr_scheduler, optimizer, 0, steps)


def derive_genotype(supernet: Supernet, architect: Architect, schedule: Schedule) -> Genotype:
    """The genotype at the end of a search, by the choice that suits it (see discretize);
    found_by holds how it was found, and the verdict."""
    genotype, config = discretize(supernet), supernet.config
    genotype.found_by |= {
        "relaxation": config.relaxation,
        "steps": schedule.steps,
        "run_steps": schedule.run_steps,
        "warmup_steps": schedule.warmup_steps,
        "seed": config.seed,
        "verdict": verdict(supernet, architect.gradient_sums, genotype.num_parameters),
    }
    return genotype
