"""A search inside transformers' Trainer, or one derived from it as TRL's SFTTrainer: one callback.
Not here: our own loop (search.py), nor a finetune (finetune.py)."""

from __future__ import annotations

import copy
import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from functools import partial
from typing import Any

import torch
from accelerate.utils import set_seed
from peft import PeftModel
from peft.utils import SAFETENSORS_WEIGHTS_NAME
from torch import Tensor, nn
from torch.utils.data import Dataset, IterableDataset
from transformers import Trainer, TrainerCallback
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from darts_lora.alpha.verdict import verdict_text
from darts_lora.architect import Architect
from darts_lora.base.errors import InputError, told_as
from darts_lora.base.files import write_whole
from darts_lora.config import SearchConfig
from darts_lora.genotype import Genotype
from darts_lora.lora.models import frozen_digest
from darts_lora.lora.relaxation import entropies
from darts_lora.run.beginning import load_adapter, plain_adapter
from darts_lora.run.course import check_same_course
from darts_lora.run.launch import check_distribution
from darts_lora.run.schedule import derive_genotype
from darts_lora.run.stream import BatchStream
from darts_lora.supernet import PREPARED, Supernet
from darts_lora.views.console import show, show_sizes

# Beside what a Trainer saves: the state of the search, and from the handover on its result.
STATE_NAME, GENOTYPE_NAME = "rank_search.pt", "genotype.json"


