"""transformers' Trainer in a finetune: its arguments, its loss, its checkpoints; between its steps
the bar, requests to stop. Not here: what is trained (finetune.py), which checkpoint is whole
(checkpoint.py), what asks for a stop (interruption.py), trackers (views/trackers.py)."""

from __future__ import annotations

import contextlib
import os
import pickle
import sys
import time
from collections.abc import Sequence
from typing import Any

import peft
import torch
import transformers
from accelerate import PartialState
from peft import PeftModel
from peft.optimizers import create_loraplus_optimizer
from peft.utils import SAFETENSORS_WEIGHTS_NAME
from torch import nn
from torch.optim.lr_scheduler import LambdaLR
from transformers import (
    ProgressCallback,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    get_scheduler,
)

from darts_lora.base.errors import DivergedError, told_as
from darts_lora.base.files import told_as_unwritten
from darts_lora.base.interruption import Stopped, StopRequest
from darts_lora.config import TrainingConfig
from darts_lora.data.loaders import run_dataloader
from darts_lora.run.beginning import load_adapter
from darts_lora.run.checkpoint import (
    FINETUNE,
    FOLDER,
    KEPT,
    checkpoints,
    kept,
    remove_checkpoints,
    seal,
    sealed,
    told_as_os_error,
)


def training_arguments(
    training: TrainingConfig, output_dir: str, seed: int, first_step: int = 0
) -> TrainingArguments:
    """What the Trainer is to do behind the first steps of a run, for the first GPU alone."""
    steps = training.max_steps - first_step
    args = TrainingArguments(
        output_dir=os.path.join(output_dir, FOLDER),
        max_steps=steps,
        per_device_train_batch_size=training.batch_size,
        gradient_accumulation_steps=training.gradient_accumulation_steps,
        learning_rate=training.learning_rate,
        weight_decay=training.weight_decay,
        lr_scheduler_type=training.scheduler_type,
        warmup_steps=training.lr_warmup_steps,
        max_grad_norm=training.max_grad_norm,
        bf16=training.mixed_precision == "bf16",
        fp16=training.mixed_precision == "fp16",
        logging_steps=min(training.logging_steps, steps),
        logging_nan_inf_filter=False,  # our own check names the step
        save_strategy="no",  # Checkpoints says when
        accelerator_config={"dispatch_batches": False},  # of a stream: batches are of all lengths
        remove_unused_columns=False,  # the collator reads the columns
        label_names=["labels"],
        disable_tqdm=False,  # where transformers is quiet, it would print whole dictionaries
        report_to=[],  # Views, which may fail
        use_cpu=PartialState().device.type == "cpu",  # else it refuses bf16 there
        seed=seed,
    )
    # One process uses one GPU, as in a search; the Trainer would feed all of them (DataParallel).
    args._n_gpu = min(args.n_gpu, 1)
    return args


class FinetuneTrainer(Trainer):
    """Begins within its learning rate's course and with the rows that the search left, and stops at
    a loss that is not finite, on any process, before it enters the weights.

    Attributes:
        training: the options of the whole run.
        first_step: steps of the run that the search took.
        first_rows: numbers of the rows that come first; None: all alike.
        loraplus_lr_ratio: the rate of B over that of A (LoRA+); None: 1.
    """

    model: PeftModel
    training: TrainingConfig
    first_step = 0
    first_rows: Sequence[int] | None = None
    loraplus_lr_ratio: float | None = None

    def create_optimizer(self, model=None):
        if self.loraplus_lr_ratio is not None and self.optimizer is None:
            kind, options = self.get_optimizer_cls_and_kwargs(self.args)
            self.optimizer = create_loraplus_optimizer(
                self.model,
                kind,
                loraplus_lr_ratio=self.loraplus_lr_ratio,
                loraplus_weight_decay=self.args.weight_decay,
                **options,
            )
        return super().create_optimizer(model)

    def create_scheduler(self, num_training_steps, optimizer=None):
        stand_in, args = torch.optim.SGD([torch.zeros(1)], lr=1.0), self.args
        whole = get_scheduler(
            args.lr_scheduler_type,
            stand_in,
            args.get_warmup_steps(num_training_steps),
            self.first_step + num_training_steps,
        )
        (course,) = whole.lr_lambdas
        self.lr_scheduler = LambdaLR(
            optimizer or self.optimizer, lambda step: course(self.first_step + step)
        )
        return self.lr_scheduler

    def get_train_dataloader(self):
        """One epoch to the Trainer, which then goes on at any step exactly."""
        loader = run_dataloader(
            self.train_dataset,
            self.data_collator,
            self.training,
            self.args.max_steps,
            self.args.seed,
            self.first_rows,
        )
        return self.accelerator.prepare(loader)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None):
        """The adapter's weights as they were: PEFT's own loading changes their data type."""
        load_adapter(self.model, os.path.join(resume_from_checkpoint, SAFETENSORS_WEIGHTS_NAME))

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False):
        """The adapter alone: no tokenizer, and no arguments as a pickle."""
        if self.args.should_save:
            self.model.save_pretrained(output_dir)

    def _save_checkpoint(self, *args):
        with told_as_unwritten(self.args.output_dir), told_as_os_error():
            super()._save_checkpoint(*args)

    def go_on(self, path: str | None) -> None:
        """Train to the end, from that checkpoint on.

        Raises:
            InputError: the checkpoint is of another release, or holds code.
        """
        with told_as(f"resume: {path} cannot be read", pickle.UnpicklingError):
            self.train(resume_from_checkpoint=path)

    def training_step(self, model, inputs, num_items_in_batch=None):
        loss = super().training_step(model, inputs, num_items_in_batch)
        losses = self.accelerator.gather(loss.detach())
        if not torch.isfinite(losses).all():
            raise DivergedError(
                f"the loss is {losses.sum().item()} at step {self.state.global_step + 1}: stopped; "
                "lower the learning rate, or look at the data"
            )
        return loss


