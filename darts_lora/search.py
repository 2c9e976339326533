"""RankSearch: the loop on accelerate: warm-up, alternation, when to log, to save and to stop.
Not here: the two steps (weight_step.py, architect.py), phases (schedule.py), views, state."""

from __future__ import annotations

import math
import os
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from functools import partial
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from peft import LoraConfig
from safetensors.torch import save_file
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from transformers import default_data_collator

from darts_lora.base.errors import DivergedError
from darts_lora.base.files import check_writable, locked, write_whole
from darts_lora.base.interruption import Stopped, StopRequest, told_as_input_errors
from darts_lora.config import SearchConfig, TrainingConfig, split_options
from darts_lora.genotype import Genotype
from darts_lora.lora.models import weights_digest
from darts_lora.lora.parts import task_type
from darts_lora.run.bilevel import BilevelStep
from darts_lora.run.checkpoint import kept, load_checkpoint, save_checkpoint
from darts_lora.run.course import check_same_course
from darts_lora.run.launch import check_replays, search_accelerator
from darts_lora.run.records import (
    Metrics,
    alpha_figures,
    number,
    peak_memory,
    progress_bar,
    progress_text,
)
from darts_lora.run.resume import (
    capture,
    check_alpha_is_one,
    check_start,
    course_options,
    full,
    remove_search,
    restore,
)
from darts_lora.run.schedule import derive_genotype
from darts_lora.run.stream import open_streams, row_loader
from darts_lora.run.tokens import model_loss
from darts_lora.supernet import Supernet
from darts_lora.views.search_views import SearchViews
from darts_lora.views.trackers import Trackers, check_trackers


