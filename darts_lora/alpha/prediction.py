"""What a whole run would come to at each size, from what one search without a budget measured.
Not here: the measurements (architect.py), which size is recommended (sizes.py)."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from darts_lora.alpha.values import Measured, Values
from darts_lora.alpha.verdict import FEWEST, FOLDS, Found, predicted_gain
from darts_lora.supernet import Supernet

TO_COME = 1.5  # falls as that over the last doubling of the steps, to the end of a run
SLOPE = 0.44  # of the loss against 1 / sqrt(rank), of what the loss still falls by
SPREAD = 0.3  # standard deviation of that, relative, between tasks


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


def predicted_sizes(supernet: Supernet, found: Found, tolerance: float) -> dict[str, Any] | None:
    """The losses that are predicted of whole runs at each candidate rank above 0, uniform and
    searched (sizes.check_sizes says how); None: a budget was given, or too little was measured.

    From the loss L at the end of the search, which fell by d over its last doubling of the steps, a
    run at the largest rank R is taken to come to L exp(-TO_COME d / L): falls of one share each. At
    a uniform rank r it ends above that by

        SLOPE * (L - L exp(-TO_COME d / L)) * (1 / sqrt(r) - 1 / sqrt(R))

    for what is still to be learnt is what needs rank. On four tasks of the benchmark the measured
    losses of uniform ranks follow such a curve. SLOPE is its mean; SPREAD is in the standard
    errors, beside the spread over batches. Searched ranks lie below it by the verdict's predicted
    gain g, of which g b / (g + b) counts where the uniform rank lies b behind.
    """
    measured = found.measured
    few = min(len(measured.base), len(measured.energies), len(measured.growth)) < FOLDS
    if few or len(measured.gains) < FEWEST:
        return None
    loss, loss_error = mean_error(measured.losses)
    to_come, error = to_fall(measured)
    points = []
    ranks = [int(supernet.config.ranks[k]) for k in _places(supernet)]
    for place, rank in enumerate(ranks):
        steepness = SLOPE * (rank**-0.5 - ranks[-1] ** -0.5)
        behind = steepness * to_come
        behind_error = steepness * math.hypot(error, SPREAD * to_come)
        there = at_budget(supernet, measured, place)
        gain, gain_error = _healed(*predicted_gain(supernet, there), behind)
        points.append(
            {
                "rank": rank,
                "parameters": int(there.values.budget),
                "uniform": loss - to_come + behind,
                "uniform_error": math.hypot(loss_error, error, behind_error),
                "searched": loss - to_come + behind - gain,
                "searched_error": math.hypot(loss_error, error, behind_error, gain_error),
                "behind": behind,
                "behind_error": behind_error,
            }
        )
    base = float(measured.base.double().mean())
    return {"base_loss": base, "tolerance": tolerance, "points": points}


def to_fall(measured: Measured) -> tuple[float, float]:
    """What the loss still falls by to the end of a run, and its standard error; 0 where it rose."""
    loss = max(float(measured.loss), 1e-30)
    growth, error = mean_error(measured.growth)
    left = math.exp(-TO_COME * max(growth, 0.0) / loss)
    return loss * (1 - left), TO_COME * left * error


def _healed(gain: float, error: float, most: float) -> tuple[float, float]:
    """The gain of searched ranks, and its error, where the uniform rank lacks `most` in the end: a
    cut is measured in the search, and the rest of the run mends most of what it cost. No plan is
    taken to be better than the largest rank."""
    if gain <= 0 or most <= 0:
        return min(gain, 0.0), error
    part = most / (gain + most)
    return gain * part, error * part**2


def mean_error(batches: Tensor) -> tuple[float, float]:
    """The mean over batches (at least two), and its standard error."""
    batches = batches.double()
    return float(batches.mean()), float(batches.std()) / math.sqrt(len(batches))


def _places(supernet: Supernet) -> list[int]:
    return [k for k, rank in enumerate(supernet.config.ranks) if rank]
