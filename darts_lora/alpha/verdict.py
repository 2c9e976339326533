"""Will the found ranks beat the uniform rank, by about how much, and how sure is that?
Not here: the search, and how figures are shown."""

from __future__ import annotations

import math
from typing import Any, Protocol

import torch
from scipy import stats
from torch import Tensor

from darts_lora.alpha.choice import choose
from darts_lora.alpha.values import Measured, Values
from darts_lora.lora.relaxation import entropies
from darts_lora.supernet import Supernet

FOLDS = 4  # parts of the validation batches, each judged by ranks of the others
FEWEST = 8  # architecture steps that say anything
CHANCE = 0.01  # the most that is believed
CONFIDENCE = 0.05  # one-sided, that the gain is above 0
LEAST = 1e-3  # of the validation loss: a smaller gain of the adapter is none


class Found(Protocol):
    """What of an Architect a verdict needs."""

    values: Values
    measured: Measured


def chance(steps: Tensor, draws: int = 9999, seed: int = 0) -> float:
    """The probability that noise alone agrees as far as the steps do: a test by random signs.

    Noise of mean 0 is as likely with its sign turned. So the norm of the mean over the steps,
    each layer scaled by its own size, is compared with that under random signs of whole steps: what
    layers have in common in a step, and how they differ in size, are in it.

    Args:
        steps: (S, ...), what each of S architecture steps measured.
        draws: random signs (count).

    Returns:
        A p-value, at least 1 / (draws + 1).
    """
    flat = steps.double().flatten(1)
    flat = flat / flat.norm(dim=0).clamp_min(1e-300)
    gram = flat @ flat.T  # the norm of a signed sum needs no more
    generator = torch.Generator().manual_seed(seed)
    signs = torch.randint(2, (draws, len(flat)), generator=generator).double() * 2 - 1
    norms = ((signs @ gram) * signs).sum(1)
    return float((1 + (norms >= gram.sum() * (1 - 1e-12)).sum()) / (draws + 1))


def predicted_gain(supernet: Supernet, found: Found) -> tuple[float, float]:
    """What the ranks take off the loss beyond the uniform rank, and its standard error.

    Each part of the validation batches judges ranks that the others chose: what was chosen by
    luck is worth nothing there.
    """
    values, measured, gains = found.values, found.measured, []
    uniform = torch.full((len(values.unit), 1), values.uniform, dtype=torch.float64)
    for fold in range(FOLDS):
        others = values.table(measured.without(fold, FOLDS))
        choice = torch.tensor(choose(others, supernet.costs, values.budget))
        own = measured.only(fold, FOLDS)
        chosen = values.at(own, values.ranks.gather(1, choice[:, None]))
        gains.append(float(chosen.sum() - values.at(own, uniform).sum()))
    mean = sum(gains) / FOLDS
    return mean, math.sqrt(sum((g - mean) ** 2 for g in gains) / (FOLDS - 1) / FOLDS)


def verdict(supernet: Supernet, found: Found, chosen_parameters: int) -> dict[str, Any]:
    """The figures that say whether the ranks are worth having."""
    measured = found.measured
    steps, seen = len(measured.gains), measured.gains.abs().sum(0)
    enough = steps >= FEWEST and len(measured.energies) >= FOLDS and len(measured.growth) >= FOLDS
    gain, error = predicted_gain(supernet, found) if enough else (None, None)
    total = float(measured.gains.double().mean(0).sum()) if steps else 0.0
    probability = chance(measured.gains) if enough else None
    learnt = bool(
        enough
        and probability <= CHANCE
        and total > LEAST * abs(float(measured.loss))
        and gain > error * stats.t.ppf(1 - CONFIDENCE, FOLDS - 1)
    )
    dead = [name for name, s in zip(supernet.layers, seen.tolist(), strict=True) if s == 0]
    return {
        "learnt": learnt,
        "early": not enough,
        "architecture_steps": steps,
        "predicted_gain": gain,
        "predicted_gain_error": error,
        "chance": probability,
        "adapter_gain": total,
        "validation_loss": float(measured.loss) if enough else None,
        "entropy": float(entropies(supernet.probabilities()).mean()),
        "expected_parameters": float(supernet.expected_parameters()),
        "chosen_parameters": chosen_parameters,
        "budget_parameters": supernet.budget,
        "without_gradient": dead if steps else [],
    }


def verdict_text(figures: dict[str, Any]) -> str:
    """The verdict in plain words."""
    steps = figures["architecture_steps"]
    if figures["early"]:
        first = (
            f"Too early to tell: {steps} architecture steps say nothing (at least {FEWEST}). "
            "Search for more steps (max_steps or search_fraction)."
        )
    else:
        size = f"{figures['predicted_gain']:.2g} +- {figures['predicted_gain_error']:.1g}"
        against = f"a validation loss of {figures['validation_loss']:.3g}"
        if figures["learnt"]:
            first = (
                f"These ranks are expected to beat the uniform rank by {size}, beside {against}."
            )
        else:
            first = (
                f"These ranks cannot be told from chance: an expected gain of {size} over the "
                f"uniform rank, beside {against}. A uniform rank may do as well; or search for "
                "more steps."
            )
    sizes = (
        f"Parameters: {figures['chosen_parameters']:,} chosen, budget "
        f"{figures['budget_parameters']:,.0f}"
    )
    text = f"{first} {sizes}."
    if dead := figures.get("without_gradient"):
        names = ", ".join(dead[:3]) + (", ..." if len(dead) > 3 else "")
        text += (
            f" The loss depended on {len(dead)} of the layers at no step ({names}): nothing was "
            "seen of them. Do the rows reach them (images for a vision tower), and is no gate "
            "behind them 0?"
        )
    return text
