"""The verdict: agreement on signal and on noise, and what a user reads.
Not here: the search that it judges (test_search.py)."""

import math

import pytest
import torch

from darts_lora.verdict import agreement, verdict_text


def noise(layers=40, candidates=5):
    """Gradients of a softmax: every row sums to 0."""
    raw = torch.randn(2, layers, candidates, dtype=torch.float64)
    return raw - raw.mean(-1, keepdim=True)


def test_noise_agrees_as_often_as_it_says():
    figures = torch.tensor([agreement(noise())[0] for _ in range(2000)])
    by_chance = agreement(noise())[1]
    assert float(figures.std()) == pytest.approx(by_chance, rel=0.06)
    assert abs(float(figures.mean())) < 3 * by_chance / math.sqrt(2000) + 1e-3


def test_a_shared_wish_shows_and_one_of_all_layers_alike_does_not():
    wish = noise()[:1]
    found, by_chance = agreement(noise() + 0.7 * wish)
    assert found > 3 * by_chance
    everywhere = 50 * torch.tensor([2.0, 1.0, 0.0, -1.0, -2.0], dtype=torch.float64)
    plain = noise()
    assert agreement(plain + everywhere)[0] == pytest.approx(agreement(plain)[0], abs=1e-9)


@pytest.mark.parametrize(
    ("learnt", "budget", "words"),
    [
        (True, 1000.0, "The search learnt which layers need rank"),
        (False, None, "The ranks cannot be told from chance"),
    ],
)
def test_the_text_says_it_plainly(learnt, budget, words):
    text = verdict_text(
        {
            "learnt": learnt,
            "agreement": 0.9 if learnt else 0.01,
            "agreement_by_chance": 0.07,
            "entropy": 0.5,
            "expected_parameters": 990.4,
            "chosen_parameters": 960,
            "budget_parameters": budget,
        }
    )
    assert words in text and "Entropy 0.50 of 1" in text
    assert "960 chosen, 990 expected" in text
    assert ("budget 1,000" in text) == (budget is not None)
