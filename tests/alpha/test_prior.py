"""Which layers count as alike, and what that makes of a noisy measurement of them.
Not here: the values that are made of it (test_values.py)."""

import math

import pytest
import torch

from darts_lora.alpha.prior import NEAR, kernel, layer_type, smoother

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
    torch.testing.assert_close(found, torch.tensor(expected, dtype=torch.float64) / 4)
    assert torch.linalg.eigvalsh(found).min() > 0


def test_experts_of_a_block_are_of_one_type():
    a, b = "layers.1.experts.0.up", "layers.1.experts.7.up"
    assert layer_type(a) == layer_type(b) == "layers.*.experts.*.up"
    assert kernel([a, b])[0, 1] == 3 / 4


@pytest.mark.parametrize("noise", [0.1, 1.0, 7.0])
def test_what_is_smoothed_is_the_posterior_mode(noise):
    """It minimises f K^-1 f / 2 + |y - f|^2 / (2 noise)."""
    observed = torch.randn(len(NAMES), dtype=torch.float64)
    found = smoother(NAMES, noise) @ observed
    slope = torch.linalg.inv(kernel(NAMES)) @ found + (found - observed) / noise
    torch.testing.assert_close(slope, torch.zeros_like(slope), atol=1e-9, rtol=0)


def test_what_has_no_noise_stays_and_a_layer_unlike_all_others_only_shrinks():
    observed = torch.randn(len(NAMES), dtype=torch.float64)
    torch.testing.assert_close(smoother(NAMES, 0.0) @ observed, observed)
    found = smoother(NAMES, 1.0) @ observed
    torch.testing.assert_close(found[-2:], observed[-2:] / 2)
    assert (found[:4] - observed[:4] / 2).abs().min() > 1e-3


def test_much_noise_leaves_what_a_type_has_in_common():
    names = [f"layers.{i}.{kind}" for i in range(12) for kind in ("up", "down")]
    truth = torch.tensor([1.0, -1.0], dtype=torch.float64).repeat(12)
    seen = truth + torch.randn(24)
    likeness = torch.nn.functional.cosine_similarity
    smoothed = smoother(names, 4.0) @ seen
    assert likeness(smoothed, truth, dim=0) > likeness(seen, truth, dim=0) + 0.05
