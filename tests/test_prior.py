"""Which layers count as alike, and what that makes of a noisy gradient of alpha.
Not here: the architecture step that uses it (test_architect.py)."""

import math

import torch

from darts_lora.prior import NEAR, kernel, smoother

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


def test_the_smoothed_gradient_is_the_posterior_mode():
    """It minimises f K^-1 f / 2 + |y - f|^2 / (2 noise)."""
    torch.manual_seed(0)
    observed, noise = torch.randn(len(NAMES), 3, dtype=torch.float64), 2.5
    found = smoother(NAMES, noise).double() @ observed
    slope = torch.linalg.inv(kernel(NAMES)) @ found + (found - observed) / noise
    torch.testing.assert_close(slope, torch.zeros_like(slope), atol=1e-6, rtol=0)


def test_without_noise_a_gradient_stays_to_the_last_bit():
    gradient = torch.randn(len(NAMES), 5)
    assert torch.equal(smoother(NAMES, 0.0) @ gradient, gradient)


def test_much_noise_leaves_what_a_type_has_in_common():
    names = [f"layers.{i}.{kind}" for i in range(12) for kind in ("up", "down")]
    torch.manual_seed(0)
    truth = torch.tensor([1.0, -1.0]).repeat(12)
    observed = truth + torch.randn(24)
    smoothed = smoother(names, 20.0) @ observed
    likeness = torch.nn.functional.cosine_similarity
    assert likeness(smoothed, truth, dim=0) > likeness(observed, truth, dim=0) + 0.1
