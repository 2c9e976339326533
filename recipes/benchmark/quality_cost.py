"""The table at equal cost: each way beside the uniform rank of as many passes, seed by seed.
Not here: running cells (quality.py), the tables of one task's methods (quality_tables.py).

python recipes/benchmark/quality_cost.py --output_dir runs/quality
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from statistics import mean

from quality_publish import read, tasks_in
from quality_statistics import (
    Record,
    agreement,
    by_seed,
    finals,
    interval,
    load_cells,
    saved_parameters,
)
from quality_tables import markdown, rich_table, saved_text, spread, text_of
from rich.console import Console

from darts_lora import InputError
from darts_lora.base.files import write_json, write_text
from darts_lora.base.options import run


@dataclass
class CostRun:
    """Whose table."""

    output_dir: str = "runs/quality"
    """Folder of the folders of cells, or of packed files (quality_publish.py): of a task, a budget,
    a length or a variant each. equal_cost.md and equal_cost.json go there."""


def main(options: CostRun) -> None:
    """Show what is finished: every way's test loss, its difference to the uniform rank's on the
    same seeds with a 95 % t-interval, and the parameters that it saves."""
    folder = Path(options.output_dir)
    found = []
    for name, path in sorted(tasks_in(folder).items()):
        steps = read(path)[0]["max_steps"]
        found += [r | {"folder": name, "steps": steps} for r in load_cells(path)]
    rows = equal_cost(found)
    if not rows:
        raise InputError(f"output_dir={options.output_dir!r}: no finished plan in a folder in it")
    columns = ["cells", "r", "steps", "method", "seeds", "parameters", "test loss", "uniform"]
    columns += ["difference", "saved", "Spearman"]
    title, lines = "At equal cost: test loss per token", [_line(row) for row in rows]
    Console(width=160).print(rich_table(title, columns, lines))
    write_text(folder / "equal_cost.md", markdown(title, columns, lines))
    write_json(folder / "equal_cost.json", rows)


def equal_cost(records: list[Record]) -> list[Record]:
    """A row for each folder, budget, number of steps and method: seeds, diverged, parameters, loss;
    uniform and difference (means over the seeds that both have) with interval; saved,
    saved_interval and saved_bound as of quality_statistics.summarise; spearman of the expected
    ranks of two seeds. None: not known.

    Uniform ranks are those of the same rows, model and steps: of the folder itself, else of
    another one. The curve is made of all folders.

    Args:
        records: of cells, with folder and steps beside what quality.py wrote.
    """
    keys = ("folder", "budget", "steps", "method")
    groups = {tuple(r[key] for key in keys): r["task"] for r in records if r["stage"] == "final"}
    rows = []
    for (folder, budget, steps, method), task in sorted(groups.items(), key=_order):
        same = [r for r in records if (r["task"], r["steps"]) == (task, steps)]
        own = [r for r in same if r["folder"] == folder]
        runs = finals(own, method, budget)
        tried = [r for r in own if (r["stage"], r["method"], r["budget"]) ==
                 ("final", method, budget)]  # fmt: skip
        row = {"folder": folder, "budget": budget, "steps": steps, "method": method}
        row |= {"seeds": len(runs), "diverged": len(tried) - len(runs)}
        row |= dict.fromkeys(("loss", "parameters", "uniform", "difference", "interval"))
        if runs:
            losses = by_seed(runs)
            row["loss"] = mean(losses.values())
            row["parameters"] = mean(r["parameters"] for r in runs)
            curve = finals(same, "uniform")
            if method != "uniform":
                here = [r for r in curve if r["budget"] == budget]
                others = by_seed([r for r in here if r["folder"] == folder] or here)
                row |= _difference(losses, others) | saved_parameters(runs, curve)
                row["spearman"] = agreement(own, budget, method)
        rows.append(row)
    return rows


def _order(group: tuple[tuple, str]) -> tuple:
    (folder, budget, steps, method), task = group
    return task, budget, steps, method != "uniform", folder, method


def _difference(losses: dict[int, float], others: dict[int, float]) -> Record:
    shared = [seed for seed in losses if seed in others]
    if not shared:
        return {}
    difference, half = interval([losses[seed] - others[seed] for seed in shared])
    uniform = mean(others[seed] for seed in shared)
    known = half if half == half else None
    return {"uniform": uniform, "difference": difference, "interval": known}


def _line(row: Record) -> list[str]:
    seeds = str(row["seeds"]) + (f" ({row['diverged']} diverged)" if row["diverged"] else "")
    cells = [row["folder"], str(row["budget"]), str(row["steps"]), row["method"], seeds]
    cells += [text_of(row["parameters"], ",.0f")]
    cells += [text_of(row[key], ".4f") for key in ("loss", "uniform")]
    cells += [spread(row["difference"], row["interval"], "+.4f"), saved_text(row)]
    return [*cells, text_of(row.get("spearman"), ".2f")]


if __name__ == "__main__":
    run(main, CostRun)
