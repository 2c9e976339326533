"""Setting and Found: what a way to choose ranks is given, and what it gives back.
Not here: the ways themselves (quality_methods.py, quality_peft.py)."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

from quality_allocation import parameters
from quality_rows import EncodedRows
from quality_training import Plan, Retrainer
from torch import Tensor, nn

from darts_lora import InputError, SearchConfig
from darts_lora.architect import search_passes
from darts_lora.config import TrainingConfig

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
    search_training: TrainingConfig
    """Steps and batch size of a search."""
    adalora_steps: int
    gradient_batches: int
    validation_fraction: float
    """Share of the rows that a search keeps for alpha."""
    kept: Weights = field(default_factory=dict)
    """Where the training of the plan begins: A (r, in) and B (out, r) of the adapted layers. For
    the method to fill in."""
    judge: Callable[[nn.Module], float | None] | None = None
    """Test loss of a model that a method leaves behind, to be noted; None: not a final plan."""

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
        passes = self.retrainer.training.max_steps
        for steps in range(passes, 0, -1):
            searched = max(1, round(self.search.search_fraction * steps))
            more = math.ceil(search_passes(searched, self.search.arch_every))
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
