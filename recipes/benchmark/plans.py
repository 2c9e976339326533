"""Is the searched plan worth it? Search, retrain and test beside uniform and random plans.
Not here: the search and the retraining themselves; problems with a known answer (planted.py).

python recipes/benchmark/plans.py                    # embedded default, seeds 0 1 2
python recipes/benchmark/plans.py --seeds '[3]' --output_dir runs/plans    # one seed more
"""

import json
import os
import statistics
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from darts_lora import Genotype, InputError, RankSearch, SearchConfig, Supernet
from darts_lora.cli import run, save_config
from darts_lora.collator import Collator
from darts_lora.config import DataConfig, ModelConfig, TrainingConfig, check_writable
from darts_lora.cost import rank_costs
from darts_lora.data import load_splits, make_dataloader
from darts_lora.evaluate import score
from darts_lora.files import write_json
from darts_lora.finetune import FinetuneConfig, finetune
from darts_lora.models import load_model, load_processor

EMBEDDED_CONFIG = os.path.join(os.path.dirname(__file__), "..", "configs", "embedded.yaml")


@dataclass
class PlansRun:
    """Which plans are compared."""

    output_dir: str = "runs/plans"
    """Folder of the results; what is finished there is not run again."""
    seeds: list[int] = field(default_factory=lambda: [0, 1, 2])
    """Seeds of search, retraining and random plans; one comparison each."""
    random_plans: int = 5
    """Random plans for each seed (count)."""


def main(
    options: PlansRun,
    search: SearchConfig,
    model: ModelConfig,
    data: DataConfig,
    training: TrainingConfig,
) -> None:
    """Test loss of the searched ranks, of the uniform rank and of random ranks, all at the
    parameters of one budget, all retrained alike from scratch."""
    if search.budget_rank is None or search.budget_rank % 1:
        raise InputError(f"budget_rank={search.budget_rank}: a uniform plan needs a whole rank")
    folder = Path(check_writable(options.output_dir))
    save_config(options.output_dir, search, model, data, training)
    for seed in options.seeds:
        searched = _search(
            folder / f"seed-{seed}", replace(search, seed=seed), model, data, training
        )
        for name, genotype in _plans(searched, int(search.budget_rank), seed, options).items():
            _retrain(folder / f"seed-{seed}" / name, genotype, seed, model, data, training)
    results = [json.loads(path.read_text()) for path in sorted(folder.glob("seed-*/*/result.json"))]
    write_json(folder / "results.json", results)
    Console().print(_table(results))


def _search(folder, search, model, data, training) -> Genotype:
    path = folder / "search" / "genotype.json"
    if not path.exists():
        collator = Collator(load_processor(model), data.max_length)
        splits = load_splits(data)
        loaders = [
            make_dataloader(
                splits[name],
                collator,
                training.batch_size,
                shuffle=True,
                seed=search.seed,
                num_workers=training.num_workers,
                drop_last=True,
            )
            for name in ("train", "validation")
        ]
        supernet = Supernet(load_model(model), search)
        RankSearch(supernet, *loaders, training=training, output_dir=str(path.parent)).run()
    return Genotype.load(path)


def _plans(searched: Genotype, uniform: int, seed: int, options: PlansRun) -> dict[str, Genotype]:
    """Name -> genotype: the searched ranks, the budget's uniform rank, random ranks."""
    plans = {
        "searched": searched,
        "uniform": replace(searched, ranks=dict.fromkeys(searched.ranks, uniform)),
    }
    costs = rank_costs(searched.shapes.values(), searched.candidates)
    generator = torch.Generator().manual_seed(seed)
    for number in range(options.random_plans):
        choice = _random_choice(costs, searched.found_by["budget_parameters"], generator)
        ranks = [searched.candidates[k] for k in choice]
        ranks = dict(zip(searched.shapes, ranks, strict=True))
        plans[f"random-{number}"] = replace(searched, ranks=ranks)
    return plans


def _random_choice(costs: torch.Tensor, budget: float, generator: torch.Generator) -> list[int]:
    """Raise random layers to random candidates until no raise fits into the budget."""
    layers, candidates = costs.shape
    choice = [0] * layers
    total = costs[:, 0].sum()
    for move in torch.randperm(layers * candidates, generator=generator).tolist():
        layer, candidate = divmod(move, candidates)
        raised = total + costs[layer, candidate] - costs[layer, choice[layer]]
        if candidate > choice[layer] and raised <= budget:
            choice[layer], total = candidate, raised
    return choice


def _retrain(folder, genotype, seed, model, data, training) -> None:
    if (folder / "result.json").exists():
        return
    genotype.save(folder / "genotype.json")
    config = FinetuneConfig(str(folder / "genotype.json"), output_dir=str(folder), seed=seed)
    adapted, record = finetune(config, model, data, training)
    collator = Collator(load_processor(model), data.max_length)
    result = score(adapted, load_splits(data, ["test"])["test"], collator)
    result |= {"plan": folder.name, "seed": seed, "seconds": record["seconds"]}
    write_json(folder / "result.json", {**result, "parameters": genotype.num_parameters})


def _table(results: list[dict]) -> Table:
    """Mean over the seeds, random plans together; the last column counts the seeds won."""
    kinds: dict[str, dict[int, list[dict]]] = {}
    for result in results:
        by_seed = kinds.setdefault(result["plan"].split("-")[0], {})
        by_seed.setdefault(result["seed"], []).append(result)
    table = Table(title="test rows, mean (min to max) over plans and seeds")
    for column in ("plan", "runs", "parameters", "loss per token", "exact match"):
        table.add_column(column, justify="left" if column == "plan" else "right")
    for kind, by_seed in sorted(kinds.items(), reverse=True):
        runs = [result for of_seed in by_seed.values() for result in of_seed]
        figures = {key: [r[key] for r in runs] for key in ("parameters", "loss", "exact_match")}
        table.add_row(
            kind,
            str(len(runs)),
            f"{statistics.mean(figures['parameters']):,.0f}",
            _spread(figures["loss"], ".4f"),
            _spread(figures["exact_match"], ".1%"),
        )
    return table


def _spread(values: list[float], form: str) -> str:
    low, high = min(values), max(values)
    return f"{statistics.mean(values):{form}} ({low:{form}} to {high:{form}})"


if __name__ == "__main__":
    run(
        main,
        PlansRun,
        SearchConfig,
        ModelConfig,
        DataConfig,
        TrainingConfig,
        default_config=EMBEDDED_CONFIG,
    )
