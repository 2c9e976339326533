"""The table at equal cost: each way beside the uniform rank of as many passes, seed by seed.
Not here: running cells (quality.py), the tables of one task's methods (quality_tables.py).

python recipes/benchmark/quality_cost.py --output_dir runs/quality
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

import pandas
from pandas import DataFrame, Series
from quality_publish import read, tasks_in
from quality_statistics import (
    Row,
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
    found = [
        load_cells(path).assign(folder=name, steps=read(path)[0]["max_steps"])
        for name, path in sorted(tasks_in(folder).items())
    ]
    rows = equal_cost(pandas.concat(found)) if found else []
    if not rows:
        raise InputError(f"output_dir={options.output_dir!r}: no finished plan in a folder in it")
    columns = ["cells", "r", "steps", "method", "seeds", "parameters", "test loss", "uniform"]
    columns += ["difference", "saved", "Spearman"]
    title, lines = "At equal cost: test loss per token", [_line(row) for row in rows]
    Console(width=160).print(rich_table(title, columns, lines))
    write_text(folder / "equal_cost.md", markdown(title, columns, lines))
    write_json(folder / "equal_cost.json", rows)


def equal_cost(cells: DataFrame) -> list[Row]:
    """A row for each folder, budget, number of steps and method: seeds, diverged, parameters, loss;
    uniform and difference (means over the seeds that both have) with interval; saved,
    saved_interval and saved_bound as of quality_statistics.summarise; spearman of the expected
    ranks of two seeds. None: not known.

    Uniform ranks are those of the same rows, model and steps: of the folder itself, else of
    another one. The curve is made of all folders.

    Args:
        cells: of quality_statistics.table, with folder and steps beside what quality.py wrote.
    """
    order = ["task", "budget", "steps", "rival", "folder", "method"]
    judged = cells[cells.stage == "final"].assign(rival=lambda c: c.method != "uniform")
    rows = []
    for (task, budget, steps, rival, folder, method), tried in judged.groupby(order):
        same = cells[(cells.task == task) & (cells.steps == steps)]
        own, runs = same[same.folder == folder], tried[tried.loss.notna()]
        row = {"folder": folder, "budget": budget, "steps": steps, "method": method}
        row |= {"seeds": len(runs), "diverged": len(tried) - len(runs)}
        row |= dict.fromkeys(("loss", "parameters", "uniform", "difference", "interval"))
        if len(runs):
            losses = by_seed(runs)
            row |= {"loss": losses.mean(), "parameters": runs.parameters.mean()}
            if rival:
                here = finals(own, "uniform", budget)
                others = by_seed(finals(same, "uniform", budget) if here.empty else here)
                row |= _difference(losses, others)
                row |= saved_parameters(runs, finals(same, "uniform"))
                row["spearman"] = agreement(own, budget, method)
        rows.append(row)
    return rows


def _difference(losses: Series, others: Series) -> Row:
    shared = (losses - others).dropna()
    if shared.empty:
        return {}
    difference, half = interval(shared)
    known = None if math.isnan(half) else half
    return {"uniform": others[shared.index].mean(), "difference": difference, "interval": known}


def _line(row: Row) -> list[str]:
    seeds = str(row["seeds"]) + (f" ({row['diverged']} diverged)" if row["diverged"] else "")
    cells = [row["folder"], str(row["budget"]), str(row["steps"]), row["method"], seeds]
    cells += [text_of(row["parameters"], ",.0f")]
    cells += [text_of(row[key], ".4f") for key in ("loss", "uniform")]
    cells += [spread(row["difference"], row["interval"], "+.4f"), saved_text(row)]
    return [*cells, text_of(row.get("spearman"), ".2f")]


if __name__ == "__main__":
    run(main, CostRun)
