"""The architecture step: exact gradients, what it leaves alone, the budget, the README's loop.
Not here: the loop of RankSearch (test_search.py)."""

import copy
import math
from itertools import pairwise
from unittest import mock

import pytest
import torch

from darts_lora import Architect, DivergedError, InputError, SearchConfig, Supernet
from darts_lora.alpha.prior import Prior
from darts_lora.architect import SharedAdam
from darts_lora.lora import mixed_linear
from small_models import randomise, residual

EXACT = {"ranks": (0, 1, 2, 4), "relaxation": "softmax", "arch_noise": 0.0}
EXACT |= {"arch_update": "gradient", "arch_average": 0.0}


def make(dtype=torch.float64, **options):
    config = SearchConfig(**{**EXACT, **options})
    supernet = Supernet(residual(), config)
    supernet.model.to(dtype)
    supernet._place_alpha(supernet.alpha.device, dtype)
    randomise(supernet)
    return supernet, Architect(supernet)


def batches(dtype=torch.float64, rows=8):
    return tuple(
        (torch.randn(rows, 16, dtype=dtype), torch.randn(rows, 16, dtype=dtype)) for _ in range(2)
    )


def loss_of(supernet):
    return lambda batch: (supernet.model(batch[0]) - batch[1]).pow(2).mean()


def alpha_gradient(architect, loss_fn, batch):
    """What the step hands to alpha's optimizer."""
    seen = []
    architect.optimizer.register_step_pre_hook(
        lambda *_: seen.append(architect.supernet.alpha.grad.clone())
    )
    architect.step(loss_fn, batch)
    return seen[0]


def plain_mixture(x, a, b, gates, y, weight, bias, *rest):
    """The layer's sum in autograd's own operations."""
    return torch.nn.functional.linear(x, weight, bias) + (x @ a.T * gates) @ b.T


def exact_gradient(supernet, batch):
    """d/d alpha of the loss, by autograd's own operations."""
    plain = mock.patch.object(mixed_linear._Mixture, "apply", plain_mixture)
    with supernet.arch_gradients(), plain:
        return torch.autograd.grad(loss_of(supernet)(batch), supernet.alpha)[0]


def test_the_gradient_is_the_exact_one():
    supernet, architect = make()
    _, val = batches()
    exact = exact_gradient(supernet, val)
    found = alpha_gradient(architect, loss_of(supernet), val)
    assert (found - exact).norm() / exact.norm() < 1e-12


def test_the_gradient_is_taken_at_the_mean_of_the_weights():
    supernet, architect = make(arch_average=1.0)
    _, val = batches()
    first = [w.detach().clone() for w in supernet.weight_parameters()]
    architect.mean.update()
    for weight in supernet.weight_parameters():
        weight.data += torch.randn_like(weight)
    second = [w.detach().clone() for w in supernet.weight_parameters()]
    seen = alpha_gradient(architect, loss_of(supernet), val)
    still, reference = make(arch_average=0.0)
    still.model.load_state_dict(supernet.model.state_dict())
    for weight, one, other in zip(still.weight_parameters(), first, second, strict=True):
        weight.data.copy_((one + 2 * other) / 3)
    expected = alpha_gradient(reference, loss_of(still), val)
    assert torch.allclose(seen, expected, rtol=1e-9, atol=1e-12)


def test_small_gradients_in_float16_are_scaled_as_the_weights_are():
    supernet, exact = make(torch.float32)
    (_, val), alpha = batches(torch.float32), supernet.alpha.detach().clone()
    small = 2.0**-18

    def loss_fn(batch):
        with torch.autocast("cpu", torch.float16):
            return loss_of(supernet)(batch) * small

    wanted = alpha_gradient(exact, lambda batch: loss_of(supernet)(batch) * small, val)
    found = {}
    for scale in (None, 2.0**14, 2.0**60):
        scaler = None if scale is None else torch.amp.GradScaler("cpu", init_scale=scale)
        architect = Architect(supernet, scaler=scaler)
        supernet.alpha.data.copy_(alpha)
        found[scale] = alpha_gradient(architect, loss_fn, val)
    error = {s: float((g - wanted).norm() / wanted.norm()) for s, g in found.items()}
    assert error[None] > 0.3 > 0.05 > error[2.0**14]
    assert not found[2.0**60].any(), "what overflows counts as 0"


