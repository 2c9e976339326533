"""recipes/benchmark/plans.py: the plans it compares keep one budget, its table shows their means.
Not here: that it runs (../test_readme.py)."""

import importlib.util
from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import Console

from darts_lora import Genotype, SearchConfig, discretize

PATH = Path(__file__).parents[2] / "recipes" / "benchmark" / "plans.py"


@pytest.fixture(scope="module")
def plans():
    spec = importlib.util.spec_from_file_location("plans", PATH)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_plans_have_the_same_layers_and_keep_the_budget(plans, search_dir):
    searched = Genotype.load(search_dir / "genotype.json")
    per_rank = sum(sum(shape) for shape in searched.shapes.values())
    searched = discretize(searched, budget_rank=2)
    config = SearchConfig(ranks=(0, 2, 4), budget_rank=2)
    made = plans._plans(searched, config, plans.PlansRun(random_plans=4))
    assert list(made) == ["searched", "uniform", *(f"random-{i}" for i in range(4))]
    assert made["uniform"].num_parameters == 2 * per_rank
    assert set(made["uniform"].ranks.values()) == {2}
    random = [made[f"random-{i}"] for i in range(4)]
    for plan in random:
        assert plan.ranks.keys() == searched.ranks.keys()
        assert set(plan.ranks.values()) == {0, 2, 4}
        assert 0.9 * 2 * per_rank < plan.num_parameters <= 2 * per_rank
    assert len({tuple(plan.ranks.values()) for plan in random}) == 4
    again = plans._plans(searched, config, plans.PlansRun(random_plans=4))
    assert again == made
    other = plans._plans(searched, replace(config, seed=1), plans.PlansRun(random_plans=4))
    assert other["random-0"] != made["random-0"]


def test_the_table_shows_means_and_spread(plans):
    results = [
        {"plan": plan, "seed": 0, "parameters": 1000, "loss": loss, "exact_match": 0.5}
        for plan, loss in (("searched", 0.1), ("random-0", 0.2), ("random-1", 0.4))
    ]
    console = Console(width=120, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(plans._table(results))
    text = console.export_text()
    rows = {words[1]: words for words in (line.split() for line in text.splitlines()) if words[1:]}
    assert [rows["random"][i] for i in (7, 9, 11)] == ["0.3000", "0.2000", "0.4000"]
    assert [rows["searched"][i] for i in (7, 9, 11)] == ["0.1000"] * 3
