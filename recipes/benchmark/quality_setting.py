"""Setting and Found: what a way to choose ranks is given, and what it gives back.
Not here: the ways themselves (quality_methods.py, quality_peft.py)."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

from quality_allocation import parameters
from quality_rows import EncodedRows
from quality_training import Plan, Retrainer
from torch import Tensor, nn

from darts_lora import SearchConfig
from darts_lora.config import TrainingConfig


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
    kept: dict[tuple, Any] = field(default_factory=dict)
    """What one-run searches of this process leave for the rest of their runs."""
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

    def batches(self, count: int) -> Iterator[dict[str, Tensor]]:
        """The first training batches of this seed."""
        order = self.rows.batches(self.indices, self.batch_size, self.seed).endless()
        return map(self.rows.batch, itertools.islice(order, count))


@dataclass
class Found:
    """A plan, and what else is worth a look at."""

    ranks: Plan
    notes: dict[str, Any] = field(default_factory=dict)
    """For the cell's file."""
