"""A transformers model's loss, and how much each of several batches counts: by its learnt tokens,
as in transformers' Trainer. Not here: which tokens are learnt (collator.py)."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from darts_lora.base.errors import InputError
from darts_lora.data.collator import IGNORED


def model_loss(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    """The loss that a transformers model computes from a batch with labels.

    Raises:
        InputError: the batch is no mapping of inputs, or the model gives no loss.
    """
    output = model(**batch) if isinstance(batch, Mapping) else batch
    loss = output.get("loss") if isinstance(output, Mapping) else getattr(output, "loss", None)
    if loss is None:
        what = f"a model gives no loss ({type(output).__name__})"
        if output is batch:
            what = f"a batch is a {type(batch).__name__}, no dict of a transformers model's inputs"
        raise InputError(f"loss_fn: {what}; give loss_fn, (model, batch) -> loss, or labels")
    return loss


def learnt_tokens(batch: Any) -> Tensor | None:
    """What a transformers model's loss is the mean of: the labels that are learnt (a count, int64
    scalar); None where the batch has no labels."""
    labels = batch.get("labels") if isinstance(batch, Mapping) else None
    if not isinstance(labels, Tensor):
        return None
    # of a row of tokens the first is never predicted
    return (labels if labels.dim() == 1 else labels[..., 1:]).ne(IGNORED).sum()


def shares(
    batches: Sequence[Any],
    accelerator: Accelerator,
    count: Callable[[Any], Tensor | None] | None = learnt_tokens,
) -> list[Tensor | float]:
    """Factors of the batches' mean losses, whose sum's mean over all processes is then the mean
    over all that was counted in all of them; on all processes at once.

    Args:
        batches: of this process; all processes have as many.
        count: batch -> how many tokens, or rows, its loss is the mean of; None: all batches count
            alike, as they do where it gives None.
    """
    if len(batches) * accelerator.num_processes == 1:
        return [1.0]
    each = [None if count is None else count(batch) for batch in batches]
    known = [tokens for tokens in each if tokens is not None]
    if len(known) < len(batches):
        return [1 / len(batches)] * len(batches)
    counts = torch.stack(known).to(accelerator.device, torch.float32)
    total = accelerator.reduce(counts.sum(), "sum")
    return list((counts * accelerator.num_processes / total).unbind())
