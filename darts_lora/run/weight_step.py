"""WeightStep: gradients of the LoRA weights on training batches, accumulation, clipping, optimizer.
Not here: the step of alpha (architect.py), the loop around both (search.py)."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from transformers import get_scheduler

from darts_lora.config import TrainingConfig
from darts_lora.run.graphs import Graphed
from darts_lora.run.tokens import shares
from darts_lora.supernet import Supernet


class WeightStep:
    """Trains a supernet's weights, and leaves alpha alone; owns the weights' optimizer.

    Args:
        supernet: whose weights are trained.
        accelerator: prepares the model and the optimizer.
        training: learning rate and its course, accumulation, clipping.
        loss_fn: (model, batch) -> scalar loss.
        count: batch -> how many tokens its loss is the mean of, to weigh accumulated batches and
            those of other processes by (tokens.py); None: all batches count alike.

    Attributes:
        model: the supernet's model as accelerate prepared it.
        optimizer, scheduler: of the weights.
        parts: batches whose gradients are accumulated in a step.
        graphed: batch -> loss and gradients, in place of loss_fn (graphs.py); None: eager launches.
        gradient_norm: of the last step, before clipping; None without clipping.
    """

    def __init__(
        self,
        supernet: Supernet,
        accelerator: Accelerator,
        training: TrainingConfig,
        loss_fn: Callable[[nn.Module, Any], Tensor],
        count: Callable[[Any], Tensor | None] | None = None,
    ):
        self.accelerator, self.training, self.loss_fn = accelerator, training, loss_fn
        self.count = count
        self.parts = training.gradient_accumulation_steps
        optimizer = torch.optim.AdamW(
            supernet.weight_parameters(),
            lr=training.learning_rate,
            weight_decay=training.weight_decay,
            fused=accelerator.device.type == "cuda" or None,  # few launches
        )
        self.model, self.optimizer = accelerator.prepare(supernet.model, optimizer)
        gather_ahead(self.model)
        self.parameters = supernet.weight_parameters()  # FSDP2 has put sharded ones in their place
        # not prepared: accelerate would step it once for every process
        self.scheduler = get_scheduler(
            training.scheduler_type, self.optimizer, training.lr_warmup_steps, training.max_steps
        )
        self.graphed: Graphed | None = None
        self.gradient_norm: Tensor | None = None

    def step(self, batches: Iterator[Any]) -> Tensor:
        """One step on as many of the batches as are accumulated; the mean loss."""
        taken = [next(batches) for _ in range(self.parts)]
        each = zip(taken, shares(taken, self.accelerator, self.count), strict=True)
        losses = [self._backward(*pair, i == self.parts) for i, pair in enumerate(each, start=1)]
        self.update()
        return torch.stack(losses).sum()

    def update(self) -> None:
        """The part of a step behind the gradients: clipping, optimizer, learning rate."""
        if self.training.max_grad_norm:
            self.gradient_norm = self.accelerator.clip_grad_norm_(
                self.parameters, self.training.max_grad_norm
            )
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.scheduler.step()

    def gradients(self, batch: Any) -> tuple[Tensor, list[Tensor]]:
        """The loss on the batch and its gradients of the weights; no `.grad` is written."""
        loss = self.loss_fn(self.model, batch)
        found = torch.autograd.grad(loss, self.parameters, allow_unused=True)
        filled = zip(self.parameters, found, strict=True)
        return loss.detach(), [torch.zeros_like(w) if g is None else g for w, g in filled]

    def _backward(self, batch: Any, share: Tensor | float, last: bool) -> Tensor:
        """Add the gradients of loss * share to the weights' own; loss * share."""
        if self.graphed is not None:
            loss, gradients = self.graphed(batch)
            add_gradients(self.parameters, gradients, share)
            return loss * share
        waits = contextlib.nullcontext() if last else self.accelerator.no_sync(self.model)
        with waits:
            loss = self.loss_fn(self.model, batch) * share
            self.accelerator.backward(loss)
        return loss.detach()


def add_gradients(
    parameters: Sequence[Tensor], gradients: list[Tensor], share: Tensor | float
) -> None:
    """Add gradients * share to the parameters' own, in few kernels."""
    if (
        isinstance(share, Tensor) or share != 1
    ):  # else they are used up before the next replay overwrites them
        gradients = list(torch._foreach_mul(gradients, share))
    if parameters[0].grad is None:
        for parameter, gradient in zip(parameters, gradients, strict=True):
            parameter.grad = gradient
    else:
        torch._foreach_add_([parameter.grad for parameter in parameters], gradients)


def gather_ahead(model: nn.Module) -> None:
    """Let each unit that FSDP2 shards gather the next one's weights before it computes: a host that
    is busy launching kernels would ask for them too late. Nothing where FSDP2 has no units."""
    units = [module for module in model.modules() if isinstance(module, FSDPModule)][1:]
    for unit, following in itertools.pairwise(units):
        unit.set_modules_to_forward_prefetch([following])
