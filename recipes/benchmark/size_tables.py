"""Recommended sizes against sweeps of uniform ranks, as a table.
Not here: the measurements (size.py).

python recipes/benchmark/size_tables.py    # what has been measured
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from statistics import mean
from typing import Any

from quality_publish import RESULTS, read, tasks_in
from scipy.stats import spearmanr
from size import read_searches

from darts_lora import InputError
from darts_lora.alpha.sizes import recommended
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


def main(options: TablesRun) -> None:
    """Print a row for each search."""
    folder = Path(options.output_dir)
    packed = {p.name.split(".")[0]: p for p in folder.glob("*.searches.jsonl")}
    searches = packed | {p.parent.name: p for p in folder.glob("*/searches.jsonl")}
    sweeps = tasks_in(RESULTS / "quality") | tasks_in(folder)
    print("| " + " | ".join(COLUMNS) + " |\n|" + " --- |" * len(COLUMNS))
    for name, path in sorted(searches.items()):
        losses = measured(read(sweeps[name])[1]) if name in sweeps else {}
        for search in read_searches(path):
            if not losses or search["found_by"]["sizes"] is None:
                raise InputError(f"{path}: has no sweep, or a search too short to recommend a size")
            row = compared(search, losses, options.tolerance)
            print(f"| {name} | " + " | ".join(row) + " |")


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


def compared(search: dict[str, Any], losses: dict[int, float], tolerance: float) -> list[str]:
    """The cells of a row: what the search recommends, and the smallest uniform rank that lacks at
    most the tolerance of what the best one gains over the base model."""
    sizes = search["found_by"]["sizes"]
    best = min(losses.values())
    most = best + tolerance * (sizes["base_loss"] - best)
    needed = min(rank for rank, loss in losses.items() if loss <= most)
    predicted = {p["rank"]: p["uniform"] for p in sizes["points"]}
    shared = sorted(predicted.keys() & losses.keys())
    order = spearmanr([predicted[r] for r in shared], [losses[r] for r in shared]).statistic
    ends = shared[0], shared[-1]
    return [
        str(search["seed"]),
        str(recommended(sizes, tolerance)["rank"]),
        str(needed),
        f"{order:.2f}",
        " / ".join(f"{predicted[r]:.3f}" for r in ends),
        " / ".join(f"{losses[r]:.3f}" for r in ends),
    ]


if __name__ == "__main__":
    run(main, TablesRun)
