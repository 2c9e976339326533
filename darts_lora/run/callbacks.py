"""transformers' Trainer in a finetune: its arguments, its loss, what it leaves; between its steps
the bar, the adapter so far, requests to stop. Not here: what is trained (finetune.py),
what asks for a stop (interruption.py)."""

from __future__ import annotations

import os
import sys
from typing import Any

import peft
import torch
import transformers
from accelerate import PartialState
from torch.optim.lr_scheduler import LambdaLR
from transformers import (
    ProgressCallback,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    get_scheduler,
)

from darts_lora.base.errors import DivergedError
from darts_lora.base.files import write_whole
from darts_lora.base.interruption import Stopped, StopRequest, worker_context
from darts_lora.config import TrainingConfig


def training_arguments(
    training: TrainingConfig, output_dir: str, seed: int, first_step: int = 0
) -> TrainingArguments:
    """What the Trainer is to do behind the first steps of a run, for the first GPU alone."""
    steps = training.max_steps - first_step
    args = TrainingArguments(
        output_dir=output_dir,
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
        save_strategy="no",  # its checkpoints are pickles; SaveAdapter writes safetensors
        dataloader_num_workers=training.num_workers,
        dataloader_pin_memory=torch.cuda.is_available(),
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
    """Begins within its learning rate's course, and stops at a loss that is not finite, on any
    process, before it enters the weights."""

    first_step = 0

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
        loader = super().get_train_dataloader()
        inner = getattr(loader, "base_dataloader", loader)  # what accelerate's own iterates
        inner.multiprocessing_context = worker_context(inner.num_workers)
        return loader

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


class SaveAdapter(TrainerCallback):
    """The adapter to `folder` every `save_steps` steps (0: never) and where a stop is asked for."""

    def __init__(self, trainer: Trainer, save_steps: int, folder: str, stop: StopRequest):
        self.trainer, self.save_steps, self.folder, self.stop = trainer, save_steps, folder, stop

    def on_step_end(self, args, state, control, model=None, **kwargs):
        status = 0
        if state.global_step == state.max_steps:
            self.stop.finish()
        else:
            status = self.stop.agreed(self.trainer.accelerator)
        due = self.save_steps > 0 and state.global_step % self.save_steps == 0
        if (due or status) and state.is_world_process_zero:
            write_whole(self.folder, model.save_pretrained)
        if status:
            if state.is_world_process_zero:
                print(
                    f"\n{self.stop.reason(status)}: stopped after step {state.global_step} of "
                    f"{state.max_steps}; {kept(self.folder)}",
                    file=sys.stderr,
                    flush=True,
                )
            raise Stopped(status)


def kept(folder: str) -> str:
    if not os.path.isdir(folder):
        return "no adapter was written"
    return f"{folder} has the last adapter that was saved; a finetune starts anew"


def training_record(trainer: Trainer, seconds: float) -> dict[str, Any]:
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
