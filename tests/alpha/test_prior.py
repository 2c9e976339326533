"""Which layers count as alike, and what that makes of a noisy gradient of alpha.
Not here: the architecture step that uses it (test_architect.py)."""

import math

import pytest
import torch

from darts_lora.alpha.prior import NEAR, Prior, kernel, noise_to_signal

EQUAL = torch.ones(6, dtype=torch.float64)
COSTS = torch.tensor([2.0, 4.0, 4.0, 2.0, 1.0, 3.0], dtype=torch.float64)
NAMES = [
    "model.layers.0.attn.q_proj",
    "model.layers.0.mlp.fc1",
    "model.layers.0.mlp.fc2",
    "model.layers.3.attn.q_proj",
    "vision.layers.0.attn.q_proj",
    "projector",
]


def test_layers_of_one_type_and_of_near_blocks_are_alike():
    found = kernel(NAMES)
    near = math.exp(-3 / (4 * NEAR))  # three blocks apart, in a stack of four
    expected = [
        [4, 1, 1, 1 + 2 * near, 0, 0],
        [1, 4, 1, near, 0, 0],
        [1, 1, 4, near, 0, 0],
        [1 + 2 * near, near, near, 4, 0, 0],
        [0, 0, 0, 0, 4, 0],
        [0, 0, 0, 0, 0, 4],
    ]
    torch.testing.assert_close(found, torch.tensor(expected, dtype=torch.float64))
    assert torch.linalg.eigvalsh(found).min() > 0


def test_experts_of_a_block_are_of_one_type():
    a, b = "layers.1.experts.0.up", "layers.1.experts.7.up"
    assert kernel([a, b])[0, 1] == 3


def halves(agree: float) -> torch.Tensor:
    """(2, 6, 3), two halves that correlate by `agree`, candidates' means over layers 0."""
    common, own = torch.linalg.qr(torch.randn(6, 7, dtype=torch.float64))[0][:, :2].T
    common, own = ((v - v.mean()) / (v - v.mean()).norm() for v in (common, own))
    own = own - (own @ common) * common
    other = agree * common + math.sqrt(1 - agree**2) * own / own.norm()
    return torch.stack([common, 3 * other])[:, :, None].expand(2, 6, 3)


@pytest.mark.parametrize("agree", [0.9, 0.3])
def test_the_smoothed_gradient_is_the_posterior_mode(agree):
    """It minimises f K^-1 f / 2 + |y - f|^2 / (2 noise), in units of the root of a rank's cost."""
    torch.manual_seed(0)
    observed = torch.randn(len(NAMES), 3, dtype=torch.float64)
    unit = (COSTS.mean() / COSTS).sqrt()[:, None]
    found = Prior(NAMES, 2.5, COSTS).posterior(halves(agree) / unit)(observed / unit) / unit
    noise = 2.5 * 4 * (1 - agree) / (2 * agree)  # of the sum of two halves, over its signal
    slope = torch.linalg.inv(kernel(NAMES)) @ found + (found - observed) / noise
    torch.testing.assert_close(slope, torch.zeros_like(slope), atol=1e-9, rtol=0)


def test_noise_is_what_two_halves_do_not_share():
    torch.manual_seed(0)
    signal, noise = torch.randn(5000, 5), torch.randn(2, 5000, 5)
    everywhere = 50 * torch.randn(5)  # tells no layers apart
    for scale in (0.5, 1.0, 2.0):
        sums = signal + scale * noise + everywhere
        assert float(noise_to_signal(sums)) == pytest.approx(scale**2 / 2, rel=0.05)


def test_a_gradient_without_noise_stays():
    gradient = torch.randn(len(NAMES), 5)
    assert torch.equal(Prior(NAMES, 0.0, EQUAL).posterior(torch.randn(2, 6, 5))(gradient), gradient)
    found = Prior(NAMES, 4.0, EQUAL).posterior(gradient.expand(2, -1, -1))(gradient)
    torch.testing.assert_close(found, gradient)


def test_without_noise_a_layer_moves_by_what_a_parameter_of_it_is_worth():
    gradient = torch.randn(len(NAMES), 5, dtype=torch.float64)
    found = Prior(NAMES, 0.0, COSTS).posterior(torch.randn(2, 6, 5))(gradient)
    torch.testing.assert_close(found, gradient / COSTS[:, None] * COSTS.mean())


@pytest.mark.parametrize("second", [0.0, -1.0])
def test_halves_without_anything_in_common_leave_a_finite_gradient(second):
    """As at the first step, which has one half alone."""
    gradient = torch.randn(len(NAMES), 5)
    sums = torch.stack([gradient, second * gradient])
    found = Prior(NAMES, 4.0, EQUAL).posterior(sums)(gradient)
    assert found.isfinite().all() and 0 < found.norm() < 0.5 * gradient.norm()


def test_much_noise_leaves_what_a_type_has_in_common():
    names = [f"layers.{i}.{kind}" for i in range(12) for kind in ("up", "down")]
    torch.manual_seed(0)
    truth = torch.tensor([1.0, -1.0]).repeat(12)[:, None]
    sums = truth + torch.randn(2, 24, 1)
    smoothed = Prior(names, 4.0, torch.ones(24)).posterior(sums)(sums.sum(0))
    likeness = torch.nn.functional.cosine_similarity
    assert likeness(smoothed, truth, dim=0) > likeness(sums.sum(0), truth, dim=0) + 0.05
