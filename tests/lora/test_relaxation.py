"""Costs and budgets against PEFT's count; distributions over candidates: their expected cost, their
entropy, the price. Not here: the values (test_values.py), a search's budget (test_architect.py)."""

import math

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from darts_lora import InputError
from darts_lora.alpha.choice import choose
from darts_lora.lora.cost import rank_costs, resolve_budget
from darts_lora.lora.relaxation import LOWEST, SPREAD, distribution, entropies, even

RANKS = (0, 1, 2, 4, 8)
SHAPES = [(16, 16), (16, 48), (64, 64), (99, 7), (16, 16), (30, 30)]


def table(seed=0):
    """Values that rise with the rank, of layers that are worth unlike much."""
    generator = torch.Generator().manual_seed(seed)
    layers = len(SHAPES)
    steps = torch.rand(layers, len(RANKS), generator=generator, dtype=torch.float64)
    return (steps * torch.rand(layers, 1, generator=generator, dtype=torch.float64)).cumsum(-1)


def expected(alpha, costs):
    return float((alpha.softmax(-1) * costs).sum())


@pytest.mark.parametrize("part", [0.003, 0.2, 0.5, 0.97])
def test_expected_parameters_are_the_budget(part):
    costs = rank_costs(SHAPES, RANKS)
    budget = part * float(costs[:, -1].sum())
    for seed in range(3):
        alpha, price = distribution(table(seed), costs, budget)
        assert alpha.dtype == torch.float64 and math.isfinite(price)
        assert expected(alpha, costs) == pytest.approx(budget, rel=1e-9)
        assert (alpha.max(-1).values == 0).all() and alpha.min() >= LOWEST


def test_the_price_gives_the_values_back():
    costs = rank_costs(SHAPES, RANKS)
    values = table()
    alpha, price = distribution(values, costs, 0.4 * float(costs[:, -1].sum()))
    found = alpha + price * costs
    spread = (values.max(-1).values - values.min(-1).values).mean()
    wanted = values * SPREAD / spread
    torch.testing.assert_close(found - found[:, :1], wanted - wanted[:, :1])
    for part in (0.1, 0.3, 0.7):  # another budget chooses as from the values
        budget = part * float(costs[:, -1].sum())
        again, direct = choose(found - found[:, :1], costs, budget), choose(values, costs, budget)
        totals = [values.gather(1, torch.tensor(c)[:, None]).sum() for c in (again, direct)]
        assert float(totals[0]) == pytest.approx(float(totals[1]), rel=2e-4)


def test_of_all_of_its_cost_and_value_it_has_the_most_entropy():
    """No small step that keeps both gains any."""
    costs, values = rank_costs(SHAPES, RANKS), table()
    alpha, _ = distribution(values, costs, 0.4 * float(costs[:, -1].sum()))
    p = alpha.softmax(-1)
    # the slope of the entropy is at a right angle to each step that keeps sums, cost and value
    slope = -(p.log() + 1)
    rows = torch.block_diag(*[torch.ones(1, len(RANKS), dtype=torch.float64)] * len(SHAPES))
    constraints = torch.cat([rows, costs.reshape(1, -1), values.reshape(1, -1)])
    solved = torch.linalg.lstsq(constraints.T, slope.reshape(-1, 1)).solution
    torch.testing.assert_close(constraints.T @ solved, slope.reshape(-1, 1), atol=1e-8, rtol=0)


def test_a_unit_of_the_loss_changes_nothing():
    costs, values = rank_costs(SHAPES, RANKS), table()
    budget = 0.4 * float(costs[:, -1].sum())
    one, other = (distribution(unit * values, costs, budget)[0] for unit in (1.0, 1e-6))
    torch.testing.assert_close(one, other)


