"""Whether a search learnt anything: entropy, and how far its ranks are from chance.
Not here: the search, and how figures are shown."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from darts_lora.alpha.prior import correlation
from darts_lora.lora.relaxation import entropies
from darts_lora.supernet import Supernet


def agreement(gradient_sums: Tensor) -> tuple[float, float]:
    """How far two halves of the architecture steps wanted the same, and what chance gives.

    Args:
        gradient_sums: (2, N, K), the loss's gradients of alpha summed over even and over odd steps:
            two halves that saw other batches and other samples.

    Returns:
        The correlation of the halves (prior.py), and the standard deviation of the same figure
        under noise.
    """
    _, layers, candidates = gradient_sums.shape
    # each layer's gradients sum to 0 over the candidates, each candidate's over the layers
    freedom = max((layers - 1) * (candidates - 1), 1)
    return float(correlation(gradient_sums.double().cpu())), 1 / math.sqrt(freedom)


def verdict(supernet: Supernet, gradient_sums: Tensor, chosen: int) -> dict[str, Any]:
    """The figures that say whether another search would find these ranks again.

    Args:
        gradient_sums: (2, N, K), as of agreement.
        chosen: parameters of the genotype.
    """
    halves_agree, by_chance = agreement(gradient_sums)
    seen = gradient_sums.abs().sum((0, 2))  # exactly 0 where the loss never depends on it
    choices = gradient_sums.shape[2] > 1
    dead = [n for n, s in zip(supernet.layers, seen.tolist(), strict=True) if choices and s == 0]
    with torch.no_grad():
        return {
            "learnt": halves_agree > 3 * by_chance,
            "agreement": halves_agree,
            "agreement_by_chance": by_chance,
            "entropy": float(entropies(supernet.probabilities()).mean()),
            "expected_parameters": float(supernet.expected_parameters()),
            "chosen_parameters": chosen,
            "budget_parameters": supernet.budget,
            "without_gradient": dead,
        }


def verdict_text(figures: dict[str, Any]) -> str:
    """The verdict in plain words."""
    halves = (
        f"two halves of the architecture steps agree to {figures['agreement']:.2f} "
        f"(noise: 0 +- {figures['agreement_by_chance']:.2f})"
    )
    if figures["learnt"]:
        first = f"The search learnt which layers need rank: {halves}."
    else:
        first = (
            f"The ranks cannot be told from chance: {halves}. Search for more steps, or with "
            "larger batches."
        )
    size = (
        f"Parameters: {figures['chosen_parameters']:,} chosen, "
        f"{figures['expected_parameters']:,.0f} expected by alpha"
    )
    if figures["budget_parameters"]:
        size += f", budget {figures['budget_parameters']:,.0f}"
    text = f"{first} Entropy {figures['entropy']:.2f} of 1. {size}."
    if dead := figures.get("without_gradient"):
        names = ", ".join(dead[:3]) + (", ..." if len(dead) > 3 else "")
        text += (
            f" The loss depended on {len(dead)} of the layers at no step ({names}): they get the "
            "least rank because nothing was seen of them. Do the rows reach them (images for a "
            "vision tower), and is no gate behind them 0?"
        )
    return text
