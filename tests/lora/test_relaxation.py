"""Samples of the relaxations: exactness, distribution, gradient, rows, temperature; entropy.
Not here: what they do to a model (test_supernet.py)."""

import math

import pytest
import torch

from darts_lora.lora.relaxation import entropies, sample, temperature_at


def test_hard_samples_are_exactly_one_hot_with_the_soft_gradient():
    alpha = torch.randn(3, 4, requires_grad=True)
    weights = torch.randn(5, 3, 4)
    torch.manual_seed(1)
    hard = sample(alpha, "gumbel_hard", 0.7, rows=5)
    assert set(hard.detach().unique().tolist()) == {0.0, 1.0}
    assert torch.equal(hard.sum(-1), torch.ones(5, 3))
    torch.manual_seed(1)
    soft = sample(alpha, "gumbel", 0.7, rows=5)
    assert torch.equal(hard.argmax(-1), soft.argmax(-1))
    (g_hard,) = torch.autograd.grad((hard * weights).sum(), alpha)
    (g_soft,) = torch.autograd.grad((soft * weights).sum(), alpha)
    assert torch.equal(g_hard, g_soft)


@pytest.mark.parametrize("temperature", [0.3, 3.0])
def test_hard_samples_have_probability_softmax_of_alpha(temperature):
    alpha = torch.tensor([[0.0, 1.0, -1.0]])
    torch.manual_seed(0)
    frequency = sample(alpha, "gumbel_hard", temperature, rows=40_000).mean(0)
    assert (frequency - alpha.softmax(-1)).abs().max() < 0.01


def test_softmax_is_deterministic_and_tempered():
    alpha = torch.randn(3, 4)
    assert torch.equal(sample(alpha, "softmax", 2.0, rows=5), (alpha / 2).softmax(-1))


def test_shapes_and_independent_rows():
    alpha = torch.zeros(6, 5)
    assert sample(alpha, "gumbel", 1.0, rows=None).shape == (6, 5)
    rows = sample(alpha, "gumbel_hard", 1.0, rows=64)
    assert rows.shape == (64, 6, 5)
    assert len(rows.argmax(-1).unique(dim=0)) > 32


def test_temperature_is_geometric():
    assert temperature_at(0, (2.0, 0.2)) == pytest.approx(2.0)
    assert temperature_at(0.5, (2.0, 0.2)) == pytest.approx((2.0 * 0.2) ** 0.5)
    assert temperature_at(1, (2.0, 0.2)) == pytest.approx(0.2)


def test_entropy_by_closed_form():
    assert entropies(torch.full((3, 4), 0.25)).tolist() == pytest.approx([1.0] * 3)
    assert entropies(torch.eye(4)).tolist() == [0.0] * 4
    half = torch.tensor([[0.5, 0.5, 0.0, 0.0]])
    assert entropies(half).item() == pytest.approx(math.log(2) / math.log(4))
    assert entropies(torch.ones(3, 1)).tolist() == [0.0] * 3