def test_gradients_of_loss_and_cost_are_smoothed_alike():
    supernet, architect = make(arch_noise=3.0, budget_rank=1.0)
    _train, val = batches()
    gradient = exact_gradient(supernet, val)
    before = float(supernet.expected_parameters().detach())
    at_optimizer = []  # alpha when its optimizer is done
    architect.optimizer.register_step_post_hook(
        lambda *_: at_optimizer.append(supernet.alpha.detach().clone())
    )
    found = alpha_gradient(architect, loss_of(supernet), val)
    sums = torch.stack([gradient, torch.zeros_like(gradient)])  # one half alone: all may be noise
    smooth = Prior(list(supernet.layers), 3.0, supernet.costs[:, -1]).posterior(sums)
    assert (smooth(gradient) - gradient).norm() > 0.1 * gradient.norm()
    torch.testing.assert_close(found, smooth(gradient))

    probabilities = at_optimizer[0].requires_grad_().softmax(-1)
    (slope,) = torch.autograd.grad((probabilities * supernet.costs).sum(), at_optimizer[0])
    moved, direction = supernet.alpha - at_optimizer[0], smooth(slope)
    torch.testing.assert_close(moved / moved.norm(), -direction / direction.norm())
    expected = float(supernet.expected_parameters().detach())
    assert supernet.budget < expected == pytest.approx(0.98 * before, rel=1e-3)
    raw = architect.gradient_sums[0]  # the verdict is about what was seen
    torch.testing.assert_close(raw, gradient.to(raw))


@pytest.mark.parametrize("relaxation", ["gumbel_hard", "gumbel", "softmax"])
@pytest.mark.parametrize("arch_update", ["proportional", "gradient"])
def test_touches_nothing_but_alpha(relaxation, arch_update):
    options = {"relaxation": relaxation, "arch_update": arch_update}
    supernet, architect = make(torch.float32, **options, arch_average=0.125, budget_rank=2)
    train, val = batches(torch.float32)
    loss_fn, weights = loss_of(supernet), supernet.weight_parameters()
    optimizer = torch.optim.AdamW(weights)
    loss_fn(train).backward()
    optimizer.step()
    before = [w.detach().clone() for w in weights], [w.grad.clone() for w in weights]
    state = copy.deepcopy(optimizer.state_dict())
    alphas = supernet.alpha.detach().clone()
    architect.step(loss_fn, val)
    assert all(torch.equal(w, b) for w, b in zip(weights, before[0], strict=True))
    assert all(torch.equal(w.grad, b) for w, b in zip(weights, before[1], strict=True))
    for new, old in zip(optimizer.state.values(), state["state"].values(), strict=True):
        assert all(torch.equal(new[key], old[key]) for key in old)
    assert architect.gradient_sums.abs().sum() > 0
    assert torch.equal(supernet.alpha, alphas) == nothing_is_worth_rank(architect)
    assert supernet.alpha.grad is None


def nothing_is_worth_rank(architect):
    return (
        architect.allocation is not None
        and not (architect.allocation.worth(architect.gradient_sums) > 0).any()
    )


