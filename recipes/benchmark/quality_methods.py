"""Ways to choose ranks under a budget, each a function of a Setting, and the list of all of them.
Not here: PEFT's own (quality_peft.py), how a plan is retrained (quality_training.py)."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal

import torch
from quality_allocation import (
    energy_spectrum,
    largest_gain,
    product_spectrum,
    proportional_gains,
    random_choice,
    uniform_on,
)
from quality_peft import adalora, adalora_run, eva, eva_components
from quality_rivals import autolora, cut_heal, gora, weight_gradients
from quality_rows import supervised_loss
from quality_setting import Found, Setting
from quality_training import Retraining
from torch import Tensor
from torch.utils.data import DataLoader

from darts_lora import DivergedError, Genotype, RankSearch, Supernet
from darts_lora.config import TrainingConfig
from darts_lora.data.splits import hold_back
from darts_lora.genotype import PEFT_PREFIX
from darts_lora.lora.cost import rank_costs


def uniform(setting: Setting) -> Found:
    """The budget's rank everywhere."""
    return Found(dict.fromkeys(setting.retrainer.shapes, setting.budget_rank))


def search(setting: Setting, **options) -> Found:
    """The library's search under the budget; `options` of SearchConfig beside the task's own."""
    with (
        made_search(setting, **options) as ready,
        open(os.devnull, "w") as quiet,
        contextlib.redirect_stderr(quiet),  # one bar is enough
    ):
        genotype = ready.run()
    return Found(genotype.ranks, _notes(genotype))


def one_run(setting: Setting) -> Found:
    """The library's default: the search is the first part of the run, which goes on from its
    weights. Its architecture steps are paid for with weight steps, so that the run has as many
    passes (rows that go forward and backward) as a finetune of the task."""
    training, (steps, passes) = setting.retrainer.training, setting.steps_with_search()
    run = replace(training, max_steps=steps, learning_rate=setting.rate, logging_steps=steps)
    with (
        made_search(setting, run) as ready,
        open(os.devnull, "w") as quiet,
        contextlib.redirect_stderr(quiet),
    ):
        genotype = ready.run()
        state = genotype.inherited_state(ready.supernet)
    first = {
        name: tuple(state[f"{PEFT_PREFIX}{name}.lora_{part}.weight"] for part in "AB")
        for name, rank in genotype.ranks.items()
        if rank
    }
    found = {"taken": ready.step, "run_steps": steps, "passes": passes}
    setting.kept = first
    return Found(genotype.ranks, _notes(genotype) | found)


@contextlib.contextmanager
def made_search(
    setting: Setting, training: TrainingConfig | None = None, **options
) -> Iterator[RankSearch]:
    """A search that has not begun; behind it the model is as it was. By default it is a run of its
    own, with the task's steps of a search."""
    parts = hold_back(setting.indices, setting.rows.prompts, setting.validation_fraction)
    own = {"budget_rank": None, "budget_parameters": setting.budget, "seed": setting.seed}
    config = replace(setting.search, **(own | options))
    if training is None:
        training = replace(setting.search_training, learning_rate=setting.rate)
        config = replace(config, search_fraction=1.0)
    loaders = [
        DataLoader(
            range(len(setting.rows)),
            batch_sampler=setting.rows.batches(indices, training.batch_size, setting.seed),
            collate_fn=setting.rows.batch,
        )
        for indices in parts
    ]
    supernet = Supernet(setting.retrainer.model, config)
    on_gpu = setting.retrainer.device.type == "cuda"
    try:
        yield RankSearch(
            supernet, *loaders, training=training, loss_fn=supervised_loss, cuda_graphs=on_gpu
        )
    finally:
        supernet.remove().requires_grad_(False)


def _notes(genotype: Genotype) -> dict[str, Any]:
    expected = [
        sum(p * rank for p, rank in zip(row, genotype.candidates, strict=True))
        for row in genotype.probabilities.values()
    ]
    verdict = genotype.found_by["verdict"]
    return {"expected_ranks": [round(rank, 4) for rank in expected], "verdict": verdict}


def random_ranks(setting: Setting, number: int) -> Found:
    """Random raises until none fits; `number` tells the plans of a seed apart."""
    shapes, candidates = setting.retrainer.shapes, setting.search.ranks
    generator = torch.Generator().manual_seed(1000 * setting.seed + number)
    costs = rank_costs(shapes.values(), candidates)
    choice = random_choice(costs, setting.budget, generator)
    return Found({n: candidates[k] for n, k in zip(shapes, choice, strict=True)})


def some_layers(setting: Setting, kinds: tuple[str, ...]) -> Found:
    """The same rank for layers inside modules that are called so, 0 elsewhere; same total."""
    shapes = setting.retrainer.shapes
    names = [n for n in shapes if any(kind in part for part in n.split(".") for kind in kinds)]
    return Found(uniform_on(names, shapes, setting.retrainer.capacity, setting.budget))


