"""BilevelStep: a weight step and, where it is due, an architecture step, launched one by one or as
graphs. Not here: what the steps compute (weight_step.py, architect.py)."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from darts_lora.architect import Architect
from darts_lora.config import TrainingConfig
from darts_lora.run.graphs import Graphed
from darts_lora.run.tokens import learnt_tokens, model_loss, shares
from darts_lora.run.weight_step import WeightStep
from darts_lora.supernet import Supernet


class BilevelStep:
    """Makes both steps of a supernet for `accelerator`, and takes them.

    Args:
        supernet: whose weights and alpha are trained.
        accelerator: prepares the model, averages gradients over processes.
        training: steps of the whole run; learning rate, accumulation, clipping of the weights.
        loss_fn: (model, batch) -> scalar loss. Batches count by their learnt tokens with
            model_loss, alike with any other.

    Attributes:
        weights, architect: the steps, which own the optimizers.
    """

    def __init__(
        self,
        supernet: Supernet,
        accelerator: Accelerator,
        training: TrainingConfig,
        loss_fn: Callable[[nn.Module, Any], Tensor],
    ):
        count = learnt_tokens if loss_fn is model_loss else None  # what others are means of?
        self.supernet, self.accelerator = supernet, accelerator
        self.weights = WeightStep(supernet, accelerator, training, loss_fn, count)
        several = accelerator.num_processes > 1
        self.architect = Architect(
            supernet,
            supernet.config.search_steps(training.max_steps),
            reduce=(lambda g: accelerator.reduce(g, "mean")) if several else None,
            scaler=accelerator.scaler,
            check_finite=False,  # the loop looks at the losses where it waits anyhow
        )

        def val_loss_fn(batch: Any) -> Tensor:
            (share,) = shares([batch], accelerator, count)
            return loss_fn(supernet.model, batch) * share

        self.val_loss_fn = val_loss_fn

    def step(
        self, train_batches: Iterator[Any], val_batches: Iterator[Any]
    ) -> tuple[Tensor, dict[str, Tensor] | None]:
        """The training loss; the metrics of Architect.step, None where it was not due."""
        loss = self.weights.step(train_batches)
        return loss, self.architect.step(self.val_loss_fn, val_batches)

    def capture(self) -> None:
        """From now on gradients come from CUDA graphs; or one line says why not."""
        reason = None
        if self.accelerator.device.type != "cuda":
            reason = f"the device is {self.accelerator.device.type}"
        elif self.accelerator.num_processes > 1 or self.accelerator.scaler is not None:
            reason = "one process without loss scaling (fp16) can be captured"
        if reason is not None:
            self.accelerator.print(f"no CUDA graph, steps are launched one by one: {reason}")
            return
        # One pool: results are used up before the next.
        graphed = partial(Graphed, pool=torch.cuda.graph_pool_handle())
        self.weights.graphed = graphed(self.weights.gradients)
        self.architect.graphed = graphed(partial(self.architect.path, self.val_loss_fn))
