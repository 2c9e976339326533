"""How large should the budget be? What one search without a budget recommends, and a sweep of
uniform ranks at rates of their own. Not here: the sweep's machinery (quality.py), tables
(size_tables.py), where the rows of some tasks come from (size_tasks.py).

python recipes/benchmark/size.py --config recipes/benchmark/quality/embedded_vqa.yaml
python recipes/benchmark/size.py --config recipes/benchmark/quality/embedded_vqa.yaml --sweep false
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import quality
from quality import Task
from quality_cells import Cell, QualityRun
from quality_methods import made_search
from quality_rows import task_digest

from darts_lora import SearchConfig
from darts_lora.base.files import check_writable, write_text
from darts_lora.base.options import run
from darts_lora.config import DataConfig, ModelConfig, TrainingConfig


@dataclass
class SizeRun:
    """Which parts of a task are run; what is finished is not run again."""

    search: bool = True
    """A search without a budget for each seed, the first part of a run of max_steps, at one rate:
    the middle one of learning_rates."""
    sweep: bool = True
    """The uniform ranks of the curve at each seed, as quality.py retrains them."""


def main(
    size: SizeRun,
    options: QualityRun,
    search: SearchConfig,
    model: ModelConfig,
    data: DataConfig,
    training: TrainingConfig,
) -> None:
    """Search without a budget, and sweep the uniform ranks of the same task."""
    folder = Path(check_writable(os.path.join(options.output_dir, options.benchmark)))
    rate = sorted(options.learning_rates)[len(options.learning_rates) // 2]
    path = folder / "searches.jsonl"
    done = read_searches(path) if path.exists() else []
    todo = [s for s in options.seeds if (s, rate) not in {(d["seed"], d["rate"]) for d in done}]
    if size.search and todo:
        task = Task(replace(options, stack=1), search, model, data, training)
        digest = task_digest(model, data)
        for seed in todo:
            done.append({"task": digest} | searched(task, seed, rate))
            write_text(path, "".join(json.dumps(line) + "\n" for line in done))
            print(f"{path}: seed {seed}", flush=True)
    if size.sweep:
        options = replace(options, methods=["uniform"], budgets=options.curve)
        quality.main(options, search, model, data, training)


def read_searches(path: Path) -> list[dict[str, Any]]:
    """What `searched` gave, a search a line."""
    return [json.loads(line) for line in path.read_text().splitlines()]


def searched(task: Task, seed: int, rate: float) -> dict[str, Any]:
    """All that a search without a budget measures."""
    cell = Cell("find", "search", max(task.options.curve), seed, rate)
    steps = task.retrainer.training.max_steps
    with made_search(task.setting(cell), steps, None) as ready:
        genotype = ready.run()
    measured = ready.architect.measured
    found = {f.name: getattr(measured, f.name).tolist() for f in fields(measured)}
    del found["gains"], found["energies"]
    return found | {
        "seed": seed,
        "rate": rate,
        "steps": ready.steps,
        "run_steps": steps,
        "gain": float(measured.gains.double().mean(0).sum()),
        "found_by": genotype.found_by,
    }


if __name__ == "__main__":
    run(
        main,
        SizeRun,
        QualityRun,
        SearchConfig,
        ModelConfig,
        DataConfig,
        TrainingConfig,
        default_config=os.path.join(os.path.dirname(__file__), "quality", "embedded_vqa.yaml"),
    )
