"""Alpha in proportion to worth: shares and alpha against closed forms, what a layer is worth, the
way from even. Not here: the architecture step around it (test_architect.py)."""

import math

import pytest
import torch

from darts_lora import Architect, InputError, SearchConfig, Supernet
from darts_lora.allocation import share
from darts_lora.prior import Prior

RANKS = (0, 1, 2, 4, 8)


def make(steps=400, ranks=RANKS, sizes=(16, 16, 48, 16), dtype=torch.float32, **options):
    layers = {f"l{i}": torch.nn.Linear(16, size) for i, size in enumerate(sizes)}
    config = SearchConfig(**{"ranks": ranks, "budget_rank": 2, "arch_noise": 0.0, **options})
    supernet = Supernet(torch.nn.ModuleDict(layers), config)
    supernet._place_alpha(supernet.alpha.device, dtype)
    return supernet, Architect(supernet, steps=steps)


def mean_ranks(supernet):
    ranks = torch.tensor(supernet.config.ranks).to(supernet.alpha)
    return (supernet.probabilities() @ ranks).detach()


def log_loss(supernet, worth):
    """-worth . log of the expected parameters."""
    costs = supernet.costs.to(supernet.alpha)
    return lambda _: -(worth * (supernet.probabilities() * costs).sum(-1).log()).sum()


@pytest.mark.parametrize("layers", [1, 3, 200])
@pytest.mark.parametrize("least", [0.0, 2.0])
def test_shares_are_those_of_the_best_split_of_a_sum_of_logs(layers, least):
    """Karush-Kuhn-Tucker: worth over share is one price inside, more at `most`, less at `least`."""
    worth = torch.randn(layers, dtype=torch.float64).exp()
    cost = torch.randint(1, 9, (layers,)).double()
    total = 8 * float(cost.sum())
    shares = share(worth, least * cost, 32 * cost, total)
    assert float(shares.sum()) == pytest.approx(total, rel=1e-9)
    low, high = shares <= least * cost * (1 + 1e-9), shares >= 32 * cost * (1 - 1e-9)
    prices, inside = worth / shares, ~low & ~high
    if inside.any():
        price = prices[inside].mean()
        assert prices[inside].max() / prices[inside].min() < 1 + 1e-3
        assert (prices[high] > 0.999 * price).all() and (prices[low] < 1.001 * price).all()


@pytest.mark.parametrize("worth", [0.0, -1.0])
def test_where_nothing_is_worth_anything_ranks_are_even(worth):
    cost = torch.tensor([1.0, 3.0, 7.0])
    shares = share(torch.full((3,), worth), 0 * cost, 16 * cost, 5 * 11.0)
    torch.testing.assert_close(shares / cost, torch.full((3,), 5.0), rtol=1e-5, atol=0)


@pytest.mark.parametrize("budget", [0.1, 2.5, 7.9, 63.0])
@pytest.mark.parametrize("ranks", [RANKS, (1, 2, 8), (4, 8, 64)])
def test_begins_with_the_budgets_rank_everywhere_and_the_largest_entropy(ranks, budget):
    budget = min(max(budget, ranks[0]), ranks[-1])
    supernet = make_wide(ranks, budget)
    uniform = torch.full((2,), float(budget))
    torch.testing.assert_close(mean_ranks(supernet), uniform, rtol=2e-3, atol=2e-3)
    # of all distributions with a mean, that of largest entropy has its logarithm linear in the rank
    alpha, places = supernet.alpha.detach().double(), torch.tensor(ranks).double()
    slopes = alpha.diff(dim=-1) / places.diff()
    torch.testing.assert_close(slopes, slopes[:, :1].expand_as(slopes), rtol=1e-4, atol=1e-5)


def make_wide(ranks, budget):
    layers = {name: torch.nn.Linear(64, size) for name, size in (("a", 64), ("b", 99))}
    config = SearchConfig(ranks=ranks, budget_rank=budget)
    supernet = Supernet(torch.nn.ModuleDict(layers), config)
    Architect(supernet, steps=1)
    return supernet


