"""What is smoothed. The running mean of weights: its closed form, and the weights behind it. Which
layers count as alike, and what that makes of a noisy measurement of them.
Not here: the values that are made of it (test_values.py)."""

import math

import pytest
import torch

from darts_lora.alpha.average import RunningMean
from darts_lora.alpha.prior import NEAR, kernel, layer_type, smoother


def test_weights_of_the_mean_rise_with_the_step():
    course = torch.randn(7, 5, 3, dtype=torch.float64)
    weight = torch.zeros(5, 3, dtype=torch.float64)
    mean = RunningMean(lambda: [weight], share=1.0)
    for t, value in enumerate(course, start=1):
        weight.copy_(value)
        mean.update()
        share = torch.arange(1, t + 1, dtype=torch.float64) * 2 / (t * (t + 1))
        expected = torch.einsum("t, t i j -> i j", share, course[:t])
        assert torch.allclose(mean.values[0], expected, rtol=0, atol=1e-14)


@pytest.mark.parametrize("share", [0.5, 0.125])
def test_goes_over_about_that_share_of_the_steps(share):
    step = torch.zeros(1, dtype=torch.float64)
    mean = RunningMean(lambda: [step], share)
    for t in range(1, 2001):
        step.fill_(t)
        mean.update()
    behind = (2000 - float(mean.values[0])) / 2000
    assert behind == pytest.approx(1 / (1 / share + 2), rel=1e-3), "the mean age of what it holds"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weights_hold_it_inside_and_are_bitwise_as_before_behind(dtype):
    weights = [torch.randn(4, 3).to(dtype), torch.randn(2).to(dtype)]
    mean = RunningMean(lambda: weights, share=0.125)
    for _ in range(3):
        mean.update()
        for weight in weights:
            weight.add_(1)
    before = [weight.clone() for weight in weights]
    with pytest.raises(ZeroDivisionError), mean.in_place():
        for weight, value in zip(weights, mean.values, strict=True):
            assert value.dtype == torch.float32 and torch.equal(weight, value.to(dtype))
        assert not torch.equal(weights[0], before[0])
        1 / 0  # noqa: B018
    assert all(map(torch.equal, weights, before))


def test_other_values_take_their_place_as_well_also_within():
    weights = [torch.randn(3), torch.randn(2, 2)]
    before, other = [w.clone() for w in weights], [torch.zeros(3), torch.ones(2, 2)]
    mean = RunningMean(lambda: weights, 0.125)
    mean.update()
    weights[0].add_(1)
    with mean.in_place():
        assert torch.equal(weights[0], before[0])
        with mean.in_place(other):
            assert all(map(torch.equal, weights, other))
        assert torch.equal(weights[0], before[0])
    assert torch.equal(weights[0], before[0] + 1)


def test_what_is_loaded_goes_where_the_weights_are():
    weights = [torch.empty(3, device="meta"), torch.empty(2, device="meta")]
    mean = RunningMean(lambda: weights, 0.125)
    mean.load([torch.ones(3), torch.ones(2)], steps=7)
    assert [value.device.type for value in mean.values] == ["meta", "meta"] and mean.steps == 7
    mean.load([], steps=0)
    assert mean.values == []


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
