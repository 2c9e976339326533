"""The losses that are predicted of sizes, against closed forms.
Not here: which size is recommended (test_sizes.py), how it is measured (../test_architect.py)."""

import math
from types import SimpleNamespace

import pytest
import torch
from transformers import get_scheduler

from darts_lora import SearchConfig, Supernet
from darts_lora.alpha.prediction import MENDED, SLOPE, SPREAD, doublings, predicted_sizes
from darts_lora.alpha.values import Measured, Values
from darts_lora.alpha.verdict import FEWEST, predicted_gain

SHARE = 0.125  # of the run's steps
COME = doublings(SHARE)
RANKS = (0, 1, 2, 4, 8)
EDGES = torch.zeros(4, 8).double()
EDGES[0, :4], EDGES[1, 0] = 3.0, 1.0  # two of the layers need a rank, 4 and 1


def searched(growth, energies=EDGES, loss=0.5, cuts=(0.0, 0.0, 0.0, 0.0), base=3.0, steps=FEWEST):
    """A supernet without a budget, and what of its search a prediction needs."""
    model = torch.nn.ModuleDict({f"l{i}": torch.nn.Linear(16, 16) for i in range(4)})
    supernet = Supernet(model, SearchConfig(ranks=RANKS))
    growth = torch.tensor(growth)
    batches = len(growth)
    measured = Measured(
        torch.ones(steps, 4),
        energies.expand(batches, -1, -1),
        growth,
        torch.full((batches,), cuts[2]),
        torch.full((batches,), loss),
        torch.tensor(cuts).expand(batches, -1),
        torch.full((batches,), base),
    )
    return supernet, SimpleNamespace(values=Values(supernet), measured=measured)


def test_uniform_ranks_follow_a_root_of_what_is_still_to_be_learnt():
    found = predicted_sizes(*searched([0.1, 0.3, 0.1, 0.3]), 0.01, SHARE)
    fall = 0.5 * (1 - math.exp(-COME * 0.2 / 0.5))
    assert found["base_loss"] == 3.0 and found["tolerance"] == 0.01
    assert [p["rank"] for p in found["points"]] == [1, 2, 4, 8]
    assert [p["parameters"] for p in found["points"]] == [128, 256, 512, 1024]
    error = COME * (0.5 - fall) / 0.5 * torch.tensor([0.1, 0.3, 0.1, 0.3]).std().item() / 2
    for point in found["points"]:
        part = SLOPE * (point["rank"] ** -0.5 - 8**-0.5)
        assert point["behind"] == pytest.approx(part * fall, rel=1e-5)
        assert point["uniform"] == pytest.approx(0.5 - fall + part * fall, rel=1e-5)
        own = part * math.hypot(error, SPREAD * fall)
        assert (point["rank"] > 1) or found["noise"] == pytest.approx(part * error, rel=1e-5)
        assert point["behind_error"] == pytest.approx(own, rel=1e-5)
        between = SPREAD * COME * 0.2 * (0.5 - fall) / 0.5
        assert point["uniform_error"] == pytest.approx(math.hypot(error, between, own), rel=1e-5)


@pytest.mark.parametrize("steps", [50, 100, 200, 400])
def test_the_falls_to_come_are_the_doublings_of_the_sum_of_the_rates(steps):
    weight = torch.optim.SGD([torch.zeros(1)], lr=1.0)
    scheduler, rates = get_scheduler("cosine", weight, 0, 400), []
    for _ in range(400):
        rates.append(scheduler.get_last_lr()[0])
        weight.step()
        scheduler.step()
    wanted = math.log2(sum(rates) / sum(rates[:steps]))
    assert doublings(steps / 400) == pytest.approx(wanted, abs=0.01)
    points = predicted_sizes(*searched([0.1] * 4), 0.01, steps / 400)["points"]
    assert points[-1]["uniform"] == pytest.approx(0.5 * math.exp(-wanted * 0.2), rel=1e-2)


def test_searched_ranks_lie_below_by_the_predicted_gain_of_their_own_budget():
    """At each size the verdict's own figure, of a search that had it for a budget."""
    supernet, found = searched([0.2] * 4, cuts=(0.8, 0.4, 0.2, 0.0))
    points = predicted_sizes(supernet, found, 0.01, SHARE)["points"]
    for place, point in enumerate(points[:-1]):
        values = Values(supernet, point["parameters"])
        measured = Measured(**{**vars(found.measured), "cut": found.measured.cuts[:, place]})
        gain, _ = predicted_gain(supernet, SimpleNamespace(values=values, measured=measured))
        behind = point["behind"]
        assert gain > 0
        saved = point["uniform"] - point["searched"]
        assert saved == pytest.approx(gain * behind / (gain + behind))
    assert points[-1]["searched"] == points[-1]["uniform"], "there is no other plan"
    losses = [p["searched"] for p in points]
    assert min(losses) >= points[-1]["uniform"], "none beats the largest rank"


def test_where_nothing_more_is_learnt_all_sizes_are_alike():
    for growth in (0.0, -0.1):
        points = predicted_sizes(*searched([growth] * 4), 0.01, SHARE)["points"]
        assert {p["behind"] for p in points} == {0.0}
        assert {p["uniform"] for p in points} == {0.5} == {p["searched"] for p in points}


def test_where_a_cut_is_all_that_is_missing_it_counts_in_full():
    """Of a search that has nothing more to learn; a run that still learns mends its part."""
    cuts = (0.8, 0.3, 0.35, 0.0)
    points = predicted_sizes(*searched([0.0] * 4, cuts=cuts), 0.01, SHARE)["points"]
    behind = [p["behind"] for p in points]
    assert behind == pytest.approx([0.8, 0.35, 0.35, 0.0]), "less rank never lacks less"
    points = predicted_sizes(*searched([0.1] * 4, cuts=cuts), 0.01, SHARE)["points"]
    fall = 0.5 * (1 - math.exp(-COME * 0.1 / 0.5))
    assert points[0]["behind"] == pytest.approx(0.8**2 / (0.8 + MENDED * fall), rel=1e-5)


def test_the_noise_of_a_cut_is_that_of_its_batches():
    supernet, found = searched([0.0] * 4)
    cut = torch.tensor([0.1, 0.3, 0.1, 0.3])
    found.measured.cuts = cut[:, None] * torch.tensor([1.0, 0, 0, 0])
    assert predicted_sizes(supernet, found, 0.01, SHARE)["noise"] == pytest.approx(
        float(cut.std() / 2)
    )


def test_the_loss_of_no_size_is_predicted_below_zero():
    for growth in (0.5, 5.0, 500.0):
        points = predicted_sizes(*searched([growth] * 4), 0.01, SHARE)["points"]
        assert min(p["searched"] for p in points) >= 0


def test_too_few_steps_or_batches_or_a_budget_predict_nothing():
    assert predicted_sizes(*searched([0.2] * 4, steps=FEWEST - 1), 0.01, SHARE) is None
    assert predicted_sizes(*searched([0.2] * 3), 0.01, SHARE) is None
    supernet, found = searched([0.2] * 4)
    found.measured.base = torch.zeros(0)
    assert predicted_sizes(supernet, found, 0.01, SHARE) is None
