"""What finished cells amount to: means with intervals, parameters at equal loss, agreement, times.
Not here: the cells themselves (quality_cells.py), how figures are shown (quality_tables.py)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from statistics import mean
from typing import Any

import numpy as np
from pandas import DataFrame, Series
from quality_publish import read
from scipy.stats import sem, t

Row = dict[str, Any]
SOMETIMES = ("exact_match", "expected_ranks", "stack")  # columns that not every cell has
PLANS = ["method", "budget"]


def load_cells(path: Path) -> DataFrame:
    """A task's finished cells, of a folder or a packed file; random_0 and so on are method random.
    Final ones of rates that were chosen by fewer seeds of the tuning, and no longer are, are left
    out."""
    cells = table(read(path)[1])
    cells["method"] = cells.method.replace(r"random_\d+", "random", regex=True)
    cells["rates"] = list(zip(cells.find_rate.fillna(0), cells.rate.fillna(0), strict=True))
    tries = cells[cells.stage == "tune"].assign(loss=lambda tune: tune.loss.fillna(math.inf))
    means = tries.groupby([*PLANS, "rates"]).loss.mean().reset_index("rates")
    best = means.sort_values("loss", kind="stable").groupby(PLANS).rates.first()
    chosen = cells.join(best.rename("chosen"), on=PLANS).chosen
    return cells[(cells.stage != "final") | chosen.isna() | (cells.rates == chosen)]


def table(records: Sequence[Row]) -> DataFrame:
    """Records of cells; the loss of a training that diverged is NaN."""
    cells = DataFrame(records)
    cells = cells.reindex(columns=cells.columns.union(SOMETIMES, sort=False))
    return cells.astype({"loss": float}).fillna({"stack": 1})


def interval(values: Sequence[float]) -> tuple[float, float]:
    """Mean and half width of its 95 % t-interval; NaN for a single value."""
    if len(values) < 2:
        return mean(values), math.nan
    return mean(values), float(t.ppf(0.975, len(values) - 1) * sem(values))


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


def finals(cells: DataFrame, method: str, budget: int | None = None) -> DataFrame:
    """A method's judged plans whose training did not diverge."""
    found = cells[(cells.stage == "final") & (cells.method == method) & cells.loss.notna()]
    return found if budget is None else found[found.budget == budget]


def by_seed(cells: DataFrame, key: str = "loss") -> Series:
    """Seed -> mean over that seed's plans (random ones are several)."""
    return cells.groupby("seed")[key].mean()


def summarise(cells: DataFrame) -> list[Row]:
    """One row for each method and budget; rows of uniform first, then in order of the loss.

    A row has: method, budget, runs, seeds, diverged, parameters, loss and loss_interval,
    exact_match (None where not measured), saved: 1 - parameters / those that the uniform curve
    needs for the same loss, with saved_interval (low, high) and saved_bound (the loss lies beyond
    the curve); behind: loss - that of the search, of the same seeds, with behind_interval;
    and find_seconds, seconds (medians of cells that ran alone, None where none did).
    """
    plans = cells[cells.stage == "final"][PLANS].drop_duplicates()
    rows = [_row(cells, *plan) for plan in plans.itertuples(index=False)]

    def order(row: Row) -> tuple:
        loss = math.inf if row["loss"] is None else row["loss"]
        return row["budget"], row["method"] != "uniform", loss

    return sorted(rows, key=order)


def _row(cells: DataFrame, method: str, budget: int) -> Row:
    own = cells[(cells.method == method) & (cells.budget == budget)]
    runs = finals(own, method)
    row = {"method": method, "budget": budget, "runs": len(runs), "seeds": runs.seed.nunique()}
    row |= {"diverged": sum(own.stage == "final") - len(runs), "loss": None, "parameters": None}
    if runs.empty:
        return row
    losses, matches = by_seed(runs), runs.exact_match.dropna()
    row["loss"], row["loss_interval"] = interval(losses)
    row["parameters"] = runs.parameters.mean()
    row["exact_match"] = None if matches.empty else matches.mean()
    behind = (losses - by_seed(finals(cells, "search", budget))).dropna()
    row["behind"], row["behind_interval"] = (None, None) if behind.empty else interval(behind)
    if method != "uniform":
        row |= saved_parameters(runs, finals(cells, "uniform"))
    alone = own[(own.workers == 1) & (own["stack"] == 1)]
    for key, stage in (("find_seconds", "find"), ("seconds", "final")):
        times = alone[(alone.stage == stage) & alone.seed.isin(losses.index)].seconds
        row[key] = None if times.empty else times.median()
    return row


