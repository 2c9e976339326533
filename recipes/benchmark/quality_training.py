"""Rows encoded once, and retrainings of rank plans on one model, launched as CUDA graphs on a GPU.
Not here: which plans there are (quality_methods.py), which cells are run (quality_cells.py)."""

from __future__ import annotations

import contextlib
import itertools
import math
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import get_scheduler

from darts_lora import InputError
from darts_lora.collator import IGNORED, Collator
from darts_lora.config import TrainingConfig
from darts_lora.graphs import Graphed
from darts_lora.mixed_linear import MixedRankLinear, linear_shape

Plan = dict[str, int]


class EncodedRows:
    """All rows of a split as tensors on the device: what a Collator makes of them, made once.

    Args:
        rows: of a data set.
        collator: gives each row its tensors; its pad_to_multiple_of pads the batches.
        device: where they stay.
    """

    def __init__(self, rows: Iterable[dict], collator: Collator, device: torch.device):
        self.multiple, collator.pad_to_multiple_of = collator.pad_to_multiple_of, 1
        single = [collator([row]) for row in rows]
        collator.pad_to_multiple_of = self.multiple
        self.lengths = [row["input_ids"].shape[1] for row in single]
        fill = {"input_ids": collator.tokenizer.pad_token_id, "labels": IGNORED}
        fill |= {"attention_mask": 0}
        longest = self._padded(max(self.lengths))
        # Beside the tokens, what is aligned with them: masks; the leading dimension is the row.
        self.aligned = {
            key
            for key, value in single[0].items()
            if value.dim() > 1 and value.shape[1] == self.lengths[0]
        }
        self.tensors = {}
        for key in single[0]:
            values = [row[key] for row in single]
            if key in self.aligned:
                values = [_pad(value, longest, fill.get(key)) for value in values]
            self.tensors[key] = torch.cat(values).to(device)

    def __len__(self) -> int:
        return len(self.lengths)

    def length(self, indices: Sequence[int]) -> int:
        """Tokens that a batch of these rows is padded to."""
        return self._padded(max(self.lengths[i] for i in indices))

    def batch(self, indices: Sequence[int]) -> dict[str, Tensor]:
        """The batch that the collator makes of these rows."""
        length = self.length(indices)
        chosen, device = torch.tensor(indices), self.tensors["input_ids"].device
        if device.type == "cuda":  # a copy from pageable memory would wait for the step before
            chosen = chosen.pin_memory().to(device, non_blocking=True)
        return {
            key: value[chosen, :length] if key in self.aligned else value[chosen]
            for key, value in self.tensors.items()
        }

    def _padded(self, length: int) -> int:
        return math.ceil(length / self.multiple) * self.multiple


def _pad(value: Tensor, length: int, fill: int | None) -> Tensor:
    """Up to `length` in the second dimension; None goes on as at the last token, as processors let
    masks of images do."""
    rest = value[:, -1:] if fill is None else torch.full_like(value[:, -1:], fill)
    return torch.cat([value, rest.expand(-1, length - value.shape[1], *value.shape[2:])], dim=1)


def batches(indices: Sequence[int], size: int, seed: int) -> Iterator[list[int]]:
    """Full batches of shuffled rows, epoch after epoch without end; the seed decides the order.

    Raises:
        InputError: fewer rows than a batch takes.
    """
    if len(indices) < size:
        raise InputError(f"batch_size={size}: there are {len(indices)} rows to train on")
    generator = torch.Generator().manual_seed(seed)
    while True:
        order = torch.randperm(len(indices), generator=generator).tolist()
        for start in range(0, len(order) - size + 1, size):
            yield [indices[i] for i in order[start : start + size]]