@pytest.mark.parametrize("arch_noise", [0.0, 16.0])
def test_of_a_loss_in_the_log_of_parameters_it_finds_the_best_split(arch_noise):
    supernet, architect = make(dtype=torch.float64, arch_noise=arch_noise)
    worth = torch.tensor([1.0, 2.0, 4.0, 0.5], dtype=torch.float64)
    for _ in range(400):
        metrics = architect.step(log_loss(supernet, worth), None)
        assert float(metrics["expected_parameters"]) == pytest.approx(supernet.budget, rel=1e-4)
    counted = 360 + sum(1 - step / 40 for step in range(40))  # in the last tenth alpha moves
    torch.testing.assert_close(architect.allocation.worth() / counted, worth, rtol=1e-6, atol=0)
    size = (supernet.probabilities() * supernet.costs).sum(-1).detach()
    torch.testing.assert_close(size / supernet.budget, worth / worth.sum(), rtol=1e-3, atol=0)


def test_stays_even_and_goes_to_the_shares_in_the_last_tenth_of_its_steps():
    supernet, architect = make(steps=40, sizes=(16, 16))
    worth = torch.tensor([3.0, 1.0])
    for step in range(1, 45):  # a trainer may take more than it said
        architect.step(log_loss(supernet, worth), None)
        way = {37: 0.25, 38: 0.5, 39: 0.75}.get(step, float(step >= 40))
        expected = torch.tensor([2 + way, 2 - way])
        torch.testing.assert_close(mean_ranks(supernet), expected, rtol=1e-3, atol=0)


def test_a_step_counts_by_the_way_that_is_still_to_go():
    """Worth is seen where ranks are even; what comes after alpha has arrived counts nothing."""
    supernet, architect = make(steps=40, sizes=(16, 16))
    early, late = torch.tensor([3.0, 1.0]), torch.tensor([0.0, 1.0])
    for step in range(50):
        architect.step(log_loss(supernet, early if step < 36 else late), None)
    worth = 36 * early + (1 + 0.75 + 0.5 + 0.25) * late
    expected = 4 * worth / worth.sum()
    torch.testing.assert_close(mean_ranks(supernet), expected, rtol=1e-3, atol=0)


def test_noise_is_averaged_and_layers_are_drawn_to_their_type():
    """Two types of layers, of which the second is worth three times as much."""
    names = [f"layers.{i}.{kind}" for i in range(20) for kind in ("a", "b")]
    worth, spread = torch.tensor([1.0, 3.0]).repeat(20), []

    def noisy(supernet):
        gates = supernet.probabilities()
        return log_loss(supernet, worth)(None) + 10 * (torch.randn_like(gates) * gates).sum()

    for arch_noise in (0.0, 16.0):
        torch.manual_seed(0)
        supernet, architect = make(steps=100, sizes=[16] * 40)
        architect.allocation.prior = Prior(names, arch_noise, supernet.costs[:, -1])
        for _ in range(100):
            architect.step(noisy, supernet)
        ranks = mean_ranks(supernet)
        spread.append(float((ranks / worth - ranks.sum() / worth.sum()).std()))
        assert float(ranks[1::2].mean() / ranks[::2].mean()) == pytest.approx(3, rel=0.25)
    assert spread[1] < 0.6 * spread[0]


def test_needs_a_budget_and_a_number_of_steps():
    with pytest.raises(InputError, match="arch_update=proportional: shares a budget"):
        SearchConfig(arch_update="proportional")
    supernet = Supernet(torch.nn.ModuleDict({"a": torch.nn.Linear(16, 16)}), SearchConfig())
    assert Architect(supernet).allocation is None and supernet.arch_update == "gradient"
    with pytest.raises(InputError, match=r"steps=None.*give their number"):
        make(steps=None)


def test_undecided_gradients_at_the_ends_stay_finite():
    """All worth in one layer: it gets the largest rank, the others next to none."""
    supernet, architect = make(steps=20, sizes=(16, 16, 16, 16))
    worth = torch.tensor([1.0, 0.0, 0.0, 0.0])
    for _ in range(60):
        metrics = architect.step(log_loss(supernet, worth), None)
    assert supernet.alpha.isfinite().all()
    assert mean_ranks(supernet)[0] == pytest.approx(8, rel=1e-2)
    assert math.isfinite(float(metrics["expected_parameters"]))
