"""Problems with a known answer: a frozen residual model, and data from a copy of it with planted
low-rank changes; ways to look for the ranks, and the retraining that judges a plan.
Not here: which are run, and the table (planted.py)."""

from __future__ import annotations

import contextlib
import copy
import os
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from darts_lora import Genotype, RankSearch, SearchConfig, Supernet
from darts_lora.base.bounds import check_bounds
from darts_lora.config import TrainingConfig
from darts_lora.lora.adapter import add_lora

Plan = dict[str, int]
WIDTH, RANKS = 32, (0, 1, 2, 4, 8, 16)
PLANTED = (0, 0, 1, 1, 2, 4, 8, 16)  # in an order of its own for each seed; uniform rank 4


@dataclass(frozen=True)
class Difficulty:
    """How a problem is drawn; the defaults are the easy one."""

    name: str
    train_samples: int
    input_spread: float = 1.0
    """Largest over smallest standard deviation of the inputs, geometric in between."""
    gain_spread: float = 1.0
    """Largest over smallest gain of the layers, geometric, in an order of its own."""
    singular_spread: float = 1.0
    """Largest over smallest singular value of a planted change, geometric in between."""
    label_noise: float = 0.05
    """Standard deviation of the noise on all labels."""


HARD = {"input_spread": 20.0, "gain_spread": 8.0, "singular_spread": 4.0, "label_noise": 0.8}
DIFFICULTIES = {
    difficulty.name: difficulty
    for difficulty in (
        Difficulty("easy", 4000),
        Difficulty("hard-1500", 1500, **HARD),
        Difficulty("hard-5000", 5000, **HARD),
    )
}


class Residual(nn.Module):
    """x + gain * tanh(W x), a layer for each planted rank."""

    def __init__(self, gains: Tensor):
        super().__init__()
        self.blocks = nn.ModuleList(nn.Linear(WIDTH, WIDTH, bias=False) for _ in gains)
        self.gains = gains.tolist()

    def forward(self, x: Tensor) -> Tensor:
        for gain, block in zip(self.gains, self.blocks, strict=True):
            x = x + gain * torch.tanh(block(x))
        return x


class Samples(Dataset):
    """(x, y) rows; a whole batch is taken at once, which is much of the time of models so small."""

    def __init__(self, x: Tensor, y: Tensor):
        self.x, self.y = x, y

    def __len__(self) -> int:
        return len(self.x)

    def __getitems__(self, rows: list[int]) -> tuple[Tensor, Tensor]:
        return self.x[rows], self.y[rows]


@dataclass
class Problem:
    """A frozen model, the ranks that were planted, and data that needs them."""

    model: Residual
    changes: dict[str, Tensor]
    """Module name -> the planted change of its weight, (out, in)."""
    ranks: dict[str, int]
    """Module name -> rank of its change."""
    train: Samples
    validation: Samples
    test: Samples

    @property
    def budget(self) -> int:
        """Trainable parameters of the planted ranks."""
        return 2 * WIDTH * sum(self.ranks.values())


