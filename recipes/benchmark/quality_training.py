"""Retrainings of rank plans on one model, several at once, launched as CUDA graphs on a GPU.
Not here: rows and losses (quality_rows.py), which plans there are (quality_methods.py), which
cells are run (quality_cells.py)."""

from __future__ import annotations

import contextlib
import itertools
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from quality_rows import EncodedRows, supervised_losses
from torch import Tensor, nn
from transformers import get_scheduler

from darts_lora import InputError
from darts_lora.config import TrainingConfig
from darts_lora.lora.mixed_linear import linear_shape
from darts_lora.run.graphs import Graphed

Plan = dict[str, int]


@dataclass
class Retraining:
    """A plan to be trained, from scratch or from where a search stopped."""

    plan: Plan
    """Layer -> rank."""
    indices: Sequence[int]
    """Rows that it is trained on."""
    seed: int
    """Of A and of the order of the batches, the same for all plans."""
    rate: float
    """Peak learning rate."""
    first: dict[str, Tensor] = field(default_factory=dict)
    """Layer -> first value of A (rank, in), instead of PEFT's."""
    first_b: dict[str, Tensor] = field(default_factory=dict)
    """Layer -> first value of B (out, rank), instead of zeros."""
    taken: int = 0
    """Steps of the run that a search took: of its learning rate too."""
    run_steps: int | None = None
    """Steps of the run; default: the task's."""


class StackedLora(nn.Module):
    """A frozen linear layer and S LoRAs on it: of S equal parts of the rows each has its own.

    Attributes:
        a, b: (S, R, in) and (S, out, R), of the dtype of the activations.
        gates: (S, 1, R), the scaling in the columns that a LoRA has, 0 in all others.
    """

    def __init__(self, base_layer: nn.Module):
        super().__init__()
        self.base_layer = base_layer
        self.a = self.b = self.gates = None

    def forward(self, x: Tensor) -> Tensor:
        """x (..., in) -> (..., out)."""
        y, parts = self.base_layer(x), len(self.a)
        h = torch.bmm(x.reshape(parts, -1, x.shape[-1]), self.a.mT) * self.gates
        return torch.baddbmm(y.view(parts, -1, y.shape[-1]), h, self.b.mT).view(y.shape)

    @property
    def weight(self) -> Tensor:
        """The base layer's: some models ask for its dtype or device."""
        return self.base_layer.weight

    @property
    def bias(self) -> Tensor | None:
        """The base layer's."""
        return self.base_layer.bias


