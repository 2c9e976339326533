"""Is the searched plan worth it? Search, retrain and test beside uniform and random plans.
Not here: the search and the retraining themselves; problems with a known answer (planted.py).

python recipes/benchmark/plans.py                    # embedded default, seeds 0 1 2
python recipes/benchmark/plans.py --seeds '[3]' --output_dir runs/plans    # one seed more
"""

import json
import os
import statistics
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field, replace
from functools import partial
from multiprocessing import get_context
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from darts_lora import Genotype, InputError, RankSearch, SearchConfig, Supernet
from darts_lora.cli import run, save_config
from darts_lora.config import DataConfig, ModelConfig, TrainingConfig, check_writable
from darts_lora.cost import rank_costs
from darts_lora.data import load_splits, make_collator, search_dataloaders
from darts_lora.evaluate import score
from darts_lora.files import write_json
from darts_lora.finetune import FinetuneConfig, finetune
from darts_lora.models import load_model

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
    workers: int = 1
    """Searches and retrainings at a time (processes)."""


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
    folders = [folder / f"seed-{seed}" for seed in options.seeds]
    configs = [replace(search, seed=seed) for seed in options.seeds]
    spawn, threads = get_context("spawn"), max(1, torch.get_num_threads() // options.workers)
    with ProcessPoolExecutor(options.workers, spawn, torch.set_num_threads, (threads,)) as pool:
        run_search = partial(_search, model=model, data=data, training=training)
        searched = list(pool.map(run_search, folders, configs))
        jobs = [
            pool.submit(_retrain, place / name, genotype, config.seed, model, data, training)
            for place, config, genotype in zip(folders, configs, searched, strict=True)
            for name, genotype in _plans(genotype, config, options).items()
        ]
        for job in jobs:
            job.result()
    results = [json.loads(path.read_text()) for path in sorted(folder.glob("seed-*/*/result.json"))]
    write_json(folder / "results.json", results)
    Console().print(_table(results))


def _search(folder, search, model, data, training) -> Genotype:
    path = folder / "search" / "genotype.json"
    if not path.exists():
        collator = make_collator(model, data)
        loaders = search_dataloaders(load_splits(data), collator, training, search.seed)
        supernet = Supernet(load_model(model), search)
        RankSearch(supernet, *loaders, training=training, output_dir=str(path.parent)).run()
    return Genotype.load(path)


def _plans(searched: Genotype, search: SearchConfig, options: PlansRun) -> dict[str, Genotype]:
    """Name -> genotype: the searched ranks, the budget's uniform rank, random ranks."""
    plans = {
        "searched": searched,
        "uniform": replace(searched, ranks=dict.fromkeys(searched.ranks, int(search.budget_rank))),
    }
    costs = rank_costs(searched.shapes.values(), searched.candidates)
    generator = torch.Generator().manual_seed(search.seed)
    for number in range(options.random_plans):
        choice = random_choice(costs, searched.found_by["budget_parameters"], generator)
        ranks = [searched.candidates[k] for k in choice]
        ranks = dict(zip(searched.shapes, ranks, strict=True))
        plans[f"random-{number}"] = replace(searched, ranks=ranks)
    return plans


def random_choice(costs: torch.Tensor, budget: float, generator: torch.Generator) -> list[int]:
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
    collator = make_collator(model, data)
    result = score(adapted, load_splits(data, ["test"])["test"], collator)
    result |= {"plan": folder.name, "seed": seed, "seconds": record["seconds"]}
    write_json(folder / "result.json", {**result, "parameters": genotype.num_parameters})


def _table(results: list[dict]) -> Table:
    """One row a kind of plan: means over its plans and seeds, and the spread of the loss."""
    kinds: dict[str, list[dict]] = {}
    for result in results:
        kinds.setdefault(result["plan"].split("-")[0], []).append(result)
    table = Table(title="plans retrained from scratch, on the test rows")
    table.add_column("plan")
    for column in ("runs", "parameters", "loss per token", "min", "max", "exact match"):
        table.add_column(column, justify="right")
    for kind, runs in sorted(kinds.items(), reverse=True):
        losses = [run["loss"] for run in runs]
        table.add_row(
            kind,
            str(len(runs)),
            f"{statistics.mean(run['parameters'] for run in runs):,.0f}",
            *(f"{value:.4f}" for value in (statistics.mean(losses), min(losses), max(losses))),
            f"{statistics.mean(run['exact_match'] for run in runs):.1%}",
        )
    return table


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
