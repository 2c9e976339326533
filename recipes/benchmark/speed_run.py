"""What one run costs beside a plain PEFT finetune of as many weight steps: wall time and memory.
Not here: what it is worth (quality.py), the shapes (speed_shapes.py).

python recipes/benchmark/speed_run.py     # the embedded default, alone on a machine
python recipes/benchmark/speed_run.py --shape mllama_11b_batch4 --batches 2 --max_steps 400
"""

from __future__ import annotations

import contextlib
import gc
import itertools
import json
import math
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch
from accelerate import Accelerator
from peft import PeftModel
from quality_cells import QualityRun
from quality_peft import half_precision
from quality_rows import EncodedRows, model_inputs, task_rows
from speed_shapes import SHAPES, make_batch, make_model
from torch import Tensor, nn

from darts_lora import Genotype, InputError, SearchConfig, Supernet
from darts_lora.base.bounds import check_bounds
from darts_lora.base.files import write_json
from darts_lora.base.options import run
from darts_lora.config import DataConfig, ModelConfig, TrainingConfig
from darts_lora.data.loaders import make_collator
from darts_lora.lora.models import load_model
from darts_lora.lora.targets import match_modules
from darts_lora.run.beginning import plain_adapter
from darts_lora.run.bilevel import BilevelStep
from darts_lora.run.graphs import Graphed
from darts_lora.run.schedule import derive_genotype
from darts_lora.run.tokens import model_loss

Batch = dict[str, Tensor]


@dataclass
class SpeedOfRun:
    """What is timed. The task is that of a file of recipes/benchmark/quality (--config)."""

    shape: str | None = None
    """A shape of speed_shapes.py in place of the task, with random weights."""
    graphs: list[bool] = field(default_factory=lambda: [False, True])
    """Launch the steps one by one, as CUDA graphs, or both (on a GPU)."""
    batches: int = 8
    """Batches that are gone through again and again (count)."""
    passes: int = 3
    """Timed passes over them of each kind of step in a round (count)."""
    rounds: int = 3
    """Rounds of the plain finetune and the run in turn, each built anew (count)."""
    output: str = "speed_run.json"
    """File of the figures (JSON); those of other tasks in it stay."""

    def __post_init__(self):
        check_bounds(self, at_least={"batches": 1, "passes": 1, "rounds": 1})
        if self.shape not in (None, *SHAPES):
            raise InputError(f"shape={self.shape!r}: must be one of {', '.join(SHAPES)}")
        if not self.graphs:
            raise InputError("graphs=[]: must hold true, false or both")


@dataclass
class Timed:
    """What rounds have measured: of each kind of step the seconds of passes over all batches, of
    what happens once in a run its seconds, and the peak of the memory in use (bytes)."""

    passes: dict[str, list[float]] = field(default_factory=dict)
    once: dict[str, list[float]] = field(default_factory=dict)
    peak: dict[str, int] = field(default_factory=dict)


