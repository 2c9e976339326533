"""The verdict: noise that is called so, gains that are predicted, and what a user reads.
Not here: the search that it judges (test_search.py)."""

import dataclasses
from types import SimpleNamespace

import pytest
import torch
from scipy import stats

from darts_lora import Architect, SearchConfig, Supernet
from darts_lora.alpha.values import Measured, Values
from darts_lora.alpha.verdict import FEWEST, chance, lacking, predicted_gain, verdict, verdict_text
from small_models import Residual, randomise, residual

SEARCHES = 2000


def noise(spread, generator, steps=16, layers=12):
    """What layers measure in steps of pure noise: most of a step's is common to all layers, and
    layers and steps differ in size by `spread` in the logarithm."""

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    common = normal(steps, 1) * normal(1, layers).abs()
    sizes = (spread * normal(1, layers)).exp() * (spread * normal(steps, 1)).exp()
    return (3 * common + normal(steps, layers)) * sizes


@pytest.mark.parametrize("spread", [0.0, 0.5, 1.0])
def test_noise_is_as_likely_as_it_says(spread):
    generator = torch.Generator().manual_seed(0)
    found = [chance(noise(spread, generator), draws=999) for _ in range(SEARCHES)]
    assert stats.kstest(found, "uniform").pvalue > 1e-3
    often = sum(p <= 0.01 for p in found)
    assert often <= stats.binom.ppf(0.999, SEARCHES, 0.01), "beyond sampling error"


def test_what_all_steps_have_in_common_is_not_chance():
    generator = torch.Generator().manual_seed(0)
    wish = torch.linspace(0.5, 2, 12, dtype=torch.float64)
    assert chance(noise(0.0, generator, 24) / 3 + wish) == pytest.approx(1e-4)
    assert chance(wish.expand(10, -1)) == pytest.approx(2**-9, rel=0.7), "of 10 steps' signs"


def test_the_unit_of_a_layer_and_the_order_of_the_steps_do_not_matter():
    seen = noise(0.5, torch.Generator().manual_seed(1)) + 0.5
    found, units = chance(seen), torch.logspace(-6, 6, 12, dtype=torch.float64)
    assert chance(seen * units) == found
    assert chance(seen.flip(0)) == pytest.approx(found, abs=0.02)
    assert chance(torch.cat([seen, torch.zeros(16, 1)], -1)) == found, "a layer without a gradient"


def toy(gains, energies, growth=0.0, cut=0.5, batches=8, sizes=(16, 16, 16, 16)):
    """A supernet, and what of a search a verdict needs."""
    layers = {f"l{i}": torch.nn.Linear(16, size) for i, size in enumerate(sizes)}
    config = SearchConfig(ranks=(0, 1, 2, 4), budget_rank=1)
    supernet = Supernet(torch.nn.ModuleDict(layers), config)
    scalars = [torch.full((batches,), value) for value in (growth, cut, 1.0)]
    expand = (batches, -1, -1)
    measured = Measured(gains.expand(batches, -1), energies.expand(*expand), *scalars)
    return supernet, SimpleNamespace(values=Values(supernet), measured=measured)


EDGES = torch.tensor([[5.0, 4, 0, 0], [0.0, 0, 0, 0], [1.0, 0, 0, 0], [2.0, 0, 0, 0]]).double()


def test_the_predicted_gain_is_that_of_the_choice_over_the_uniform_rank():
    """Ranks 2, 0, 1, 1 lose nothing; the uniform rank 1 loses 4 of 12, which cost 0.5."""
    supernet, found = toy(torch.ones(4), EDGES)
    assert predicted_gain(supernet, found) == (pytest.approx(0.5), pytest.approx(0, abs=1e-12))


def test_its_error_is_that_of_the_mean_over_folds():
    supernet, found = toy(torch.ones(4), EDGES)
    cuts = torch.tensor([0.1, 0.2, 0.3, 0.4] * 2)
    found.measured = dataclasses.replace(found.measured, cut=cuts)
    gain, error = predicted_gain(supernet, found)
    assert gain == pytest.approx(0.25)
    assert error == pytest.approx(float(cuts[:4].std() / 2))


