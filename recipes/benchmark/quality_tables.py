"""Tables and plots of whatever cells of the quality benchmark are finished.
Not here: running cells (quality.py), the figures themselves (quality_statistics.py).

python recipes/benchmark/quality_tables.py --output_dir runs/quality
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from pandas import DataFrame
from quality_publish import tasks_in
from quality_statistics import Row, by_seed, finals, headlines, interval, load_cells, summarise
from rich import box
from rich.console import Console
from rich.table import Table

from darts_lora import InputError
from darts_lora.base.files import write_text, write_whole
from darts_lora.base.options import run


@dataclass
class TablesRun:
    """Whose tables."""

    output_dir: str = "runs/quality"
    """Folder of the tasks' folders, or of their packed files (quality_publish.py). tables.md goes
    there, <task>.png beside it."""


def main(options: TablesRun) -> None:
    """Show what is finished: test loss against trainable parameters, and the headlines."""
    folder = Path(options.output_dir)
    tasks = {name: load_cells(path) for name, path in tasks_in(folder).items()}
    tasks = {name: tasks[name] for name in sorted(tasks) if (tasks[name].stage == "final").any()}
    if not tasks:
        raise InputError(f"output_dir={options.output_dir!r}: no finished plan in a task's folder")
    text = ""
    for task, cells in tasks.items():
        for title, columns, rows in (
            (f"{task}: test loss per token", *_method_rows(summarise(cells))),
            (f"{task}: the search", *_headline_rows(headlines(cells))),
        ):
            if rows:
                Console(width=140).print(rich_table(title, columns, rows))
                text += markdown(title, columns, rows)
        draw(cells, folder / f"{task}.png", task)
        text += f"![{task}]({task}.png)\n\n"
    write_text(folder / "tables.md", text)
    print(f"Tables and plots: {folder / 'tables.md'}")


def _method_rows(summary: list[Row]) -> tuple[list[str], list[list[str]]]:
    columns = ["r", "method", "runs", "parameters", "test loss", "behind the search", "saved"]
    matched = any(row.get("exact_match") is not None for row in summary)
    columns += ["exact match"] * matched + ["find, s", "finetune, s"]
    rows = []
    for row in summary:
        runs = f"{row['runs']}" + (f" ({row['diverged']} diverged)" if row["diverged"] else "")
        cells = [str(row["budget"]), row["method"], runs, text_of(row["parameters"], ",.0f")]
        cells.append(spread(row["loss"], row.get("loss_interval"), ".4f"))
        cells.append(spread(row.get("behind"), row.get("behind_interval"), "+.4f"))
        cells.append(saved_text(row))
        cells += [text_of(row.get("exact_match"), ".1%")] * matched
        cells += [text_of(row.get(key), ".1f") for key in ("find_seconds", "seconds")]
        rows.append(cells)
    return columns, rows


def _headline_rows(found: list[Row]) -> tuple[list[str], list[list[str]]]:
    columns = ["r", "saved over uniform", "best other", "saved over it", "Spearman"]
    columns += ["time / finetune", "time / sweep"]
    rows = []
    for row in found:
        cells = [str(row["budget"]), saved_text(row), row["best_other"] or "-"]
        cells += [text_of(row["saved_over_best"], ".0%"), text_of(row["spearman"], ".2f")]
        cells += [text_of(row[key], ".2f") for key in ("time_of_finetune", "time_of_sweep")]
        rows.append(cells)
    return columns, rows


def saved_text(row: Row) -> str:
    """* : the loss lies beyond the uniform curve, whose nearest end stands for it."""
    text = text_of(row.get("saved"), ".0%")
    if row.get("saved_interval"):
        text += " ({:.0%} to {:.0%})".format(*row["saved_interval"])
    return text + "*" * bool(row.get("saved_bound"))


def text_of(value: Any, form: str) -> str:
    return "-" if value is None else format(value, form)


def spread(value: float | None, half: float | None, form: str) -> str:
    text = text_of(value, form)
    known = half is not None and not math.isnan(half)
    return f"{text} ± {format(half, form.removeprefix('+'))}" if known else text


def rich_table(title: str, columns: Sequence[str], rows: list[list[str]]) -> Table:
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
    for column in columns:
        table.add_column(column, justify="right", no_wrap=True)
    for row in rows:
        table.add_row(*row)
    return table


def markdown(title: str, columns: Sequence[str], rows: list[list[str]]) -> str:
    lines = [columns, ["---"] * len(columns), *rows]
    body = "\n".join(f"| {' | '.join(line)} |" for line in lines)
    return f"## {title}\n\n{body}\n\n"


def draw(cells: DataFrame, path: Path, title: str) -> None:
    """Loss, and exact match where it was measured, against trainable parameters; bars are 95 %
    intervals over seeds, of the uniform curve and the search alone. Other methods stand side by
    side to the right of their parameters, or they would hide each other. Plans of single searches
    are in the tables alone: they are the search's."""
    judged = cells[(cells.stage == "final") & cells.loss.notna()]
    judged = judged[~judged.method.str.startswith("search_seed_")]
    measured = bool(judged.exact_match.notna().any())
    keys = ["loss"] + ["exact_match"] * measured
    figure, panels = plt.subplots(1, len(keys), figsize=(6.5 * len(keys), 4.5), squeeze=False)
    methods = sorted(judged.method.unique(), key=lambda m: (m != "uniform", m != "search", m))
    for panel, key in zip(panels[0], keys, strict=True):
        for number, method in enumerate(methods):
            points = []
            for _, runs in finals(judged, method).dropna(subset=key).groupby("budget"):
                middle, half = interval(by_seed(runs, key))
                size = by_seed(runs, "parameters").mean()
                points.append((size, middle, 0 if math.isnan(half) else half))
            style = {"uniform": "k-o", "search": "r-D"}.get(method)
            if points and style:
                panel.errorbar(*zip(*points, strict=True), fmt=style, capsize=2, ms=4, lw=1,
                               label=method)  # fmt: skip
            elif points:
                sizes, middles, _ = zip(*points, strict=True)
                beside = [size * 1.03 ** (number - 1) for size in sizes]
                panel.plot(beside, middles, ls="", color=f"C{number % 10}", ms=6, label=method,
                           marker="x+1234v^<>s"[number % 11])  # fmt: skip
        panel.set_xscale("log")
        panel.set_xlabel("trainable parameters")
        panel.set_ylabel({"loss": "test loss per token", "exact_match": "exact match"}[key])
    panels[0, -1].legend(fontsize=7, ncols=2)
    figure.suptitle(title)
    figure.tight_layout()
    write_whole(path, lambda temporary: figure.savefig(temporary, dpi=120, format="png"))
    plt.close(figure)


if __name__ == "__main__":
    run(main, TablesRun)