def make_problem(difficulty: Difficulty, seed: int) -> Problem:
    """The problem of this difficulty and seed; validation has half as many rows as train."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        ranks = [PLANTED[i] for i in torch.randperm(len(PLANTED))]
        gains = _spread(len(ranks), difficulty.gain_spread)[torch.randperm(len(ranks))]
        model, truth = Residual(gains), Residual(gains)
        for block in model.blocks:
            nn.init.normal_(block.weight, std=WIDTH**-0.5)
        truth.load_state_dict(model.state_dict())
        names = [name for name, m in model.named_modules() if isinstance(m, nn.Linear)]
        changes = {
            name: _change(rank, difficulty.singular_spread)
            for name, rank in zip(names, ranks, strict=True)
        }
        for name, change in changes.items():
            truth.get_submodule(name).weight.data += change
        train, validation, test = (
            _draw(truth, rows, difficulty)
            for rows in (difficulty.train_samples, difficulty.train_samples // 2, 4000)
        )
    return Problem(model, changes, dict(zip(names, ranks, strict=True)), train, validation, test)


def _spread(count: int, ratio: float) -> Tensor:
    """`count` values of geometric mean 1, the largest `ratio` times the smallest."""
    return ratio ** torch.linspace(0.5, -0.5, count)


def _change(rank: int, spread: float) -> Tensor:
    """A random matrix of this rank, (out, in); its singular values have geometric mean 1."""
    if rank == 0:
        return torch.zeros(WIDTH, WIDTH)
    left, right = (torch.linalg.qr(torch.randn(WIDTH, rank)).Q for _ in range(2))
    values = _spread(rank, spread) if rank > 1 else torch.ones(1)
    return left * values @ right.T


@torch.no_grad()
def _draw(truth: Residual, rows: int, difficulty: Difficulty) -> Samples:
    x = torch.randn(rows, WIDTH) * _spread(WIDTH, difficulty.input_spread)
    y = truth(x)
    return Samples(x, y + difficulty.label_noise * torch.randn_like(y))


@dataclass
class Training:
    """How weights are trained, the same for every method."""

    run_steps: int = 8000
    """Weight steps of the run that a search is the first part of (search_fraction)."""
    retrain_steps: int = 500
    """Weight steps of every retraining."""
    batch_size: int = 256
    """Rows of a batch."""
    learning_rate: float = 1e-2
    """Peak learning rate of the LoRA weights (AdamW, cosine)."""

    def __post_init__(self):
        counts = dict.fromkeys(("run_steps", "retrain_steps", "batch_size"), 0)
        check_bounds(self, above={**counts, "learning_rate": 0.0})


def mse(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    x, y = batch
    return F.mse_loss(model(x), y)


def search(problem: Problem, seed: int, training: Training) -> Plan:
    """The library's search under the budget, all at its defaults."""
    config = SearchConfig(ranks=RANKS, budget_parameters=problem.budget, seed=seed)
    supernet = Supernet(copy.deepcopy(problem.model), config)
    loaders = (
        DataLoader(rows, training.batch_size, shuffle=True, collate_fn=_as_it_is)
        for rows in (problem.train, problem.validation)
    )
    steps = TrainingConfig(
        max_steps=training.run_steps,
        learning_rate=training.learning_rate,
        logging_steps=training.run_steps,
    )
    with open(os.devnull, "w") as quiet, contextlib.redirect_stderr(quiet):  # one bar is enough
        return RankSearch(supernet, *loaders, training=steps, loss_fn=mse).run().ranks


def _as_it_is(batch):
    return batch


def oracle(problem: Problem, seed: int, training: Training) -> Plan:
    """The planted ranks."""
    return problem.ranks


def uniform(problem: Problem, seed: int, training: Training) -> Plan:
    """The same rank everywhere; the planted ranks' mean is an integer."""
    return dict.fromkeys(problem.ranks, sum(problem.ranks.values()) // len(problem.ranks))


METHODS: dict[str, Callable[[Problem, int, Training], Plan]] = {
    "oracle": oracle,
    "search": search,
    "uniform": uniform,
}


def retrained_loss(problem: Problem, plan: Plan, seed: int, training: Training) -> float:
    """Mean squared error on the test rows, after a plain PEFT LoRA of these ranks was trained from
    scratch on training and validation rows; without any rank above 0 nothing is trained."""
    model = copy.deepcopy(problem.model)
    if any(plan.values()):
        torch.manual_seed(seed)
        model = add_lora(model, Genotype(plan).to_lora_config(model), plan, [])
        _train(model, problem, training)
    with torch.no_grad():
        return float(mse(model, (problem.test.x, problem.test.y)))


def _train(model: nn.Module, problem: Problem, training: Training) -> None:
    """AdamW and a cosine."""
    splits = problem.train, problem.validation
    rows = Samples(torch.cat([s.x for s in splits]), torch.cat([s.y for s in splits]))
    weights = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(weights, lr=training.learning_rate, weight_decay=0.0, fused=True)
    steps = training.retrain_steps
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in range(steps):
        batch = rows.__getitems__(torch.randint(len(rows), (training.batch_size,)))
        mse(model, batch).backward()
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()


def measure(difficulty: str, seed: int, method: str, training: Training) -> dict:
    """One method on one problem: its plan, share of exact ranks, retrained test loss, seconds."""
    torch.set_num_threads(1)
    problem = make_problem(DIFFICULTIES[difficulty], seed)
    started = time.monotonic()
    plan = METHODS[method](problem, seed, training)
    seconds = time.monotonic() - started
    planted = problem.ranks
    return {
        "problem": difficulty,
        "seed": seed,
        "method": method,
        "planted_ranks": list(planted.values()),
        "found_ranks": [plan[name] for name in planted],
        "exact": sum(plan[name] == rank for name, rank in planted.items()) / len(planted),
        "test_loss": retrained_loss(problem, plan, seed, training),
        "parameters_of_budget": sum(plan.values()) / sum(planted.values()),
        "seconds": round(seconds, 2),
    }