def model_loss(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    """The model's own loss; no cache of keys and values is built for it."""
    return model(**batch, use_cache=False).loss


class Retrainer:
    """Retrains any rank plan on one model with the arithmetic of a PEFT LoRA of these ranks.

    Every target holds one LoRA of the largest rank, and gates (0 or the scaling) switch the columns
    above the plan's rank off: these neither change the output nor get a gradient, so what is left
    is the LoRA of the plan's rank, and AdamW and clipping take the same step. One graph for each
    length of batches thus serves all plans, seeds and learning rates, where PEFT's own modules have
    other shapes for each plan and would be captured anew.

    Args:
        model: frozen from now on; on its device. The adapters are in it inside `adapters()` alone.
        names: target layers.
        largest: largest rank of a plan; less where a layer is smaller.
        scaling: lora_alpha / r.
        training: steps, batch size, schedule, clipping, decay of every retraining.
    """

    def __init__(
        self,
        model: nn.Module,
        names: Sequence[str],
        *,
        largest: int,
        scaling: float,
        training: TrainingConfig,
    ):
        self.model, self.scaling, self.training = model.requires_grad_(False), scaling, training
        self.originals = {name: model.get_submodule(name) for name in names}
        self.shapes = {name: linear_shape(module) for name, module in self.originals.items()}
        self.capacity = {name: min(largest, *shape) for name, shape in self.shapes.items()}
        self.layers: dict[str, MixedRankLinear] = {}
        for name, module in self.originals.items():
            layer = MixedRankLinear(module, (self.capacity[name],), scaling=scaling)
            layer.gates = torch.zeros(len(layer.lora_A), device=layer.lora_A.device)
            self.layers[name] = layer
        self.device = layer.lora_A.device
        self.weights = [w for x in self.layers.values() for w in (x.lora_A, x.lora_B)]
        on_gpu = self.device.type == "cuda"
        self.rate = torch.zeros((), device=self.device)  # read by the captured step
        self.optimizer = torch.optim.AdamW(
            self.weights,
            lr=self.rate,
            weight_decay=training.weight_decay,
            fused=True,
            capturable=on_gpu,
        )
        pool = torch.cuda.graph_pool_handle() if on_gpu else None
        self.step = Graphed(self._step, pool=pool) if on_gpu else self._step
        self.warm: set[int] = set()

    @property
    def graphed(self) -> bool:
        """Whether steps are launched as CUDA graphs."""
        return isinstance(self.step, Graphed) and not self.step.failed

    @contextlib.contextmanager
    def adapters(self):
        """The adapters are in the model inside, and the model is as it was before outside."""
        self._put(self.layers)
        try:
            yield self.model
        finally:
            self._put(self.originals)

    def _put(self, modules: dict[str, nn.Module]) -> None:
        for name, module in modules.items():
            self.model.set_submodule(name, module)

    def retrain(
        self,
        plan: Plan,
        rows: EncodedRows,
        indices: Sequence[int],
        *,
        seed: int,
        rate: float,
        first: dict[str, Tensor] | None = None,
    ) -> dict[str, Any]:
        """Train a plan from scratch and leave it in the adapters.

        Args:
            plan: layer -> rank.
            rows, indices: what it is trained on.
            seed: of A and of the order of the batches, the same for all plans.
            rate: peak learning rate.
            first: layer -> first value of A (rank, in), instead of PEFT's.

        Returns:
            train_loss (mean of the last tenth of the steps; None if it is not finite), seconds,
            capture_seconds (making graphs, once a process), graphed.
        """
        chosen = list(itertools.islice(batches(indices, self.training.batch_size, seed),
                                       self.training.max_steps))  # fmt: skip
        started = time.perf_counter()
        with self.adapters():
            self.model.train()
            self._warm_up(rows, chosen)
            self._reset(plan, seed, first or {})
            captured = self._clock()
            losses = []
            for batch, now in zip(chosen, self._rates(rate), strict=True):
                self.rate.fill_(now)
                losses.append(self.step(rows.batch(batch))[0])
            seconds = self._clock() - captured
        loss = float(torch.stack(losses[-max(1, len(losses) // 10) :]).mean())
        return {
            "train_loss": loss if math.isfinite(loss) else None,
            "seconds": round(seconds, 3),
            "capture_seconds": round(captured - started, 3),
            "graphed": self.graphed,
        }

    def _step(self, batch: dict[str, Tensor]) -> tuple[Tensor, list[Tensor]]:
        """Forward, backward, clipping and AdamW: all of it is in the graph."""
        loss = model_loss(self.model, batch)
        # some models have layers that do not take part: the last ones of a vision tower
        gradients = torch.autograd.grad(loss, self.weights, materialize_grads=True)
        for weight, gradient in zip(self.weights, gradients, strict=True):
            weight.grad = gradient
        if self.training.max_grad_norm:
            nn.utils.clip_grad_norm_(self.weights, self.training.max_grad_norm)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return loss.detach(), []

    def _warm_up(self, rows: EncodedRows, chosen: list[list[int]]) -> None:
        """Capture each new length of batches before the first step: capturing runs steps."""
        for batch in chosen if self.device.type == "cuda" else ():
            if rows.length(batch) not in self.warm:
                self.warm.add(rows.length(batch))
                self.step(rows.batch(batch))

    @torch.no_grad()
    def _reset(self, plan: Plan, seed: int, first: dict[str, Tensor]) -> None:
        """Fresh weights of this plan and an optimizer that knows nothing, in place."""
        generator = torch.Generator().manual_seed(seed)
        for name, layer in self.layers.items():
            rank = plan[name]
            if rank > self.capacity[name]:
                raise InputError(f"rank {rank} of {name}: at most {self.capacity[name]} here")
            layer.gates.zero_()[:rank] = self.scaling
            a = torch.empty(layer.lora_A.shape)
            nn.init.kaiming_uniform_(a, a=math.sqrt(5), generator=generator)  # as PEFT
            layer.lora_A.copy_(a)
            layer.lora_B.zero_()
            if name in first:
                layer.lora_A[:rank] = first[name][:rank].to(layer.lora_A)
        for state in self.optimizer.state.values():
            for value in state.values():
                value.zero_()

    def _rates(self, peak: float) -> list[float]:
        """The learning rate of each step, as transformers' Trainer takes it."""
        training = self.training
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

    def _clock(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()


@torch.no_grad()
def mean_loss(
    model: nn.Module, rows: EncodedRows, indices: Sequence[int], batch_size: int,
    loss_fn: Callable[[nn.Module, dict[str, Tensor]], Tensor] = model_loss,
) -> float | None:  # fmt: skip
    """Mean loss per supervised token over the rows, natural log; None if it is not finite."""
    training = model.training
    model.eval()
    order = sorted(indices, key=lambda i: rows.lengths[i])  # little padding
    total, tokens = 0.0, 0
    for start in range(0, len(order), batch_size):
        batch = rows.batch(order[start : start + batch_size])
        count = int((batch["labels"][:, 1:] != IGNORED).sum())
        total, tokens = total + float(loss_fn(model, batch)) * count, tokens + count
    model.train(training)
    return total / tokens if math.isfinite(total) else None
