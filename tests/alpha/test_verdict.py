"""The verdict: agreement on signal and on noise, and what a user reads.
Not here: the search that it judges (test_search.py)."""

import math

import pytest
import torch

from darts_lora import Architect, SearchConfig, Supernet
from darts_lora.alpha.verdict import agreement, verdict, verdict_text
from small_models import Residual, randomise


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


class Gated(Residual):
    """As Mllama's vision tower, what block 1 computes is multiplied by 0; block 3 rests."""

    def forward(self, x):
        x, dead = torch.tanh(self.blocks[0](x)), self.blocks[1](x)
        return self.blocks[2](x) + 0 * dead


@pytest.mark.parametrize(("ranks", "budget"), [((0, 1, 2), 200), ((4,), 512)])
@pytest.mark.parametrize("arch_update", ["proportional", "gradient"])
def test_layers_that_the_loss_never_depends_on_are_told(ranks, budget, arch_update):
    torch.manual_seed(0)
    config = SearchConfig(ranks=ranks, budget_parameters=budget, arch_update=arch_update)
    supernet = Supernet(Gated(16, 4), config)
    architect = Architect(supernet)
    randomise(supernet)
    for _ in range(3):
        architect.step(lambda x: supernet.model(x).pow(2).mean(), torch.randn(8, 16))
    figures = verdict(supernet, architect.gradient_sums, 0)
    dead = ["blocks.1", "blocks.3"] if len(ranks) > 1 else []
    assert figures["without_gradient"] == dead, "of one candidate there is none to learn"
    text = verdict_text(figures)
    assert ("depended on 2 of the layers at no step (blocks.1, blocks.3)" in text) == bool(dead)
