"""Problems with a known answer: a frozen residual model, and data from a copy of it with planted
low-rank changes. Not here: the methods that look for the ranks (planted_methods.py)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

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
