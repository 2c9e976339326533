"""Cells: the pieces of work of a run, their order, and their files, shared by workers.
Not here: what is computed in one (quality.py), what they amount to (quality_tables.py)."""

from __future__ import annotations

import contextlib
import fcntl
import json
import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from quality_methods import METHODS
from safetensors.torch import load_file, save_file
from torch import Tensor

from darts_lora import InputError
from darts_lora.base.files import write_json, write_text, write_whole

TUNING_SEED = 1000  # the first seed of the tuning


@dataclass
class QualityRun:
    """What is measured, and how long this call may take."""

    benchmark: str = "embedded_vqa"
    """Name of model and data together: the folder of the cells."""
    output_dir: str = "runs/quality"
    """Folder of the tasks' folders; what is finished there is not run again."""
    methods: list[str] = field(default_factory=lambda: list(METHODS))
    """Ways to choose ranks beside the uniform curve; default: all."""
    curve: list[int] = field(default_factory=lambda: [1, 2, 4, 8, 16, 32])
    """Ranks of the uniform curve."""
    budgets: list[int] = field(default_factory=lambda: [8, 2])
    """Budgets of every method, as ranks of the uniform curve, the most important first."""
    seeds: list[int] = field(default_factory=lambda: [0, 1, 2])
    """Seeds of searches, plans and retrainings."""
    learning_rates: list[float] = field(default_factory=lambda: [5e-4, 1e-3, 2e-3])
    """What each method's learning rates are chosen from: validation loss, on a seed of its own."""
    tuning_seeds: int = 1
    """Seeds of the tuning, whose mean loss decides (count): more where two retrainings of one plan
    differ by as much as two rates."""
    tuning_fraction: float = 0.1
    """Share of the training rows that tuning holds out, in (0, 1)."""
    group_by_length: bool = False
    """Train on batches of rows of similar length, where lengths differ: little is padded."""
    eval_batch_size: int = 64
    """Rows of a batch of an evaluation."""
    exact_match: bool = False
    """Generate the answers to the test rows too: share of exact ones."""
    stack: int = 1
    """Retrainings of a process at once (count), rounded down to a power of 2: small models are
    bound by the number of kernels, which they share. Compare seconds of single ones only."""
    workers: int = 1
    """Processes side by side, on one GPU too (count). Compare seconds of single ones only."""
    max_minutes: float | None = None
    """Begin no cell that would end later than this (minutes); default: run until all is done."""

    def __post_init__(self):
        unknown = set(self.methods) - set(METHODS)
        if unknown:
            raise InputError(f"methods={sorted(unknown)}: not among {', '.join(METHODS)}")
        if not self.budgets or not set(self.budgets) <= set(self.curve):
            raise InputError(f"budgets={self.budgets}: must be ranks of the curve {self.curve}")
        for name in ("curve", "seeds", "learning_rates"):
            values = getattr(self, name)
            low = 0 if name == "seeds" else 1 if name == "curve" else 1e-12
            if not values or min(values) < low or len(set(values)) < len(values):
                raise InputError(f"{name}={values}: must be distinct numbers >= {low}")
        if max(self.seeds) >= TUNING_SEED:
            raise InputError(f"seeds={self.seeds}: from {TUNING_SEED} on they are the tuning's")
        if self.tuning_seeds < 1:
            raise InputError(f"tuning_seeds={self.tuning_seeds}: must be an integer >= 1")
        if not 0 < self.tuning_fraction < 1:
            raise InputError(f"tuning_fraction={self.tuning_fraction}: must be between 0 and 1")
        for name in ("stack", "workers"):
            if getattr(self, name) < 1:
                raise InputError(f"{name}={getattr(self, name)}: must be an integer >= 1")


@dataclass(frozen=True)
class Cell:
    """One piece of work: a file <name>.json once it is done.

    find: choose ranks, on the tuning rows (seeds from TUNING_SEED) or on all; tune: retrain on the
    tuning rows, judged on the held-out rows; final: retrain on all rows, judged on the test rows.
    """

    stage: str
    method: str
    budget: int
    """Uniform rank of as many parameters."""
    seed: int
    find_rate: float | None = None
    """Learning rate of what finds the ranks, None where nothing is trained for it."""
    rate: float | None = None
    """Learning rate of the retraining."""

    @property
    def name(self) -> str:
        rates = [f"find{self.find_rate:g}"] if self.find_rate else []
        rates += [f"lr{self.rate:g}"] if self.rate else []
        parts = [self.method, f"r{self.budget}", self.stage, f"s{self.seed}", *rates]
        return "-".join(parts)

    @property
    def plan(self) -> Cell:
        """The cell that finds the plan which this one retrains."""
        method = METHODS[self.method].plan_of or self.method
        return Cell("find", method, self.budget, self.seed, self.find_rate)


