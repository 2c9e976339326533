"""What candidates are worth, against closed forms: planted edges, shares, cuts, even ranks.
Not here: how it is measured (test_architect.py)."""

import dataclasses

import pytest
import torch

from darts_lora import SearchConfig, Supernet
from darts_lora.alpha.choice import choose
from darts_lora.alpha.values import GROWTH, Measured, Values, logarithm

RANKS = (0, 1, 2, 4)


def make(sizes=(16, 16, 48, 16), ranks=RANKS, **options):
    """Layers that are of no common type, so that each is drawn to 0 alone."""
    layers = {f"l{i}": torch.nn.Linear(16, size) for i, size in enumerate(sizes)}
    config = SearchConfig(ranks=ranks, **({"budget_rank": 1} | options))
    supernet = Supernet(torch.nn.ModuleDict(layers), config)
    return supernet, Values(supernet)


def measured(gains, energies=None, growth=0.0, cut=0.0, batches=4, loss=1.0):
    """The same in each of the batches."""
    gains = torch.as_tensor(gains, dtype=torch.float64)
    columns = 0 if energies is None else len(energies[0])
    if energies is None:
        energies = torch.zeros(0, len(gains), columns)
    else:
        energies = torch.as_tensor(energies, dtype=torch.float64).expand(batches, -1, -1)
    scalars = [torch.full((batches,), float(value)) for value in (growth, cut, loss)]
    return Measured(gains.expand(batches, -1), energies, *scalars)


def ranks_of(supernet, table):
    return [RANKS[k] for k in choose(table, supernet.costs, supernet.budget)]


EDGES = torch.tensor(
    [[5.0, 0, 0, 0], [0.0, 0, 0, 0], [0.0, 0, 0, 0], [4.0, 4, 0, 0]], dtype=torch.float64
)


def test_a_planted_edge_is_all_that_counts_where_nothing_more_can_be_learnt():
    """Layer 1 takes most off the loss, but no direction of it can be missed."""
    supernet, values = make(budget_parameters=3 * 32, budget_rank=None)
    found = measured([1.0, 9.0, 1.0, 1.0], EDGES, growth=0.0, cut=2.0)
    table = values.table(found)
    assert ranks_of(supernet, table) == [1, 0, 0, 2]
    assert (table.diff(dim=-1)[:, -1] < 1e-6).all(), "beyond its edge a layer wants no rank"
    assert not torch.equal(torch.tensor(ranks_of(supernet, values.table(
        dataclasses.replace(found, growth=torch.full((4,), 100.0))
    ))), torch.tensor([1, 0, 0, 2]))  # fmt: skip


def test_the_uniform_cut_costs_what_it_was_measured_to_cost():
    """5 + 4 of 13 are kept at rank 1, so 4 of 13 are worth the cut."""
    _, values = make()
    found = measured([1.0] * 4, EDGES, cut=0.6)
    uniform = torch.ones(4, 1, dtype=torch.float64)
    whole, cut = (values.at(found, r * uniform).sum() for r in (4, 1))
    assert float(whole - cut) == pytest.approx(0.6)
    assert float(whole - values.at(found, 0 * uniform).sum()) == pytest.approx(0.6 * 13 / 4)


@pytest.mark.parametrize("growth", [0.0, 0.2, 1.8])
def test_a_run_that_still_learns_mends_a_cut(growth):
    """Of a cut of 0.6 the part 0.6 / (0.6 + growth) lasts, on top of what growth is worth."""
    _, values = make()
    found = measured([1.0] * 4, EDGES, growth=growth, cut=0.6)
    nothing_cut = dataclasses.replace(found, cut=torch.zeros(4))
    ranks = torch.tensor([[4.0], [1.0]], dtype=torch.float64)
    whole, cut = (
        (values.at(found, r.expand(4, 1)) - values.at(nothing_cut, r.expand(4, 1))).sum()
        for r in ranks
    )
    assert float(whole - cut) == pytest.approx(0.6 * 0.6 / (0.6 + growth))


@pytest.mark.parametrize("budget_rank", [0.3, 1.4, 1.6])
def test_between_whole_ranks_the_cut_that_is_measured_is_the_one_that_counts(budget_rank):
    """A cut is measured at a whole rank: of a budget between two, at the nearest."""
    _, values = make(budget_rank=budget_rank)
    assert values.uniform == pytest.approx(budget_rank)
    found = measured([1.0] * 4, torch.tensor([[5.0, 2, 1, 0.5]] * 4), cut=0.6)
    nearest = torch.full((4, 1), float(round(budget_rank)), dtype=torch.float64)
    whole, cut = (values.at(found, r).sum() for r in (nearest * 0 + 4, nearest))
    assert float(whole - cut) == pytest.approx(0.6)


def test_values_between_whole_ranks_are_linear():
    _, values = make()
    found = measured([1.0, 2.0, 3.0, 4.0], EDGES, growth=0.4, cut=0.6)
    at = [values.at(found, torch.full((4, 1), rank, dtype=torch.float64)) for rank in (1, 1.25, 2)]
    torch.testing.assert_close(at[1], 0.75 * at[0] + 0.25 * at[2])
    table = values.table(found)
    torch.testing.assert_close(table[:, 1:3], torch.cat([at[0], at[2]], -1))


