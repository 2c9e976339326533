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
LEAST = 1e-3  # of the validation loss: what is worth less is worth nothing


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
    return mean_error(torch.tensor(gains, dtype=torch.float64))


def mean_error(batches: Tensor) -> tuple[float, float]:
    """The mean over batches (at least two), and its standard error."""
    batches = batches.double()
    return float(batches.mean()), float(batches.std()) / math.sqrt(len(batches))


def verdict(supernet: Supernet, found: Found, chosen_parameters: int) -> dict[str, Any]:
    """The figures that say whether the ranks are worth having."""
    measured = found.measured
    steps, seen = len(measured.gains), measured.gains.abs().sum(0)
    enough = steps >= FEWEST and len(measured.energies) >= FOLDS and len(measured.growth) >= FOLDS
    gain, error = predicted_gain(supernet, found) if enough else (None, None)
    cut, cut_error = mean_error(measured.cut) if enough else (None, None)
    dead = [name for name, s in zip(supernet.layers, seen.tolist(), strict=True) if s == 0]
    figures = {
        "early": not enough,
        "architecture_steps": steps,
        "predicted_gain": gain,
        "predicted_gain_error": error,
        "chance": chance(measured.gains) if enough else None,
        "adapter_gain": float(measured.gains.double().mean(0).sum()) if steps else 0.0,
        "uniform_cut": cut,
        "uniform_cut_error": cut_error,
        "validation_loss": float(measured.loss) if enough else None,
        "entropy": float(entropies(supernet.probabilities()).mean()),
        "expected_parameters": float(supernet.expected_parameters()),
        "chosen_parameters": chosen_parameters,
        "budget_parameters": supernet.budget,
        "without_gradient": dead if steps else [],
    }
    return {"learnt": enough and not lacking(figures)} | figures


def lacking(figures: dict[str, Any]) -> list[str]:
    """What speaks against the ranks, in words; nothing: the search learnt which are better.

    The cut is of all layers to the uniform rank. Where it costs nothing, no layer uses more than
    that rank: that layers differ, and that the loss still falls, does not make more rank of use.
    """
    least = LEAST * abs(figures["validation_loss"])
    sure = figures["predicted_gain_error"] * stats.t.ppf(1 - CONFIDENCE, FOLDS - 1)
    words = []
    if not figures["chance"] <= CHANCE:
        words.append("the architecture steps agree no more than noise does")
    if not figures["adapter_gain"] > least:
        words.append(f"the adapter takes no more than {least:.1g} off the loss")
    if not figures["predicted_gain"] > sure:
        words.append("this gain is within its error")
    elif not figures["predicted_gain"] > least:
        words.append(f"this gain is below {least:.1g}, a thousandth of the loss")
    if not figures.get("uniform_cut", math.inf) > least:  # a genotype of before lacks it
        cost = f"{figures['uniform_cut']:.1g} +- {figures['uniform_cut_error']:.1g}"
        words.append(
            f"a cut of all layers to the uniform rank costs {cost}, so more rank is of no use yet"
        )
    return words


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
                f"These ranks may be no better than the uniform rank: an expected gain of {size}, "
                f"beside {against}. But {' and '.join(lacking(figures))}. A uniform rank may do "
                "as well; or search for more steps."
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
