"""Recommended sizes against sweeps of uniform ranks, as a table and a plot.
Not here: the measurements (size.py).

python recipes/benchmark/size_tables.py    # what has been measured
python recipes/benchmark/size_tables.py --plot recipes/benchmark/results/size/sizes.png
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from statistics import mean
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from quality_publish import RESULTS, read, tasks_in
from scipy.stats import spearmanr
from size import read_searches

from darts_lora import InputError
from darts_lora.alpha.sizes import recommended
from darts_lora.base.files import write_whole
from darts_lora.base.options import run

COLUMNS = ("task", "seed", "recommended", "needed", "Spearman", "predicted 1 / largest", "measured")


@dataclass
class TablesRun:
    """What is compared."""

    output_dir: str = str(RESULTS / "size")
    """Folder of the tasks' folders, or of packed searches, <benchmark>.searches.jsonl. A sweep that
    is not there is taken from the published ones."""
    tolerance: float = 0.01
    """Share of the largest rank's gain that a rank may lack."""
    plot: str | None = None
    """PNG of predicted and measured curves."""


def main(options: TablesRun) -> None:
    """Print a row for each search."""
    folder = Path(options.output_dir)
    packed = {p.name.split(".")[0]: p for p in folder.glob("*.searches.jsonl")}
    searches = packed | {p.parent.name: p for p in folder.glob("*/searches.jsonl")}
    sweeps = tasks_in(RESULTS / "quality") | tasks_in(folder)
    print("| " + " | ".join(COLUMNS) + " |\n|" + " --- |" * len(COLUMNS))
    curves: dict[str, tuple[list[dict[str, Any]], dict[int, float]]] = {}
    for name, path in sorted(searches.items()):
        losses = measured(read(sweeps[name])[1]) if name in sweeps else {}
        found = read_searches(path)
        if not losses or any(search["found_by"]["sizes"] is None for search in found):
            raise InputError(f"{path}: has no sweep, or a search too short to recommend a size")
        for search in found:
            row = compared(search, losses, options.tolerance)
            print(f"| {name} | " + " | ".join(row) + " |")
        curves[name] = found, losses
    if options.plot is not None:
        draw(curves, Path(options.plot), options.tolerance)


def measured(cells: list[dict[str, Any]]) -> dict[int, float]:
    """Uniform rank -> mean test loss over the seeds, at the rate of the lowest validation loss; of
    a sweep with one rate at that."""
    tuned: dict[int, dict[float, list[float]]] = {}
    for stage in ("tune", "final"):
        for cell in cells:
            if (cell["method"], cell["stage"]) == ("uniform", stage) and cell["loss"] is not None:
                tuned.setdefault(cell["budget"], {}).setdefault((stage, cell["rate"]), []).append(
                    cell["loss"]
                )
    found = {}
    for rank, losses in sorted(tuned.items()):
        finals = {rate for stage, rate in losses if stage == "final"}
        rate = min(finals, key=lambda r: mean(losses.get(("tune", r), [0.0])))
        found[rank] = mean(losses["final", rate])
    return found


def needed(losses: dict[int, float], base_loss: float, tolerance: float) -> int:
    """The smallest uniform rank that lacks at most the tolerance of what the best one gains over
    the base model."""
    best = min(losses.values())
    most = best + tolerance * (base_loss - best)
    return min(rank for rank, loss in losses.items() if loss <= most)


def compared(search: dict[str, Any], losses: dict[int, float], tolerance: float) -> list[str]:
    """The cells of a row."""
    sizes = search["found_by"]["sizes"]
    predicted = {p["rank"]: p["uniform"] for p in sizes["points"]}
    shared = sorted(predicted.keys() & losses.keys())
    order = spearmanr([predicted[r] for r in shared], [losses[r] for r in shared]).statistic
    ends = shared[0], shared[-1]
    return [
        str(search["seed"]),
        str(recommended(sizes, tolerance)["rank"]),
        str(needed(losses, sizes["base_loss"], tolerance)),
        f"{order:.2f}",
        " / ".join(f"{predicted[r]:.3f}" for r in ends),
        " / ".join(f"{losses[r]:.3f}" for r in ends),
    ]


def draw(
    curves: dict[str, tuple[list[dict[str, Any]], dict[int, float]]], path: Path, tolerance: float
) -> None:
    """A panel for each task: the loss of uniform ranks as each search predicts it, with a band of
    one standard error and a ring at the recommended rank, and as it was measured, with a square at
    the needed one."""
    columns = min(4, len(curves))
    lines = math.ceil(len(curves) / columns)
    figure, panels = plt.subplots(
        lines, columns, figsize=(3.2 * columns, 2.7 * lines + 0.3), squeeze=False
    )
    for panel in panels.flat[len(curves) :]:
        panel.set_axis_off()
    for panel, (name, (searches, losses)) in zip(panels.flat, curves.items(), strict=False):
        for number, search in enumerate(searches):
            sizes, color = search["found_by"]["sizes"], f"C{number}"
            ranks, middle, error = zip(
                *((p["rank"], p["uniform"], p["uniform_error"]) for p in sizes["points"]),
                strict=True,
            )
            low, high = ([m + s * e for m, e in zip(middle, error, strict=True)] for s in (-1, 1))
            panel.fill_between(ranks, low, high, color=color, alpha=0.12, lw=0)
            panel.plot(ranks, middle, color=color, lw=1, label=f"predicted, seed {search['seed']}")
            rank = recommended(sizes, tolerance)["rank"]
            panel.plot(rank, middle[ranks.index(rank)], "o", ms=8, mfc="none", color=color)
        panel.plot(list(losses), list(losses.values()), "k-o", ms=3, lw=1.3, label="measured")
        rank = needed(losses, searches[0]["found_by"]["sizes"]["base_loss"], tolerance)
        panel.plot(rank, losses[rank], "ks", ms=9, mfc="none")
        panel.set_xscale("log", base=2)
        panel.set_xticks(list(losses), list(map(str, losses)))
        panel.set_title(name, fontsize=9)
        panel.tick_params(labelsize=7)
        panel.set_ylim(bottom=0)
        panel.legend(fontsize=6)
    figure.supxlabel("uniform rank (ring: recommended, square: needed)", fontsize=8)
    figure.supylabel("loss", fontsize=8)
    figure.tight_layout()
    write_whole(path, lambda temporary: figure.savefig(temporary, dpi=100, format="png"))
    plt.close(figure)


if __name__ == "__main__":
    run(main, TablesRun)