def test_weight_step_leaves_alpha_and_its_optimizer_alone():
    supernet, architect = make(torch.float32, relaxation="gumbel_hard")
    train, val = batches(torch.float32)
    loss_fn = loss_of(supernet)
    architect.step(loss_fn, val)
    alphas = supernet.alpha.detach().clone()
    state = copy.deepcopy(architect.optimizer.state_dict()["state"])
    optimizer = torch.optim.AdamW(supernet.weight_parameters(), weight_decay=0.1)
    for _ in range(3):
        loss_fn(train).backward()
        optimizer.step()
        optimizer.zero_grad()
    assert torch.equal(supernet.alpha, alphas)
    assert supernet.alpha.grad is None
    for new, old in zip(architect.optimizer.state.values(), state.values(), strict=True):
        assert all(torch.equal(new[key], old[key]) for key in old)


def other_model(supernet, batch):
    return residual(seed=1).double()(batch[0]).pow(2).mean()


def other_trained_model(supernet, batch):
    return other_model(supernet, batch) + supernet.model.extra.sum()


LOSSES = {
    "another model": other_model,
    "another model that learns": other_trained_model,
    "detached": lambda supernet, batch: loss_of(supernet)(batch).detach(),
    "a number": lambda supernet, batch: torch.tensor(loss_of(supernet)(batch).item()),
    "past the call": lambda supernet, batch: supernet.model.forward(batch[0]).pow(2).mean(),
}


@pytest.mark.parametrize("loss", LOSSES.values(), ids=LOSSES)
def test_a_loss_that_does_not_depend_on_alpha_is_refused(loss):
    supernet, architect = make()
    supernet.model.extra = torch.nn.Parameter(torch.ones(3))
    _train, val = batches()
    with pytest.raises(InputError, match="loss_fn: its loss does not depend on alpha"):
        architect.step(lambda batch: loss(supernet, batch), val)


@pytest.mark.parametrize("arch_update", ["gradient", "proportional"])
@pytest.mark.parametrize("what", ["rows", "infinite"])
def test_a_gradient_that_is_not_finite_leaves_alpha_alone(arch_update, what):
    supernet, architect = make(arch_update=arch_update, budget_rank=2)
    loss_fn, (train, _) = loss_of(supernet), batches()
    architect.step(loss_fn, train)
    before, sums = supernet.alpha.detach().clone(), architect.gradient_sums.clone()
    bad = batches(rows=0)[0] if what == "rows" else (train[0] * torch.inf, train[1])
    with pytest.raises(DivergedError, match=r"validation loss nan\): alpha was left as it was"):
        architect.step(loss_fn, bad)
    assert torch.equal(supernet.alpha, before) and torch.equal(architect.gradient_sums, sums)
    assert architect.steps == 1


@pytest.mark.parametrize("scale", [1.0, 1000.0])
@pytest.mark.parametrize("start", [-3.0, 3.0, 30.0])
def test_ends_at_the_budget_from_either_side_whatever_the_losss_unit(start, scale):
    """A loss that always wants more rank: the projection must hold it at the budget."""
    supernet, architect = make(
        torch.float32, relaxation="gumbel_hard", budget_rank=2, arch_learning_rate=0.05
    )
    with torch.no_grad():
        supernet.alpha.copy_(torch.tensor([0.0, 0.0, 0.0, start]))
    wants = torch.linspace(1, 4, 4)[:, None] * torch.tensor([0.0, -1.0, -2.0, -4.0])

    def loss_fn(noise):
        return scale * (((supernet.alpha + noise).softmax(-1)) * wants).sum()

    for _ in range(800):
        metrics = architect.step(loss_fn, 0.5 * torch.randn(4, 4))
    assert float(metrics["expected_parameters"]) == pytest.approx(supernet.budget, rel=0.1)


def test_a_small_budget_is_met_from_above_and_never_undercut():
    """A price that remembers how far the budget once was drives alpha far below it."""
    supernet, architect = make(torch.float32, ranks=(0, 1, 2, 4, 8, 16), budget_rank=1)
    wants = -torch.tensor([0.0, 1.0, 2.0, 4.0, 8.0, 16.0]).expand(4, 6)
    sizes = [float(supernet.expected_parameters().detach()) / supernet.budget]
    assert sizes[0] > 4

    def loss_fn(noise):
        return ((supernet.alpha + noise).softmax(-1) * wants).sum()

    for _ in range(150):
        metrics = architect.step(loss_fn, 0.5 * torch.randn(4, 6))
        sizes.append(float(metrics["expected_parameters"]) / supernet.budget)
    assert min(sizes) > 0.98
    assert all(b > 0.975 * a for a, b in pairwise(sizes))
    assert max(sizes[100:]) < 1.02