class RankSearch:
    """Bilevel search: LoRA weights on training batches, alpha on validation batches.

    It is the first part (search_fraction) of a run of training.max_steps weight steps, on the
    learning rate of the whole run: a finetune goes on from its weights with the rest. In its second
    half, every `arch_every`-th weight step is followed by an architecture step.

    Args:
        supernet: the model with its rank branches.
        train_dataloader, val_dataloader: batches of two disjoint splits, for `loss_fn`; of the
            second half as many rows do, and each costs a pass.
        training: steps of the whole run, learning rate and the like of the weights.
        output_dir: checkpoints/, tensorboard/, metrics.jsonl, supernet.safetensors and
            genotype.json go there; None: nothing is written.
        loss_fn: (model, batch) -> scalar loss. Accumulated batches and those of other processes
            count by their learnt tokens with the default, alike with any other.
        accelerator: default: one made from `training`.
        course: further options that decide what is computed (of the model, of the data), name to
            value; a checkpoint holds them, and a search with others does not resume from it.
        cuda_graphs: launch the forward and backward of each step as one CUDA graph for each shape
            of batch. What cannot be captured runs as ever, after one line that says why.
        report_to: trackers of the figures, which need an output_dir: one or several that accelerate
            knows, "all" that are installed, or "none". Those of an `accelerator` get them, too.

    Raises:
        InputError: a data loader without a batch for each process; DeepSpeed, Megatron-LM or
            FSDP's first version; a tracker that is not installed.
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
        course: dict[str, Any] | None = None,
        cuda_graphs: bool = False,
        report_to: str | Sequence[str] = "tensorboard",
    ):
        self.supernet, self.training = supernet, training or TrainingConfig()
        self.output_dir, self.report_to = output_dir, check_trackers(report_to)
        config = supernet.config
        self.steps = config.search_steps(self.training.max_steps)
        precision = self.training.mixed_precision
        self.accelerator = search_accelerator(supernet.model, precision, accelerator)
        set_seed(config.seed, device_specific=True)
        self.course = course_options(self, course or {})
        self.bilevel = BilevelStep(supernet, self.accelerator, self.training, loss_fn)
        self.weights, self.architect = self.bilevel.weights, self.bilevel.architect
        self.model = self.weights.model
        self.streams = self.train_stream, self.val_stream = open_streams(
            self.accelerator, train_dataloader, val_dataloader, config.seed, output_dir is not None
        )
        if cuda_graphs:
            self.bilevel.capture()
        self.step, self.seconds = 0, 0.0

    def resume(self) -> None:
        """Go on from the newest checkpoint in output_dir that is whole.

        Raises:
            InputError: there is none, or a search with other options wrote it; a data loader does
                not give its order of rows again; no memory is left, or a data worker died.
        """
        with told_as_input_errors(self._kept):
            state, options = load_checkpoint(self.output_dir)
            check_same_course(self.course, options)
            check_replays([stream.dataloader for stream in self.streams])
            restore(self, state)

    def run(self, resume: bool = False) -> Genotype:
        """Search, and discretize by the choice that suits the search.

        Args:
            resume: call `resume` first.

        Returns:
            The genotype; its found_by["verdict"] says whether the search learnt anything.

        Raises:
            InputError: nothing to resume from; an output_dir that cannot be written, or with an
                unfinished search or a live run; no memory is left; a data worker died. The last
                checkpoint stays.
            DivergedError: the loss became infinite or NaN at the step that the message
                names. The last checkpoint stays.
            Stopped: SIGTERM, SIGINT or max_runtime: the step was finished, a checkpoint written. As
                a SystemExit it ends the process with the status that schedulers expect.
        """
        if self.output_dir is not None:
            check_writable(self.output_dir)
        if resume:
            self.resume()
        elif self.step == 0:
            check_start(self.output_dir, resume=False)
        self.accelerator.wait_for_everyone()  # all have looked before the first one writes
        with (
            locked(self.output_dir),
            StopRequest(self.training.max_runtime) as stop,
            told_as_input_errors(self._kept),
        ):
            self._open_output()
            self._loop(stop)
            return self._finish()

    def _loop(self, stop: StopRequest) -> None:
        """Step until the last one, or until a stop is asked for."""
        self.model.train()
        started, losses = time.monotonic() - self.seconds, []
        bar = progress_bar(self.step, self.steps, self.accelerator.is_main_process)
        for step in bar:
            losses.append(self._one_step(step))
            self.step = step + 1
            last = self.step == self.steps
            status = self._agreed(stop)
            due = self.training.save_steps and self.step % self.training.save_steps == 0
            save = last or status or due
            if self.step % self.training.logging_steps == 0 or save:
                record = self._record(losses, time.monotonic() - started)
                losses = []
                bar.set_postfix_str(progress_text(record, self.supernet.budget), refresh=False)
                if self.metrics is not None:
                    self.metrics.write(record)
                    self.views.write(record)
            if save and self.output_dir is not None:
                self._save_checkpoint()
            if status:
                bar.close()
                self._stop(stop.reason(status), status)

    def _agreed(self, stop: StopRequest) -> int:
        """The exit status that was asked for, the same on all processes; 0: go on. Several ask each
        other where the loop waits for the device anyhow."""
        stop.step()
        if self.step == self.steps:
            stop.finish()
            return 0
        if self.accelerator.num_processes > 1 and self.step % self.training.logging_steps:
            return 0
        return stop.agreed(self.accelerator)

    def _stop(self, reason: str, status: int) -> None:
        if self.views is not None:
            self.views.close()
        if self.accelerator.is_main_process:
            print(
                f"{reason}: stopped after step {self.step} of {self.steps}; {self._kept()}",
                file=sys.stderr,
                flush=True,
            )
        raise Stopped(status)

    def _kept(self) -> str:
        """What is left to go on from, in words."""
        return kept(self.output_dir)

    def _one_step(self, step: int) -> Tensor:
        """A weight step and, where it is due, an architecture step; the training loss."""
        loss, _ = self.bilevel.step(self.train_stream, self.val_stream)
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
        if (step := self.architect.first_non_finite()) is not None:
            self._stop_non_finite("validation loss", step)
        gains = self.architect.measured.gains
        figures = alpha_figures(self.supernet)
        if not math.isfinite(figures["expected_parameters"]):
            self._stop_non_finite("alpha", self.step)
        rows = len(train_losses) * self.training.gradient_accumulation_steps
        rows *= self.training.batch_size * self.accelerator.num_processes
        pace, self.seconds = max(seconds - self.seconds, 1e-9), seconds
        return figures | {
            "step": self.step,
            "train_loss": sum(train_losses) / len(train_losses),
            "validation_gain": float(gains[-1].sum()) if len(gains) else None,
            "learning_rate": self.weights.scheduler.get_last_lr()[0],
            "gradient_norm": number(full(self.weights.gradient_norm)),
            "samples_per_second": round(rows / pace, 2),
            "seconds": round(seconds, 3),
            "peak_memory_gib": peak_memory(self.accelerator.device),
        }

    def _stop_non_finite(self, what: str, step: int) -> None:
        raise DivergedError(
            f"learning_rate={self.training.learning_rate}: the {what} is infinite or NaN at step "
            f"{step}; lower the learning rate or use another mixed_precision; {self._kept()}"
        )

    def _open_output(self) -> None:
        """Metrics and views, on the first process where there is an output_dir."""
        self.metrics = self.views = None
        if self.output_dir is None or not self.accelerator.is_main_process:
            return
        if self.step == 0:
            remove_search(self.output_dir)
        self.metrics = Metrics(self.output_dir, self.supernet, self.step)
        trackers = Trackers(
            self.report_to,
            self.output_dir,
            asdict(self.supernet.config) | asdict(self.training),
            first_step=self.step,
            more=self.accelerator.trackers,
            otherwise=f"{self.metrics.path} has all figures",
        )
        self.views = SearchViews(trackers, self.output_dir, self.supernet, self.step, self.steps)

    def _finish(self) -> Genotype:
        genotype = derive_genotype(self.supernet, self.architect, self.training.max_steps)
        state = full(self.supernet.state_dict())
        genotype.found_by["supernet_digest"] = weights_digest(state)
        if self.output_dir is not None and self.accelerator.is_main_process:
            state = {k: v.contiguous().cpu() for k, v in state.items()}
            path = os.path.join(self.output_dir, "supernet.safetensors")
            write_whole(path, lambda temporary: save_file(state, temporary))
            genotype.save(os.path.join(self.output_dir, "genotype.json"))
        if self.views is not None:
            self.views.finish(genotype, self.step)
        self.accelerator.wait_for_everyone()
        return genotype

    def _save_checkpoint(self) -> None:
        check_alpha_is_one(self)
        state = capture(self)
        if self.accelerator.is_main_process:
            save_checkpoint(self.output_dir, state, self.course)


def find_ranks(
    model: torch.nn.Module,
    train_dataset: Dataset,
    eval_dataset: Dataset,
    *,
    data_collator: Callable[[list], Any] = default_data_collator,
    loss_fn: Callable[[torch.nn.Module, Any], Tensor] = model_loss,
    **options: Any,
) -> LoraConfig:
    """The LoRA rank of every layer, as a configuration for peft.get_peft_model.

    Args:
        model: comes out as it went in, on the device of the search.
        train_dataset: rows that the LoRA weights learn.
        eval_dataset: other rows, by which the ranks are chosen.
        data_collator: list of rows -> batch.
        loss_fn: (model, batch) -> scalar loss; default: the one that a transformers model gives.
        options: of SearchConfig (budget_rank, ranks, target_modules, ...) and of TrainingConfig
            (max_steps, batch_size, learning_rate, ...). max_steps is of the whole run, of which
            the search takes search_fraction.

    Raises:
        InputError: an unknown option, or of Supernet and RankSearch.
    """
    search, training = split_options(options, SearchConfig, TrainingConfig)
    supernet = Supernet(model, search)
    try:
        given = (
            ("train_dataset", train_dataset, training.batch_size),
            ("eval_dataset", eval_dataset, training.validation_batch_size),
        )
        loaders = [row_loader(*part, training.num_workers, data_collator) for part in given]
        genotype = RankSearch(supernet, *loaders, training=training, loss_fn=loss_fn).run()
    finally:
        supernet.remove()
    return genotype.to_lora_config(model, task_type=task_type(model))
