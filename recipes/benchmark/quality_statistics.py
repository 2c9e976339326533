"""What finished cells amount to: means with intervals, parameters at equal loss, agreement, times.
Not here: the cells themselves (quality_cells.py), how figures are shown (quality_tables.py)."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from statistics import mean, median, stdev
from typing import Any

import numpy as np
from quality_publish import read
from scipy.stats import spearmanr, t

Record = dict[str, Any]


def load_cells(path: Path) -> list[Record]:
    """The records of a task's finished cells, of a folder or a packed file; those of random_0 ...
    are all of method random. Final ones of rates that were chosen by fewer seeds of the tuning, and
    no longer are, are left out."""
    _, records = read(path)
    for record in records:
        if record["method"].startswith("random_"):
            record["method"] = "random"
    chosen = _chosen_rates(records)
    return [
        r for r in records if r["stage"] != "final" or _rates(r) == chosen.get(_plans(r), _rates(r))
    ]


def _plans(record: Record) -> tuple[str, int]:
    return record["method"], record["budget"]


def _rates(record: Record) -> tuple[float | None, float | None]:
    return record["find_rate"], record["rate"]


def _chosen_rates(records: Iterable[Record]) -> dict[tuple, tuple]:
    """(method, budget) -> its rates of the lowest mean loss over the seeds of the tuning."""
    tries: dict[tuple, dict[tuple, list[float]]] = {}
    for r in records:
        if r["stage"] == "tune":
            loss = math.inf if r["loss"] is None else r["loss"]
            tries.setdefault(_plans(r), {}).setdefault(_rates(r), []).append(loss)
    return {plans: min(by_rate, key=lambda rates: mean(by_rate[rates]))
            for plans, by_rate in tries.items()}  # fmt: skip


def interval(values: Sequence[float]) -> tuple[float, float]:
    """Mean and half width of its 95 % t-interval; NaN for a single value."""
    if len(values) < 2:
        return mean(values), math.nan
    factor = t.ppf(0.975, len(values) - 1)
    return mean(values), float(factor * stdev(values) / math.sqrt(len(values)))


def parameters_at_loss(
    parameters: Sequence[float], losses: Sequence[float], loss: float
) -> tuple[float, bool]:
    """Where a curve of losses over parameters reaches a loss: linear in the logarithm of the
    parameters; a point is never above one of fewer parameters (the smaller plan would do).

    Returns:
        The parameters, and whether the loss lies on the curve. Of a better one those of the largest
        point (more would be needed), of a worse one those of the smallest (fewer would do).
    """
    order = np.argsort(parameters)
    logs = np.log(np.asarray(parameters, float)[order])
    falling = np.minimum.accumulate(np.asarray(losses, float)[order])
    if not falling[-1] <= loss <= falling[0]:
        return float(np.exp(logs[-1 if loss < falling[-1] else 0])), False
    # the first point that is as good and, of a flat piece, its first
    after = max(int(np.argmax(falling <= loss)), 1)
    fall = falling[after - 1] - falling[after]
    share = (falling[after - 1] - loss) / fall if fall else 0.0
    return float(np.exp(logs[after - 1] + share * (logs[after] - logs[after - 1]))), True


def finals(records: Iterable[Record], method: str, budget: int | None = None) -> list[Record]:
    """A method's judged plans whose training did not diverge."""
    return [
        r
        for r in records
        if (r["stage"], r["method"]) == ("final", method)
        and budget in (None, r["budget"])
        and r["loss"] is not None
    ]


def by_seed(records: Iterable[Record], key: str = "loss") -> dict[int, float]:
    """Seed -> mean over that seed's plans (random ones are several)."""
    groups: dict[int, list[float]] = {}
    for record in records:
        groups.setdefault(record["seed"], []).append(record[key])
    return {seed: mean(values) for seed, values in sorted(groups.items())}


def summarise(records: list[Record]) -> list[Record]:
    """One row for each method and budget; rows of uniform first, then in order of the loss.

    A row has: method, budget, runs, seeds, diverged, parameters, loss and loss_interval,
    exact_match (None where not measured), saved: 1 - parameters / those that the uniform curve
    needs for the same loss, with saved_interval (low, high) and saved_bound (the loss lies beyond
    the curve); behind: loss - that of the search, of the same seeds, with behind_interval;
    and find_seconds, seconds (medians of cells that ran alone, None where none did).
    """
    pairs = {(r["method"], r["budget"]) for r in records if r["stage"] == "final"}
    rows = [_row(records, *pair) for pair in pairs]
    return sorted(rows, key=lambda r: (r["budget"], r["method"] != "uniform", _last(r["loss"])))


def _last(loss: float | None) -> float:
    return math.inf if loss is None else loss