class RankSearchCallback(TrainerCallback):
    """Turns a training by a Trainer into a search of ranks; it adds itself to the trainer.

    The trainer trains the LoRA weights on train_dataset, with its optimizer, schedule, precision
    and learning rate as they are; behind its steps this trains alpha on eval_dataset, which must
    hold other rows. After search_fraction of the steps the found ranks are handed over: plain PEFT
    layers take the supernet's place, with what it learnt, and the training goes on with them to its
    end. `trainer.model` is a PeftModel then, and trainer.save_model() saves its adapter. The
    trainer's log also gets gain, expected_parameters and alpha_entropy. An architecture step takes
    per_device_eval_batch_size rows, of which half of a training batch's do: each costs a pass.

    The trainer's checkpoints hold the search's state too, and trainer.train with
    resume_from_checkpoint goes on from each of them, bit for bit on a CPU. What the trainer saves
    as a model before the handover is the supernet's own state (see Supernet), without the base.

    Args:
        trainer: a Trainer with an eval_dataset.
        supernet: what is searched in the trainer's model and how; or the supernet that was made of
            it, as a Trainer takes a quantized model only then.
        loss_fn: (model, batch) -> scalar loss on a batch of the trainer's evaluation data loader;
            default: the trainer's own loss, with all that its arguments add to it.

    Attributes:
        genotype: the result, from the handover on.
        supernet: the model with its rank branches.

    Raises:
        InputError: the trainer has another model, no eval_dataset or several GPUs in one process;
            DeepSpeed, vLLM, several sets of evaluation rows; on training: a handover in several
            processes, a checkpoint that is of another search or not whole, one of FSDP.
    """

    def __init__(
        self,
        trainer: Trainer,
        supernet: Supernet | SearchConfig,
        loss_fn: Callable[[torch.nn.Module, Any], Tensor] | None = None,
    ):
        if isinstance(supernet, SearchConfig):
            supernet = Supernet(trainer.model, supernet)
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
        self.trainer, self.supernet, self.loss_fn = trainer, supernet, loss_fn
        self.genotype: Genotype | None = None
        self.adapted: PeftModel | None = None
        self._base_weights = frozen_digest(supernet.model)
        self._saved: dict[str, Any] | None = None  # of the checkpoint that is gone on from
        vars(trainer)["_load_from_checkpoint"] = (
            self._open
        )  # no event of a Trainer's is before its weights
        trainer.add_callback(self)

    def on_train_begin(self, args, state, control, **kwargs):
        saved, self._saved = self._saved, None
        if saved is not None:
            check_same_course(self._course(state), saved["course"])
        if self.adapted is not None:
            self.trainer.model = self.adapted
            return
        accelerator = self.trainer.accelerator
        several = accelerator.num_processes > 1
        if several:  # a Trainer seeds them alike: all would draw the same ranks
            set_seed(args.seed, device_specific=True)
        self.steps = self.supernet.config.search_steps(state.max_steps)
        if self._hands_over(state) and several:
            raise InputError(
                f"num_processes={accelerator.num_processes}: a handover inside a Trainer has one; "
                "set search_fraction=1 and finetune the genotype then, or use RankSearch"
            )
        rows: Any = self.trainer.eval_dataset
        if not isinstance(rows, IterableDataset):
            rows = Shuffled(rows, args.seed)
        self.stream = BatchStream(self.trainer.get_eval_dataloader(rows))
        self.architect = Architect(
            self.supernet,
            self.steps,
            reduce=(lambda g: accelerator.reduce(g, "mean")) if several else None,
            scaler=accelerator.scaler,
        )
        if saved is not None:
            self.supernet.load_state_dict(saved["supernet"])
            self.architect.load_state_dict(saved["architect"])
            self.stream.move_to(saved["stream"])  # the Trainer's random state comes later

    def _course(self, state) -> dict[str, Any]:
        """What a training that goes on must share, as JSON gives it back."""
        options = asdict(self.supernet.config) | {"max_steps": state.max_steps}
        options |= {"num_processes": self.trainer.accelerator.num_processes}
        return json.loads(json.dumps(options | {"base_weights": self._base_weights}))

    def on_save(self, args, state, control, **kwargs):
        if not state.is_world_process_zero or self.trainer.is_fsdp_enabled:
            return
        folder = os.path.join(args.output_dir, f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}")
        saved: dict[str, Any] = {"course": self._course(state)}
        if self.genotype is None:
            saved["supernet"] = self.supernet.state_dict()
            saved["architect"] = self.architect.state_dict()
            saved["stream"] = self.stream.position
        else:
            self.genotype.save(os.path.join(folder, GENOTYPE_NAME))
        path = os.path.join(folder, STATE_NAME)
        write_whole(path, lambda temporary: torch.save(saved, temporary))

    def _open(self, checkpoint: str, model: nn.Module | None = None) -> None:
        """In the place of the Trainer's own: read the search's state; behind the handover put the
        adapter in, before an optimizer is made."""
        option, trainer = f"resume_from_checkpoint={checkpoint!r}", self.trainer
        if trainer.is_fsdp_enabled:
            raise InputError(
                f"{option}: a search inside a Trainer does not resume under FSDP; use RankSearch"
            )
        path = os.path.join(checkpoint, STATE_NAME)
        broken = f"{option}: is no whole checkpoint of a search"
        # any kind: what is no archive, or holds code
        with told_as(broken, Exception, behind="; name another, or train anew"):
            saved = torch.load(path, map_location="cpu", weights_only=True)
        self._saved = saved
        if "supernet" in saved:
            return
        self.genotype = Genotype.load(os.path.join(checkpoint, GENOTYPE_NAME))
        self.adapted = plain_adapter(self.supernet.remove(), self.genotype, None).train()
        load_adapter(self.adapted, os.path.join(checkpoint, SAFETENSORS_WEIGHTS_NAME))

    def _hands_over(self, state) -> bool:
        return self.steps < state.max_steps

    def on_step_end(self, args, state, control, **kwargs):
        if self.genotype is not None:
            return
        self._search_on(control)
        if state.global_step == self.steps and self._hands_over(state):
            self._find(state)
            self._hand_over()

    def _search_on(self, control) -> None:
        """What is due behind a step of the trainer's."""
        if self.loss_fn is not None:
            metrics = self.architect.step(partial(self.loss_fn, self.supernet.model), self.stream)
        else:
            with _figures_kept(self.trainer):
                metrics = self.architect.step(self._loss, self._batches())
        if metrics is not None and control.should_log:
            entropy = float(entropies(self.supernet.probabilities()).mean())
            figures = {name: float(value) for name, value in metrics.items()}
            # past what trainers add to their own line; and the trainer's own line is still to come
            Trainer.log(self.trainer, figures | {"alpha_entropy": entropy})
            control.should_log = True

    def _batches(self) -> Iterator[tuple[Any, Any]]:
        """Batches of the evaluation rows as the trainer prepares them, and its count of each."""
        model, trainer = self.supernet.model, self.trainer
        while True:
            (batch,), count = trainer.get_batch_samples(self.stream, 1, trainer.args.device)
            model.eval()  # in training mode some give a batch of their own, of training rows
            try:
                batch = trainer._prepare_inputs(batch)
            finally:
                model.train()
            yield batch, count

    def _loss(self, prepared: tuple[Any, Any]) -> Tensor:
        """The trainer's own loss."""
        batch, count = prepared
        with self.trainer.compute_loss_context_manager():
            loss: Any = self.trainer.compute_loss(
                self.supernet.model, dict(batch), num_items_in_batch=count
            )
            return loss

    def on_train_end(self, args, state, control, **kwargs):
        if self.genotype is None:
            self._find(state)

    def _hand_over(self) -> None:
        """Put a PEFT adapter in the supernet's place, and its weights into the optimizer."""
        model, trainer = self.supernet.model, self.trainer
        prepared = {name: vars(model)[name] for name in PREPARED if name in vars(model)}
        adapted = plain_adapter(self.supernet.remove(), self.genotype, self.supernet)
        vars(model).update(prepared)  # the autocast of the training that goes on
        trainer.model = self.adapted = adapted.train()
        exchange_parameters(trainer.optimizer, adapted, trainer.get_decay_parameter_names(adapted))

    def _find(self, state) -> None:
        self.genotype = derive_genotype(self.supernet, self.architect, state.max_steps)
        if state.is_world_process_zero:
            show(self.genotype)
            if "sizes" in self.genotype.found_by:
                show_sizes(self.genotype.found_by["sizes"])
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

    def __init__(self, rows: Any, seed: int):
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