def test_a_cut_that_costs_nothing_leaves_ranks_in_proportion_to_shares():
    ranks = tuple(range(17))
    supernet, values = make(ranks=ranks, budget_rank=4)
    found = measured([1.0, 2.0, 1.0, 8.0], EDGES, growth=0.7, cut=-0.1)
    shares = values.shares(found)
    assert float(shares.sum()) == pytest.approx(1)
    growth = GROWTH * 0.7
    expected = growth * shares[:, None] * logarithm(supernet.layer_ranks)
    torch.testing.assert_close(values.table(found), expected, rtol=1e-6, atol=0)
    choice = torch.tensor(choose(values.table(found), supernet.costs, supernet.budget))
    wanted = shares * supernet.budget / supernet.unit_costs
    assert (choice - wanted).abs().max() <= 0.75, "as Sainte-Lague rounds, in whole parameters"


def test_shares_are_the_mean_of_both_estimates():
    supernet, values = make()
    gains = torch.tensor([1.0, 2.0, -3.0, 1.0], dtype=torch.float64)
    found = measured(gains, EDGES)
    unit = supernet.unit_costs
    by_gain = gains.clamp_min(0) * unit
    by_energy = (EDGES.sum(-1) / unit).sqrt() * unit
    expected = sum(part / part.sum() for part in (by_gain, by_energy)) / 2
    torch.testing.assert_close(values.shares(found), expected)
    only = values.shares(measured(gains))
    torch.testing.assert_close(only, by_gain / by_gain.sum())


@pytest.mark.parametrize("gain", [0.0, -1.0])
def test_where_nothing_was_gained_ranks_are_even(gain):
    supernet, values = make(ranks=(0, 1, 2, 3, 4, 5), budget_rank=3)
    for energies in (None, torch.zeros(4, 8)):
        found = measured([gain] * 4, energies, growth=1.0)
        torch.testing.assert_close(
            values.shares(found), supernet.unit_costs / supernet.unit_costs.sum()
        )
        assert choose(values.table(found), supernet.costs, supernet.budget) == [3] * 4


def test_where_nothing_can_be_told_a_budget_is_spent_by_the_shares():
    """A loss that did not fall, and a cut that costs nothing: not rank 0 everywhere."""
    supernet, values = make(ranks=(0, 1, 2, 3, 4, 5), budget_rank=3)
    found = measured([1.0] * 4, torch.zeros(4, 8), growth=0.0, cut=0.0)
    assert choose(values.table(found), supernet.costs, supernet.budget) == [3] * 4


def test_before_the_end_gains_alone_decide_and_growth_is_a_unit():
    supernet, values = make()
    found = measured([1.0, 3.0, 1.0, 1.0])
    found = Measured(found.gains, found.energies, *(torch.zeros(0) for _ in range(3)))
    assert values.growth(found) == 1
    expected = values.shares(found)[:, None] * logarithm(supernet.layer_ranks)
    torch.testing.assert_close(values.table(found), expected)


def test_a_loss_that_rises_with_the_steps_counts_as_no_growth():
    _, values = make()
    found = measured([1.0] * 4, EDGES, growth=-0.5, cut=0.6)
    assert 0 < values.growth(found) < 1e-5
    torch.testing.assert_close(values.table(found), values.table(
        dataclasses.replace(found, growth=torch.zeros(4))
    ))  # fmt: skip


def test_kept_energy_is_that_of_the_best_directions():
    _, values = make()
    energies = torch.tensor([[1.0, 3.0, 0.0], [2.0, 0.0, 4.0]], dtype=torch.float64)
    kept = values.kept(energies)
    expected = torch.tensor([[0.0, 3, 4, 4], [0, 4, 6, 6]], dtype=torch.float64) / 10
    torch.testing.assert_close(kept, expected)


def test_each_rank_counts_from_its_middle():
    ranks = torch.tensor([[0.0, 1, 2, 4, 100]], dtype=torch.float64)
    found = logarithm(ranks)[0]
    expected = [sum(1 / (r - 0.5) for r in range(1, int(n) + 1)) for n in ranks[0]]
    torch.testing.assert_close(found, torch.tensor(expected, dtype=torch.float64))
    assert float(found[-1] - found[-2]) == pytest.approx(float((ranks[0, 4] / 4).log()), rel=0.01)


def test_folds_part_the_batches():
    whole = measured([1.0, 2.0, 3.0, 4.0], EDGES, batches=8)
    whole = dataclasses.replace(
        whole, losses=torch.arange(8.0), gains=torch.arange(32.0).view(8, 4)
    )
    assert whole.only(1, 4).losses.tolist() == [1, 5]
    assert whole.without(1, 4).losses.tolist() == [0, 2, 3, 4, 6, 7]
    assert torch.equal(whole.only(1, 4).gains, whole.gains[[1, 5]])
    assert len(whole.without(3, 4).energies) == 6 and float(whole.only(1, 4).loss) == 3
