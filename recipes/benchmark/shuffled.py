"""Does a search say that it learnt ranks where no answer belongs to its question?
Each row gets the answer of another one, so that how often answers occur is all there is to learn.
Not here: the verdict (darts_lora/alpha/verdict.py).

python recipes/benchmark/shuffled.py --retrain_steps 200    # what the ranks gain there, too
"""

from __future__ import annotations

import os
from dataclasses import dataclass, field, replace

import torch
from quality import Task
from quality_cells import Cell, QualityRun
from quality_methods import made_search
from quality_rows import EncodedRows, mean_loss, task_rows
from quality_training import Retraining

from darts_lora import SearchConfig
from darts_lora.base.options import run
from darts_lora.config import DataConfig, ModelConfig, TrainingConfig

FIGURES = ("predicted_gain", "uniform_cut", "uniform_cut_error", "validation_loss")


@dataclass
class ShuffledRun(QualityRun):
    """Which searches."""

    seeds: list[int] = field(default_factory=lambda: list(range(10)))
    """Seeds of the searches, and of the order of their answers."""
    real: int = 4
    """The first seeds, which are searched with the true answers too (count)."""
    rates: list[float] = field(default_factory=lambda: [0.006, 0.003])
    """Learning rate at each of the budgets."""
    retrain_steps: int = 0
    """Steps that the found ranks and the uniform one are trained from scratch; 0: neither is."""


def main(
    options: ShuffledRun,
    search: SearchConfig,
    model: ModelConfig,
    data: DataConfig,
    training: TrainingConfig,
) -> None:
    """Search with the answers of other rows, then with the true ones; a line for each search."""
    task, rows = Task(options, search, model, data, training), list(task_rows(data))
    true, learnt = task.rows, {"shuffled": [], "true": []}
    cases = [("shuffled", seed) for seed in options.seeds]
    for answers, seed in cases + [("true", seed) for seed in options.seeds[: options.real]]:
        task.rows = true
        if answers == "shuffled":
            device = task.retrainer.device
            task.rows = EncodedRows(shuffled(rows, seed), task.collator, device, true.grouped)
        for budget, rate in zip(options.budgets, options.rates, strict=True):
            cell = Cell("find", "one_run", budget, seed, rate)
            verdict, ranks = searched(task, cell)
            learnt[answers].append(verdict["learnt"])
            said = [f"{answers} answers, rank {budget}, seed {seed}: learnt {verdict['learnt']}"]
            said += [f"{name} {verdict[name]:.3g}" for name in FIGURES]
            if options.retrain_steps:
                gain = trained(task, cell, dict.fromkeys(ranks, budget), options)
                said += [f"measured gain {gain - trained(task, cell, ranks, options):.3g}"]
            print(", ".join(said), flush=True)
    for answers, told in learnt.items():
        print(f"{answers} answers: {sum(told)} of {len(told)} learnt")


def shuffled(rows: list[dict], seed: int) -> list[dict]:
    """The rows, which are chats, each with the answer of another one."""
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed)).tolist()
    answers = [rows[other]["messages"][-1] for other in order]
    return [
        row | {"messages": [*row["messages"][:-1], answer]}
        for row, answer in zip(rows, answers, strict=True)
    ]


def searched(task: Task, cell: Cell) -> tuple[dict, dict[str, int]]:
    """The verdict on a search of the tuning's rows, and its ranks."""
    setting = replace(task.setting(cell), indices=task.tuning)
    with made_search(setting, setting.steps_with_search()[0], setting.budget) as search:
        genotype = search.run()
    return genotype.found_by["verdict"], genotype.ranks


def trained(task: Task, cell: Cell, ranks: dict[str, int], options: ShuffledRun) -> float:
    """The loss on the tuning's held-out rows of these ranks, trained on the others."""
    job = Retraining(ranks, task.tuning, cell.seed, cell.find_rate)
    job.run_steps = options.retrain_steps
    task.retrainer.retrain([job], task.rows)
    with task.retrainer.adapters() as model:
        return mean_loss(model, task.rows, task.validation, options.eval_batch_size)


if __name__ == "__main__":
    embedded = os.path.join(os.path.dirname(__file__), "quality", "embedded_vqa.yaml")
    classes = (ShuffledRun, SearchConfig, ModelConfig, DataConfig, TrainingConfig)
    run(main, *classes, default_config=embedded)