def test_values_that_are_all_alike_leave_the_budget_as_spread_as_it_can_be():
    costs = rank_costs([(16, 16)] * 3, RANKS)
    alpha, _ = distribution(torch.full((3, 5), 2.0, dtype=torch.float64), costs, 3 * 32 * 2.5)
    ranks = alpha.softmax(-1) @ torch.tensor(RANKS, dtype=torch.float64)
    torch.testing.assert_close(ranks, torch.full((3,), 2.5, dtype=torch.float64))
    wanted = even(torch.tensor([RANKS] * 3).double(), costs, 3 * 32 * 2.5)
    torch.testing.assert_close(alpha.softmax(-1), wanted.softmax(-1))


def test_one_layer_that_is_worth_all_gets_it_and_alpha_stays_finite():
    costs = rank_costs([(16, 16)] * 4, RANKS)
    values = torch.zeros(4, 5, dtype=torch.float64)
    values[0] = torch.tensor([0.0, 1e3, 2e3, 4e3, 8e3])
    alpha, _ = distribution(values, costs, 8 * 32.0)
    assert alpha.isfinite().all() and expected(alpha, costs) == pytest.approx(8 * 32, rel=1e-6)
    ranks = alpha.softmax(-1) @ torch.tensor(RANKS, dtype=torch.float64)
    assert ranks[0] > 7.8


@pytest.mark.parametrize("budget", [0.1, 2.5, 7.9, 63.0])
@pytest.mark.parametrize("ranks", [RANKS, (1, 2, 8), (4, 8, 64)])
def test_even_has_the_budgets_rank_everywhere_and_the_largest_entropy(ranks, budget):
    budget = min(max(budget, ranks[0] + 0.01), ranks[-1] - 0.01)
    costs = rank_costs([(64, 64), (64, 99)], ranks)
    places = torch.tensor([ranks, ranks]).double()
    alpha = even(places, costs, budget * 291.0)
    means = (alpha.softmax(-1) * places).sum(-1)
    torch.testing.assert_close(means, torch.full_like(means, budget), rtol=1e-9, atol=0)
    # of all distributions with a mean, that of largest entropy has its logarithm linear in the rank
    slopes = alpha.diff(dim=-1) / places.diff()
    torch.testing.assert_close(slopes, slopes[:, :1].expand_as(slopes))


def test_even_meets_the_budget_with_layers_that_few_candidates_fit():
    ranks = torch.tensor([[0, 1, 2, 4, 8], [0, 1, 2, 3, 3]]).double()
    costs = ranks * torch.tensor([[40.0], [19.0]]).double()
    alpha = even(ranks, costs, 100.0)
    assert expected(alpha, costs) == pytest.approx(100, rel=1e-9)


def test_entropy_by_closed_form():
    assert entropies(torch.full((3, 4), 0.25)).tolist() == pytest.approx([1.0] * 3)
    assert entropies(torch.eye(4)).tolist() == [0.0] * 4
    half = torch.tensor([[0.5, 0.5, 0.0, 0.0]])
    assert entropies(half).item() == pytest.approx(math.log(2) / math.log(4))
    assert entropies(torch.ones(3, 1)).tolist() == [0.0] * 3


def test_costs_are_pefts_trainable_parameters():
    shapes = [(6, 5), (7, 3)]
    costs = rank_costs(shapes, (0, 1, 3))
    assert costs.shape == (2, 3) and costs[:, 0].eq(0).all()
    for i, (inside, outside) in enumerate(shapes):
        for k, rank in ((1, 1), (2, 3)):
            model = get_peft_model(
                nn.Sequential(nn.Linear(inside, outside)), LoraConfig(r=rank, target_modules=["0"])
            )
            assert costs[i, k] == model.get_nb_trainable_parameters()[0]


def test_budgets():
    costs = rank_costs([(6, 5), (7, 3)], (1, 4))
    assert resolve_budget(costs, 21, None, None) is None
    assert resolve_budget(costs, 21, 2.5, None) == 52.5
    assert resolve_budget(costs, 21, None, 84) == 84
    for rank, parameters in ((0.9, None), (4.1, None), (None, 20), (None, 85)):
        with pytest.raises(InputError, match="are outside what the candidates allow, 21 to 84"):
            resolve_budget(costs, 21, rank, parameters)
    with pytest.raises(InputError, match="give one of them"):
        resolve_budget(costs, 21, 2, 42)
