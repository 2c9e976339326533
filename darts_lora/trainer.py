"""A search inside transformers' Trainer, or one derived from it as TRL's SFTTrainer: one callback.
Not here: our own loop (search.py), nor a finetune (finetune.py)."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from accelerate.utils import set_seed
from torch import Tensor, nn
from torch.utils.data import Dataset, IterableDataset
from transformers import Trainer, TrainerCallback

from darts_lora.alpha.verdict import verdict_text
from darts_lora.architect import Architect
from darts_lora.base.errors import InputError
from darts_lora.genotype import Genotype
from darts_lora.lora.relaxation import entropies
from darts_lora.run.beginning import plain_adapter
from darts_lora.run.launch import check_distribution
from darts_lora.run.schedule import Schedule, derive_genotype
from darts_lora.run.stream import BatchStream
from darts_lora.supernet import PREPARED, Supernet
from darts_lora.views.console import show


class RankSearchCallback(TrainerCallback):
    """Turns a training of a supernet's model by a Trainer into a search; it adds itself.

    The trainer trains the LoRA weights on train_dataset, with its optimizer, schedule, precision
    and learning rate as they are; behind its steps this trains alpha on eval_dataset, which must
    hold other rows. After search_fraction of the steps the found ranks are handed over: plain PEFT
    layers take the supernet's place, with what it learnt, and the training goes on with them to its
    end. `trainer.model` is a PeftModel then, and trainer.save_model() saves its adapter. The
    trainer's log also gets validation_loss, alpha_entropy and expected_parameters. What the trainer
    saves before is the supernet's own state (see Supernet), without the base. A search that is cut
    off starts anew: RankSearch resumes.

    Args:
        trainer: a Trainer whose model is `supernet.model`, with an eval_dataset.
        supernet: the model with its rank branches.
        loss_fn: (model, batch) -> scalar loss on a batch of the trainer's evaluation data loader;
            default: the trainer's own loss, with all that its arguments add to it.

    Attributes:
        genotype: the result, from the handover on.

    Raises:
        InputError: the trainer has another model, no eval_dataset or several GPUs in one process;
            DeepSpeed, vLLM, several sets of evaluation rows; on training: a warm-up that
            leaves no architecture step, a resumption.
    """

    def __init__(
        self,
        trainer: Trainer,
        supernet: Supernet,
        loss_fn: Callable[[torch.nn.Module, Any], Tensor] | None = None,
    ):
        if trainer.model is not supernet.model:
            raise InputError("trainer: its model is not the supernet's; give it supernet.model")
        if trainer.args.n_gpu > 1:
            raise InputError(
                f"n_gpu={trainer.args.n_gpu}: one process would copy the model to all GPUs in each "
                "step (DataParallel), without the branches; start one process for each GPU by "
                "`accelerate launch`, or show it one by CUDA_VISIBLE_DEVICES=0"
            )
        if getattr(trainer.args, "use_vllm", False):
            raise InputError(
                "use_vllm=True: vLLM loads whole weights by name and knows no rank branches; let "
                "the model itself generate (use_vllm=False)"
            )
        if trainer.eval_dataset is None:
            raise InputError("eval_dataset=None: the trainer needs rows to train alpha on")
        if isinstance(trainer.eval_dataset, dict):
            raise InputError(
                f"eval_dataset: has {len(trainer.eval_dataset)} sets "
                f"({', '.join(map(str, trainer.eval_dataset))}); give the one to train alpha on"
            )
        check_distribution(trainer.accelerator)
        packed = [n for n in ("packing", "padding_free") if getattr(trainer.args, n, False)]
        if packed and supernet.config.sampling == "example" and supernet.relaxation != "softmax":
            warnings.warn(
                f"{packed[0]}=True: a row holds many conversations, which all see the same draw of "
                "ranks; without it each has a draw of its own, and alpha learns from more of them",
                stacklevel=2,
            )
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
        if several:  # a Trainer seeds them alike: all would draw the same ranks
            set_seed(args.seed, device_specific=True)
        self.schedule = Schedule(self.supernet, state.max_steps)
        if self._hands_over(state) and several:
            raise InputError(
                f"num_processes={accelerator.num_processes}: a handover inside a Trainer has one; "
                "set search_fraction=1 and finetune the genotype then, or use RankSearch"
            )
        rows = self.trainer.eval_dataset
        if not isinstance(rows, IterableDataset):
            rows = Shuffled(rows, args.seed)
        self.stream = BatchStream(self.trainer.get_eval_dataloader(rows))
        self.architect = Architect(
            self.supernet,
            reduce=(lambda g: accelerator.reduce(g, "mean")) if several else None,
            scaler=accelerator.scaler,
        )
        self.arch_scheduler = self.schedule.arch_scheduler(self.architect.optimizer)

    def _hands_over(self, state) -> bool:
        return self.schedule.steps < state.max_steps

    def on_step_begin(self, args, state, control, **kwargs):
        if self.genotype is None:
            self.schedule.enter(state.global_step)

    def on_step_end(self, args, state, control, **kwargs):
        if self.genotype is not None:
            return
        self._search_on(state, control)
        if state.global_step == self.schedule.steps and self._hands_over(state):
            self._find(state)
            self._hand_over()

    def _search_on(self, state, control) -> None:
        """The architecture step behind a step of the trainer's."""
        if not self.schedule.trains_alpha(state.global_step - 1):
            self.architect.mean.update()
            return
        metrics = self._step()
        if self.architect.allocation is None:  # else its optimizer rests
            self.arch_scheduler.step()
        if control.should_log:
            with torch.no_grad():
                entropy = float(entropies(self.supernet.probabilities()).mean())
                expected = float(self.supernet.expected_parameters())
            # past what trainers add to their own line; and the trainer's own line is still to come
            Trainer.log(
                self.trainer,
                {
                    "validation_loss": float(metrics["loss"]),
                    "alpha_entropy": entropy,
                    "expected_parameters": expected,
                },
            )
            control.should_log = True

    def _step(self) -> dict[str, Tensor]:
        """An architecture step on the next batch of the evaluation data loader."""
        model, trainer = self.supernet.model, self.trainer
        if self.loss_fn is not None:
            loss_fn = partial(self.loss_fn, model)
            return self.architect.step(loss_fn, next(self.stream))
        (batch,), count = trainer.get_batch_samples(self.stream, 1, trainer.args.device)

        def loss_fn(batch: Any) -> Tensor:
            with trainer.compute_loss_context_manager():
                return trainer.compute_loss(model, dict(batch), num_items_in_batch=count)

        with _figures_kept(trainer):
            model.eval()  # in training mode some give a batch of their own, of training rows
            try:
                batch = trainer._prepare_inputs(batch)
            finally:
                model.train()
            return self.architect.step(loss_fn, batch)

    def on_train_end(self, args, state, control, **kwargs):
        if self.genotype is None:
            self._find(state)

    def _hand_over(self) -> None:
        """Put a PEFT adapter in the supernet's place, and its weights into the optimizer."""
        model, trainer = self.supernet.model, self.trainer
        prepared = {name: vars(model)[name] for name in PREPARED if name in vars(model)}
        adapted = plain_adapter(self.supernet.remove(), self.genotype, self.supernet)
        vars(model).update(prepared)  # the autocast of the training that goes on
        trainer.model = adapted.train()
        exchange_parameters(trainer.optimizer, adapted, trainer.get_decay_parameter_names(adapted))

    def _find(self, state) -> None:
        self.genotype = derive_genotype(self.supernet, self.architect, self.schedule)
        if state.is_world_process_zero:
            show(self.genotype)
            print(verdict_text(self.genotype.found_by["verdict"]))


