"""What each candidate rank of each layer is worth, from what a search measured.
Not here: the measurements (architect.py), alpha (relaxation.py), the choice (discretize.py)."""

from __future__ import annotations

from dataclasses import dataclass, field, fields

import torch
from torch import Tensor

from darts_lora.alpha.prior import smoother
from darts_lora.supernet import Supernet

LEAST = 1e-9  # of the loss: where nothing can be told, the shares decide
GROWTH = 0.5  # what a factor of e on all ranks is worth, of what twice the steps are


@dataclass
class Measured:
    """What a search measured on validation rows, each batch by itself; all in units of the loss.

    Attributes:
        gains: (S, N), what each layer takes off the loss, in S architecture steps (Architect.path).
        energies: (M, N, R), of each layer's singular directions: mean square of the loss's gradient
            of the direction's gate over the rows (Architect.directions); M = 0 before the end.
        growth: (M,), what the loss fell by over the last doubling of the steps.
        cut: (M,), what the loss rises by where all layers are cut to the budget's uniform rank.
        losses: (M,), of the adapter as it is at the end.
        cuts: (M, C), as `cut`, to each candidate rank above 0; C = 0 where a budget is given.
        base: (M,), the loss without an adapter; where a budget is given, of length 0.
    """

    gains: Tensor
    energies: Tensor
    growth: Tensor
    cut: Tensor
    losses: Tensor
    cuts: Tensor = field(default_factory=lambda: torch.zeros(0, 0))
    base: Tensor = field(default_factory=lambda: torch.zeros(0))

    @property
    def loss(self) -> Tensor:
        """The mean of the losses."""
        return self.losses.mean()

    def without(self, fold: int, folds: int) -> Measured:
        """All but every folds-th batch, from the fold-th on."""
        return self._select(fold, folds, False)

    def only(self, fold: int, folds: int) -> Measured:
        """Every folds-th batch, from the fold-th on."""
        return self._select(fold, folds, True)

    def _select(self, fold: int, folds: int, own: bool) -> Measured:
        parts = (getattr(self, part.name) for part in fields(self))
        return Measured(*(p[[(i % folds == fold) is own for i in range(len(p))]] for p in parts))


class Values:
    """Values of ranks: what is lost at once by a cut to a rank, and what more rank lets one gain.

    The first is the measured one. A layer is its singular directions; the loss rises by about the
    sum of the energies of those that are cut off (Fisher information of their gates), scaled so
    that a cut to the uniform rank costs what lasts of it. A run that still learns mends a cut: of
    what it was measured to cost, the part cut / (cut + growth) is taken to last. Where a layer has
    a rank that it needs and no more, this alone finds it.

    The second is what is still to come. Along a curve of uniform ranks the loss falls with their
    logarithm, so a layer's part of it is share * log(rank), and ranks in proportion to the shares
    are best. Its size is that of the fall of the loss over the last doubling of the steps: a search
    that has nothing more to learn counts the cut alone.

    A layer's share is the mean of two estimates that err in unlike ways: its part of the loss that
    the adapter takes off (an integral of gradients along the path from the base model to the
    adapter: Aumann and Shapley; integrated gradients, arXiv 1703.01365), and the root of its
    directions' energy over its cost. Both are drawn to layers of their like (prior.py).

    Args:
        supernet: its layers and candidates.
        budget: trainable parameters; default: the supernet's.
    """

    def __init__(self, supernet: Supernet, budget: float | None = None):
        self.unit, self.ranks = supernet.unit_costs, supernet.layer_ranks
        self.smoother = smoother(list(supernet.layers))
        self.budget = supernet.budget if budget is None else budget
        self.uniform = self.budget / float(self.unit.sum())
        self.cut_rank = round(self.uniform)  # whole, as the cut that is measured

    def table(self, measured: Measured) -> Tensor:
        """The value of each candidate of each layer, (N, K) float64, in units of the loss."""
        return self.at(measured, self.ranks)

    def at(self, measured: Measured, ranks: Tensor) -> Tensor:
        """The value of `ranks`, (N, ...), of each layer, also between integers; their shape."""
        growth = self.growth(measured)
        value = growth * self.shares(measured)[:, None] * logarithm(ranks.flatten(1))
        if len(measured.energies):
            kept = self.kept(measured.energies.double().mean(0))
            value = value + self._cut_scale(measured, kept) * _between(kept, ranks.flatten(1))
        return value.view(ranks.shape)

    def growth(self, measured: Measured) -> float:
        """What a factor of e on all ranks is taken to be worth; before the end, with nothing to
        compare it to, 1."""
        if not len(measured.growth):
            return 1.0
        least = LEAST * max(abs(float(measured.losses.double().mean())), 1e-30)
        return max(GROWTH * float(measured.growth.double().mean()), least)

    def shares(self, measured: Measured) -> Tensor:
        """Of the growth, (N,) float64, sum 1; even over the parameters where nothing was gained."""
        gains = (self.smoother @ measured.gains.double().mean(0)).clamp_min(0)
        parts = [gains * self.unit]
        if len(measured.energies):
            energy = measured.energies.double().mean(0).sum(-1)
            parts.append((self.smoother @ (energy / self.unit).sqrt()).clamp_min(0) * self.unit)
        even = self.unit / self.unit.sum()
        parts = [part / part.sum() if part.sum() > 0 else even for part in parts]
        return torch.stack(parts).mean(0)

    def kept(self, energies: Tensor) -> Tensor:
        """(N, R) energies -> (N, R + 1), the part of all layers' energy that the best r directions
        of a layer have, r from 0 to R."""
        ordered = energies.sort(-1, descending=True).values.cumsum(-1)
        ordered = torch.nn.functional.pad(ordered, (1, 0))
        return ordered / ordered[:, -1].sum().clamp_min(1e-300)

    def _cut_scale(self, measured: Measured, kept: Tensor) -> float:
        """Loss for each part of the energy: what lasts of the uniform cut over what it took."""
        uniform = torch.full((len(kept), 1), float(self.cut_rank), dtype=torch.float64)
        taken = 1 - float(_between(kept, uniform).sum())
        cut, fall = (
            max(float(part.double().mean()), 0.0) if len(part) else 0.0
            for part in (measured.cut, measured.growth)
        )
        return cut * cut / max(cut + fall, 1e-300) / max(taken, 1e-6)


def logarithm(ranks: Tensor) -> Tensor:
    """About log(r) + 2, and 0 at rank 0: each further rank counts from its middle, so that the best
    whole ranks are shared out as seats are by Sainte-Lague's method."""
    steps = torch.arange(int(ranks.max()) + 1, dtype=torch.float64)
    table = (1 / (steps + 0.5)).cumsum(0)
    table = torch.nn.functional.pad(table, (1, 0))
    return _between(table.expand(len(ranks), -1), ranks)


def _between(table: Tensor, ranks: Tensor) -> Tensor:
    """Linear between the columns of (N, R) at (N, ...) ranks; beyond the last as the last."""
    ranks = ranks.clamp(0, table.shape[1] - 1)
    low = ranks.floor().long()
    high = (low + 1).clamp_max(table.shape[1] - 1)
    part = ranks - low
    return (1 - part) * table.gather(1, low) + part * table.gather(1, high)