def main(
    options: SpeedOfRun,
    task: QualityRun,
    search: SearchConfig,
    model: ModelConfig,
    data: DataConfig,
    training: TrainingConfig,
) -> None:
    """Time the steps of a plain finetune and of a run with a search, and weigh them by the run."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if search.budget_parameters is None:
        search = replace(search, budget_rank=search.budget_rank or task.budgets[0])
    if options.shape:
        shape = SHAPES[options.shape]
        base = make_model(shape, device.type)
        batches = [make_batch(shape, device.type) for _ in range(options.batches)]
    else:
        rows = EncodedRows(task_rows(data), make_collator(model, data), device,
                           task.group_by_length)  # fmt: skip
        order = rows.batches(range(len(rows)), training.batch_size, search.seed).endless()
        batches = [
            model_inputs(rows.batch(part)) for part in itertools.islice(order, options.batches)
        ]
        base = load_model(model).to(device).requires_grad_(False)
        base.config.get_text_config().use_cache = False
    modes = [graphs for graphs in options.graphs if device.type == "cuda" or not graphs]
    if not modes:
        raise InputError(f"graphs={options.graphs}: there are none on a CPU")
    path = Path(options.output)
    record = json.loads(path.read_text()) if path.exists() else {}
    name = options.shape or task.benchmark
    for graphs in modes:
        timed = Timed()
        for _ in range(options.rounds):
            bench = Bench(base, batches, search, training, graphs, options.passes, timed)
            bench.plain()
            bench.one_run()
        figures = summary(timed, len(batches), bench.shares)
        about = {"device": torch.cuda.get_device_name() if device.type == "cuda" else "cpu"}
        about |= {"torch": torch.__version__, "threads": torch.get_num_threads()}
        about |= {"budget_rank": search.budget_rank, "graphs": graphs, "rounds": options.rounds}
        record[f"{name}, {'graphs' if graphs else 'eager'}"] = about | figures
        write_json(path, record)
        print(f"{name}, {'graphs' if graphs else 'eager'}: {json.dumps(figures)}", flush=True)


class Bench:
    """One round on a frozen model, which is as it was behind each method.

    Attributes:
        shares: weight steps of the run, those of its search, architecture steps.
    """

    def __init__(
        self,
        base: nn.Module,
        batches: list[Batch],
        search: SearchConfig,
        training: TrainingConfig,
        graphs: bool,
        passes: int,
        timed: Timed,
    ):
        self.base, self.batches, self.graphs, self.timed = base, batches, graphs, timed
        self.search, self.training, self.passes = search, training, passes
        rows = len(batches[0]["input_ids"])
        size = replace(training, batch_size=rows).validation_batch_size
        self.validation = [{k: v[:size] for k, v in batch.items()} for batch in batches]
        self.cuda = batches[0]["input_ids"].device.type == "cuda"
        self.shares: tuple[int, int, int] = training.max_steps, 0, 0
        self.base.train()

    def plain(self) -> None:
        """A PEFT LoRA of the budget's rank."""
        names = match_modules(self.base, self.search.target_modules, self.search.exclude_modules)
        rank = round(self.search.budget_rank)
        with self._memory("plain"):
            with self._once("plain, built"):
                genotype = Genotype(dict.fromkeys(names, rank), self.search.scaling)
                adapted = plain_adapter(self.base, genotype, None)
            self._finetune("plain", adapted)

    def one_run(self) -> None:
        """The search's steps, the handover, the finetune's steps on what was handed over."""
        with self._memory("run"):
            adapted = self._searched()
            gc.collect()  # the search's graphs
            self._finetune("finetune", adapted)

    def _searched(self) -> PeftModel:
        with self._once("search, built"):
            supernet = Supernet(self.base, self.search)
            accelerator = Accelerator(cpu=not self.cuda)
            count = self.search.search_steps(self.training.max_steps)
            steps = BilevelStep(supernet, accelerator, self.training, model_loss)
            if self.graphs:
                steps.capture()
        due = count - count // 2  # weight steps in the search's second half
        self.shares = self.training.max_steps, count, math.ceil(due / self.search.arch_every)
        architect, loss = steps.architect, steps.val_loss_fn
        self._time("search, weights", lambda b: steps.weights.step(iter([b])))
        self._time("search, mean", lambda b: architect.mean.update())
        path = architect.graphed or partial(architect.path, loss)

        def architecture(batch: Batch) -> None:
            with architect.mean.in_place():
                path(batch)

        self._time("search, architecture", architecture, self.validation)
        architect.half = [value.clone() for value in architect.mean.values]
        architect.taken = count - 1  # so that the step that follows is the last, which looks closer
        with self._once("last measurement"):
            architect.step(loss, itertools.cycle(self.validation))
        with self._once("handover"):
            genotype = derive_genotype(supernet, architect, self.training.max_steps)
            return plain_adapter(supernet.remove(), genotype, supernet)

    def _finetune(self, kind: str, adapted: PeftModel) -> None:
        self._time(kind, weight_step(adapted, self.training, self.graphs))
        adapted.unload()
        self.base.requires_grad_(False)

    def _time(
        self, kind: str, step: Callable[[Batch], Any], batches: list[Batch] | None = None
    ) -> None:
        """Seconds of passes over all batches, behind those that make graphs (one to see a shape,
        one to capture it) or warm up."""
        times = []
        for _ in range(2 * self.graphs + 1 + self.passes):
            started = self._clock()
            for batch in batches or self.batches:
                step(batch)
            times.append(self._clock() - started)
        steady = times[-self.passes :]
        self.timed.passes.setdefault(kind, []).extend(steady)
        first = sum(times[:2]) - 2 * median(steady) if self.graphs else 0.0
        self.timed.once.setdefault(f"{kind}, graphs", []).append(max(first, 0.0))

    @contextlib.contextmanager
    def _once(self, name: str) -> Iterator[None]:
        """Time what happens once in a run."""
        started = self._clock()
        yield
        self.timed.once.setdefault(name, []).append(self._clock() - started)

    @contextlib.contextmanager
    def _memory(self, name: str) -> Iterator[None]:
        """Note the peak of the GPU's memory."""
        gc.collect()  # graphs keep their memory until they are gone
        if self.cuda:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        yield
        if self.cuda:
            peak = torch.cuda.max_memory_allocated()
            self.timed.peak[name] = max(peak, self.timed.peak.get(name, 0))

    def _clock(self) -> float:
        if self.cuda:
            torch.cuda.synchronize()
        return time.perf_counter()