def exchange_parameters(
    optimizer: torch.optim.Optimizer, model: nn.Module, decayed: list[str]
) -> None:
    """Let the optimizer train the model's parameters in place of those that it had, from a fresh
    state: weight decay for those whose names are in `decayed`, as a Trainer's own groups have it.
    """
    optimizer = getattr(optimizer, "optimizer", optimizer)  # accelerate's wrapper
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    parts = [
        [p for name, p in trained.items() if (name in decayed) == kind] for kind in (True, False)
    ]
    groups = optimizer.param_groups
    if len(groups) == 1:
        parts = [parts[0] + parts[1]]
    for group, part in zip(groups, parts, strict=True):
        group["params"] = part
    optimizer.state.clear()


class Shuffled(Dataset):
    """Rows of another data set, in an order of its own in each epoch: a Trainer's evaluation reads
    them as they lie, which may be sorted.

    Args:
        rows: a data set with a length.
        seed: the same on all processes.
    """

    def __init__(self, rows: Dataset, seed: int):
        self.rows, self.seed = rows, seed
        self.set_epoch(0)

    def set_epoch(self, epoch: int) -> None:
        """Data loaders of accelerate call this."""
        generator = torch.Generator().manual_seed(self.seed + epoch)
        self.order = torch.randperm(len(self.rows), generator=generator).tolist()

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Any:
        return self.rows[self.order[index]]


@contextmanager
def _figures_kept(trainer: Trainer) -> Iterator[None]:
    """What TRL's trainers gather for their own log, in whose line validation rows have no place."""
    names = ("_metrics", "_logs", "_total_train_tokens")
    kept = {n: copy.deepcopy(getattr(trainer, n)) for n in names if hasattr(trainer, n)}
    try:
        yield
    finally:
        vars(trainer).update(kept)
