"""The choice of ranks against exhaustive search. Not here: what candidates are worth."""

import ctypes
import itertools
import os
import time

import pytest
import scipy.optimize
import torch

from darts_lora import InputError
from darts_lora.alpha import choice
from darts_lora.alpha.choice import choose
from darts_lora.alpha.values import logarithm
from darts_lora.lora.cost import rank_costs


def total(table, choice):
    return sum(float(table[i, k]) for i, k in enumerate(choice))


@pytest.mark.parametrize("share", [0.02, 0.4, 0.8])
@pytest.mark.parametrize("seed", range(10))
@pytest.mark.parametrize("kind", ["logarithm", "any"])
def test_best_within_the_budget_is_the_exhaustive_best(seed, share, kind):
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(5, 4, generator=generator, dtype=torch.float64).mul(2).log_softmax(-1)
    shapes = torch.randint(3, 40, (5, 2), generator=generator).tolist()
    ranks = (0, 1, 2, 4) if kind == "any" else (0, 1, 2, 3)
    costs = rank_costs(shapes, ranks)
    if kind == "logarithm":
        table = logarithm(torch.tensor([ranks], dtype=torch.float64).expand(5, -1))
        values = values[:, :1].exp() * table
    budget = float(costs[:, 3].sum()) * share
    best = max(
        (c for c in itertools.product(range(4), repeat=5) if total(costs, c) <= budget),
        key=lambda c: total(values, c),
    )
    choice = choose(values, costs, budget)
    assert total(costs, choice) <= budget
    assert total(values, choice) == pytest.approx(total(values, best), rel=1e-4)


def test_whole_ranks_are_shared_out_as_seats_are_by_sainte_lague():
    """0.6, 3.4 and 5 of 9: to the nearest; by d'Hondt's divisors they would be 0, 4 and 5."""
    ranks = torch.arange(10, dtype=torch.float64).expand(3, -1)
    shares = torch.tensor([[0.6], [3.4], [5.0]], dtype=torch.float64)
    costs = rank_costs([(4, 4)] * 3, range(10))
    assert choose(shares * logarithm(ranks), costs, 9 * 8.0) == [1, 3, 5]


@pytest.mark.parametrize("seed", range(3))
def test_many_layers_get_ranks_in_proportion_to_their_shares(seed):
    generator = torch.Generator().manual_seed(seed)
    shapes = torch.randint(64, 640, (200, 2), generator=generator).tolist()
    costs = rank_costs(shapes, range(33))
    shares = torch.rand(200, generator=generator, dtype=torch.float64) * costs[:, 1]
    table = logarithm(torch.arange(33, dtype=torch.float64).expand(200, -1))
    budget = 8 * float(costs[:, 1].sum())
    found = torch.tensor(choose(shares[:, None] * table, costs, budget))
    wanted = budget * shares / shares.sum() / costs[:, 1]
    # rounding, and the 0.01 % of the value that a choice may lack
    assert (found - wanted).abs().max() < 1.5


@pytest.mark.skipif(os.name != "posix", reason="needs the C library's own output")
def test_what_the_solver_prints_by_itself_is_not_on_the_standard_output(monkeypatch, capfd):
    def chatty(**problem):
        ctypes.CDLL(None).puts(b"HighsMipSolverData")
        return scipy.optimize.milp(**problem)

    monkeypatch.setattr(choice, "milp", chatty)
    print("before")
    costs = rank_costs([(4, 4), (8, 4), (6, 6)], (0, 1, 2))
    table = torch.tensor([[0.0, 1.0, 1.9], [0.0, 0.8, 1.7], [0.0, 1.1, 1.6]]).double()
    choose(table, costs, 25.0)
    ctypes.CDLL(None).puts(b"after")
    ctypes.CDLL(None).fflush(None)
    assert capfd.readouterr().out.split() == ["before", "after"]


def test_values_that_are_no_numbers_are_refused():
    """A NaN is never the smallest: the bisection of the price would not end."""
    costs = rank_costs([(4, 4)] * 3, (0, 1, 2))
    for bad in (float("nan"), float("inf")):
        values = torch.ones(3, 3, dtype=torch.float64)
        values[1, 2] = bad
        with pytest.raises(InputError, match="infinite or NaN"):
            choose(values, costs, 10.0)


def test_a_budget_below_the_smallest_choice_is_refused():
    costs = rank_costs([(4, 4)] * 3, (1, 2))
    with pytest.raises(InputError, match=r"budget_parameters=23: no choice of ranks is as small"):
        choose(torch.ones(3, 2, dtype=torch.float64), costs, 23.0)


def test_layers_that_are_worth_nothing_leave_any_choice_within_the_budget():
    costs = rank_costs([(4, 4)] * 3, (0, 1, 2))
    choice = choose(torch.zeros(3, 3, dtype=torch.float64), costs, 10.0)
    assert total(costs, choice) <= 10


def test_10000_layers_take_seconds():
    """Minutes, where the program is given all candidates."""
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(10_000, 6, generator=generator, dtype=torch.float64).log_softmax(-1)
    shapes = [(1024 + 64 * (i % 7), 1024 + 128 * (i % 5)) for i in range(10_000)]
    costs = rank_costs(shapes, (0, 1, 2, 4, 8, 16))
    budget = 2 * float(costs[:, 1].sum())
    started = time.process_time()
    choice = torch.tensor(choose(values, costs, budget))
    assert time.process_time() - started < 10
    assert 0.9999 < float(costs.gather(1, choice[:, None]).sum()) / budget <= 1
