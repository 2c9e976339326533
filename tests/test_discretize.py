"""From alpha to ranks: the most probable ones, under a budget, again under another.
Not here: the choice itself (alpha/test_choice.py), what a genotype can do (test_genotype.py)."""

import itertools
import time
from dataclasses import replace

import pytest
import torch

from darts_lora import Genotype, InputError, SearchConfig, Supernet, discretize
from darts_lora.alpha.choice import choose
from darts_lora.lora.relaxation import distribution
from small_models import randomise, residual

RANKS = (0, 1, 2, 4)


def total(table, choice):
    return sum(float(table[i, k]) for i, k in enumerate(choice))


def searched(**options):
    supernet = Supernet(residual(), SearchConfig(**{"ranks": RANKS} | options))
    randomise(supernet)
    return supernet


def test_of_all_choices_the_most_probable_one_at_alphas_price():
    """Each parameter counts for the price: without it, small choices would be the likely ones."""
    supernet = searched(budget_rank=1.5)
    supernet.price = 0.01
    log_p, costs = supernet.alpha.detach().double().log_softmax(-1), supernet.costs
    values = log_p + 0.01 * costs
    for method in (None, "budget"):
        genotype = discretize(supernet, method)
        assert genotype.found_by["discretize"] == "budget"
        assert genotype.found_by["price"] == 0.01
        assert genotype.num_parameters <= supernet.budget == 1.5 * 4 * 32
        best = max(
            (c for c in itertools.product(range(4), repeat=4) if total(costs, c) <= 192),
            key=lambda c: total(values, c),
        )
        assert list(genotype.ranks.values()) == [RANKS[k] for k in best]
    best = supernet.alpha.argmax(-1).tolist()
    genotype = discretize(supernet, "argmax")
    assert list(genotype.ranks.values()) == [RANKS[k] for k in best]
    assert genotype.found_by["discretize"] == "argmax"


@pytest.mark.parametrize("budget_rank", [0.5, 1, 1.5, 3])
def test_another_budget_chooses_as_from_the_values_themselves(budget_rank, tmp_path):
    """The price and the probabilities hold all that the values said, also in a file."""
    supernet = searched(budget_rank=2)
    values = torch.rand(4, 4, dtype=torch.float64).cumsum(-1)
    alpha, supernet.price = distribution(values, supernet.costs, supernet.budget)
    supernet.alpha.data.copy_(alpha)
    discretize(supernet).save(tmp_path / "g.json")
    derived = discretize(Genotype.load(tmp_path / "g.json"), budget_rank=budget_rank)
    direct = choose(values, supernet.costs, budget_rank * 4 * 32)
    found = [RANKS.index(rank) for rank in derived.ranks.values()]
    assert total(values, found) == pytest.approx(total(values, direct), rel=2e-4)
    assert derived.num_parameters <= budget_rank * 4 * 32


def test_ranks_are_candidates():
    supernet = searched(ranks=(0, 8), budget_rank=3)
    assert set(discretize(supernet).ranks.values()) <= {0, 8}


def test_without_a_budget_a_genotype_of_other_hands_is_discretized_by_argmax():
    likely = {"a": [0.1, 0.9], "b": [0.8, 0.2]}
    genotype = Genotype(
        {"a": 0, "b": 0}, shapes=dict.fromkeys(likely, (8, 8)), candidates=[0, 4],
        probabilities=likely,
    )  # fmt: skip
    found = discretize(genotype)
    assert found.ranks == {"a": 4, "b": 0} and found.found_by["discretize"] == "argmax"


def test_a_genotype_can_be_discretized_again(tmp_path):
    supernet = searched(budget_rank=1.5)
    discretize(supernet).save(tmp_path / "g.json")
    loaded = Genotype.load(tmp_path / "g.json")
    for options in (
        {},
        {"budget_rank": 1},
        {"budget_parameters": 300},
        {"method": "argmax"},
        {"method": "budget"},
    ):
        again, direct = discretize(loaded, **options), discretize(supernet, **options)
        assert again.ranks == direct.ranks and again.found_by == direct.found_by
    assert discretize(loaded, budget_rank=1).num_parameters <= 128


def test_a_budget_of_the_largest_ranks_gives_them():
    supernet = searched(budget_rank=4)
    values = torch.rand(4, 4, dtype=torch.float64).cumsum(-1)
    alpha, supernet.price = distribution(values, supernet.costs, supernet.budget)
    supernet.alpha.data.copy_(alpha)
    assert set(discretize(supernet).ranks.values()) == {4}
    assert set(discretize(discretize(searched(budget_rank=1)), budget_rank=4).ranks.values()) == {4}


