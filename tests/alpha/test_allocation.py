"""Alpha in proportion to worth: shares and alpha against closed forms, what a layer is worth, where
gates are drawn. Not here: the architecture step around it (test_architect.py)."""

import math

import pytest
import torch

from darts_lora import Architect, InputError, SearchConfig, Supernet
from darts_lora.alpha.allocation import share
from darts_lora.alpha.prior import Prior

RANKS = (0, 1, 2, 4, 8)


def make(ranks=RANKS, sizes=(16, 16, 48, 16), dtype=torch.float32, **options):
    layers = {f"l{i}": torch.nn.Linear(16, size) for i, size in enumerate(sizes)}
    config = SearchConfig(**{"ranks": ranks, "budget_rank": 2, "arch_noise": 0.0, **options})
    supernet = Supernet(torch.nn.ModuleDict(layers), config)
    supernet._place_alpha(supernet.alpha.device, dtype)
    return supernet, Architect(supernet)


def mean_ranks(supernet):
    ranks = torch.tensor(supernet.config.ranks).to(supernet.alpha)
    return (supernet.probabilities() @ ranks).detach()


def gates(supernet):
    """The distribution that gates are drawn from, as the loss sees it: with alpha's gradient."""
    alpha = supernet.alpha
    return (supernet.held + (alpha - alpha.detach())).softmax(-1)


def log_loss(supernet, worth):
    """-worth . log of the expected parameters of what is drawn."""
    costs = supernet.costs.to(supernet.alpha)
    return lambda _: -(worth * (gates(supernet) * costs).sum(-1).log()).sum()


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
    Architect(supernet)
    return supernet


@pytest.mark.parametrize("arch_noise", [0.0, 16.0])
def test_of_a_loss_in_the_log_of_parameters_it_finds_the_best_split(arch_noise):
    supernet, architect = make(dtype=torch.float64, arch_noise=arch_noise)
    worth = torch.tensor([1.0, 2.0, 4.0, 0.5], dtype=torch.float64)
    for _ in range(2):  # at once: from then on nothing moves
        metrics = architect.step(log_loss(supernet, worth), None)
        assert float(metrics["expected_parameters"]) == pytest.approx(supernet.budget, rel=1e-4)
    found = architect.allocation.worth(architect.gradient_sums) / 2
    torch.testing.assert_close(found.double(), worth, rtol=1e-5, atol=0)
    size = (supernet.probabilities() * supernet.costs).sum(-1).detach()
    torch.testing.assert_close(size / supernet.budget, worth / worth.sum(), rtol=1e-3, atol=0)


def test_alpha_is_in_proportion_to_the_mean_of_all_steps():
    supernet, architect = make(sizes=(16, 16))
    seen = torch.tensor([[3.0, 1.0], [0.0, 1.0], [1.0, 3.0], [3.0, 1.0], [0.0, 0.5]])
    for step, worth in enumerate(seen, start=1):
        architect.step(log_loss(supernet, worth), None)
        expected = 4 * seen[:step].sum(0) / seen[:step].sum()
        torch.testing.assert_close(mean_ranks(supernet), expected, rtol=1e-3, atol=0)


def test_gates_are_drawn_at_the_even_distribution_whatever_alpha_is():
    supernet, architect = make(sizes=(16, 16), sampling="batch")
    architect.step(log_loss(supernet, torch.tensor([6.0, 1.0])), None)
    assert mean_ranks(supernet)[0] > 1.5 * mean_ranks(supernet)[1]
    drawn, rows = torch.zeros(2), 2000
    for _ in range(rows):
        with supernet.arch_gradients(), torch.no_grad():
            supernet._draw_gates(supernet.model, (), {})
        supernet._forget_draw()
        for i, layer in enumerate(supernet.layers.values()):
            drawn[i] += layer.gates.count_nonzero()
    torch.testing.assert_close(drawn / rows, torch.full((2,), 2.0), rtol=0.1, atol=0)
    supernet._draw_gates(supernet.model, (), {})
    for layer in supernet.layers.values():  # weights train the mean of that distribution
        mean = layer.membership @ supernet.held[0].softmax(-1) * supernet.config.scaling
        torch.testing.assert_close(layer.gates, mean)


def test_what_gates_are_drawn_from_goes_where_alpha_goes():
    supernet, _ = make()
    supernet._place_alpha(supernet.alpha.device, torch.float64)
    assert supernet.held.dtype == supernet.alpha.dtype == torch.float64


def test_noise_is_averaged_and_layers_are_drawn_to_their_type():
    """Two types of layers, of which the second is worth three times as much."""
    names = [f"layers.{i}.{kind}" for i in range(20) for kind in ("a", "b")]
    worth, spread = torch.tensor([1.0, 3.0]).repeat(20), []

    def noisy(supernet):
        drawn = gates(supernet)
        return log_loss(supernet, worth)(None) + 10 * (torch.randn_like(drawn) * drawn).sum()

    for arch_noise in (0.0, 16.0):
        torch.manual_seed(0)
        supernet, architect = make(sizes=[16] * 40)
        architect.allocation.prior = Prior(names, arch_noise, supernet.costs[:, -1])
        for _ in range(100):
            architect.step(noisy, supernet)
        ranks = mean_ranks(supernet)
        spread.append(float((ranks / worth - ranks.sum() / worth.sum()).std()))
        assert float(ranks[1::2].mean() / ranks[::2].mean()) == pytest.approx(3, rel=0.25)
    assert spread[1] < 0.6 * spread[0]


def test_needs_a_budget():
    with pytest.raises(InputError, match="arch_update=proportional: shares a budget"):
        SearchConfig(arch_update="proportional")
    supernet = Supernet(torch.nn.ModuleDict({"a": torch.nn.Linear(16, 16)}), SearchConfig())
    assert Architect(supernet).allocation is None and supernet.arch_update == "gradient"
    assert supernet.held is None


def test_undecided_gradients_at_the_ends_stay_finite():
    """All worth in one layer: it gets the largest rank, the others next to none."""
    supernet, architect = make(sizes=(16, 16, 16, 16))
    worth = torch.tensor([1.0, 0.0, 0.0, 0.0])
    for _ in range(60):
        metrics = architect.step(log_loss(supernet, worth), None)
    assert supernet.alpha.isfinite().all()
    assert mean_ranks(supernet)[0] == pytest.approx(8, rel=1e-2)
    assert math.isfinite(float(metrics["expected_parameters"]))