def test_ranks_that_luck_chose_are_predicted_to_gain_nothing():
    gains = []
    for seed in range(40):
        generator = torch.Generator().manual_seed(seed)
        supernet, found = toy(torch.ones(4), torch.ones(4, 4))
        energies = torch.randn(8, 4, 4, generator=generator).square().double()
        found.measured = dataclasses.replace(found.measured, energies=energies)
        gains.append(predicted_gain(supernet, found)[0])
    gains = torch.tensor(gains)
    assert float(gains.mean()) < 2 * float(gains.std()) / 40**0.5


def test_less_than_eight_steps_say_nothing():
    for batches in (FEWEST - 1, FEWEST):
        supernet, found = toy(torch.ones(4), EDGES, batches=batches)
        figures = verdict(supernet, found, 0)
        assert figures["early"] == (batches < FEWEST) == (figures["predicted_gain"] is None)
        assert figures["learnt"] == (batches == FEWEST)
        assert ("Too early to tell: 7 architecture" in verdict_text(figures)) == figures["early"]


def test_without_the_last_measurement_it_is_too_early():
    supernet, found = toy(torch.ones(4), EDGES)
    none = torch.zeros(0)
    found.measured = Measured(found.measured.gains, torch.zeros(0, 4, 4), none, none, none)
    assert verdict(supernet, found, 0)["early"]


MISSING = {  # and how it is said
    "adapter": "the adapter takes no more than 0.001 off the loss",
    "ranks": "this gain is within its error",
    "size": "this gain is below 0.001, a thousandth of the loss",
    "steps": "the architecture steps agree no more than noise does",
    "cut": "a cut of all layers to the uniform rank costs",
}


@pytest.mark.parametrize("what", MISSING)
def test_what_is_missing_of_a_gain_is_not_believed(what):
    gains, energies, growth, cut = torch.ones(4), EDGES, 0.5, 0.5
    if what == "adapter":
        gains = -gains  # takes nothing off the loss
    elif what == "ranks":
        energies = torch.ones(4, 4).double()  # alike in all layers
    elif what == "size":
        growth, cut = 0.01, 0.002
    elif what == "cut":
        cut = 0.0
    supernet, found = toy(gains, energies, growth=growth, cut=cut)
    if what == "steps":
        signs = torch.tensor([1.0, -1.0] * 4)[:, None] + 0.01
        found.measured = dataclasses.replace(found.measured, gains=signs * found.measured.gains)
    figures = verdict(supernet, found, 0)
    assert not figures["learnt"] and not figures["early"]
    (words,) = lacking(figures)
    assert words.startswith(MISSING[what])
    assert f"But {words}. A uniform rank may do as well" in verdict_text(figures)


@pytest.mark.parametrize("growth", [0.0, 0.5])
def test_where_a_cut_to_the_uniform_rank_costs_nothing_beyond_noise_no_rank_is_learnt(growth):
    """Layers differ, each step says the same, and the loss may still fall: so it is where answers
    have nothing to do with questions, and how often they occur is learnt."""
    supernet, found = toy(torch.ones(4), EDGES, growth=growth)
    assert verdict(supernet, found, 0)["learnt"]
    for cut in 1e-3 * torch.randn(40, 8, generator=torch.Generator().manual_seed(0)):
        found.measured = dataclasses.replace(found.measured, cut=cut)
        figures = verdict(supernet, found, 0)
        assert not figures["learnt"], cut
        assert lacking(figures)[-1].startswith(MISSING["cut"])
        assert len(lacking(figures)) == (1 if growth else 2), "a gain that is predicted of it"
    assert figures["uniform_cut"] == pytest.approx(float(cut.mean()))
    assert figures["uniform_cut_error"] == pytest.approx(float(cut.std()) / 8**0.5)


def test_a_verdict_of_before_cuts_were_told_is_shown():
    supernet, found = toy(torch.ones(4), -EDGES)
    figures = verdict(supernet, found, 0)
    before = {name: value for name, value in figures.items() if "cut" not in name}
    assert verdict_text(before | {"chance": 0.5}).count("no more than noise does") == 1


