"""A search inside transformers' Trainer, or one derived from it as TRL's SFTTrainer: one callback.
Not here: our own loop (search.py), nor a finetune (finetune.py)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers import Trainer, TrainerCallback

from darts_lora.architect import Architect
from darts_lora.errors import InputError
from darts_lora.genotype import Genotype
from darts_lora.relaxation import entropies
from darts_lora.schedule import Schedule, derive_genotype
from darts_lora.search import model_loss
from darts_lora.stream import BatchStream
from darts_lora.supernet import Supernet


class RankSearchCallback(TrainerCallback):
    """Turns a training of a supernet's model by a Trainer into a search; it adds itself.

    The trainer trains the LoRA weights on train_dataset, with its optimizer, schedule, precision
    and learning rate as it is: give a part of a finetune's (SearchConfig.learning_rate_scale);
    after each of its steps (from the end of the warm-up on) this trains alpha on eval_dataset,
    which must hold other rows. The trainer's log also gets validation_loss, alpha_entropy and
    expected_parameters. A search that is cut off starts anew: RankSearch resumes.

    Args:
        trainer: a Trainer whose model is `supernet.model`, with an eval_dataset.
        supernet: the model with its rank branches.
        loss_fn: (model, batch) -> scalar loss on a batch of the trainer's evaluation data loader.

    Attributes:
        genotype: the result, once trainer.train() is through.

    Raises:
        InputError: the trainer has another model, no eval_dataset or several GPUs in one process;
            order 2, joint; on training: a warm-up that leaves no architecture step, a resumption.
    """

    def __init__(
        self,
        trainer: Trainer,
        supernet: Supernet,
        loss_fn: Callable[[torch.nn.Module, Any], Tensor] = model_loss,
    ):
        if trainer.model is not supernet.model:
            raise InputError("trainer: its model is not the supernet's; give it supernet.model")
        if supernet.config.order == 2:
            raise InputError("order=2: needs training batches beside; use RankSearch, or order=1")
        if supernet.config.joint:
            raise InputError("joint=true: a Trainer takes its own passes; use RankSearch, or false")
        if trainer.args.n_gpu > 1:
            raise InputError(
                f"n_gpu={trainer.args.n_gpu}: one process would copy the model to all GPUs in each "
                "step (DataParallel), without the branches; start one process for each GPU by "
                "`accelerate launch`, or show it one by CUDA_VISIBLE_DEVICES=0"
            )
        if trainer.eval_dataset is None:
            raise InputError("eval_dataset=None: the trainer needs rows to train alpha on")
        self.trainer, self.supernet, self.loss_fn = trainer, supernet, loss_fn
        self.genotype: Genotype | None = None
        trainer.add_callback(self)

    def on_train_begin(self, args, state, control, **kwargs):
        if state.global_step > 0:
            raise InputError(
                f"resume_from_checkpoint: begins at step {state.global_step}, but a trainer's "
                "checkpoints hold no alpha; train anew without it, or use RankSearch, which resumes"
            )
        accelerator = self.trainer.accelerator
        several = accelerator.num_processes > 1
        self.schedule = Schedule(self.supernet, state.max_steps)
        self.stream = BatchStream(self.trainer.get_eval_dataloader())
        self.architect = Architect(
            self.supernet,
            inner_learning_rate=args.learning_rate,
            reduce=(lambda g: accelerator.reduce(g, "mean")) if several else None,
            scaler=accelerator.scaler,
        )
        self.arch_scheduler = self.schedule.arch_scheduler(self.architect.optimizer)

    def on_step_begin(self, args, state, control, **kwargs):
        self.schedule.enter(state.global_step)

    def on_step_end(self, args, state, control, **kwargs):
        if not self.schedule.trains_alpha(state.global_step - 1):
            self.architect.mean.update()
            return
        metrics = self.architect.step(
            lambda batch: self.loss_fn(self.supernet.model, batch), next(self.stream)
        )
        if self.architect.allocation is None:  # else its optimizer rests
            self.arch_scheduler.step()
        if state.global_step % max(1, state.logging_steps) == 0:
            with torch.no_grad():
                entropy = float(entropies(self.supernet.probabilities()).mean())
                expected = float(self.supernet.expected_parameters())
            self.trainer.log(
                {
                    "validation_loss": float(metrics["loss"]),
                    "alpha_entropy": entropy,
                    "expected_parameters": expected,
                }
            )

    def on_train_end(self, args, state, control, **kwargs):
        self.genotype = derive_genotype(self.supernet, self.architect, self.schedule)
