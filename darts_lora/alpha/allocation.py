"""Allocation: alpha set so that a budget is shared among layers in proportion to their worth.
Not here: where alpha's gradient comes from, or alpha's descent (architect.py)."""

from __future__ import annotations

import torch
from torch import Tensor

from darts_lora.alpha.prior import Prior
from darts_lora.supernet import Supernet

SLOPES = 4001  # of the table from a mean rank to alpha, between which it is linear
STEEPEST = 500.0  # slope of alpha over all candidates: the mean is as good as the last candidate


class Allocation:
    """Alpha's rule under a budget: expected parameters in proportion to what more of them is worth.

    A layer's worth is w = -dL / d log E[c], what the validation loss falls by when the layer's
    expected parameters E[c] grow by a share, and along alpha's tilt by the cost c it is
    -E[c] (g . (c - E[c])) / Var[c], from alpha's gradient g. Where the loss falls with the log of
    the parameters, as it about does along a curve of uniform ranks, w is a constant of the layer,
    and of all ways to spend a budget the one with E[c] in proportion to w is best: maximise
    sum w log c. So there is no rate and no price: alpha says what all steps so far say together.

    The supernet's own curve is bent more than that, it is thought since the columns of high ranks
    are trained in few samples. Descent on its loss, to where a parameter is worth the same
    everywhere, thus leaves layers too near each other; layers compared at the same rank have that
    in common. Hence gates are drawn, and gradients taken, with one mean rank everywhere, the
    budget's, all through the search (`Supernet.held`), whatever alpha is by then.

    Args:
        supernet: with a budget; alpha, and what its gates are drawn from, are set to be even.
        prior: draws layers to their like while the steps so far disagree.
    """

    def __init__(self, supernet: Supernet, prior: Prior):
        self.supernet, self.prior = supernet, prior
        costs = supernet.costs.float()
        self.least, self.most = costs[:, 0], costs[:, -1]
        # from 0 to 1, alike in all layers but those that are narrower than a candidate
        self.places = costs / costs[:, -1:]
        kinds, self.kind = self.places.unique(dim=0, return_inverse=True)
        self.members = [(self.kind == k).nonzero()[:, 0] for k in range(len(kinds))]
        dense = torch.linspace(-9, 9, SLOPES).sinh()  # around 0
        self.slopes = STEEPEST * dense / dense[-1]
        tilted = (self.slopes[:, None] * kinds[:, None]).softmax(-1)
        self.means = (tilted @ kinds[:, :, None])[..., 0]  # (kinds, SLOPES)
        self._set(supernet.budget / self.most.sum() * self.most)
        supernet.held = supernet.alpha.detach().clone()
        probabilities = supernet.held.softmax(-1).cpu()
        mean = (probabilities * costs).sum(-1, keepdim=True)
        around = costs - mean
        variance = (probabilities * around.square()).sum(-1, keepdim=True)
        self.tilt = -mean * around / variance.clamp_min(1e-6)

    @torch.no_grad()
    def update(self, gradient_sums: Tensor) -> None:
        """Set alpha by its gradients at the even distribution so far, (2, N, K), summed over even
        and over odd steps."""
        self.kind = self.kind.to(gradient_sums.device)
        self.members = [members.to(gradient_sums.device) for members in self.members]
        for name in ("least", "most", "places", "slopes", "means", "tilt"):
            setattr(self, name, getattr(self, name).to(gradient_sums))
        worth = self.worth(gradient_sums)
        self._set(share(worth, self.least, self.most, self.supernet.budget))

    def worth(self, gradient_sums: Tensor) -> Tensor:
        """Of each layer, (N,), summed over the steps, as they and its like let expect."""
        sums = (gradient_sums * self.tilt).sum(-1, keepdim=True)
        smoothed = self.prior.posterior(sums)(sums.sum(0))
        return (smoothed / self.prior.unit.to(smoothed).square())[:, 0]

    def _set(self, expected: Tensor) -> None:
        """Of all distributions with these expected parameters, (N,), alpha is that of largest
        entropy: linear in the rank."""
        place = (expected / self.most).clamp(self.places[:, 0], self.places[:, -1])
        after = torch.empty_like(self.kind)
        for members, means in zip(self.members, self.means, strict=True):
            after.index_copy_(0, members, torch.searchsorted(means, place[members]))
        after = after.clamp(1, SLOPES - 1)
        low, high = self.means[self.kind, after - 1], self.means[self.kind, after]
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
