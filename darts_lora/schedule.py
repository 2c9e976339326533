"""The phases of a search, and how it ends: warm-up, temperature, when alpha moves, the genotype.
Not here: the loop (search.py) or a user's trainer (trainer.py) that goes through them."""

from __future__ import annotations

import math

import torch
from transformers import get_scheduler

from darts_lora.architect import Architect
from darts_lora.discretize import discretize
from darts_lora.errors import InputError
from darts_lora.genotype import Genotype
from darts_lora.relaxation import temperature_at
from darts_lora.supernet import Supernet
from darts_lora.verdict import verdict


class Schedule:
    """Which phase a step of a search is in: warm-up with alpha as it begins, then the search.

    Args:
        supernet: its config gives warmup_steps (default: a quarter), arch_every, the temperatures.
        steps: weight steps of the whole search.

    Raises:
        InputError: the warm-up leaves no step for alpha.
    """

    def __init__(self, supernet: Supernet, steps: int):
        self.supernet, self.steps = supernet, steps
        wanted = supernet.config.warmup_steps
        self.warmup_steps = steps // 4 if wanted is None else wanted
        if self.warmup_steps >= steps:
            raise InputError(
                f"warmup_steps={self.warmup_steps}: must be below max_steps={steps}, "
                "or alpha is never trained"
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
        "order": config.order,
        "steps": schedule.steps,
        "warmup_steps": schedule.warmup_steps,
        "seed": config.seed,
        "verdict": verdict(supernet, architect, genotype),
    }
    return genotype