def test_a_tolerance_needs_a_search_that_recommends():
    for value in (-0.1, 1, float("nan"), "x"):
        with pytest.raises(InputError, match=r"tolerance=.*: must be a number in \[0, 1\)"):
            discretize(searched(), tolerance=value)
    with pytest.raises(InputError, match=r"tolerance=0\.1 and budget_rank=1: give one of them"):
        discretize(searched(), budget_rank=1, tolerance=0.1)
    with pytest.raises(InputError, match=r"tolerance=0\.1: the search recommended no size"):
        discretize(searched(), tolerance=0.1)


def test_errors():
    likely = {"candidates": [0, 1], "shapes": {"a": (4, 4)}, "probabilities": {"a": [0.5, 0.5]}}
    with pytest.raises(InputError, match="method='budget': give budget_rank"):
        discretize(Genotype({"a": 1}, **likely), "budget")
    for budget in ({"budget_rank": 1}, {"budget_parameters": 300}):
        with pytest.raises(InputError, match="method='argmax': keeps to no budget; leave out"):
            discretize(searched(), "argmax", **budget)
    with pytest.raises(InputError, match="method='best'"):
        discretize(searched(), "best")
    with pytest.raises(InputError, match=r"budget_rank=5: .* outside"):
        discretize(searched(), budget_rank=5)
    with pytest.raises(InputError, match="holds no probabilities"):
        discretize(Genotype({"a": 1}))


def test_10000_layers_take_seconds(tmp_path):
    """Derived under a budget, written, read, and made a PEFT configuration; minutes where the
    program is given all candidates. (PEFT itself matches names one by one.)"""
    names = [f"model.layers.{i // 10}.mlp.{i % 10}" for i in range(10_000)]
    log_p = torch.randn(10_000, 6, dtype=torch.float64)
    searched = Genotype(
        dict.fromkeys(names, 0),
        shapes={name: (1024 + 64 * (i % 7), 1024 + 128 * (i % 5)) for i, name in enumerate(names)},
        candidates=[0, 1, 2, 4, 8, 16],
        probabilities=dict(zip(names, log_p.softmax(-1).tolist(), strict=True)),
    )
    started = time.process_time()
    derived = discretize(searched, budget_rank=2)
    derived.save(tmp_path / "g.json")
    assert Genotype.load(tmp_path / "g.json") == derived
    config = derived.to_lora_config()
    assert time.process_time() - started < 15
    assert 0.9999 < derived.num_parameters / derived.found_by["budget_parameters"] <= 1
    assert len(config.rank_pattern) == sum(0 < rank < 16 for rank in derived.ranks.values())


def test_the_verdict_of_a_derived_genotype_is_of_its_own_ranks():
    supernet = Supernet(residual(), SearchConfig(ranks=(0, 1, 2, 4), budget_rank=2))
    randomise(supernet)
    searched = discretize(supernet)
    about = {"learnt": True, "chosen_parameters": searched.num_parameters}
    searched.found_by["verdict"] = about | {"budget_parameters": supernet.budget}
    derived = discretize(searched, budget_rank=1)
    verdict = derived.found_by["verdict"]
    assert verdict["chosen_parameters"] == derived.num_parameters <= 4 * 32
    assert verdict["budget_parameters"] == 4 * 32 and verdict["learnt"]
    assert searched.found_by["verdict"]["budget_parameters"] == supernet.budget


def test_a_file_does_not_decide_how_much_memory_is_taken():
    names = [f"layers.{i}" for i in range(1000)]
    genotype = Genotype(
        dict.fromkeys(names, 0),
        shapes=dict.fromkeys(names, (2**20, 2**20)),
        candidates=[0, 2**16],
        probabilities={name: [0.5, 0.5] for name in names},
        found_by={"budget_parameters": 2**20},
    )
    assert len(discretize(genotype, "budget").ranks) == 1000
    with pytest.raises(InputError, match=r"ranks=\[0, 65537\]: must be at most 65536"):
        replace(genotype, candidates=[0, 2**16 + 1])


@pytest.mark.parametrize("price", ["much", float("nan"), 1e31, True])
def test_a_price_that_is_no_number_is_refused(price):
    with pytest.raises(InputError, match=r"price=.*must be a number"):
        Genotype({"a": 1}, found_by={"price": price})
