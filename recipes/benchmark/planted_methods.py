"""Methods that look for planted ranks, each a function (problem, seed, options) -> plans, and the
retraining that judges a plan. Not here: the problems (planted_problems.py) and the table."""

from __future__ import annotations

import contextlib
import copy
import os
import random
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from peft import AdaLoraConfig, get_peft_model
from planted_problems import DIFFICULTIES, RANKS, Problem, Samples, make_problem
from torch import Tensor, nn
from torch.utils.data import DataLoader

from darts_lora import Genotype, InputError, RankSearch, SearchConfig, Supernet, discretize
from darts_lora.config import TrainingConfig
from darts_lora.lora.adapter import add_lora

Plan = dict[str, int]
RANDOM_PLANS = 3
TEMPERATURES = {"gumbel_hard": (1.0, 1.0), "gumbel": (2.0, 0.2), "softmax": (1.0, 1.0)}


@dataclass
class Training:
    """How weights are trained, the same for every method."""

    search_steps: int = 2000
    """Weight steps of a search; three quarters of them are followed by a step of alpha."""
    adalora_steps: int = 1000
    """Weight steps of each AdaLoRA run."""
    retrain_steps: int = 500
    """Weight steps of every retraining, and of the adapter whose SVD is cut."""
    batch_size: int = 256
    """Rows of a batch."""
    learning_rate: float = 1e-2
    """Peak learning rate of the LoRA weights (AdamW, cosine)."""
    adalora_learning_rates: tuple[float, ...] = (3e-3, 1e-2, 3e-2)
    """Peak learning rates that AdaLoRA tries; its validation loss chooses."""

    def __post_init__(self):
        for name, value in vars(self).items():
            values = value if isinstance(value, tuple) else (value,)
            if not values or min(values) <= 0:
                raise InputError(f"{name}={value!r}: must be above 0")


