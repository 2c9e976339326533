"""What a whole run would come to at each size, from what one search without a budget measured.
Not here: the measurements (architect.py), which size is recommended (sizes.py)."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

from darts_lora.alpha.values import Measured, Values
from darts_lora.alpha.verdict import FEWEST, FOLDS, Found, mean_error, predicted_gain
from darts_lora.supernet import Supernet

SLOPE = 0.28  # of the loss against 1 / sqrt(rank), of what the loss still falls by
SPREAD = 0.5  # standard deviation between tasks, relative: of that, and of the doublings to come
MENDED = 4.0  # cuts as large as what the loss still falls by, of which a run mends all but a fifth


@dataclass
class AtBudget:
    """What was measured, as a search with another budget would look at it."""

    values: Values
    measured: Measured


def at_budget(supernet: Supernet, measured: Measured, place: int) -> AtBudget:
    """As if the budget had been the place-th candidate above 0, all layers at which are `cuts`."""
    budget = float(supernet.costs[:, _places(supernet)[place]].sum())
    cut = replace(measured, cut=measured.cuts[:, place])
    return AtBudget(Values(supernet, budget), cut)


def predicted_sizes(
    supernet: Supernet, found: Found, tolerance: float, share: float
) -> dict[str, Any] | None:
    """The losses that are predicted of whole runs at each candidate rank above 0, uniform and
    searched (sizes.check_sizes says how); None: a budget was given, or too little was measured.

    From the loss L at the end of the search, which fell by d over its last doubling of the steps, a
    run at the largest rank R is taken to fall by F = L - L exp(-n d / L) more, with n doublings to
    come (`doublings` of the search's share of the run's steps). At a uniform rank r it ends above
    that by the larger of

        SLOPE * F * (1 / sqrt(r) - 1 / sqrt(R))    and    c * c / (c + MENDED * F)

    First, what is still to be learnt is what needs rank: the benchmark's measured losses of uniform
    ranks follow such curves, and SLOPE is their mean. Second, c is what the cut to rank r was
    measured to cost, which the rest of the run mends as far as it learns. SPREAD is in the standard
    errors, beside the spread over batches. Searched ranks lie below it by the verdict's predicted
    gain g, of which g b / (g + b) counts where the uniform rank lies b behind.
    """
    measured = found.measured
    few = min(len(measured.base), len(measured.energies), len(measured.growth)) < FOLDS
    if few or len(measured.gains) < FEWEST:
        return None
    loss, loss_error = mean_error(measured.losses)
    fall, fall_error, fall_spread = to_fall(measured, doublings(share))
    ranks = [int(supernet.config.ranks[k]) for k in _places(supernet)]
    behinds = [(0.0, 0.0)]
    for place in reversed(range(len(ranks) - 1)):  # less rank never lacks less
        steepness = SLOPE * (ranks[place] ** -0.5 - ranks[-1] ** -0.5)
        cut, error = _mended(*mean_error(measured.cuts[:, place]), fall)
        behinds.insert(0, max(behinds[0], (steepness * fall, steepness * fall_error), (cut, error)))
    points = []
    for place, (rank, (behind, noise)) in enumerate(zip(ranks, behinds, strict=True)):
        there = at_budget(supernet, measured, place)
        gain, gain_error = _healed(*predicted_gain(supernet, there), behind)
        error = math.hypot(noise, SPREAD * behind)
        errors = loss_error, fall_error, fall_spread, error
        points.append(
            {
                "rank": rank,
                "parameters": int(there.values.budget),
                "uniform": loss - fall + behind,
                "uniform_error": math.hypot(*errors),
                "searched": loss - fall + behind - gain,
                "searched_error": math.hypot(*errors, gain_error),
                "behind": behind,
                "behind_error": error,
            }
        )
    base = float(measured.base.double().mean())
    noise = behinds[0][1]
    return {"base_loss": base, "tolerance": tolerance, "noise": noise, "points": points}


def _mended(cut: float, error: float, fall: float) -> tuple[float, float]:
    """What is left at the end of a run of what a cut costs, and its error."""
    cut, whole = max(cut, 0.0), max(cut, 0.0) + MENDED * fall
    if not whole:
        return 0.0, 0.0
    return cut * cut / whole, error * cut * (whole + MENDED * fall) / whole**2


def doublings(share: float) -> float:
    """How often the sum of the learning rates so far doubles from this share of a run's steps, in
    (0, 1], to its end, on a cosine: what is learnt at a falling rate counts as fewer steps."""
    return -math.log2(share + math.sin(math.pi * share) / math.pi)


def to_fall(measured: Measured, come: float) -> tuple[float, float, float]:
    """What the loss still falls by while the rates double so many times: 0 where it rose; its
    standard error over batches, and between tasks."""
    loss = max(float(measured.loss), 1e-30)
    growth, error = mean_error(measured.growth)
    growth = max(growth, 0.0)
    left = math.exp(-come * growth / loss)
    return loss * (1 - left), come * left * error, SPREAD * come * left * growth


def _healed(gain: float, error: float, most: float) -> tuple[float, float]:
    """The gain of searched ranks, and its error, where the uniform rank lacks `most` in the end: a
    cut is measured in the search, and the rest of the run mends most of what it cost. No plan is
    taken to be better than the largest rank."""
    if gain <= 0 or most <= 0:
        return min(gain, 0.0), error
    part = most / (gain + most)
    return gain * part, error * part**2


def _places(supernet: Supernet) -> list[int]:
    return [k for k, rank in enumerate(supernet.config.ranks) if rank]
