"""Retrainings of rank plans on one model, several at once, launched as CUDA graphs on a GPU.
Not here: rows and losses (quality_rows.py), which plans there are (quality_methods.py), which
cells are run (quality_cells.py)."""

from __future__ import annotations

import contextlib
import itertools
import math
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from quality_rows import EncodedRows, supervised_losses
from quality_stacked import StackedLinear, StackedLora
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
    """Layer -> first value of A (rank, in), instead of PEFT's; or of a module in full, its
    weight."""
    first_b: dict[str, Tensor] = field(default_factory=dict)
    """Layer -> first value of B (out, rank), instead of zeros; or of a module in full, its bias."""
    taken: int = 0
    """Steps of the run that a search took: of its learning rate too."""
    run_steps: int | None = None
    """Steps of the run; default: the task's."""
    until: int | None = None
    """Step of the run that ends this part of it; default: its last."""
    read: int = 0
    """Batches of the order that were read before: it goes on behind them."""


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
        whole: linear modules that are trained in full, as a classifier's head is.
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
        whole: Sequence[str] = (),
    ):
        self.model, self.scaling, self.training = model.requires_grad_(False), scaling, training
        self.originals = {name: model.get_submodule(name) for name in names}
        self.shapes = {name: linear_shape(module) for name, module in self.originals.items()}
        self.capacity = {name: min(largest, *shape) for name, shape in self.shapes.items()}
        self.layers = {name: StackedLora(module) for name, module in self.originals.items()}
        self.whole = {name: model.get_submodule(name) for name in whole}
        self.inserted = self.layers | {name: StackedLinear() for name in whole}
        weight = next(iter(self.originals.values())).weight
        self.device, self.dtype = weight.device, weight.dtype
        # of A and B, or of a weight and its bias
        self.tensors = {
            name: ((rank, self.shapes[name][0]), (self.shapes[name][1], rank))
            for name, rank in self.capacity.items()
        } | {name: tuple(value.shape for value in _linear(m)) for name, m in self.whole.items()}
        self.sizes = [math.prod(shape) for pair in self.tensors.values() for shape in pair]
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
        # its results are used up before the next step's
        graphed = Graphed(self._gate_gradients, pool=pool, limit=64) if on_gpu else None
        self._gate_step = graphed or self._gate_gradients

    @property
    def graphed(self) -> bool:
        """Whether steps are launched as CUDA graphs."""
        return isinstance(self.step, Graphed) and not self.step.failed

    def trained(self, number: int = 0) -> dict[str, tuple[Tensor, Tensor]]:
        """Layer -> A (R, in) and B (out, R) of one of the plans that were trained last, R the
        layer's largest rank: columns that the plan lacks are in it; module in full -> its weight
        and bias."""
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
        self._put(self.inserted)
        try:
            yield
        finally:
            self._put(self.originals | self.whole)

    def _put(self, modules: dict[str, nn.Module]) -> None:
        for name, module in modules.items():
            self.model.set_submodule(name, module)

    def _split(self, weights: Tensor):
        """(S, all weights) -> name, A (S, R, in), B (S, out, R) of each layer; then name, weight,
        bias of each module in full."""
        parts = iter(weights.split(self.sizes, dim=1))
        for name, (shape_a, shape_b) in self.tensors.items():
            yield name, next(parts).view(-1, *shape_a), next(parts).view(-1, *shape_b)

    def _use(self, weights: Tensor, numbers: slice) -> None:
        for name, a, b in self._split(weights.to(self.dtype)):
            layer = self.inserted[name]
            layer.a, layer.b = a, b
            if name in self.gates:
                layer.gates = self.gates[name][numbers]

    def retrain(
        self,
        jobs: Sequence[Retraining],
        rows: EncodedRows,
        between: Callable[[int], None] = lambda step: None,
    ) -> list[dict[str, Any]]:
        """Train plans, all at once, and leave them in `trained` and `adapters`. They have as many
        steps each.

        Args:
            between: called before the first step and behind each one, with the number of steps; it
                may change `gates` in place.

        Returns:
            For each: train_loss (mean of the last tenth of the steps; None if it is not finite, or
            there is no step), and of all together seconds (with those of making graphs, once a
            process and number of plans), stack (plans), graphed.
        """
        ((taken, run_steps, until),) = {(job.taken, job.run_steps, job.until) for job in jobs}
        training = replace(self.training, max_steps=run_steps or self.training.max_steps)
        steps = (until or training.max_steps) - taken
        chosen = self.order(jobs, rows, steps)
        torch.manual_seed(jobs[0].seed)  # of dropout
        started = self._clock()
        with self._inserted():
            self.model.train()
            for number, job in enumerate(jobs):
                self._reset(number, job)
            for state in self.optimizer.state.values():
                for value in state.values():
                    value.zero_()
            courses = [learning_rates(training, job.rate)[taken : taken + steps] for job in jobs]
            rates, losses = list(zip(*courses, strict=True)), []
            between(0)
            for parts, now in zip(chosen, rates, strict=True):
                for rate, value in zip(self.rates, now, strict=False):
                    rate.fill_(value)
                losses.append(self.step(rows.batch(*parts))[0])
                between(len(losses))
            seconds = self._clock() - started
        last = losses[-max(1, steps // 10) :] or [torch.full((len(jobs),), math.nan)]
        means = torch.stack(last).mean(0).tolist()
        shared = {"seconds": round(seconds, 3), "stack": len(jobs), "graphed": self.graphed}
        return [{"train_loss": m if math.isfinite(m) else None} | shared for m in means]

    def order(
        self, jobs: Sequence[Retraining], rows: EncodedRows, steps: int
    ) -> list[tuple[list[int], ...]]:
        """The rows of each plan's batches in the next steps."""
        size = self.training.batch_size
        orders = [
            itertools.islice(rows.batches(job.indices, size, job.seed).endless(), job.read, None)
            for job in jobs
        ]
        return list(itertools.islice(zip(*orders, strict=True), steps))

    def gate_gradients(self, batch: dict[str, Tensor]) -> tuple[Tensor, list[Tensor]]:
        """The losses of all plans of the batch, and their gradients of each layer's gates (S, 1,
        R). Only while a `retrain` is under way: in its `between`."""
        return self._gate_step(batch)

    def _gate_gradients(self, batch: dict[str, Tensor]) -> tuple[Tensor, list[Tensor]]:
        count = batch["input_ids"].shape[0] // self.training.batch_size
        self._use(torch.stack(self.weights[:count]).detach(), slice(count))
        gates = []
        for layer in self.layers.values():
            layer.gates = layer.gates.detach().clone().requires_grad_()
            gates.append(layer.gates)
        losses = supervised_losses(self.model, batch)
        found = torch.autograd.grad(losses.sum(), gates, materialize_grads=True)
        return losses.detach(), list(found)

    def column_scores(self, batches: Iterable[dict[str, Tensor]]) -> dict[str, Tensor]:
        """Layer -> (S, R) float32: of each column of the plans' LoRAs the square of what it adds to
        the loss to first order, s (a x) (b g) for input x and gradient g of the output, summed
        over the tokens of the batches."""
        scores = {name: 0.0 for name in self.layers}
        with self._inserted():
            self.model.train()
            for batch in batches:
                count = batch["input_ids"].shape[0] // self.training.batch_size
                self._use(torch.stack(self.weights[:count]).detach(), slice(count))
                for layer in self.layers.values():
                    layer.each_token = []
                losses = supervised_losses(self.model, batch)
                gates = [gate for layer in self.layers.values() for gate in layer.each_token]
                found = iter(torch.autograd.grad(losses.sum(), gates, materialize_grads=True))
                for name, layer in self.layers.items():
                    for gate in layer.each_token:
                        terms = next(found).float() * gate.detach().float()
                        scores[name] = scores[name] + terms.square().sum(1)
                    layer.each_token = None
        return scores

    @torch.no_grad()
    def load(self, weights: dict[str, tuple[Tensor, Tensor]]) -> None:
        """Put A (S, R, in) and B (S, out, R) of each layer in the place of what was trained; R at
        most the layer's largest rank."""
        values = torch.stack(self.weights).zero_()
        for name, a, b in self._split(values):
            if name not in self.layers:
                raise InputError(f"{name}: only LoRA layers can be loaded")
            new_a, new_b = weights[name]
            a[: len(new_a), : new_a.shape[1]] = new_a.to(a)
            b[: len(new_b), :, : new_b.shape[2]] = new_b.to(b)
        for weight, value in zip(self.weights, values, strict=True):
            weight.copy_(value)

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
        for name, module in self.whole.items():
            for first, value in zip((job.first, job.first_b), _linear(module), strict=True):
                fresh.append(first.get(name, value).float().cpu().flatten())
        self.weights[number].copy_(torch.cat(fresh))

    def _clock(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()


def _linear(module: nn.Module) -> tuple[Tensor, Tensor]:
    """Its weight (out, in), and its bias (out,), or one of length 0."""
    weight, bias = module.weight.detach(), module.bias
    return weight, weight.new_zeros(0) if bias is None else bias.detach()


def learning_rates(training: TrainingConfig, peak: float) -> list[float]:
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