def weight_step(adapted: PeftModel, training: TrainingConfig, graphs: bool) -> Callable:
    """A step of a finetune, as finetune.py's: float32 adapters, autocast on a base in 16 bits."""
    weights = [p for p in adapted.parameters() if p.requires_grad]
    cuda = weights[0].device.type == "cuda"
    optimizer = torch.optim.AdamW(
        weights, lr=training.learning_rate, weight_decay=training.weight_decay, fused=cuda or None
    )

    def gradients(batch: Batch) -> tuple[Tensor, list[Tensor]]:
        with half_precision(adapted):
            loss = model_loss(adapted, batch)
        return loss.detach(), list(torch.autograd.grad(loss, weights, materialize_grads=True))

    compute = Graphed(gradients, pool=torch.cuda.graph_pool_handle()) if graphs else gradients

    def step(batch: Batch) -> None:
        for weight, gradient in zip(weights, compute(batch)[1], strict=True):
            weight.grad = gradient
        if training.max_grad_norm:
            nn.utils.clip_grad_norm_(weights, training.max_grad_norm)
        optimizer.step()

    return step


def summary(timed: Timed, batches: int, shares: tuple[int, int, int]) -> dict[str, Any]:
    """Milliseconds of the steps (medians of passes), seconds of what happens once, and of a run of
    `shares` (steps, those of its search, architecture steps) beside a plain finetune of as many
    steps. The last architecture step is part of the last measurement, which happens once.

    ratio is of everything but the making of graphs, ratio_with_graphs of that as well.
    """
    step = {kind: median(times) / batches for kind, times in timed.passes.items()}
    once = {name: median(times) for name, times in timed.once.items()}
    steps, searched, architecture = shares
    plain = steps * step["plain"] + once["plain, built"]
    whole = searched * (step["search, weights"] + step["search, mean"])
    whole += (architecture - 1) * step["search, architecture"] + once["last measurement"]
    whole += (steps - searched) * step["finetune"] + once["search, built"] + once["handover"]
    kinds = ("search, weights", "search, architecture", "finetune")
    made = sum(once[f"{kind}, graphs"] for kind in kinds)
    found = {
        "steps": steps,
        "search_steps": searched,
        "architecture_steps": architecture,
        "ms": {kind: round(1000 * value, 3) for kind, value in step.items()},
        "once_s": {name: round(value, 3) for name, value in once.items()},
        "plain_s": round(plain, 2),
        "one_run_s": round(whole, 2),
        "ratio": round(whole / plain, 4),
        "ratio_with_graphs": round((whole + made) / (plain + once["plain, graphs"]), 4),
    }
    if timed.peak:
        found["peak_gib"] = {name: round(size / 2**30, 3) for name, size in timed.peak.items()}
        found["peak_ratio"] = round(timed.peak["run"] / timed.peak["plain"], 4)
    return found


if __name__ == "__main__":
    run(
        main,
        SpeedOfRun,
        QualityRun,
        SearchConfig,
        ModelConfig,
        DataConfig,
        TrainingConfig,
        default_config=os.path.join(os.path.dirname(__file__), "quality", "embedded_vqa.yaml"),
    )