class Progress(ProgressCallback):
    """The bar with the time left; beside it one number, the loss."""

    def on_log(self, args, state, control, logs=None, **kwargs):
        if self.training_bar is not None and "loss" in logs:
            self.training_bar.set_postfix(loss=f"{logs['loss']:.4f}")


class Checkpoints(TrainerCallback):
    """Has the Trainer save every `save_steps` steps (0: never) and where a stop is asked for; keeps
    the newest few; stops.

    Args:
        trainer: of the training.
        save_steps: steps between two checkpoints.
        output_dir: of the run.
        stop: what asks for a stop.
        options: the run's, name to value, by which one that goes on is compared with it.
        seconds: that the training took before this process.
    """

    def __init__(
        self,
        trainer: Trainer,
        save_steps: int,
        output_dir: str,
        stop: StopRequest,
        options: dict[str, Any],
        seconds: float = 0.0,
    ):
        self.trainer, self.save_steps, self.output_dir, self.stop = (
            trainer,
            save_steps,
            output_dir,
            stop,
        )
        self.options, self.begun, self.status = options, time.perf_counter() - seconds, 0

    @property
    def seconds(self) -> float:
        """That the training took so far."""
        return round(time.perf_counter() - self.begun, 3)

    def on_train_begin(self, args, state, control, **kwargs):
        state.compute_steps(args, state.max_steps)  # not those of the process before

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == state.max_steps:
            self.stop.finish()
            return
        self.status = self.stop.agreed(self.trainer.accelerator)
        due = self.save_steps > 0 and state.global_step % self.save_steps == 0
        if due or self.status:
            control.should_save = control.should_log = True

    def on_save(self, args, state, control, **kwargs):
        self.trainer.accelerator.wait_for_everyone()  # each wrote its random state
        if state.is_world_process_zero:
            path = os.path.join(args.output_dir, f"{FINETUNE}-{state.global_step}")
            record = {"step": state.global_step, "options": self.options, "seconds": self.seconds}
            seal(path, record)
            remove_checkpoints(sealed(self.output_dir)[:-KEPT])
        if self.status:
            self.trainer.accelerator.wait_for_everyone()  # a launcher ends all with the first
            if state.is_world_process_zero:
                print(
                    f"\n{self.stop.reason(self.status)}: stopped after step {state.global_step} of "
                    f"{state.max_steps}; {kept(self.output_dir, FINETUNE)}",
                    file=sys.stderr,
                    flush=True,
                )
            raise Stopped(self.status)


def remove_unfinished(output_dir: str, but: str | None = None) -> None:
    """Remove a finetune's checkpoints, but that one and those before it that are whole."""
    whole = sealed(output_dir)
    left = whole[: whole.index(but) + 1] if but else []
    remove_checkpoints([path for path in checkpoints(output_dir, FINETUNE) if path not in left])
    with contextlib.suppress(OSError):  # where it is empty
        os.rmdir(os.path.join(output_dir, FOLDER))


def training_record(trainer: FinetuneTrainer, seconds: float) -> dict[str, Any]:
    """What finetune.train returns."""
    losses = [(log["step"], log["loss"]) for log in trainer.state.log_history if "loss" in log]
    last = [loss for _, loss in losses[-max(1, len(losses) // 10) :]]
    return {
        "trainable_parameters": trainer.get_num_trainable_parameters(),
        "loss": sum(last) / len(last) if last else None,
        "losses": losses,
        "first_step": trainer.first_step,
        "steps": trainer.state.global_step,
        "seconds": round(seconds, 3),
        "versions": {m.__name__: m.__version__ for m in (torch, transformers, peft)},
    }
