"""How large should the adapter be? A recommendation from predicted losses, and its words.
Not here: the prediction (prediction.py), how figures are shown (views/)."""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any

import numpy as np

from darts_lora.base.bounds import is_real
from darts_lora.base.errors import InputError

RATE_TEXT = (
    "Sizes are compared at the search's own learning_rate. On four tasks of the benchmark the best "
    "rate fell with the rank, to a half or a quarter from rank 1 to rank 32: try the finetune at "
    "twice and at half of it, too."
)
FIGURES = ("uniform", "uniform_error", "searched", "searched_error", "behind", "behind_error")


def check_sizes(sizes: Any) -> None:
    """Whether these are what prediction.predicted_sizes gives: None, or a mapping of

    - base_loss: validation loss of the base model;
    - tolerance: of the loss gained over it, which a recommended adapter may lack;
    - noise: standard error over batches of what the smallest rank lies behind;
    - points: a mapping for each uniform rank, from the smallest on, with rank, parameters (count)
      and FIGURES: the loss that is predicted of a whole run (uniform ranks; searched ranks of as
      many parameters), what the uniform one lies behind that of the largest rank, and the standard
      errors of each.

    Raises:
        InputError: they are something else.
    """
    if sizes is None:
        return
    ok = isinstance(sizes, dict) and all(is_real(sizes.get(n)) for n in ("base_loss", "noise"))
    ok = ok and is_real(sizes.get("tolerance")) and 0 <= sizes["tolerance"] < 1
    points = sizes.get("points") if ok else None
    ok = ok and isinstance(points, list) and bool(points) and all(map(_is_point, points))
    ok = ok and all(a["rank"] < b["rank"] for a, b in pairwise(points))
    if not ok:
        raise InputError(
            f"genotype: sizes={sizes!r:.100}: must give base_loss, noise, a tolerance and points, "
            f"in order of their ranks, with rank, parameters, {', '.join(FIGURES)}"
        )


def gained(sizes: dict[str, Any]) -> float:
    """What the largest adapter is predicted to take off the base model's loss."""
    return sizes["base_loss"] - sizes["points"][-1]["uniform"]


def recommended(sizes: dict[str, Any], tolerance: float | None = None) -> dict[str, Any]:
    """The smallest point that is predicted to lack at most this share (default: its own) of what
    the largest one gains over the base model; the smallest of all where that gains nothing. Noise
    does not decide: where it hides what rank is worth, too much costs parameters, too little may
    cost what is gained."""
    share = sizes["tolerance"] if tolerance is None else tolerance
    most = share * gained(sizes) if gained(sizes) > 0 else math.inf
    return next(p for p in sizes["points"] if p["behind"] <= most or p is sizes["points"][-1])


def predicted_loss(sizes: dict[str, Any], parameters: float, curve: str) -> float | None:
    """What is predicted of an adapter of so many parameters on one of the curves ("uniform",
    "searched"): linear in their logarithm; None outside of them."""
    counts = [math.log(point["parameters"]) for point in sizes["points"]]
    place = math.log(parameters) if parameters > 0 else -math.inf
    if not counts[0] <= place <= counts[-1]:
        return None
    return float(np.interp(place, counts, [point[curve] for point in sizes["points"]]))


def matters(sizes: dict[str, Any]) -> bool:
    """Whether the smallest rank is predicted to lack anything, beyond twice the noise."""
    return sizes["points"][0]["behind"] > 2 * sizes["noise"]


def sizes_text(sizes: dict[str, Any] | None) -> str:
    """The recommendation in plain words; None: nothing was predicted."""
    if sizes is None:
        return (
            "Too early to tell how much rank is needed: the budget is half of the largest "
            "candidate. Search for more steps, or give budget_rank."
        )
    first, last, best = sizes["points"][0], sizes["points"][-1], recommended(sizes)
    size = f"rank {best['rank']} ({best['parameters']:,} parameters)"
    gain, share = gained(sizes), sizes["tolerance"]
    if gain <= 0:
        return (
            f"No rank is predicted to take anything off the base model's loss of "
            f"{sizes['base_loss']:.3g}: this search cannot tell how much rank is needed. It takes "
            f"{size}."
        )
    if len(sizes["points"]) == 1:
        return f"There is one candidate rank: {size}."
    lacks = f"{first['behind']:.2g} +- {sizes['noise']:.1g}"
    of = f"of the {gain:.3g} that rank {last['rank']} gains over the base model"
    if best is first and not matters(sizes):
        return f"Rank does not matter here within noise: take {size}. It lacks {lacks} {of}."
    if best is first:
        return (
            f"Rank hardly matters here: take {size}. It lacks {lacks} {of}, at most the tolerance "
            f"of {share:.2g}."
        )
    unsure = ""
    if not matters(sizes):
        unsure = (
            f" Rank {first['rank']} lacks {lacks}, within noise: a longer search may tell more."
        )
    lacks = f"{best['behind']:.2g} +- {best['behind_error']:.1g}"
    return (
        f"Recommended size: {size}, the smallest that is predicted to lack at most {share:.2g} "
        f"{of}. It lacks {lacks}.{unsure}"
    )


def _is_point(point: Any) -> bool:
    if not isinstance(point, dict):
        return False
    counts = (point.get("rank"), point.get("parameters"))
    ok = all(type(count) is int and 0 < count < 2**63 for count in counts)
    return ok and all(is_real(point.get(name)) for name in FIGURES)
