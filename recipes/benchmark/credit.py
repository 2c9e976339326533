"""Searches whose alpha stays where it is: what its gradient says a rank is worth, by eighths of the
steps. Not here: searches that move alpha (quality.py).

python recipes/benchmark/credit.py --config recipes/benchmark/quality/embedded_vqa.yaml \\
    --budgets '[8]' --learning_rates '[0.003]' --seeds '[0]' --arch_average 0.125
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any

import torch
from quality import Task
from quality_cells import Cell, QualityRun
from quality_methods import made_search
from rich.console import Console
from rich.table import Table
from torch import Tensor
from tqdm import tqdm

from darts_lora import InputError, RankSearch, SearchConfig, Supernet
from darts_lora.base.files import check_writable, write_json
from darts_lora.base.options import run
from darts_lora.config import DataConfig, ModelConfig, TrainingConfig
from darts_lora.lora.parts import layer_type

PARTS = 8  # of the steps
UNIT = 1e-9  # of a loss per parameter


@dataclass
class CreditRun(QualityRun):
    """Which searches are looked at: all of budgets, seeds and learning_rates."""

    output_dir: str = "runs/credit"
    """Folder for <benchmark>.json."""
    last_batches: int = 80
    """Validation batches at the weights behind the last step (count)."""

    def __post_init__(self):
        super().__post_init__()
        if self.last_batches < 1:
            raise InputError(f"last_batches={self.last_batches}: must be an integer >= 1")


def main(
    options: CreditRun,
    search: SearchConfig,
    model: ModelConfig,
    data: DataConfig,
    training: TrainingConfig,
) -> None:
    """What a further parameter of each layer is worth, as alpha's gradient has it: at the weights,
    at their running mean (arch_average), and at the end."""
    if search.arch_average == 0:
        raise InputError("arch_average=0.0: must be above 0, the mean is what is compared")
    if options.search_steps < PARTS:
        raise InputError(f"search_steps={options.search_steps}: must be {PARTS} at least")
    path = os.path.join(check_writable(options.output_dir), f"{options.benchmark}.json")
    task, records = Task(options, search, model, data, training), []
    for budget in options.budgets:
        for rate in options.learning_rates:
            for seed in options.seeds:
                cell = Cell("find", "search", budget, seed, find_rate=rate)
                with made_search(task.setting(cell)) as ready:
                    values = look(ready, options.last_batches)
                records.append({"budget": budget, "seed": seed, "learning_rate": rate} | values)
                write_json(path, {"unit": UNIT, "records": records})
                _show(records[-1])


def look(search: RankSearch, last_batches: int) -> dict[str, Any]:
    """The weight steps of a search; alpha stays at the budget's even distribution.

    Returns:
        names of the layers; at_weights and at_mean (8 lists, by eighths of the steps) and
        at_the_end (a list): what a parameter of each layer is worth, in 1e-9 of the loss.
    """
    supernet, architect, steps = search.supernet, search.architect, search.training.max_steps
    hold_at_budget(supernet)
    sums = {"at_weights": [0.0] * PARTS, "at_mean": [0.0] * PARTS}
    counts = [0] * PARTS

    def gradient(batch: Any) -> Tensor:
        return architect.gradients(search.bilevel.val_loss_fn, batch)[1][0]

    search.model.train()
    for step in tqdm(range(steps), desc="credit", unit="step"):
        part = step * PARTS // steps
        search.schedule.enter(step)
        search.weights.step(search.train_stream)
        architect.mean.update()
        batch = next(search.val_stream)
        sums["at_weights"][part] += gradient(batch)
        with architect.mean.in_place():
            sums["at_mean"][part] += gradient(batch)
        counts[part] += 1
    last = sum(gradient(next(search.val_stream)) for _ in range(last_batches)) / last_batches
    found: dict[str, Any] = {"layers": list(supernet.layers)}
    for name, parts in sums.items():
        found[name] = [worth(supernet, g / n) for g, n in zip(parts, counts, strict=True)]
    return found | {"at_the_end": worth(supernet, last)}


def hold_at_budget(supernet: Supernet) -> None:
    """Set alpha to the distribution of largest entropy, the same in all layers, that has the
    budget's expected parameters."""
    ranks = torch.tensor(supernet.config.ranks).to(supernet.alpha)
    low, high = -100.0, 100.0  # of the tilt towards small ranks
    for _ in range(100):
        tilt = (low + high) / 2
        supernet.alpha.data.copy_((-tilt * ranks / ranks.max()).expand_as(supernet.alpha))
        over = float(supernet.expected_parameters().detach()) > supernet.budget
        low, high = (tilt, high) if over else (low, tilt)


def worth(supernet: Supernet, gradient: Tensor) -> list[float]:
    """The fall of the loss per expected parameter where alpha is tilted towards what costs more,
    from its gradient (N, K): minus the covariance of gradient over probability with cost, over the
    variance of the cost; in 1e-9."""
    p = supernet.probabilities().detach().double()
    costs = supernet.costs.to(p)
    beside = costs - (p * costs).sum(-1, keepdim=True)
    values = -(gradient.double() * beside).sum(-1) / (p * beside.square()).sum(-1)
    return [round(float(value) / UNIT, 4) for value in values]


def _show(record: dict[str, Any]) -> None:
    """Means over the layers of a type, and over all."""
    types = [layer_type(name) for name in record["layers"]]
    half, weights, mean = PARTS // 2, *(torch.tensor(record[k]) for k in ("at_weights", "at_mean"))
    columns = [
        *(("weights, 1st half", weights[:half].mean(0)), ("2nd half", weights[half:].mean(0))),
        *(("mean, 1st half", mean[:half].mean(0)), ("2nd half", mean[half:].mean(0))),
        ("at the end", torch.tensor(record["at_the_end"])),
    ]
    table = Table("type of layer", *(name for name, _ in columns))
    table.columns[0].overflow = "fold"
    for kind in sorted(set(types)):
        chosen = torch.tensor([kind == t for t in types])
        table.add_row(kind, *(f"{values[chosen].mean():.1f}" for _, values in columns))
    table.add_row("all", *(f"{values.mean():.1f}" for _, values in columns))
    Console().print(table)


if __name__ == "__main__":
    run(main, CreditRun, SearchConfig, ModelConfig, DataConfig, TrainingConfig)