WIDTH = 16


def searched(labels, seed=0, steps=40):
    """The verdict on a search whose labels are of a change of rank 2 in one layer, or at random."""
    torch.manual_seed(seed)
    model, x = residual(WIDTH), torch.randn(640, WIDTH)
    with torch.no_grad():
        planted = residual(WIDTH)
        planted.blocks[1].weight += torch.randn(WIDTH, 2) @ torch.randn(2, WIDTH) / 4
        y = planted(x)
        if labels == "random":
            y = model(x) + torch.randn(640, WIDTH)
    config = SearchConfig(ranks=(0, 1, 2, 4), budget_parameters=2 * 2 * WIDTH)
    supernet = Supernet(model, config)
    architect = Architect(supernet, steps)
    optimizer = torch.optim.AdamW(supernet.weight_parameters(), lr=0.02)
    train = iter(torch.randint(320, (steps, 32)))
    val = iter(320 + torch.randint(320, (steps, 32)))

    def loss_fn(rows):
        return (model(x[rows]) - y[rows]).pow(2).mean()

    for rows in train:
        loss_fn(rows).backward()
        optimizer.step()
        optimizer.zero_grad()
        architect.step(loss_fn, val)
    return verdict(supernet, architect, 0)


def test_a_planted_change_is_learnt():
    figures = searched("planted")
    assert figures["learnt"] and figures["chance"] < 0.01
    assert figures["predicted_gain"] > 2 * figures["predicted_gain_error"] > 0
    assert figures["adapter_gain"] > 0.1 * figures["validation_loss"]


@pytest.mark.parametrize("seed", range(4))
def test_random_labels_are_not_learnt(seed):
    figures = searched("random", seed)
    assert not figures["learnt"] and not figures["early"]


@pytest.mark.parametrize(
    ("learnt", "words"),
    [
        (True, "are expected to beat the uniform rank by 0.021 +- 0.004, beside a validation los"),
        (
            False,
            "may be no better than the uniform rank: an expected gain of 0.021 +- 0.004, beside",
        ),
    ],
)
def test_the_text_says_it_plainly(learnt, words):
    text = verdict_text(
        {
            "learnt": learnt,
            "early": False,
            "architecture_steps": 20,
            "predicted_gain": 0.0213,
            "predicted_gain_error": 0.0041,
            "chance": 1e-4,
            "adapter_gain": 2.0,
            "uniform_cut": 0.5 if learnt else 2e-4,
            "uniform_cut_error": 1e-3,
            "validation_loss": 1.2345,
            "chosen_parameters": 960,
            "budget_parameters": 1000.0,
        }
    )
    assert words in text and "1.23" in text
    assert "Parameters: 960 chosen, budget 1,000." in text


class Gated(Residual):
    """As Mllama's vision tower, what block 1 computes is multiplied by 0; block 3 rests."""

    def forward(self, x):
        x, dead = torch.tanh(self.blocks[0](x)), self.blocks[1](x)
        return self.blocks[2](x) + 0 * dead


@pytest.mark.parametrize("checked", [True, False])
@pytest.mark.parametrize(("ranks", "budget"), [((0, 1, 2), 200), ((4,), 512)])
def test_layers_that_the_loss_never_depends_on_are_told(ranks, budget, checked):
    config = SearchConfig(ranks=ranks, budget_parameters=budget)
    supernet = Supernet(Gated(16, 4), config)
    architect = Architect(supernet, 3, check_finite=checked)
    randomise(supernet)
    batches = iter(torch.randn(9, 8, 16))
    for _ in range(3):
        architect.step(lambda x: supernet.model(x).pow(2).mean(), batches)
    figures = verdict(supernet, architect, 0)
    assert figures["without_gradient"] == ["blocks.1", "blocks.3"]
    text = verdict_text(figures)
    assert "depended on 2 of the layers at no step (blocks.1, blocks.3)" in text
