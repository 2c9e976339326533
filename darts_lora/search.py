"""RankSearch: the loop on accelerate: warm-up, alternation, logging, when to log and to save.
Not here: the two steps (weights.py, architect.py), phases (schedule.py), checkpoints, views."""

from __future__ import annotations

import math
import os
import sys
import time
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DataLoaderConfiguration, gather_object, set_seed
from safetensors.torch import save_file
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset
from tqdm.auto import tqdm

from darts_lora.architect import Architect
from darts_lora.checkpoint import (
    checkpoints,
    load_checkpoint,
    random_state,
    restore_random_state,
    save_checkpoint,
)
from darts_lora.config import TrainingConfig, check_writable
from darts_lora.errors import InputError
from darts_lora.files import write_whole
from darts_lora.genotype import Genotype
from darts_lora.graphs import Graphed
from darts_lora.schedule import Schedule, derive_genotype
from darts_lora.stream import BatchStream
from darts_lora.supernet import Supernet
from darts_lora.verdict import normalised_entropy
from darts_lora.weights import WeightStep


def model_loss(model: torch.nn.Module, batch: dict[str, Tensor]) -> Tensor:
    """The loss that a transformers model computes from a batch with labels."""
    return model(**batch).loss


class RankSearch:
    """Bilevel search: LoRA weights on training batches, alpha on validation batches.

    The first `warmup_steps` weight steps draw ranks uniformly and leave alpha alone; then every
    `arch_every`-th weight step is followed by an architecture step.

    Args:
        supernet: the model with its rank branches.
        train_dataloader, val_dataloader: batches of two disjoint splits, for `loss_fn`.
        training: steps, learning rate and the like of the weights.
        output_dir: checkpoints/, tensorboard/, metrics.jsonl, supernet.safetensors and
            genotype.json go there; None: nothing is written.
        loss_fn: (model, batch) -> scalar loss.
        accelerator: default: one made from `training`.
        cuda_graphs: launch the forward and backward of each step as one CUDA graph for each shape
            of batch. What cannot be captured runs as ever, after one line that says why.

    Raises:
        InputError: a data loader without a batch, a warm-up that leaves no architecture step, an
            output_dir that cannot be written.
    """

    def __init__(
        self,
        supernet: Supernet,
        train_dataloader: DataLoader,
        val_dataloader: DataLoader,
        *,
        training: TrainingConfig | None = None,
        output_dir: str | None = None,
        loss_fn: Callable[[torch.nn.Module, Any], Tensor] = model_loss,
        accelerator: Accelerator | None = None,
        cuda_graphs: bool = False,
    ):
        self.supernet, self.training = supernet, training or TrainingConfig()
        self.output_dir, self.loss_fn = output_dir, loss_fn
        config = supernet.config
        self.schedule = Schedule(supernet, self.training.max_steps)
        for name, loader in (("train", train_dataloader), ("validation", val_dataloader)):
            if not isinstance(loader.dataset, IterableDataset) and len(loader) == 0:
                raise InputError(f"{name} data loader: gives no batch")
        if output_dir is not None:
            check_writable(output_dir)
        self.accelerator = accelerator or Accelerator(
            mixed_precision=self.training.mixed_precision,
            # one order of rows for all processes, although each draws samples of its own
            dataloader_config=DataLoaderConfiguration(
                use_seedable_sampler=True, data_seed=config.seed, dispatch_batches=False
            ),
        )
        set_seed(config.seed, device_specific=True)
        self.weights = WeightStep(supernet, self.accelerator, self.training, loss_fn)
        self.model = self.weights.model
        loaders = self.accelerator.prepare(train_dataloader, val_dataloader)
        self.train_stream, self.val_stream = map(BatchStream, loaders)
        several = self.accelerator.num_processes > 1
        self.architect = Architect(
            supernet,
            inner_learning_rate=self.training.learning_rate,
            reduce=(lambda g: self.accelerator.reduce(g, "mean")) if several else None,
        )
        self.arch_scheduler = self.schedule.arch_scheduler(self.architect.optimizer)
        if cuda_graphs:
            self._capture_steps()
        self.step = 0
        self.validation_loss, self.alpha_gradient_norm = math.nan, None

    def _capture_steps(self) -> None:
        """The gradients of both steps as graphs, or one line that says why not."""
        reason = None
        if self.accelerator.device.type != "cuda":
            reason = f"the device is {self.accelerator.device.type}"
        elif self.accelerator.num_processes > 1 or self.accelerator.scaler is not None:
            reason = "one process without loss scaling (fp16) can be captured"
        if reason is not None:
            self.accelerator.print(f"no CUDA graph, steps are launched one by one: {reason}")
            return
        supernet, pool = self.supernet, torch.cuda.graph_pool_handle()

        def key() -> str:
            return supernet.relaxation

        if supernet.config.order == 1:
            loss_fn = partial(self.loss_fn, supernet.model)
            first_order = partial(self.architect.first_order, loss_fn)
            self.architect.graphed = Graphed(first_order, key=key, pool=pool)
        self.weights.graphed = Graphed(self.weights.gradients, key=key, pool=pool)

    def run(self, resume: bool = False) -> Genotype:
        """Search, and discretize: under the budget where there is one, else by argmax.

        Args:
            resume: go on from the newest checkpoint in output_dir.

        Returns:
            The genotype; its found_by["verdict"] says whether the search learnt anything.

        Raises:
            InputError: nothing to resume from, or the loss became infinite or NaN (the message
                names the step; the last good checkpoint stays).
        """
        if resume:
            self._resume()
        views = self._open_views()
        self.model.train()
        started, losses, self.recorded = time.monotonic(), [], 0.0
        bar = tqdm(
            range(self.step, self.training.max_steps),
            initial=self.step,
            total=self.training.max_steps,
            desc="search",
            unit="step",
            disable=not self.accelerator.is_main_process,
            mininterval=0.5 if sys.stderr.isatty() else 10,  # few lines in a file
        )
        for step in bar:
            losses.append(self._one_step(step))
            self.step = step + 1
            last = self.step == self.training.max_steps
            save = last or (self.training.save_steps and self.step % self.training.save_steps == 0)
            if self.step % self.training.logging_steps == 0 or save:
                record = self._record(losses, time.monotonic() - started)
                losses = []
                bar.set_postfix_str(_progress_text(record, self.supernet.budget), refresh=False)
                if views is not None:
                    views.write(record)
            if save and self.output_dir is not None:
                self._save_checkpoint()
        genotype = self._finish()
        if views is not None:
            views.finish(genotype, self._options(), self.step)
            views.close()
        return genotype

    def _one_step(self, step: int) -> Tensor:
        """A weight step and, after the warm-up, an architecture step; the training loss."""
        self.schedule.enter(step)
        loss, batch = self.weights.step(self.train_stream)
        if self.schedule.trains_alpha(step):
            metrics = self.architect.step(
                lambda b: self.loss_fn(self.supernet.model, b), next(self.val_stream), batch
            )
            self.arch_scheduler.step()
            self.validation_loss = metrics["loss"]
            self.alpha_gradient_norm = metrics["gradient_norm"]
        return loss

    def _record(self, losses: list[Tensor], seconds: float) -> dict[str, Any]:
        """Figures of the steps since the last record; the one place that waits for the device."""
        # over all processes: what one of them cannot go on with stops all of them
        reduce = partial(self.accelerator.reduce, reduction="mean")
        train_losses = reduce(torch.stack(losses).float()).tolist()
        first = self.step - len(train_losses) + 1
        for step, loss in enumerate(train_losses, start=first):
            if not math.isfinite(loss):
                self._stop_non_finite("training loss", step)
        with torch.no_grad():
            probabilities = self.supernet.probabilities()
            expected = float(self.supernet.expected_parameters())
        validation = torch.as_tensor(self.validation_loss, device=self.accelerator.device)
        validation = float(reduce(validation.float()))
        if self.step > self.schedule.warmup_steps and not math.isfinite(validation):
            self._stop_non_finite("validation loss", self.step)
        if not bool(probabilities.isfinite().all()):
            self._stop_non_finite("alpha", self.step)
        multiplier, candidates = self.architect.multiplier, self.supernet.config.ranks
        ranks = probabilities.cpu() @ torch.tensor(candidates, dtype=probabilities.dtype)
        rows = len(train_losses) * self.training.gradient_accumulation_steps
        rows *= self.training.batch_size * self.accelerator.num_processes
        pace, self.recorded = max(seconds - self.recorded, 1e-9), seconds
        record = {
            "step": self.step,
            "train_loss": sum(train_losses) / len(train_losses),
            "validation_loss": validation if math.isfinite(validation) else None,
            "entropy": normalised_entropy(probabilities),
            "expected_parameters": expected,
            "multiplier": None if multiplier is None else float(multiplier.factor),
            "temperature": self.supernet.temperature,
            "learning_rate": self.weights.scheduler.get_last_lr()[0],
            "gradient_norm": _number(self.weights.gradient_norm),
            "alpha_gradient_norm": _number(self.alpha_gradient_norm),
            "samples_per_second": round(rows / pace, 2),
            "expected_ranks": [round(rank, 3) for rank in ranks.tolist()],
            "seconds": round(seconds, 3),
            "peak_memory_gib": _peak_memory(self.accelerator.device),
        }
        return record

    def _stop_non_finite(self, what: str, step: int) -> None:
        kept = checkpoints(self.output_dir)
        where = f"the last good checkpoint is {kept[-1]}" if kept else "no checkpoint was written"
        raise InputError(
            f"learning_rate={self.training.learning_rate}: the {what} is infinite or NaN at step "
            f"{step}; {where}; lower the learning rate or use another mixed_precision"
        )

    def _open_views(self):
        if self.output_dir is None or not self.accelerator.is_main_process:
            return None
        from darts_lora.tensorboard import SearchViews

        return SearchViews(self.output_dir, self.supernet, self.step, self.training.max_steps)

    def _options(self) -> dict[str, Any]:
        return asdict(self.supernet.config) | asdict(self.training)

    def _finish(self) -> Genotype:
        genotype = derive_genotype(self.supernet, self.architect, self.schedule)
        if self.output_dir is not None and self.accelerator.is_main_process:
            state = {k: v.contiguous().cpu() for k, v in self.supernet.state_dict().items()}
            path = os.path.join(self.output_dir, "supernet.safetensors")
            write_whole(path, lambda temporary: save_file(state, temporary))
            genotype.save(os.path.join(self.output_dir, "genotype.json"))
        self.accelerator.wait_for_everyone()
        return genotype

    def _schedulers(self) -> tuple:
        return self.weights.scheduler, self.arch_scheduler

    def _save_checkpoint(self) -> None:
        state = {
            "step": self.step,
            "supernet": self.supernet.state_dict(),
            "optimizer": self.weights.optimizer.state_dict(),
            "scaler": self.accelerator.scaler and self.accelerator.scaler.state_dict(),
            "schedulers": [scheduler.state_dict() for scheduler in self._schedulers()],
            "architect": self.architect.state_dict(),
            "streams": [self.train_stream.position, self.val_stream.position],
            "random": gather_object([random_state(self.accelerator.device)]),
        }
        if self.accelerator.is_main_process:
            save_checkpoint(self.output_dir, state)

    def _resume(self) -> None:
        state = load_checkpoint(self.output_dir, self.accelerator.num_processes)
        if state["step"] > self.training.max_steps:
            raise InputError(
                f"max_steps={self.training.max_steps}: the checkpoint is at step {state['step']}"
            )
        self.step = state["step"]
        self.supernet.load_state_dict(state["supernet"])
        self.weights.optimizer.load_state_dict(state["optimizer"])
        if self.accelerator.scaler is not None:
            self.accelerator.scaler.load_state_dict(state["scaler"])
        for scheduler, saved in zip(self._schedulers(), state["schedulers"], strict=True):
            scheduler.load_state_dict(saved)
        self.architect.load_state_dict(state["architect"])
        streams = (self.train_stream, self.val_stream)
        for stream, position in zip(streams, state["streams"], strict=True):
            stream.move_to(position)
        # last: opening a stream draws random numbers
        restore_random_state(state["random"][self.accelerator.process_index])


def _number(value: Tensor | None) -> float | None:
    return None if value is None else float(value)


def _peak_memory(device: torch.device) -> float | None:
    """Most memory that tensors took on this GPU (GiB), None on a CPU."""
    if device.type != "cuda":
        return None
    return round(torch.cuda.max_memory_allocated(device) / 2**30, 3)


def _progress_text(record: dict[str, Any], budget: float | None) -> str:
    size = record["expected_parameters"]
    parts = [f"train {record['train_loss']:.4f}"]
    if record["validation_loss"] is not None:
        parts.append(f"val {record['validation_loss']:.4f}")
    parts.append(f"size {size / budget:.0%} of budget" if budget else f"size {size:,.0f}")
    return ", ".join([*parts, f"entropy {record['entropy']:.2f}"])
