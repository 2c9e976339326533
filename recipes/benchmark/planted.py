"""The planted-rank benchmark: does a search find ranks that are known? A table and planted.json.
Not here: the problems and the methods (planted_problems.py)."""

from __future__ import annotations

import itertools
import multiprocessing
import os
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass, field, replace

import pandas
from planted_problems import DIFFICULTIES, METHODS, Training, measure
from rich import box
from rich.console import Console
from rich.table import Table
from tqdm import tqdm

from darts_lora import InputError
from darts_lora.base.files import check_writable, write_json
from darts_lora.base.options import run, save_config

QUICK_STEPS = {"run_steps": 4000, "retrain_steps": 300}


@dataclass
class PlantedRun:
    """Which problems and methods, and where the result goes."""

    output_dir: str = "runs/planted"
    """Folder for planted.json and config.yaml."""
    problems: list[str] | None = None
    """Problems to run: easy, hard-1500, hard-5000 (training rows); default: all three."""
    methods: list[str] | None = None
    """Methods to run beside the oracle, by their names in the table; default: all of them."""
    seeds: list[int] = field(default_factory=lambda: [0, 1, 2, 3, 4])
    """Seeds of the problems of each sort, of the searches and of the retrainings."""
    workers: int = 2
    """Processes that work side by side, one thread each (count)."""
    quick: bool = False
    """A short look: the easy problem, one seed, and fewer steps than the defaults."""

    def __post_init__(self):
        for name, known in (("problems", DIFFICULTIES), ("methods", METHODS)):
            unknown = set(getattr(self, name) or ()) - set(known)
            if unknown:
                raise InputError(f"{name}={sorted(unknown)}: not among {'; '.join(known)}")
        if not self.seeds or min(self.seeds) < 0:
            raise InputError(f"seeds={self.seeds}: must be integers >= 0, at least one")
        if self.workers < 1:
            raise InputError(f"workers={self.workers}: must be an integer >= 1")


def main(options: PlantedRun, training: Training) -> None:
    """Search ranks that were planted and compare the plans found, each retrained from scratch."""
    if options.quick:
        options, training = shortened(options, training)
    check_writable(options.output_dir)
    save_config(options.output_dir, options, training)
    path, started, records = os.path.join(options.output_dir, "planted.json"), time.monotonic(), []
    for record in run_jobs(jobs(options), options.workers, training):
        records.append(record)
        result = {"options": asdict(options) | asdict(training), "summary": summarise(records)}
        result |= {"seconds": round(time.monotonic() - started, 1), "records": records}
        write_json(path, result)  # after each method, so that nothing is lost
    Console().print(result_table(summarise(records)))
    print(f"{time.monotonic() - started:,.0f} s in all; all figures: {path}")


def shortened(options: PlantedRun, training: Training) -> tuple[PlantedRun, Training]:
    """The options of --quick; problems that were named stay."""
    options = replace(options, problems=options.problems or ["easy"], seeds=options.seeds[:1])
    steps = {n: min(getattr(training, n), most) for n, most in QUICK_STEPS.items()}
    return options, replace(training, **steps)


def jobs(options: PlantedRun) -> list[tuple[str, int, str]]:
    """(problem, seed, method) of each measurement, seed by seed: a run that is cut off has compared
    all methods on the seeds that it finished."""
    methods = dict.fromkeys(["oracle", *(options.methods or METHODS)])
    problems = options.problems or list(DIFFICULTIES)
    return [(p, s, m) for s in options.seeds for p in problems for m in methods]


def run_jobs(todo: list[tuple], workers: int, training: Training) -> Iterator[dict]:
    """The records in the order in which they are done."""
    context = multiprocessing.get_context("forkserver")  # forked threads of torch can hang
    context.set_forkserver_preload(["darts_lora.search"])
    with (
        ProcessPoolExecutor(workers, mp_context=context) as pool,
        tqdm(total=len(todo), desc="planted", unit="run") as bar,
    ):
        futures = [pool.submit(measure, *job, training) for job in todo]
        try:
            for future in as_completed(futures):
                record = future.result()
                bar.set_postfix_str(f"{record['problem']}: {record['method']}")
                bar.update()
                yield record
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise


def summarise(records: list[dict]) -> list[dict]:
    """One row for each problem and method, over the seeds whose oracle is there as well."""
    found = pandas.DataFrame(records)
    oracle = found[found.method == "oracle"].set_index(["problem", "seed"]).test_loss
    found = found.join(oracle.rename("oracle"), on=["problem", "seed"], how="inner")
    found["ratio"] = found.test_loss / found.oracle
    rows = found.groupby(["problem", "method"]).agg(
        seeds=("seed", "size"),
        exact=("exact", "mean"),
        loss_of_oracle=("ratio", "mean"),
        loss_of_oracle_min=("ratio", "min"),
        loss_of_oracle_max=("ratio", "max"),
        parameters_of_budget=("parameters_of_budget", "mean"),
        seconds=("seconds", "mean"),
    )
    order = [key for key in itertools.product(DIFFICULTIES, METHODS) if key in rows.index]
    return rows.loc[order].reset_index().to_dict("records")


def result_table(summary: list[dict]) -> Table:
    """The summary for the screen, a section for each problem."""
    table = Table(title="planted ranks", title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("problem", no_wrap=True)
    table.add_column("method", no_wrap=True)
    for heading in ("exact", "loss / oracle's", "budget", "s"):
        table.add_column(heading, justify="right", no_wrap=True)
    shown = None
    for row in summary:
        if row["problem"] != shown:
            table.add_section()
        low, high = row["loss_of_oracle_min"], row["loss_of_oracle_max"]
        table.add_row(
            "" if row["problem"] == shown else row["problem"],
            row["method"],
            f"{row['exact']:.0%}",
            f"{_short(row['loss_of_oracle'])} ({_short(low)}-{_short(high)})",
            f"{row['parameters_of_budget']:.0%}",
            f"{row['seconds']:.0f}",
        )
        shown = row["problem"]
    return table


def _short(ratio: float) -> str:
    return f"{ratio:.2f}" if ratio < 9.995 else f"{ratio:.0f}"


if __name__ == "__main__":
    run(main, PlantedRun, Training)
