"""Architect: what trains alpha behind the weight steps of a search, on validation rows.
Not here: what the measurements come to (values.py), the weight step, the loop, logging."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from darts_lora.alpha.average import RunningMean
from darts_lora.alpha.values import Measured, Values
from darts_lora.base.errors import DivergedError, InputError
from darts_lora.lora.relaxation import distribution
from darts_lora.supernet import Supernet

AVERAGE = 0.125  # share of the steps so far that the weights are averaged over
LAST = 8  # validation batches of the last measurement


def search_passes(steps: int, every: int, cuts: int = 0) -> float:
    """Validation batches that a search of so many weight steps takes, forward and backward; a
    forward alone counts a third.

    Args:
        steps: weight steps of the search.
        every: SearchConfig.arch_every.
        cuts: candidate ranks above 0 of a search without a budget, each of which is measured, as
            the base model is; 0 with a budget.
    """
    forwards = 2 + (cuts + 1 if cuts else 0)
    return math.ceil((steps - steps // 2) / every) + LAST * (1 + forwards / 3)


class Architect:
    """Trains alpha on validation batches, behind weight steps on training batches (the bilevel
    problem of DARTS, arXiv 1806.09055, eq. 3 and 4, in first order: the weights are taken as they
    are). The LoRA weights, their gradients and their optimizer come out of a step bit for bit as
    they went in.

    An architecture step takes the gradient of the validation loss of a gate for each layer, on its
    way from 0 to 1: what the layer takes off the loss. Behind the last weight step it looks closer,
    at each layer's singular directions, at how far the loss still falls, and at what a cut costs.
    `values.py` makes of these what each rank is worth, and alpha is the distribution that follows.
    All of it is measured at the running mean of the weights (average.py): where they would settle,
    not amid the noise of their last steps.

    Args:
        supernet: whose alpha is trained.
        steps: weight steps of the search (count).
        reduce: averages a tensor over processes, Tensor -> Tensor; None for one process.
        scaler: of the weights' losses in float16; these are scaled alike, or small gradients would
            be 0. A step that overflows is left out. None: no scaling.
        check_finite: look at each measurement before alpha takes it, which waits for the device; a
            caller that looks at the losses itself needs no such waits.

    Attributes:
        taken: weight steps so far.
        measured: all that was measured so far, on the CPU.
        mean: of the weights.
        graphed: batch -> loss and gains, in place of `path` (graphs.py).
    """

    def __init__(
        self,
        supernet: Supernet,
        steps: int,
        *,
        reduce: Callable[[Tensor], Tensor] | None = None,
        scaler: torch.amp.GradScaler | None = None,
        check_finite: bool = True,
    ):
        self.supernet, self.steps, self.reduce = supernet, steps, reduce
        self.scaler, self.check_finite = scaler, check_finite
        self.values = Values(supernet)
        self.mean = RunningMean(supernet.weight_parameters, AVERAGE)
        self.half: list[Tensor] = []  # the mean of the weights at half of the steps
        self.taken = 0
        layers, columns = supernet.mean_gates().shape
        none = (torch.zeros(0) for _ in range(3))
        self.measured = Measured(torch.zeros(0, layers), torch.zeros(0, layers, columns), *none)
        self.graphed: Callable[[Any], tuple[Tensor, list[Tensor]]] | None = None

    def step(
        self, loss_fn: Callable[[Any], Tensor], val_batches: Iterator[Any]
    ) -> dict[str, Tensor] | None:
        """What is due behind a weight step; call it behind each.

        In the second half of the search every arch_every-th takes a validation batch, and the last
        one LAST more.

        Args:
            loss_fn: batch -> scalar loss of the supernet's model.
            val_batches: gives batches of the validation split.

        Returns:
            None where no architecture step is due; else "gain", what all layers together take off
            the validation loss, and "expected_parameters", scalars.

        Raises:
            InputError: a loss that does not depend on the supernet's layers.
            DivergedError: a measurement that is infinite or NaN; alpha stays as it was.
        """
        self.mean.update()
        self.taken += 1
        if self.taken == self.steps // 2:
            self.half = [value.clone() for value in self.mean.values]
        left = self.steps - self.taken
        if self.taken <= self.steps // 2 or left % self.supernet.config.arch_every:
            return None
        with self.mean.in_place():
            path = self.graphed or (lambda batch: self.path(loss_fn, batch))
            loss, (gains,) = path(next(val_batches))
            gains = self._reduced(gains, loss)
            if left == 0 and gains.isfinite().all():  # else the caller stops: weights have no SVD
                self._finish(loss_fn, val_batches)
        self._take(gains)
        return {
            "gain": gains.sum(),
            "expected_parameters": self.supernet.expected_parameters(),
        }

    def first_non_finite(self) -> int | None:
        """The weight step behind which something that is infinite or NaN was measured first; None:
        there is none."""
        every, last = self.supernet.config.arch_every, self.measured
        due = math.ceil((self.steps - self.steps // 2) / every)
        bad = (~last.gains.isfinite().all(-1)).nonzero()
        if len(bad):
            return self.steps - (due - 1 - int(bad[0])) * every
        parts = (last.energies, last.losses, last.growth, last.cut, last.cuts, last.base)
        return None if all(part.isfinite().all() for part in parts) else self.steps

    def path(self, loss_fn: Callable[[Any], Tensor], batch: Any) -> tuple[Tensor, list[Tensor]]:
        """The loss and [gains, (N,)]: minus its gradient of a gate for each layer, at a place
        between 0 and 1 that is another for each row. Its mean over places and rows is the layer's
        part of what the adapter takes off the loss (integrated gradients, arXiv 1703.01365)."""
        gates, leaves = self.supernet.mean_gates(), []

        def probe(rows: int) -> Tensor:
            even = torch.arange(rows, device=gates.device, dtype=gates.dtype) / rows
            places = (even + torch.rand((), device=gates.device, dtype=gates.dtype)) % 1
            leaves.append(places.expand(len(gates), -1).clone().requires_grad_())
            return leaves[-1][..., None] * gates[:, None]

        loss, gradients = self._gradients(loss_fn, batch, probe, leaves)
        return loss, [-torch.stack([gradient.sum(-1) for gradient in gradients]).sum(0)]

    def directions(self, loss_fn: Callable[[Any], Tensor], batch: Any) -> tuple[Tensor, Tensor]:
        """The loss and the energies, (N, R), of the columns: the mean square over the rows of the
        gradient of a gate for each (Fisher information, as far as the loss is a log-likelihood)."""
        gates, leaves = self._whole_gates(), []

        def probe(rows: int) -> Tensor:
            leaves.append(gates.new_ones(len(gates), rows, gates.shape[1]).requires_grad_())
            return leaves[-1] * gates[:, None]

        loss, gradients = self._gradients(loss_fn, batch, probe, leaves)
        squares = [g.shape[1] * g.square().sum(1) for g in gradients]
        return loss, torch.stack(squares).sum(0)

    def state_dict(self) -> dict[str, Any]:
        """All that a resumed search needs, also behind its last step: tensors and plain numbers."""
        last = self.measured
        return {
            "taken": self.taken,
            "gains": last.gains,
            "mean": self.mean.values,
            "mean_steps": self.mean.steps,
            "half": self.half,
            "last": [last.energies, last.growth, last.cut, last.losses, last.cuts, last.base],
            "price": self.supernet.price,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what state_dict gave."""
        self.taken = state["taken"]
        self.mean.load(state["mean"], state["mean_steps"])
        self.half = [h.to(m.device) for h, m in zip(state["half"], self.mean.values, strict=False)]
        self.measured = Measured(state["gains"], *state["last"])
        self.supernet.price = state["price"]

    def _take(self, gains: Tensor) -> None:
        """Set alpha by all that was measured so far."""
        self.measured.gains = torch.cat([self.measured.gains, gains[None].cpu()])
        values = self.values.table(self.measured)
        alpha, self.supernet.price = distribution(values, self.supernet.costs, self.supernet.budget)
        self.supernet.alpha.data.copy_(alpha)

    def _finish(self, loss_fn: Callable[[Any], Tensor], val_batches: Iterator[Any]) -> None:
        """The last measurement, on rows that are the same for all of its parts."""
        batches = [next(val_batches) for _ in range(LAST)]
        before: list[Tensor] = []
        if self.half:
            with self.mean.in_place(self.half):
                gates = self.supernet.mean_gates()
                before = [self._loss(loss_fn, batch, gates) for batch in batches]
        with self.supernet.in_directions():
            found = [self.directions(loss_fn, batch) for batch in batches]
            losses = [loss.float() for loss, _ in found]
            cuts = [
                [self._loss(loss_fn, batch, self._uniform_gates(rank)) for batch in batches]
                for rank in (self.values.cut_rank, *self.supernet.sizes)
            ]
        energies = torch.stack([energies for _, energies in found])
        scalars = torch.stack([torch.stack(part) for part in (losses, before or losses, *cuts)])
        energies, scalars = (self._reduced(m, scalars.sum()).cpu() for m in (energies, scalars))
        last, half, cut, *sizes = scalars.unbind()
        self.measured.energies, self.measured.losses = energies, last
        self.measured.cut = cut - last
        if self.half:
            per_doubling = math.log2(self.steps / max(self.steps // 2, 1))
            self.measured.growth = (half - last) / per_doubling
        if sizes:
            self.measured.base = sizes[0]
            self.measured.cuts = torch.stack(sizes[1:], -1) - last[:, None]

    def _whole_gates(self) -> Tensor:
        return torch.full_like(self.supernet.mean_gates(), self.supernet.config.scaling)

    def _uniform_gates(self, rank: int) -> Tensor:
        """Those of the first `rank` directions of each layer; 0: the base model."""
        whole = self._whole_gates()
        return whole * (torch.arange(whole.shape[1], device=whole.device) < rank)

    @torch.no_grad()
    def _loss(self, loss_fn: Callable[[Any], Tensor], batch: Any, gates: Tensor) -> Tensor:
        with self.supernet.probing(lambda rows: gates):
            return loss_fn(batch).detach().float()

    def _gradients(
        self, loss_fn: Callable, batch: Any, probe: Callable[[int], Tensor], leaves: list[Tensor]
    ) -> tuple[Tensor, list[Tensor]]:
        """The loss and its gradients of the leaves that `probe` makes; no `.grad` is written. Rows
        may reach no layer, as text does where images are searched: that is a gradient of 0."""
        calls = self.supernet.calls
        with self.supernet.probing(probe):
            loss = loss_fn(batch)
            scale = 1.0 if self.scaler is None else self.scaler.get_scale()
            gradients: Sequence[Tensor | None] = [None] * len(leaves)
            if loss.requires_grad and leaves:
                gradients = torch.autograd.grad(loss * scale, leaves, allow_unused=True)
        if all(g is None for g in gradients) and (
            self.supernet.calls == calls or not loss.requires_grad
        ):
            raise InputError(
                "loss_fn: its loss does not depend on alpha; compute it from what the "
                "supernet's own model gives, without detach, item or torch.no_grad"
            )
        filled = [
            torch.zeros_like(leaf) if g is None else g / scale
            for leaf, g in zip(leaves, gradients, strict=True)
        ]
        return loss.detach(), filled

    def _reduced(self, measurement: Tensor, loss: Tensor) -> Tensor:
        """Over all processes; NaN of one stops all of them."""
        measurement = measurement + 0 * loss.to(measurement) if self.check_finite else measurement
        if self.reduce is not None:
            measurement = self.reduce(measurement)
        if self.scaler is not None and not measurement.isfinite().all():
            return torch.zeros_like(measurement)  # weight steps overflow too, and lower the scale
        if self.check_finite and not measurement.isfinite().all():
            raise DivergedError(
                f"what alpha is set by is infinite or NaN (validation loss {float(loss):.4g}): "
                "alpha was left as it was; lower the learning rate, or look at the data"
            )
        return measurement