def mse(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    x, y = batch
    return F.mse_loss(model(x), y)


def search(
    problem: Problem,
    seed: int,
    training: Training,
    relaxation: str,
    choice: str | None = None,
    **options,
) -> list[Plan]:
    """The library's search under the budget, with `options` of SearchConfig and discretize's
    `choice`, all else but arch_update at its defaults."""
    config = SearchConfig(
        ranks=RANKS,
        relaxation=relaxation,
        temperature=TEMPERATURES[relaxation],
        budget_parameters=problem.budget,
        seed=seed,
        # a planted rank is an edge: beyond it nothing is gained, in no proportion to the parameters
        **{"arch_update": "gradient", "arch_every": 1, "search_fraction": 1.0} | options,
    )
    supernet = Supernet(copy.deepcopy(problem.model), config)
    loaders = (
        DataLoader(rows, training.batch_size, shuffle=True, collate_fn=_as_it_is)
        for rows in (problem.train, problem.validation)
    )
    steps = TrainingConfig(
        max_steps=training.search_steps,
        learning_rate=training.learning_rate / 3,  # descent follows its batches at the whole rate
        logging_steps=training.search_steps,
    )
    with open(os.devnull, "w") as quiet, contextlib.redirect_stderr(quiet):  # one bar is enough
        genotype = RankSearch(supernet, *loaders, training=steps, loss_fn=mse).run()
    return [discretize(genotype, choice).ranks]


def _as_it_is(batch):
    return batch


def oracle(problem: Problem, seed: int, training: Training) -> list[Plan]:
    """The planted ranks."""
    return [problem.ranks]


def uniform(problem: Problem, seed: int, training: Training) -> list[Plan]:
    """The same rank everywhere; the planted ranks' mean is an integer."""
    return [dict.fromkeys(problem.ranks, sum(problem.ranks.values()) // len(problem.ranks))]


def random_ranks(problem: Problem, seed: int, training: Training) -> list[Plan]:
    """Candidate ranks drawn evenly from all choices that use the whole budget."""
    draw, total, plans = random.Random(seed), sum(problem.ranks.values()), []
    while len(plans) < RANDOM_PLANS:
        ranks = draw.choices(RANKS, k=len(problem.ranks))
        if sum(ranks) == total:
            plans.append(dict(zip(problem.ranks, ranks, strict=True)))
    return plans


def svd(problem: Problem, seed: int, training: Training) -> list[Plan]:
    """A trained LoRA of the largest rank, cut to its largest singular values over all layers."""
    plan = dict.fromkeys(problem.ranks, max(RANKS))
    model = train_lora(problem, plan, seed, training)
    values = {
        name: torch.linalg.svdvals(model.get_submodule(name).get_delta_weight("default"))
        for name in plan
    }
    kept = sum(problem.ranks.values())
    threshold = torch.cat(list(values.values())).sort(descending=True).values[kept - 1]
    return [{name: int((v >= threshold).sum()) for name, v in values.items()}]


def adalora(problem: Problem, seed: int, training: Training) -> list[Plan]:
    """PEFT's AdaLoRA from the largest rank down to the budget, its learning rate tuned."""
    runs = [_adalora(problem, seed, training, lr) for lr in training.adalora_learning_rates]
    return [min(runs, key=lambda run: run[0])[1]]


def _adalora(problem: Problem, seed: int, training: Training, rate: float) -> tuple[float, Plan]:
    """Validation loss and ranks of one run; ranks fall from 10 % to 70 % of the steps."""
    steps = training.adalora_steps
    config = AdaLoraConfig(
        target_modules=list(problem.ranks),
        init_r=max(RANKS),
        target_r=sum(problem.ranks.values()) // len(problem.ranks),
        lora_alpha=2 * max(RANKS),
        tinit=steps // 10,
        tfinal=steps * 3 // 10,
        deltaT=10,
        total_step=steps,
    )
    torch.manual_seed(seed)
    model = get_peft_model(_WithLoss(copy.deepcopy(problem.model)), config)
    model = model.base_model  # it adds the orthogonality term, PeftModel does not
    for step in _training_steps(model, problem.train, steps, training.batch_size, rate):
        model.update_and_allocate(step)
    with torch.no_grad():
        loss = float(mse(model.model.model, (problem.validation.x, problem.validation.y)))
    pattern = config.rank_pattern
    ranks = {n: sum(pattern[f"model.{n}.lora_E.default"]) for n in problem.ranks}
    return loss, ranks


class _WithLoss(nn.Module):
    """A model that computes its loss, as PEFT wants it to add AdaLoRA's orthogonality term."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, x: Tensor, y: Tensor) -> SimpleNamespace:
        return SimpleNamespace(loss=mse(self.model, (x, y)))


def train_lora(problem: Problem, plan: Plan, seed: int, training: Training) -> nn.Module:
    """A copy of the problem's model with a plain PEFT LoRA of these ranks, trained from scratch on
    training and validation rows; without any rank above 0 there is nothing to train."""
    model = _WithLoss(copy.deepcopy(problem.model))
    if not any(plan.values()):
        return model.model
    genotype = Genotype({f"model.{name}": rank for name, rank in plan.items()})
    torch.manual_seed(seed)
    peft_model = add_lora(model, genotype.to_lora_config(model), genotype.ranks, [])
    splits = problem.train, problem.validation
    rows = Samples(torch.cat([s.x for s in splits]), torch.cat([s.y for s in splits]))
    steps, rate = training.retrain_steps, training.learning_rate
    for _ in _training_steps(peft_model, rows, steps, training.batch_size, rate):
        pass
    return model.model


def _training_steps(
    model: nn.Module, rows: Samples, steps: int, batch_size: int, rate: float
) -> Iterator[int]:
    """Train with AdamW and a cosine; yields the step between the update and the next gradient."""
    weights = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(weights, lr=rate, weight_decay=0.0, fused=True)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for step in range(steps):
        batch = rows.__getitems__(torch.randint(len(rows), (batch_size,)))
        model(*batch).loss.backward()
        optimizer.step()
        scheduler.step()
        yield step
        optimizer.zero_grad()


def retrained_loss(problem: Problem, plan: Plan, seed: int, training: Training) -> float:
    """Mean squared error on the test rows after retraining the plan from scratch."""
    model = train_lora(problem, plan, seed, training)
    with torch.no_grad():
        return float(mse(model, (problem.test.x, problem.test.y)))


SEARCHES = {
    f"{relaxation}, {branches}": partial(search, relaxation=relaxation, branches=branches)
    for relaxation in TEMPERATURES
    for branches in ("independent", "nested")
}
SEARCHES["gumbel_hard, nested, proportional"] = partial(
    search, relaxation="gumbel_hard", branches="nested", arch_update="proportional"
)
CHEAPER = {
    f"gumbel_hard, {branches}, {name}": partial(
        search, relaxation="gumbel_hard", branches=branches, **options
    )
    for name, options in (
        ("alpha every 2nd step", {"arch_every": 2}),
        ("alpha every 4th step", {"arch_every": 4}),
    )
    for branches in ("independent", "nested")
}
METHODS: dict[str, Callable[[Problem, int, Training], list[Plan]]] = {
    "oracle": oracle,
    **SEARCHES,
    **CHEAPER,
    "AdaLoRA": adalora,
    "SVD of rank 16": svd,
    "uniform": uniform,
    "random": random_ranks,
}


def measure(difficulty: str, seed: int, method: str, training: Training) -> dict:
    """One method on one problem: plans, share of exact ranks, retrained test loss, seconds."""
    torch.set_num_threads(1)
    problem = make_problem(DIFFICULTIES[difficulty], seed)
    started = time.monotonic()
    plans = METHODS[method](problem, seed, training)
    seconds = time.monotonic() - started
    losses = [retrained_loss(problem, plan, seed, training) for plan in plans]
    hits = [plan[name] == rank for plan in plans for name, rank in problem.ranks.items()]
    used = [sum(plan.values()) for plan in plans]
    return {
        "problem": difficulty,
        "seed": seed,
        "method": method,
        "planted_ranks": list(problem.ranks.values()),
        "found_ranks": [list(plan.values()) for plan in plans],
        "exact": sum(hits) / len(hits),
        "test_loss": sum(losses) / len(losses),
        "parameters_of_budget": sum(used) / len(used) / sum(problem.ranks.values()),
        "seconds": round(seconds, 2),
    }