@pytest.mark.parametrize("arch_noise", [0.0, 4.0])
def test_the_price_of_parameters_moves_layers_of_all_sizes_alike(arch_noise):
    """Where the loss says nothing, ranks stay equal, as the uniform rank of the budget."""
    layers = {"small": torch.nn.Linear(16, 16), "large": torch.nn.Linear(16, 99)}
    config = SearchConfig(
        ranks=(0, 1, 2, 4, 8), budget_rank=1, arch_noise=arch_noise, arch_update="gradient"
    )
    supernet = Supernet(torch.nn.ModuleDict(layers), config)
    architect = Architect(supernet)
    for _ in range(100):
        architect.step(lambda _: (0 * supernet.alpha).sum(), None)
    ranks = supernet.probabilities() @ torch.tensor([0.0, 1.0, 2.0, 4.0, 8.0])
    torch.testing.assert_close(ranks.detach(), torch.ones(2), rtol=0.01, atol=0)


def test_what_the_loss_does_not_want_stays_unused():
    supernet, architect = make(torch.float32, budget_rank=2)
    for _ in range(200):
        architect.step(lambda _: (supernet.probabilities() * supernet.costs).sum(), None)
    assert float(supernet.expected_parameters().detach()) < 0.5 * supernet.budget


@pytest.mark.parametrize("arch_update", ["proportional", "gradient"])
def test_state_round_trip(arch_update):
    options = {"arch_update": arch_update, "budget_rank": 2}
    supernet, architect = make(torch.float32, **options)
    loss_fn, (val, _) = loss_of(supernet), batches(torch.float32)
    for _ in range(3):
        architect.step(loss_fn, val)
    twin, twin_architect = make(torch.float32, **options)
    twin.load_state_dict(supernet.state_dict())
    twin_architect.load_state_dict(copy.deepcopy(architect.state_dict()))
    architect.step(loss_fn, val)
    twin_architect.step(loss_of(twin), val)
    assert torch.equal(supernet.alpha, twin.alpha)
    assert torch.equal(architect.gradient_sums, twin_architect.gradient_sums)


def test_the_optimizer_of_one_entry_is_adam():
    ours, adams = (torch.nn.Parameter(torch.tensor([0.5])) for _ in range(2))
    options = {"lr": 0.1, "betas": (0.5, 0.9), "weight_decay": 0.2}
    optimizers = SharedAdam([ours], **options), torch.optim.Adam([adams], **options)
    for step in range(20):
        for parameter, optimizer in zip((ours, adams), optimizers, strict=True):
            parameter.grad = torch.tensor([math.sin(step)]) * (1 + parameter.detach())
            optimizer.step()
        torch.testing.assert_close(ours, adams)


def test_entries_move_in_proportion_to_their_gradients_whatever_their_unit():
    """Adam moves both by as much, at whatever noise."""
    moved = []
    for unit in (1.0, 1000.0):
        parameter = torch.nn.Parameter(torch.zeros(2, dtype=torch.float64))
        optimizer = SharedAdam([parameter], lr=0.01)
        for _ in range(10):
            parameter.grad = unit * torch.tensor([4.0, -1.0], dtype=torch.float64)
            optimizer.step()
        moved.append(parameter.detach())
    assert float(moved[0][0] / moved[0][1]) == pytest.approx(-4)
    assert float(moved[0].square().mean().sqrt()) == pytest.approx(0.1, rel=1e-6)
    torch.testing.assert_close(moved[0], moved[1])
