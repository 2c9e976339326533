"""One learning rate for all ranks? Uniform ranks at a few rates, where the scaling (lora_alpha / r)
is the same for all ranks, or falls with the rank; all are alike at rank 8.
Not here: a search, or which size is recommended (size.py).

python recipes/benchmark/size_rates.py --config recipes/benchmark/quality/embedded_vqa.yaml
python recipes/benchmark/size_rates.py --only_table true    # what has been measured
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass, field, replace
from pathlib import Path

from quality import Task
from quality_cells import TUNING_SEED, QualityRun
from quality_publish import RESULTS
from quality_rows import mean_loss
from quality_training import Retraining

from darts_lora import SearchConfig
from darts_lora.base.files import check_writable, write_text
from darts_lora.base.options import run
from darts_lora.config import DataConfig, ModelConfig, TrainingConfig

EVEN = 8  # the rank at which all rules have the same scaling
RULES = {"constant": 0.0, "1 / sqrt(r)": 0.5, "1 / r": 1.0}  # scaling is as r to minus this


@dataclass
class RatesRun:
    """Which runs are compared; what is finished is not run again."""

    tried: list[int] = field(default_factory=lambda: [1, 2, 8, 16])
    """Uniform ranks."""
    results: str = str(RESULTS / "size" / "rates.jsonl")
    """File of a line for each run."""
    only_table: bool = False
    """Run nothing, print the table of what is finished."""


def main(
    rates: RatesRun,
    options: QualityRun,
    search: SearchConfig,
    model: ModelConfig,
    data: DataConfig,
    training: TrainingConfig,
) -> None:
    """Train each rank at each rate under each rule on the tuning's rows, and judge it on the rows
    that the tuning holds out."""
    path = Path(check_writable(os.path.dirname(rates.results))) / os.path.basename(rates.results)
    done = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    if not rates.only_table:
        options = replace(options, stack=len(options.learning_rates), curve=rates.tried)
        task = Task(options, search, model, data, training)
        seeds = range(TUNING_SEED, TUNING_SEED + options.tuning_seeds)
        for seed, rank, (rule, power) in (
            (s, r, p) for s in seeds for r in rates.tried for p in RULES.items()
        ):
            if rank == EVEN and power:
                continue  # as the constant one
            key = {"benchmark": options.benchmark, "rule": rule, "rank": rank, "seed": seed}
            if any(key.items() <= line.items() for line in done):
                continue
            task.retrainer.scaling = search.scaling * (EVEN / rank) ** power
            plan = dict.fromkeys(task.retrainer.shapes, rank)
            jobs = [Retraining(plan, task.tuning, seed, rate) for rate in options.learning_rates]
            task.retrainer.retrain(jobs, task.rows)
            for number, rate in enumerate(options.learning_rates):
                with task.retrainer.adapters(number) as adapted:
                    size = options.eval_batch_size
                    loss = mean_loss(adapted, task.rows, task.validation, size)
                done.append(key | {"rate": rate, "steps": training.max_steps, "loss": loss})
            write_text(path, "".join(json.dumps(line) + "\n" for line in done))
            print(f"{path}: {key}", flush=True)
    print(table(done))


def table(done: list[dict]) -> str:
    """Held-out loss of each rule and rank at each rate, the best one marked."""
    rates = sorted({line["rate"] for line in done})
    head = ["task", "rule", "rank", *(f"{rate:g}" for rate in rates)]
    rows = [head, ["---"] * len(head)]
    places = list(RULES)
    keys = {(d["benchmark"], d["rule"], d["rank"]) for d in done}
    for key in sorted(keys, key=lambda key: (key[0], places.index(key[1]), key[2])):
        found: dict[float, list[float]] = {}
        for line in done:
            if (line["benchmark"], line["rule"], line["rank"]) == key and line["loss"] is not None:
                found.setdefault(line["rate"], []).append(line["loss"])
        means = {rate: sum(losses) / len(losses) for rate, losses in found.items()}
        best = min(means, key=lambda rate: means[rate])
        cells = [f"{means[rate]:.4f}" if rate in means else "-" for rate in rates]
        cells = [f"**{c}**" if r == best else c for r, c in zip(rates, cells, strict=True)]
        rows.append([*map(str, key), *cells])
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


if __name__ == "__main__":
    run(
        main,
        RatesRun,
        QualityRun,
        SearchConfig,
        ModelConfig,
        DataConfig,
        TrainingConfig,
        default_config=os.path.join(os.path.dirname(__file__), "quality", "embedded_vqa.yaml"),
    )