class Retrainer:
    """Retrains any rank plans on one model with the arithmetic of a PEFT LoRA of these ranks.

    Every target holds LoRAs of the largest rank, and gates (0 or the scaling) switch the columns
    above a plan's rank off: these neither change the output nor get a gradient, so what is left
    is the LoRA of the plan's rank, and AdamW and clipping take the same step. One graph for each
    shape of batches thus serves all plans, seeds and learning rates, where PEFT's own modules have
    other shapes for each plan and would be captured anew.

    A small model is bound by the number of its kernels, so several plans are trained at once: each
    has its own rows of a batch, and its own weights in products of batches of matrices.

    Args:
        model: frozen from now on; on its device. The adapters are in it inside `adapters()` alone.
        names: target layers.
        largest: largest rank of a plan; less where a layer is smaller.
        scaling: lora_alpha / r.
        training: steps, batch size, schedule, clipping, decay of every retraining.
        stack: plans that are trained at once, at most (count).
    """

    def __init__(
        self,
        model: nn.Module,
        names: Sequence[str],
        *,
        largest: int,
        scaling: float,
        training: TrainingConfig,
        stack: int = 1,
    ):
        self.model, self.scaling, self.training = model.requires_grad_(False), scaling, training
        self.originals = {name: model.get_submodule(name) for name in names}
        self.shapes = {name: linear_shape(module) for name, module in self.originals.items()}
        self.capacity = {name: min(largest, *shape) for name, shape in self.shapes.items()}
        self.layers = {name: StackedLora(module) for name, module in self.originals.items()}
        weight = next(iter(self.originals.values())).weight
        self.device, self.dtype = weight.device, weight.dtype
        self.sizes = [
            rank * side for name, rank in self.capacity.items() for side in self.shapes[name]
        ]
        # each plan's A and B of all layers in one tensor: one kernel casts, clips or updates all
        self.weights = [
            nn.Parameter(torch.zeros(sum(self.sizes), device=self.device)) for _ in range(stack)
        ]
        self.gates = {
            name: torch.zeros(stack, 1, rank, device=self.device, dtype=self.dtype)
            for name, rank in self.capacity.items()
        }
        on_gpu = self.device.type == "cuda"
        self.rates = [torch.zeros((), device=self.device) for _ in range(stack)]  # of the next step
        self.optimizer = torch.optim.AdamW(
            [{"params": [w], "lr": r} for w, r in zip(self.weights, self.rates, strict=True)],
            weight_decay=training.weight_decay,
            fused=True,
            capturable=on_gpu,
        )
        pool = torch.cuda.graph_pool_handle() if on_gpu else None
        self.step = Graphed(self._step, pool=pool, limit=64) if on_gpu else self._step

    @property
    def graphed(self) -> bool:
        """Whether steps are launched as CUDA graphs."""
        return isinstance(self.step, Graphed) and not self.step.failed

    def trained(self, number: int = 0) -> dict[str, tuple[Tensor, Tensor]]:
        """Layer -> A (R, in) and B (out, R) of one of the plans that were trained last, R the
        layer's largest rank: columns that the plan lacks are in it."""
        return {
            name: (a[0], b[0]) for name, a, b in self._split(self.weights[number].detach()[None])
        }

    @contextlib.contextmanager
    def adapters(self, number: int = 0):
        """Inside, the model has the adapters of one of the plans that were trained last; outside it
        is as it was before."""
        with self._inserted():
            self._use(self.weights[number].detach()[None], slice(number, number + 1))
            yield self.model

    @contextlib.contextmanager
    def _inserted(self):
        self._put(self.layers)
        try:
            yield
        finally:
            self._put(self.originals)

    def _put(self, modules: dict[str, nn.Module]) -> None:
        for name, module in modules.items():
            self.model.set_submodule(name, module)

    def _split(self, weights: Tensor):
        """(S, all weights) -> name, A (S, R, in), B (S, out, R) of each layer."""
        parts = iter(weights.split(self.sizes, dim=1))
        for name, rank in self.capacity.items():
            width_in, width_out = self.shapes[name]
            a, b = next(parts), next(parts)
            yield name, a.view(-1, rank, width_in), b.view(-1, width_out, rank)

    def _use(self, weights: Tensor, numbers: slice) -> None:
        for name, a, b in self._split(weights.to(self.dtype)):
            layer = self.layers[name]
            layer.a, layer.b, layer.gates = a, b, self.gates[name][numbers]

    def retrain(self, jobs: Sequence[Retraining], rows: EncodedRows) -> list[dict[str, Any]]:
        """Train plans, all at once, and leave them in `trained` and `adapters`. They have as many
        steps each.

        Returns:
            For each: train_loss (mean of the last tenth of the steps; None if it is not finite),
            and of all together seconds (with those of making graphs, once a process and number of
            plans), stack (plans), graphed.
        """
        ((taken, run_steps),) = {(job.taken, job.run_steps) for job in jobs}
        training = replace(self.training, max_steps=run_steps or self.training.max_steps)
        steps, size = training.max_steps - taken, training.batch_size
        orders = [rows.batches(job.indices, size, job.seed).endless() for job in jobs]
        chosen = list(itertools.islice(zip(*orders, strict=True), steps))
        started = self._clock()
        with self._inserted():
            self.model.train()
            for number, job in enumerate(jobs):
                self._reset(number, job)
            for state in self.optimizer.state.values():
                for value in state.values():
                    value.zero_()
            courses = [_rates(training, job.rate)[taken:] for job in jobs]
            rates, losses = list(zip(*courses, strict=True)), []
            for parts, now in zip(chosen, rates, strict=True):
                for rate, value in zip(self.rates, now, strict=False):
                    rate.fill_(value)
                losses.append(self.step(rows.batch(*parts))[0])
            seconds = self._clock() - started
        means = torch.stack(losses[-max(1, steps // 10) :]).mean(0).tolist()
        shared = {"seconds": round(seconds, 3), "stack": len(jobs), "graphed": self.graphed}
        return [{"train_loss": m if math.isfinite(m) else None} | shared for m in means]

    def _step(self, batch: dict[str, Tensor]) -> tuple[Tensor, list[Tensor]]:
        """Forward, backward, clipping and AdamW of all plans of the batch: all of it is in the
        graph. Their losses."""
        rows = batch["input_ids"].shape[0]
        weights = self.weights[: rows // self.training.batch_size]
        self._use(torch.stack(weights), slice(len(weights)))
        losses = supervised_losses(self.model, batch)
        # one plan's loss doesn't depend on another's weights
        for weight, gradient in zip(
            weights, torch.autograd.grad(losses.sum(), weights), strict=True
        ):
            weight.grad = gradient
            if self.training.max_grad_norm:
                nn.utils.clip_grad_norm_([weight], self.training.max_grad_norm)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return losses.detach(), []

    @torch.no_grad()
    def _reset(self, number: int, job: Retraining) -> None:
        """Fresh weights of this plan, in place."""
        generator, fresh = torch.Generator().manual_seed(job.seed), []
        for name, most in self.capacity.items():
            rank = job.plan[name]
            if rank > most:
                raise InputError(f"rank {rank} of {name}: at most {most} here")
            self.gates[name][number] = 0
            self.gates[name][number, 0, :rank] = self.scaling
            width_in, width_out = self.shapes[name]
            a = torch.empty(most, width_in)
            nn.init.kaiming_uniform_(a, a=math.sqrt(5), generator=generator)  # as PEFT
            if name in job.first:
                a[:rank] = job.first[name][:rank].to(a)
            b = torch.zeros(width_out, most)
            if name in job.first_b:
                b[:, :rank] = job.first_b[name].to(b)
            fresh += [a.flatten(), b.flatten()]
        self.weights[number].copy_(torch.cat(fresh))

    def _clock(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()


def _rates(training: TrainingConfig, peak: float) -> list[float]:
    """The learning rate of each step, as transformers' Trainer takes it."""
    stand_in = torch.optim.SGD([torch.zeros(1)], lr=peak)
    scheduler = get_scheduler(
        training.lr_scheduler, stand_in, training.lr_warmup_steps, training.max_steps
    )
    rates = []
    for _ in range(training.max_steps):
        rates.append(scheduler.get_last_lr()[0])
        stand_in.step()
        scheduler.step()
    return rates