def _row(records: list[Record], method: str, budget: int) -> Record:
    runs = finals(records, method, budget)
    losses = by_seed(runs)
    alone = [r for r in records if r["workers"] == 1 and r.get("stack", 1) == 1]
    tried = [r for r in records if (r["stage"], r["method"], r["budget"]) ==
             ("final", method, budget)]  # fmt: skip
    row = {"method": method, "budget": budget, "runs": len(runs), "seeds": len(losses)}
    row |= {"diverged": len(tried) - len(runs), "loss": None, "parameters": None}
    if not runs:
        return row
    row["loss"], row["loss_interval"] = interval(list(losses.values()))
    row["parameters"] = mean(r["parameters"] for r in runs)
    matches = [r["exact_match"] for r in runs if r.get("exact_match") is not None]
    row["exact_match"] = mean(matches) if matches else None
    searched = by_seed(finals(records, "search", budget))
    behind = [losses[seed] - searched[seed] for seed in losses if seed in searched]
    row["behind"], row["behind_interval"] = interval(behind) if behind else (None, None)
    if method != "uniform":
        row |= saved_parameters(runs, finals(records, "uniform"))
    for key, stage in (("find_seconds", "find"), ("seconds", "final")):
        times = [r["seconds"] for r in alone if (r["method"], r["budget"]) == (method, budget)
                 and r["stage"] == stage and r["seed"] in losses]  # fmt: skip
        row[key] = median(times) if times else None
    return row


def saved_parameters(runs: list[Record], curve: list[Record]) -> Record:
    """What a plan saves on the uniform curve, both as means over the seeds that they share.

    The ratio of a single seed jumps where its curve is flat or not monotone, and a mean of such
    ratios means nothing. The interval is the jackknife's, of the logarithm, by Student's t.
    """
    ranks = sorted({r["budget"] for r in curve})
    losses = [by_seed([r for r in curve if r["budget"] == rank]) for rank in ranks]
    sizes = [next(r["parameters"] for r in curve if r["budget"] == rank) for rank in ranks]
    own_losses, own_sizes = by_seed(runs), by_seed(runs, "parameters")
    seeds = sorted(set(own_losses).intersection(*losses))
    if len(ranks) < 2 or not seeds:
        return {}

    def log_ratio(chosen: Sequence[int]) -> tuple[float, bool]:
        means = [mean(point[seed] for seed in chosen) for point in losses]
        loss = mean(own_losses[seed] for seed in chosen)
        needed, inside = parameters_at_loss(sizes, means, loss)
        return math.log(mean(own_sizes[seed] for seed in chosen) / needed), inside

    ratio, inside = log_ratio(seeds)
    found = {"saved": 1 - math.exp(ratio), "saved_bound": not inside, "saved_interval": None}
    if len(seeds) > 1:
        n = len(seeds)
        without = [log_ratio([s for s in seeds if s != left])[0] for left in seeds]
        half = interval([n * ratio - (n - 1) * value for value in without])[1]
        found["saved_interval"] = (1 - math.exp(ratio + half), 1 - math.exp(ratio - half))
    return found


def headlines(records: list[Record]) -> list[Record]:
    """For each budget at which the search was judged: saved over uniform, and over the best other
    method (both in uniform's parameters at their losses), the expected ranks' Spearman correlation
    between seeds, times over one finetune's and the whole sweep over uniform ranks."""
    rows = summarise(records)
    uniform = [r for r in rows if r["method"] == "uniform"]
    found = []
    for row in rows:
        if row["method"] != "search" or row["loss"] is None:
            continue
        others = [
            r
            for r in rows
            if r["budget"] == row["budget"]
            and r["loss"] is not None
            and not r["method"].startswith(("search", "uniform"))
        ]
        best = min(others, key=lambda r: r["loss"], default=None)
        saved, of_best = row.get("saved"), best and best.get("saved")
        over_best = None if None in (saved, of_best) else 1 - (1 - saved) / (1 - of_best)
        found.append(
            {
                "budget": row["budget"],
                **{key: row.get(key) for key in ("saved", "saved_interval", "saved_bound")},
                "best_other": best and best["method"],
                "saved_over_best": over_best,
                "spearman": agreement(records, row["budget"]),
                **_times(row, uniform),
            }
        )
    return found


def agreement(records: list[Record], budget: int, method: str = "search") -> float | None:
    """Mean Spearman correlation of the expected ranks of searches of different seeds; None with
    fewer than two. Tuning's search, on fewer rows, is none of them."""
    judged = {r["seed"] for r in finals(records, method, budget)}
    ranks = {
        r["seed"]: r["expected_ranks"]
        for r in records
        if (r["stage"], r["method"], r["budget"]) == ("find", method, budget)
        and r["seed"] in judged
        and "expected_ranks" in r
    }
    pairs = list(itertools.combinations(ranks.values(), 2))
    return mean(float(spearmanr(*pair).statistic) for pair in pairs) if pairs else None


def _times(row: Record, uniform: list[Record]) -> Record:
    """Search and finetune over one finetune of the uniform rank, and over the sweep."""
    one = next((r.get("seconds") for r in uniform if r["budget"] == row["budget"]), None)
    sweep = [r.get("seconds") for r in uniform]
    if None in (row.get("find_seconds"), row.get("seconds"), one, *sweep):
        return {"time_of_finetune": None, "time_of_sweep": None}
    whole = row["find_seconds"] + row["seconds"]
    return {"time_of_finetune": whole / one, "time_of_sweep": whole / sum(sweep)}
