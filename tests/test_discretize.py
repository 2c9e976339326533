"""The choice of ranks against exhaustive search.
Not here: what a genotype can do (test_genotype.py)."""

import itertools
import time
from dataclasses import replace

import pytest
import torch

from darts_lora import Genotype, InputError, SearchConfig, Supernet, discretize
from darts_lora.discretize import choose, proportional_values, shared_parameters
from darts_lora.lora.cost import rank_costs
from small_models import randomise, residual


@pytest.mark.parametrize("share", [0.02, 0.4, 0.8])
@pytest.mark.parametrize("seed", range(10))
@pytest.mark.parametrize("kind", ["shared", "proportional", "any"])
def test_best_within_the_budget_is_the_exhaustive_best(seed, share, kind):
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(5, 4, generator=generator, dtype=torch.float64).mul(2).log_softmax(-1)
    shapes = torch.randint(3, 40, (5, 2), generator=generator).tolist()
    costs = rank_costs(shapes, (0, 1, 2, 3) if kind == "proportional" else (0, 1, 2, 4))
    if kind == "shared":
        values = shared_parameters(values.exp(), costs)
    elif kind == "proportional":
        values = proportional_values(values.exp()[:, 0], costs)
    budget = float(costs[:, 3].sum()) * share
    best = max(
        (c for c in itertools.product(range(4), repeat=5) if _total(costs, c) <= budget),
        key=lambda c: _total(values, c),
    )
    choice = choose(values, costs, budget)
    assert _total(costs, choice) <= budget
    assert _total(values, choice) == pytest.approx(_total(values, best), rel=1e-4)


def test_shared_parameters_are_those_of_drawn_architectures():
    probabilities = torch.tensor([[0.5, 0.0, 0.2, 0.3]], dtype=torch.float64)
    costs = rank_costs([(3, 4)], (0, 1, 2, 4))
    drawn = torch.multinomial(probabilities[0], 100_000, replacement=True)
    shared = torch.minimum(costs[0][:, None], costs[0][drawn]).mean(-1)
    torch.testing.assert_close(shared_parameters(probabilities, costs)[0], shared, rtol=0, atol=0.1)
    assert shared_parameters(probabilities, costs)[0].tolist() == pytest.approx([0, 3.5, 7, 11.2])


def test_certain_layers_keep_their_ranks_and_undecided_ones_share_what_is_left():
    """Their most probable rank, 4, would fit one of them alone."""
    likely = {"a": [0.0, 0.0, 0.0, 1.0], "b": [1.0, 0.0, 0.0, 0.0]}
    likely |= {name: [0.3, 0.1, 0.2, 0.4] for name in ("c", "d")}
    searched = Genotype(
        dict.fromkeys(likely, 0),
        shapes=dict.fromkeys(likely, (8, 8)),
        candidates=[0, 1, 2, 4],
        probabilities=likely,
    )
    for budget, ranks in ((64, [4, 0, 0, 0]), (128, [4, 0, 2, 2]), (192, [4, 0, 4, 4])):
        derived = discretize(searched, budget_parameters=budget)
        assert list(derived.ranks.values()) == ranks


def test_whole_ranks_are_shared_out_as_seats_are_by_sainte_lague():
    """0.6, 3.4 and 5 of 9: to the nearest; by d'Hondt's divisors they would be 0, 4 and 5."""
    costs = rank_costs([(4, 4)] * 3, range(10))
    wanted = 8 * torch.tensor([0.6, 3.4, 5.0], dtype=torch.float64)
    assert choose(proportional_values(wanted, costs), costs, 9 * 8.0) == [1, 3, 5]