def svd(setting: Setting) -> Found:
    """A trained LoRA of the largest candidate rank, cut to its largest singular values."""
    retrainer, largest = setting.retrainer, max(setting.search.ranks)
    plan = {name: min(largest, most) for name, most in retrainer.capacity.items()}
    job = Retraining(plan, setting.indices, setting.seed, setting.rate)
    (trained,) = retrainer.retrain([job], setting.rows)
    if trained["train_loss"] is None:
        raise DivergedError(f"find_rate={setting.rate}: the training loss is infinite or NaN")
    gains = {
        name: _filled(product_spectrum(b[:, : plan[name]], a[: plan[name]]), largest)
        for name, (a, b) in retrainer.trained().items()
    }
    ranks = largest_gain(gains, retrainer.shapes, setting.search.ranks, setting.budget)
    return Found(ranks, {"train_loss": trained["train_loss"]})


def _filled(values: Tensor, length: int) -> Tensor:
    return torch.cat([values, values.new_zeros(length - len(values))])


def gradient(setting: Setting) -> Found:
    """The spectrum of each layer's weight gradient, summed over batches of the untrained model."""
    largest = max(setting.search.ranks)
    sums, _ = weight_gradients(setting, setting.gradient_batches)
    gains = {name: energy_spectrum(matrix, largest) for name, matrix in sums.items()}
    ranks = largest_gain(gains, setting.retrainer.shapes, setting.search.ranks, setting.budget)
    return Found(ranks)


def fisher(setting: Setting) -> Found:
    """Ranks in proportion to the empirical Fisher information of each layer's weight (squared
    gradients of batches, summed) over its cost."""
    largest = max(setting.search.ranks)
    _, squares = weight_gradients(setting, setting.gradient_batches)
    gains = {name: proportional_gains(score, largest) for name, score in squares.items()}
    ranks = largest_gain(gains, setting.retrainer.shapes, setting.search.ranks, setting.budget)
    return Found(ranks, {"fisher": [float(score) for score in squares.values()]})


@dataclass(frozen=True)
class Method:
    """How ranks are chosen, and what of it is tuned."""

    find: Callable[[Setting], Found] | Callable[[list[Setting]], list[Found]]
    at_once: bool = False
    """It finds the plans of several seeds together."""
    trains: Literal["", "tuned", "as uniform"] = ""
    """It trains something to find ranks: at a rate that is tuned as well, or at that which is best
    for the budget's uniform plan."""
    plan_of: str | None = None
    """The method whose plans are retrained; default: its own."""
    plan_seed: int | None = None
    """The seed whose plan is retrained at every seed; default: each its own."""
    rates_of: str | None = None
    """The method whose tuned learning rates are used; default: its own."""
    first: Callable[[Setting], dict[str, Tensor]] | None = None
    """First values of A; default: PEFT's."""
    goes_on: bool = False
    """The plan's training begins with the weights that were kept when it was found, and where
    something was trained for that it is the rest of that run, at the same rate."""

    afresh: bool = False
    """A plan of one_run, trained from scratch with the passes that its search left."""

    @property
    def own_rate(self) -> bool:
        """Its whole run has one learning rate, which is tuned by itself."""
        return self.goes_on and self.trains == "tuned"

    def plans(self, settings: list[Setting]) -> list[Found]:
        """What it finds in each setting."""
        return self.find(settings) if self.at_once else [self.find(s) for s in settings]


def _searches(**options) -> Method:
    return Method(partial(search, **options), trains="as uniform")


RANDOM_PLANS = 5
COMPARED = 2  # searches of which each plan is retrained with all seeds
# What matters most first: a run that is cut off has compared the search with the first ones.
METHODS = {
    "uniform": Method(uniform),
    "one_run": Method(one_run, trains="as uniform", goes_on=True),
    "one_run_scratch": Method(one_run, trains="as uniform", plan_of="one_run", afresh=True),
    "adalora_run": Method(adalora_run, trains="tuned", goes_on=True),
    "gora": Method(gora),
    "gora_init": Method(partial(gora, starts=True), goes_on=True),
    "cut_heal": Method(cut_heal, at_once=True, trains="as uniform", goes_on=True),
    "cut_heal_fisher": Method(
        partial(cut_heal, fisher=True), at_once=True, trains="as uniform", goes_on=True
    ),
    "autolora": Method(autolora, at_once=True, trains="as uniform"),
    "search": _searches(),
    "random_0": Method(partial(random_ranks, number=0)),
    "adalora": Method(adalora, trains="tuned"),
    "svd": Method(svd, trains="tuned"),
    "gradient": Method(gradient),
    "fisher": Method(fisher),
    "eva": Method(eva),
    "eva_init": Method(eva, plan_of="eva", first=eva_components),
    "attention": Method(partial(some_layers, kinds=("attn", "attention"))),
    "mlp": Method(partial(some_layers, kinds=("mlp", "feed_forward"))),
    **{
        f"random_{i}": Method(partial(random_ranks, number=i), rates_of="random_0")
        for i in range(1, RANDOM_PLANS)
    },
    **{
        f"search_seed_{i}": replace(_searches(), plan_of="search", plan_seed=i, rates_of="search")
        for i in range(COMPARED)
    },
}
