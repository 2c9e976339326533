"""Allocation: alpha set so that a budget is shared among layers in proportion to their worth.
Not here: where alpha's gradient comes from, or alpha's descent (architect.py)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from darts_lora.prior import Prior
from darts_lora.supernet import Supernet

SLOPES = 4001  # of the table from a mean rank to alpha, between which it is linear
HELD = 0.9  # of its steps, in which alpha stays even
STEEPEST = 500.0  # slope of alpha over all candidates: the mean is as good as the last candidate


class Allocation:
    """Alpha's rule under a budget: expected parameters in proportion to what more of them is worth.

    A layer's worth is w = -dL / d log E[c], what the validation loss falls by when the layer's
    expected parameters E[c] grow by a share, and along alpha's tilt by the cost c it is
    -E[c] (g . (c - E[c])) / Var[c], from alpha's gradient g. Where the loss falls with the log of
    the parameters, as it about does along a curve of uniform ranks, w is a constant of the layer,
    and of all ways to spend a budget the one with E[c] in proportion to w is best: maximise
    sum w log c. So there is no rate and no price: each step takes the mean of the steps so far.

    The supernet's own curve is bent more than that, it is thought since the columns of high ranks
    are trained in few samples. Descent on its loss, to where a parameter is worth the same
    everywhere, thus leaves layers too near each other; layers compared at the same rank have that
    in common. Hence alpha stays at one mean rank everywhere, the budget's, for nine tenths of its
    steps, and goes to the shares of w over the last; there a step counts in the mean by the part of
    the way that is still to go. So the last weight steps are at about the ranks that are found.

    Args:
        supernet: with a budget; alpha is set to the even distribution.
        prior: draws layers to their like while the steps so far disagree.
        steps: after which alpha is at the shares (count); stopped before, it may be still even.

    Attributes:
        sums: (2, N, 1), the layers' worths, weighted, summed over even and odd steps.
        taken: number of steps so far.
    """

    def __init__(self, supernet: Supernet, prior: Prior, steps: int):
        self.supernet, self.prior, self.steps, self.taken = supernet, prior, steps, 0
        self.costs = supernet.costs.float()
        self.sums = torch.zeros(2, len(self.costs), 1)
        self.places = self.costs[0] / self.costs[0, -1]  # the same in all layers, from 0 to 1
        dense = torch.linspace(-9, 9, SLOPES).sinh()  # around 0
        self.slopes = STEEPEST * dense / dense[-1]
        self.means = (self.slopes[:, None] * self.places).softmax(-1) @ self.places
        self._set(self._even())

    @torch.no_grad()
    def step(self, gradient: Tensor) -> None:
        """Take in the validation loss's gradient of alpha, (N, K), and set alpha."""
        self._follow(gradient)
        probabilities = self.supernet.probabilities()
        mean = (probabilities * self.costs).sum(-1, keepdim=True)
        around = self.costs - mean
        variance = (probabilities * around.square()).sum(-1, keepdim=True)
        worth = -mean * (gradient * around).sum(-1, keepdim=True) / variance.clamp_min(1e-6)
        self.sums[self.taken % 2] += (1 - self._way()) * worth
        self.taken += 1
        least, most = self.costs[:, 0], self.costs[:, -1]
        shares = share(self.worth(), least, most, self.supernet.budget)
        self._set(self._even().lerp(shares, self._way()))

    def worth(self) -> Tensor:
        """Of each layer, (N,), summed, as the steps so far and its like let expect."""
        smoothed = self.prior.posterior(self.sums)(self.sums.sum(0))
        return (smoothed / self.prior.unit.to(smoothed).square())[:, 0]

    def state_dict(self) -> dict[str, Any]:
        """What a resumed search needs beside alpha."""
        return {"sums": self.sums, "taken": self.taken}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what state_dict gave."""
        self.sums, self.taken = state["sums"], state["taken"]

    def _way(self) -> float:
        """The part of the way from even to the shares that is gone."""
        return min(max(self.taken / self.steps - HELD, 0) / (1 - HELD), 1.0)

    def _follow(self, gradient: Tensor) -> None:
        """Move what is computed with to where the gradient is."""
        for name in ("costs", "sums", "places", "slopes", "means"):
            setattr(self, name, getattr(self, name).to(gradient))

    def _even(self) -> Tensor:
        """The budget at one mean rank everywhere, (N,)."""
        most = self.costs[:, -1]
        return self.supernet.budget / most.sum() * most

    def _set(self, expected: Tensor) -> None:
        """Of all distributions with these expected parameters, (N,), alpha is that of largest
        entropy: linear in the rank."""
        place = (expected / self.costs[:, -1]).clamp(self.places[0], self.places[-1])
        after = torch.searchsorted(self.means, place).clamp(1, SLOPES - 1)
        low, high = self.means[after - 1], self.means[after]
        part = ((place - low) / (high - low).clamp_min(1e-12)).clamp(0, 1)
        slope = self.slopes[after - 1].lerp(self.slopes[after], part)
        alpha = slope[:, None] * self.places
        self.supernet.alpha.data.copy_(alpha - alpha.mean(-1, keepdim=True))


def share(worth: Tensor, least: Tensor, most: Tensor, total: float) -> Tensor:
    """Parts of `total` in proportion to `worth`, each at least `least` and at most `most`; all
    (N,). What is worth nothing, or less, gets as good as `least`."""
    worth = worth.clamp_min(0) / worth.abs().max().clamp_min(1e-30) + 1e-6 * most / most.mean()
    # the sum is piecewise linear in the factor: find its piece, and the place within
    factors = torch.cat([least / worth, most / worth]).sort().values
    sums = (factors[:, None] * worth).clamp(least, most).sum(-1)
    after = torch.searchsorted(sums, sums.new_full((), total)).clamp(1, len(sums) - 1)
    rise = (sums[after] - sums[after - 1]).clamp_min(1e-30)
    part = ((total - sums[after - 1]) / rise).clamp(0, 1)
    factor = factors[after - 1].lerp(factors[after], part)
    return (factor * worth).clamp(least, most)
