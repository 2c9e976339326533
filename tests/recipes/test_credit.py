"""recipes/benchmark/credit.py: closed forms of what it measures, and a run as a user makes it.
Not here: what it says about a task (recipes/benchmark/README.md)."""

import json
from pathlib import Path

import pytest
import torch

from darts_lora import SearchConfig, Supernet
from small_models import residual

BENCHMARK = Path(__file__).parents[2] / "recipes" / "benchmark"


@pytest.fixture(scope="module", autouse=True)
def modules():
    """A recipe is a script: its folder is no package."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(BENCHMARK)
        yield


@pytest.mark.parametrize("budget", [0.3, 1, 3])
def test_alpha_is_held_at_the_budget(budget):
    from credit import hold_at_budget

    supernet = Supernet(residual(), SearchConfig(ranks=(0, 1, 2, 4), budget_rank=budget))
    hold_at_budget(supernet)
    assert float(supernet.expected_parameters().detach()) == pytest.approx(
        supernet.budget, rel=1e-5
    )
    assert torch.equal(supernet.alpha, supernet.alpha[:1].expand_as(supernet.alpha))


def test_worth_of_a_loss_that_falls_with_the_expected_parameters():
    from credit import UNIT, hold_at_budget, worth

    supernet = Supernet(residual(), SearchConfig(ranks=(0, 1, 2, 4), budget_rank=1))
    hold_at_budget(supernet)
    slopes = torch.arange(1.0, len(supernet.layers) + 1) * UNIT
    size = (supernet.probabilities() * supernet.costs.float()).sum(-1)
    (gradient,) = torch.autograd.grad(-(slopes * size).sum(), supernet.alpha)
    assert worth(supernet, gradient) == pytest.approx((slopes / UNIT).tolist(), rel=1e-3)


def test_a_run(launch, vision_folder, data_folder, tmp_path):
    model = ("--model_name_or_path", vision_folder, "--dataset", data_folder, "--max_length", 32)
    few = ("--budgets", "[2]", "--curve", "[1,2]", "--learning_rates", "[0.006]", "--seeds", "[1]")
    done = launch(
        *("benchmark/credit", *model, *few, "--ranks", "[0,1,2,4]", "--output_dir", tmp_path),
        *("--search_batch_size", 4, "--last_batches", 2, "--search_steps", 8),
        *("--arch_average", 0.5),
        alone=True,
    )
    (record,) = json.loads((tmp_path / "embedded_vqa.json").read_text())["records"]
    assert (record["budget"], record["seed"], record["learning_rate"]) == (2, 1, 0.006)
    weights, mean = (torch.tensor(record[name]) for name in ("at_weights", "at_mean"))
    layers = len(record["layers"])
    assert weights.shape == mean.shape == (8, layers) == (8, len(record["at_the_end"]))
    assert mean.isfinite().all() and mean.std() > 0 and not torch.equal(weights, mean)
    assert "credit: 100%" in done.stderr
    assert "at the end" in done.stdout and "self_attn.v_proj" in done.stdout


def test_without_a_mean_there_is_nothing_to_compare(launch, tmp_path):
    options = "--arch_average", 0
    done = launch("benchmark/credit", "--output_dir", tmp_path, *options, alone=True, status=2)
    assert "arch_average=0.0: must be above 0" in done.stderr