def saved_parameters(runs: DataFrame, curve: DataFrame) -> Row:
    """What a plan saves on the uniform curve, both as means over the seeds that they share.

    The ratio of a single seed jumps where its curve is flat or not monotone, and a mean of such
    ratios means nothing. The interval is the jackknife's, of the logarithm, by Student's t.
    """
    points = curve.pivot_table(index="seed", columns="budget", values="loss")
    sizes = curve.groupby("budget").parameters.first()
    own = runs.groupby("seed")[["loss", "parameters"]].mean()
    shared = points.join(own, how="inner").dropna()
    if len(sizes) < 2 or shared.empty:
        return {}

    def log_ratio(seeds: DataFrame) -> tuple[float, bool]:
        means = seeds.mean()
        needed, inside = parameters_at_loss(sizes, means[sizes.index], means["loss"])
        return math.log(means["parameters"] / needed), inside

    ratio, inside = log_ratio(shared)
    found = {"saved": 1 - math.exp(ratio), "saved_bound": not inside, "saved_interval": None}
    if (n := len(shared)) > 1:
        without = [log_ratio(shared.drop(seed))[0] for seed in shared.index]
        half = interval([n * ratio - (n - 1) * value for value in without])[1]
        found["saved_interval"] = (1 - math.exp(ratio + half), 1 - math.exp(ratio - half))
    return found


def headlines(cells: DataFrame) -> list[Row]:
    """For each budget at which the search was judged: saved over uniform, and over the best other
    method (both in uniform's parameters at their losses), the expected ranks' Spearman correlation
    between seeds, times over one finetune's and the whole sweep over uniform ranks."""
    rows = [row for row in summarise(cells) if row["loss"] is not None]
    found = []
    for row in (row for row in rows if row["method"] == "search"):
        same = [other for other in rows if other["budget"] == row["budget"]]
        others = [r for r in same if not r["method"].startswith(("search", "uniform"))]
        best = min(others, key=lambda r: r["loss"], default={"method": None})
        saved, of_best = row.get("saved"), best.get("saved")
        line = {key: row.get(key) for key in ("budget", "saved", "saved_interval", "saved_bound")}
        line["best_other"] = best["method"]
        unknown = None in (saved, of_best)
        line["saved_over_best"] = None if unknown else 1 - (1 - saved) / (1 - of_best)
        line["spearman"] = agreement(cells, row["budget"])
        found.append(line | _times(row, [r for r in rows if r["method"] == "uniform"]))
    return found


def agreement(cells: DataFrame, budget: int, method: str = "search") -> float | None:
    """Mean Spearman correlation of the expected ranks of searches of different seeds; None with
    fewer than two. Tuning's search, on fewer rows, is none of them."""
    found = cells[(cells.stage == "find") & (cells.method == method) & (cells.budget == budget)]
    found = found[found.seed.isin(finals(cells, method, budget).seed)].set_index("seed")
    ranks = DataFrame(found.expected_ranks.dropna().to_dict())
    if (n := ranks.shape[1]) < 2:
        return None
    return float(ranks.corr("spearman").to_numpy()[np.triu_indices(n, 1)].mean())


def _times(row: Row, uniform: list[Row]) -> Row:
    """Search and finetune over one finetune of the uniform rank, and over the sweep."""
    one = next((r.get("seconds") for r in uniform if r["budget"] == row["budget"]), None)
    sweep = [r.get("seconds") for r in uniform]
    if None in (row.get("find_seconds"), row.get("seconds"), one, *sweep):
        return {"time_of_finetune": None, "time_of_sweep": None}
    whole = row["find_seconds"] + row["seconds"]
    return {"time_of_finetune": whole / one, "time_of_sweep": whole / sum(sweep)}
