"""The running mean of weights: its closed form, and the weights behind it. Not here: its use."""

import pytest
import torch

from darts_lora.alpha.average import RunningMean


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
