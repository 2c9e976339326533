"""The uniform rank, the library's search as one run, and the list of all ways to choose ranks.
Not here: rivals (quality_rivals.py, quality_peft.py), retraining a plan (quality_training.py)."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal

from quality_peft import adalora_run
from quality_rivals import autolora, cut_heal, gora
from quality_rows import supervised_loss
from quality_setting import Found, Setting
from torch.utils.data import DataLoader

from darts_lora import Genotype, RankSearch, Supernet
from darts_lora.data.splits import hold_back
from darts_lora.genotype import PEFT_PREFIX


def uniform(setting: Setting) -> Found:
    """The budget's rank everywhere."""
    return Found(dict.fromkeys(setting.retrainer.shapes, setting.budget_rank))


def one_run(setting: Setting) -> Found:
    """The library's default: the search is the first part of the run, which goes on from its
    weights. Its architecture steps are paid for with weight steps, so that the run has as many
    passes (rows that go forward and backward) as a finetune of the task."""
    steps, passes = setting.steps_with_search()
    with made_search(setting, steps, setting.budget) as search:
        genotype = search.run()
        state = genotype.inherited_state(search.supernet)
    setting.kept = {
        name: tuple(state[f"{PEFT_PREFIX}{name}.lora_{part}.weight"] for part in "AB")
        for name, rank in genotype.ranks.items()
        if rank
    }
    for name in setting.retrainer.whole:
        weight = state[f"{PEFT_PREFIX}{name}.weight"]
        bias = state.get(f"{PEFT_PREFIX}{name}.bias", weight.new_zeros(0))
        setting.kept[name] = weight, bias
    found = {"taken": search.step, "run_steps": steps, "passes": passes}
    return Found(genotype.ranks, _notes(genotype) | found)


@contextlib.contextmanager
def made_search(setting: Setting, run_steps: int, budget: int | None) -> Iterator[RankSearch]:
    """A search that has not begun, the first part of a run of so many weight steps; it shows no
    bar. Behind it the model is as it was."""
    retrainer, rows = setting.retrainer, setting.rows
    training = replace(
        retrainer.training, max_steps=run_steps, learning_rate=setting.rate, logging_steps=run_steps
    )
    config = replace(setting.search, budget_rank=None, budget_parameters=budget, seed=setting.seed)
    splits = hold_back(setting.indices, rows.prompts, setting.validation_fraction)
    sizes = training.batch_size, training.validation_batch_size
    loaders = [
        DataLoader(
            range(len(rows)),
            batch_sampler=rows.batches(indices, size, setting.seed),
            collate_fn=rows.batch,
        )
        for indices, size in zip(splits, sizes, strict=True)
    ]
    supernet = Supernet(retrainer.model, config)
    try:
        search = RankSearch(
            supernet,
            *loaders,
            training=training,
            loss_fn=supervised_loss,
            cuda_graphs=retrainer.device.type == "cuda",
        )
        with open(os.devnull, "w") as quiet, contextlib.redirect_stderr(quiet):  # no second bar
            yield search
    finally:
        supernet.remove().requires_grad_(False)


def _notes(genotype: Genotype) -> dict[str, Any]:
    expected = [
        sum(p * rank for p, rank in zip(row, genotype.candidates, strict=True))
        for row in genotype.probabilities.values()
    ]
    verdict = genotype.found_by["verdict"]
    return {"expected_ranks": [round(rank, 4) for rank in expected], "verdict": verdict}


@dataclass(frozen=True)
class Method:
    """How ranks are chosen, and what of it is tuned."""

    find: Callable[[Setting], Found] | Callable[[list[Setting]], list[Found]]
    at_once: bool = False
    """It finds the plans of several seeds together."""
    trains: Literal["", "own", "uniform"] = ""
    """It trains something to find ranks: at a rate of its own, which is tuned as that of its whole
    run; or at that which is best for the budget's uniform plan."""
    plan_of: str | None = None
    """The method whose plans are retrained; default: its own."""
    goes_on: bool = False
    """The plan's training begins with the weights that were kept when it was found, and where
    something was trained for that it is the rest of that run, at the same rate."""
    afresh: bool = False
    """A plan of one_run, trained from scratch with the passes that its search left."""

    def plans(self, settings: list[Setting]) -> list[Found]:
        """What it finds in each setting."""
        return self.find(settings) if self.at_once else [self.find(s) for s in settings]


_HEALED = {"at_once": True, "trains": "uniform", "goes_on": True}
# What matters most first: a run that is cut off has compared the search with the first ones.
METHODS = {
    "uniform": Method(uniform),
    "one_run": Method(one_run, trains="uniform", goes_on=True),
    "one_run_scratch": Method(one_run, trains="uniform", plan_of="one_run", afresh=True),
    "adalora_run": Method(adalora_run, trains="own", goes_on=True),
    "gora": Method(gora),
    "gora_init": Method(partial(gora, starts=True), goes_on=True),
    "cut_heal": Method(cut_heal, **_HEALED),
    "cut_heal_fisher": Method(partial(cut_heal, fisher=True), **_HEALED),
    "autolora": Method(autolora, at_once=True, trains="uniform"),
}
