"""One pass for both steps: training rows train the weights, validation rows train alpha.
Not here: the two steps apart (weight_step.py, architect.py), the loop (search.py)."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from darts_lora.architect import Architect
from darts_lora.base.errors import InputError
from darts_lora.data.collator import IGNORED
from darts_lora.lora.experts import MixedRankExperts
from darts_lora.run.graphs import Graphed
from darts_lora.run.tokens import shares
from darts_lora.run.weight_step import WeightStep, add_gradients

LOOKS = 10  # steps at most that look whether rows are apart: early on each layer is drawn soon


class JointStep:
    """A weight step and an architecture step in one forward and backward of both batches.

    Rows do not meet in a model, so each half of a joint batch gives its own gradients: those of
    the weights come from training rows alone, that of alpha from validation rows alone. The one
    difference to two passes: alpha's gradient is taken at the weights before their step, not after.
    Small kernels cost their launch, whatever they hold: one pass is up to twice as fast as two.

    Args:
        weights, architect: whose steps are taken.
        loss_fn: (model, joint batch) -> losses of the first and of the second half of its rows.

    Attributes:
        graphed: joint batch -> losses and gradients, launched as one graph (graphs.py); or None.

    Raises:
        InputError: other weights than those of the branches are trained, or experts are searched:
            they see all rows; or gradients are scaled, which would scale alpha's as well.
    """

    def __init__(
        self,
        weights: WeightStep,
        architect: Architect,
        loss_fn: Callable[[nn.Module, Any], tuple[Tensor, Tensor]],
    ):
        self.weights, self.architect, self.loss_fn = weights, architect, loss_fn
        self.supernet = architect.supernet
        if self.supernet.saved_modules:
            raise InputError(
                f"joint=true: {', '.join(self.supernet.saved_modules)} is trained in full, and "
                "would learn from validation rows; use joint=false"
            )
        if weights.accelerator.scaler is not None:
            raise InputError(
                "joint=true, mixed_precision=fp16: the weights' loss scaling would scale alpha's "
                "gradient; use bf16 or joint=false"
            )
        experts = [n for n, x in self.supernet.layers.items() if isinstance(x, MixedRankExperts)]
        if experts:
            raise InputError(
                f"joint=true: {experts[0]} sees tokens of training and validation rows mixed; use "
                "joint=false, or leave target_parameters out"
            )
        self.graphed: Graphed | None = None
        self.looks = LOOKS
        self.unseen = set(self.supernet.layers)  # of which it is not known yet that rows are apart

    def step(
        self, train_batches: Iterator[Any], val_batches: Iterator[Any]
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Both steps; the mean training loss, and the metrics of Architect.step.

        Raises:
            InputError: a batch of each does not make a joint one, or, at the first step, the model
                mixes its rows.
        """
        total, train_batch, share = self.weights.accumulate(train_batches)
        val_batch = next(val_batches)
        (val_share,) = shares([val_batch], self.weights.accelerator, self.weights.count)
        batch = join(train_batch, val_batch)
        alpha = self.supernet.alpha
        if self.graphed is not None and not self.unseen:
            losses, (gradient, *gradients) = self.graphed(batch)
            add_gradients(self.weights.parameters, gradients, share)
        else:
            with self.supernet.arch_gradients(joint=True):
                losses = torch.stack(self.loss_fn(self.weights.model, batch))
                self.check_rows(losses)
                self.weights.accelerator.backward(losses[0] * share + losses[1] * val_share)
            gradient, alpha.grad = alpha.grad, None
        self.weights.update()
        loss, val_loss = losses.detach()
        return total + loss * share, self.architect.update(val_loss * val_share, gradient)

    def check_rows(self, losses: Tensor) -> None:
        """Each half of the rows moves what it is to train, and nothing else, in all layers that
        this pass tells of. That a layer's leading size is a multiple of the rows is no proof: it
        may be that of the tokens.

        Args:
            losses: of both halves, (2,); their graph stays.

        Raises:
            InputError: in some layer it does not.
        """
        names = [name for name in self.supernet.layers if name in self.unseen]
        if not names:
            return
        layers = [self.supernet.layers[name] for name in names]
        options = {"allow_unused": True, "retain_graph": True}
        (rows,) = torch.autograd.grad(losses[0], [self.supernet.alpha], **options)
        moved = torch.zeros(len(self.supernet.layers)) if rows is None else rows.any(-1)
        mixed = [n for n, m in zip(self.supernet.layers, moved.tolist(), strict=True) if m]
        # sharded weights have no gradients but in a backward pass
        if not self.weights.accelerator.is_fsdp2:
            found = torch.autograd.grad(losses[1], [x.lora_B for x in layers], **options)
            mixed += [n for n, g in zip(names, found, strict=True) if g is not None and g.any()]
        if mixed:
            raise InputError(
                f"joint=true: {mixed[0]} does not see the batch's rows one after the other, so "
                "validation rows would train its weights; use joint=false"
            )
        # a layer whose sample is rank 0 for all training rows tells nothing
        active = [bool(layer.gates[: len(layer.gates) // 2].any()) for layer in layers]
        self.unseen -= {name for name, a in zip(names, active, strict=True) if a}
        self.looks -= 1
        if self.looks == 0:
            self.unseen.clear()

    def gradients(self, batch: Any) -> tuple[Tensor, list[Tensor]]:
        """The losses of both halves, (2,), and the gradients of alpha and of each weight."""
        parameters = [self.supernet.alpha, *self.weights.parameters]
        with self.supernet.arch_gradients(joint=True):
            losses = torch.stack(self.loss_fn(self.weights.model, batch))
            found = torch.autograd.grad(losses.sum(), parameters, allow_unused=True)
        filled = zip(parameters, found, strict=True)
        return losses.detach(), [torch.zeros_like(p) if g is None else g for p, g in filled]


def halves_loss(model: nn.Module, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """The loss that a transformers model computes, of each half of the rows on its own."""
    inputs = {name: value for name, value in batch.items() if name != "labels"}
    logits, labels = model(**inputs).logits, batch["labels"]
    model = getattr(model, "module", model)  # what DDP wraps
    vocabulary = model.config.get_text_config().vocab_size
    halves = zip(logits.chunk(2), labels.chunk(2), strict=True)
    first, second = (model.loss_function(*half, vocab_size=vocabulary) for half in halves)
    return first, second


def join(first: Any, second: Any, name: str | None = None) -> Any:
    """Two batches as one, row after row; what is shorter is padded at its end: labels with -100,
    anything else with zeros, which an attention mask takes for padding.

    Raises:
        InputError: they differ in more than sizes; or in the number of rows, or of images or
            patches packed one after the other: the border between them would not be in the middle.
    """
    if isinstance(first, Tensor) and isinstance(second, Tensor) and first.dim() == second.dim():
        if first.shape[:1] != second.shape[:1]:
            raise InputError(
                f"joint=true: {name or 'a tensor'} has {len(first)} entries in a training and "
                f"{len(second)} in a validation batch; use equal batch sizes and drop_last, or "
                "joint=false"
            )
        sizes = [max(pair) for pair in zip(first.shape[1:], second.shape[1:], strict=True)]
        fill = IGNORED if name == "labels" else 0
        return torch.cat([_padded(first, sizes, fill), _padded(second, sizes, fill)])
    if isinstance(first, dict) and isinstance(second, dict) and first.keys() == second.keys():
        return {key: join(value, second[key], key) for key, value in first.items()}
    if isinstance(first, list | tuple) and len(first) == len(second):
        return type(first)(join(*pair) for pair in zip(first, second, strict=True))
    raise InputError(
        f"joint=true: a training and a validation batch differ in {name or 'their structure'}; "
        "use joint=false"
    )


def _padded(tensor: Tensor, sizes: list[int], value: int) -> Tensor:
    missing = [size - own for size, own in zip(sizes, tensor.shape[1:], strict=True)]
    if not any(missing):
        return tensor
    return F.pad(tensor, [part for size in reversed(missing) for part in (0, size)], value=value)