class Store:
    """The files of a task's cells. Several processes may share the folder: a cell is computed under
    a lock that ends with its process.

    Args:
        folder: of the task.
        digest: of its rows and its model; None: not known, cells of any are read.
    """

    def __init__(self, folder: Path, digest: str | None = None):
        self.folder, self.digest, self.finished = folder, digest, {}
        for name in (".locks", ".kept"):
            (folder / name).mkdir(parents=True, exist_ok=True)

    def get(self, cell: Cell) -> dict[str, Any] | None:
        """A finished cell's record.

        Raises:
            InputError: it was computed on other rows or by another model.
        """
        if cell not in self.finished:
            path = self.folder / f"{cell.name}.json"
            if not path.exists():
                return None
            record = json.loads(path.read_text())
            if None not in (self.digest, record.get("task")) and record["task"] != self.digest:
                raise InputError(
                    f"{path}: was computed on other rows or by another model (task="
                    f"{record['task']}, here {self.digest}); name another benchmark or output_dir"
                )
            self.finished[cell] = record
        return self.finished[cell]

    def put(self, cell: Cell, record: dict[str, Any]) -> None:
        """Write a finished cell."""
        record = {**asdict(cell), **record} | ({"task": self.digest} if self.digest else {})
        write_json(self.folder / f"{cell.name}.json", record)

    def keep(self, cell: Cell, weights: dict[str, tuple[Tensor, Tensor]]) -> None:
        """Write what the training of a plan begins with, until `forget`."""
        tensors = {
            f"{name}.{part}": value.detach().float().cpu().contiguous()
            for name, pair in weights.items()
            for part, value in zip("AB", pair, strict=True)
        }
        write_whole(self._kept(cell), lambda temporary: save_file(tensors, temporary))

    def kept(self, cell: Cell) -> dict[str, tuple[Tensor, Tensor]]:
        """Layer -> A and B of a plan; nothing where none were kept."""
        path = self._kept(cell)
        tensors = load_file(path) if path.exists() else {}
        names = [key.removesuffix(".A") for key in tensors if key.endswith(".A")]
        return {name: (tensors[f"{name}.A"], tensors[f"{name}.B"]) for name in names}

    def forget(self, cell: Cell) -> None:
        """The training that began with these weights is done."""
        self._kept(cell).unlink(missing_ok=True)

    def _kept(self, cell: Cell) -> Path:
        return self.folder / ".kept" / f"{cell.name}.safetensors"

    def fail(self, cell: Cell, reason: str) -> None:
        """Note that a cell could not be computed; it is left out until the next run."""
        write_text(self.folder / f"{cell.name}.error", reason)

    def failed(self, cell: Cell) -> bool:
        return (self.folder / f"{cell.name}.error").exists()

    def forget_failures(self) -> None:
        """A new run tries them again."""
        for path in self.folder.glob("*.error"):
            path.unlink()

    def failures(self) -> list[str]:
        return sorted(path.stem for path in self.folder.glob("*.error"))

    @contextlib.contextmanager
    def claimed(self, cell: Cell) -> Iterator[bool]:
        """Whether the cell is ours to compute: not claimed by another process, not done by now."""
        with open(self.folder / ".locks" / cell.name, "w") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                yield False
            else:
                yield self.get(cell) is None and not self.failed(cell)

    def best(self, tries: list[list[Cell]]) -> Cell | None:
        """The first cell of the try (a list of cells) with the lowest mean validation loss; None
        while a cell is missing. A single try is the best."""
        if len(tries) == 1:
            return tries[0][0]
        records = [[self.get(cell) for cell in cells] for cells in tries]
        if any(None in found for found in records):
            return None
        losses = [
            [math.inf if r["loss"] is None else r["loss"] for r in found] for found in records
        ]
        means = [sum(found) / len(found) for found in losses]
        return tries[means.index(min(means))][0]


def cells(options: QualityRun, store: Store) -> Iterator[Cell]:
    """All cells in the order in which they should be done, what depends on unfinished ones left
    out: the uniform plans of the budgets (unless they are not asked for and no rate rests on them),
    then the methods, then the rest of the curve."""
    asked = [method for method in METHODS if method in options.methods and method != "uniform"]
    tuned = len(options.learning_rates) > 1 and any(METHODS[m].trains != "own" for m in asked)
    pairs = [(method, budget) for method in asked for budget in options.budgets]
    if tuned or "uniform" in options.methods:
        rest = [rank for rank in options.curve if rank not in options.budgets]
        pairs = [("uniform", rank) for rank in options.budgets] + pairs
        pairs += [("uniform", rank) for rank in rest]
    for method, budget in pairs:
        if found := (yield from _tune(options, method, budget, store)):
            for seed in options.seeds:
                final = Cell("final", method, budget, seed, found.find_rate, found.rate)
                yield final.plan
                yield final


def _tune(options: QualityRun, method: str, budget: int, store: Store) -> Iterator[Cell]:
    """Tuning cells; returns the best one, None while it is not known. The rate of finding is that
    of the whole run, tuned by itself, or of the budget's uniform plan; then the retraining's."""
    way, rates = METHODS[METHODS[method].plan_of or method], options.learning_rates
    if way.trains == "own":
        pairs = [(rate, rate) for rate in rates]
        return (yield from _try(_tries(options, method, budget, pairs), store))
    find_rate = None
    if way.trains == "uniform":
        plain = _tries(options, "uniform", budget, [(None, rate) for rate in rates])
        best = store.best(plain)
        if best is None or way.goes_on:  # one rate for what finds the plan and the rest
            return best and replace(best, find_rate=best.rate)
        find_rate = best.rate
    pairs = [(find_rate, rate) for rate in rates]
    return (yield from _try(_tries(options, method, budget, pairs), store))


def _try(tries: list[list[Cell]], store: Store) -> Iterator[Cell]:
    """All cells of the tries, each after the one that finds its plan; returns the best if known. A
    single try needs none."""
    if len(tries) == 1:
        return tries[0][0]
    for cell in (cell for cells in tries for cell in cells):
        yield cell.plan
        yield cell
    return store.best(tries)


def _tries(
    options: QualityRun, method: str, budget: int, pairs: list[tuple[float | None, float]]
) -> list[list[Cell]]:
    """For each pair of rates (finding, retraining) the cells of all seeds of the tuning."""
    seeds = range(TUNING_SEED, TUNING_SEED + options.tuning_seeds)
    return [[Cell("tune", method, budget, seed, *pair) for seed in seeds] for pair in pairs]