@pytest.mark.parametrize("seed", range(5))
def test_whole_ranks_are_in_proportion_to_what_is_wanted(seed):
    generator = torch.Generator().manual_seed(seed)
    names = [f"layers.{i}.linear" for i in range(200)]
    log_p = torch.randn(200, 6, generator=generator, dtype=torch.float64)
    probabilities = (log_p + torch.randn(200, 1, generator=generator) * torch.arange(6)).softmax(-1)
    shapes = torch.randint(64, 640, (200, 2), generator=generator).tolist()
    searched = Genotype(
        dict.fromkeys(names, 0),
        shapes=dict(zip(names, map(tuple, shapes), strict=True)),
        candidates=[0, 1, 2, 4, 8, 32],
        probabilities=dict(zip(names, probabilities.tolist(), strict=True)),
        branches="nested",
    )
    derived = discretize(searched, "proportional", budget_rank=4)
    assert derived.found_by["discretize"] == "proportional"
    assert 0.9995 < derived.num_parameters / derived.found_by["budget_parameters"] <= 1
    wanted = probabilities @ torch.tensor(searched.candidates, dtype=torch.float64)
    ranks = torch.tensor(list(derived.ranks.values()), dtype=torch.float64)
    free = ranks < 32
    large = free & (ranks >= 4)  # what is wanted below half a rank is rounded to none
    share = wanted * (ranks[large].sum() / wanted[large].sum())
    # rounding, and the 0.01 % of the value that a choice may lack
    assert (ranks - share)[free].abs().max() < 1.5
    assert (share[~free] > 31).all()
    assert set(derived.ranks.values()) - set(searched.candidates)


def test_values_that_are_no_numbers_are_refused():
    """A NaN is never the smallest: the bisection of the price would not end."""
    costs = rank_costs([(4, 4)] * 3, (0, 1, 2))
    for bad in (float("nan"), float("inf")):
        values = torch.ones(3, 3, dtype=torch.float64)
        values[1, 2] = bad
        with pytest.raises(InputError, match="infinite or NaN"):
            choose(values, costs, 10.0)


def _total(table, choice):
    return sum(float(table[i, k]) for i, k in enumerate(choice))


def searched(**options):
    supernet = Supernet(residual(), SearchConfig(**{"ranks": (0, 1, 2, 4)} | options))
    randomise(supernet)
    return supernet


def test_argmax_without_a_budget_and_as_alpha_moved_with_one():
    supernet = searched()
    genotype = discretize(supernet)
    best = supernet.alpha.argmax(-1).tolist()
    assert list(genotype.ranks.values()) == [(0, 1, 2, 4)[k] for k in best]
    assert genotype.found_by["discretize"] == "argmax"
    for arch_update, method in (("gradient", "budget"), (None, "proportional")):
        supernet = searched(budget_rank=1.5, arch_update=arch_update)
        genotype = discretize(supernet)
        assert genotype.found_by["discretize"] == method
        assert genotype.num_parameters <= supernet.budget == 1.5 * 4 * 32


@pytest.mark.parametrize("branches", ["independent", "nested"])
def test_proportional_ranks_of_independent_branches_are_candidates(branches):
    supernet = searched(ranks=(0, 8), budget_rank=3, branches=branches)
    ranks = set(discretize(supernet, "proportional").ranks.values())
    assert (ranks <= {0, 8}) == (branches == "independent")


def test_a_genotype_can_be_discretized_again(tmp_path):
    supernet = searched(budget_rank=1.5)
    discretize(supernet).save(tmp_path / "g.json")
    loaded = Genotype.load(tmp_path / "g.json")
    for options in (
        {},
        {"budget_rank": 1},
        {"budget_parameters": 300},
        {"method": "argmax"},
        {"method": "proportional"},
    ):
        again, direct = discretize(loaded, **options), discretize(supernet, **options)
        assert again.ranks == direct.ranks and again.found_by == direct.found_by
    assert discretize(loaded, budget_rank=1).num_parameters <= 128


def test_errors():
    with pytest.raises(InputError, match="method='proportional': give budget_rank"):
        discretize(searched(), "proportional")
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
    """Ranks between the candidates are choices as well, up to the largest, of all layers."""
    names = [f"layers.{i}" for i in range(1000)]
    genotype = Genotype(
        dict.fromkeys(names, 0),
        shapes=dict.fromkeys(names, (2**20, 2**20)),
        candidates=[0, 2**16],
        branches="nested",
        probabilities={name: [0.5, 0.5] for name in names},
        found_by={"budget_parameters": 2**20},
    )
    with pytest.raises(InputError, match=r"candidates: 1,000 layers with ranks up to 65,536 are"):
        discretize(genotype, "proportional")
    assert len(discretize(genotype, "budget").ranks) == 1000
    with pytest.raises(InputError, match=r"ranks=\[0, 65537\]: must be at most 65536"):
        replace(genotype, candidates=[0, 2**16 + 1])
