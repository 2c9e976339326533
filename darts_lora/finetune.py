"""Retrains a genotype, or one rank for all of its layers, as a plain PEFT adapter.
Not here: the search itself (search.py), nor how good the adapter is (evaluate.py)."""

from __future__ import annotations

import os
import sys
import time
from dataclasses import dataclass, replace
from importlib.util import find_spec
from typing import Any, Literal

import peft
import torch
import transformers
from accelerate import PartialState
from peft import PeftModel, get_peft_model, set_peft_model_state_dict
from peft.helpers import disable_input_dtype_casting
from peft.utils import SAFETENSORS_WEIGHTS_NAME, ModulesToSaveWrapper
from torch import nn
from transformers import (
    ProgressCallback,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    set_seed,
)

from darts_lora.bounds import check_bounds
from darts_lora.collator import Collator
from darts_lora.config import DataConfig, ModelConfig, TrainingConfig
from darts_lora.data import Rows, make_collator, training_rows
from darts_lora.errors import DivergedError, InputError
from darts_lora.files import check_writable, locked, remove, write_into, write_json, write_whole
from darts_lora.frozen import hold_statistics
from darts_lora.genotype import Genotype
from darts_lora.interruption import Stopped, StopRequest, told_as_input_errors, worker_context
from darts_lora.label_collator import LabelCollator
from darts_lora.launch import check_launch
from darts_lora.models import load_model
from darts_lora.padded import save_padded
from darts_lora.supernet import SUPERNET_NAME
from darts_lora.targets import (
    check_fresh,
    check_unshared,
    match_modules,
    match_saved_modules,
    task_type,
)
from darts_lora.together import check_not_anothers

RESULTS = ("finetune.json", "evaluation.json", SAFETENSORS_WEIGHTS_NAME, "adapter_config.json")
RESULTS += ("checkpoint", "padded")


@dataclass
class FinetuneConfig:
    """What is retrained, from where, and where it goes."""

    genotype: str | None = "runs/search/genotype.json"
    """File of the genotype (JSON). null, together with rank: the layers of target_modules."""
    rank: int | None = None
    """Uniform baseline: this rank for every layer of the genotype; default: the genotype's own."""
    target_modules: str | list[str] = "all-linear"
    """Layers of a uniform baseline without a genotype, as in a search."""
    scaling: float = 2.0
    """lora_alpha / r of a uniform baseline without a genotype."""
    init: Literal["scratch", "inherit"] = "scratch"
    """scratch: fresh LoRA weights; inherit: those that the search left beside the genotype."""
    adapter_dtype: Literal["float32", "bfloat16"] = "float32"
    """Data type of the LoRA weights. float32 on a base in 16 bits trains under autocast."""
    pad_to_max: bool = False
    """Save the adapter a second time, with zeros up to the largest rank for all layers, in
    output_dir/padded: for engines that ignore rank_pattern."""
    output_dir: str = "runs/finetune"
    """Folder for the adapter, finetune.json and config.yaml."""
    seed: int = 0
    """Seed of the LoRA weights and of the data order."""

    def __post_init__(self):
        check_bounds(
            self,
            at_least={"rank": 1, "seed": 0},
            above={"scaling": 0.0},
        )
        if self.rank is None and self.genotype is None:
            raise InputError("genotype=None: give a genotype, or a rank for a uniform baseline")
        if self.rank is not None and self.init == "inherit":
            raise InputError("init='inherit': a search leaves weights for its genotype alone")


def finetune(
    config: FinetuneConfig, model: ModelConfig, data: DataConfig, training: TrainingConfig
) -> tuple[PeftModel, dict[str, Any]]:
    """Train an adapter on training and validation rows together and save it to output_dir.

    Writes adapter_model.safetensors and adapter_config.json (PEFT's own format) and finetune.json.
    What an earlier finetune left there is removed when training starts.

    Returns:
        The trained model, and the record that stands in finetune.json.

    Raises:
        InputError: bad input of any kind, before training starts; a live run in output_dir, or an
            adapter of another model or other data; no memory is left; a data worker died.
        DivergedError: a loss that is not finite.
        Stopped: SIGTERM, SIGINT or max_runtime, as of RankSearch.run; the adapter so far is in
            output_dir/checkpoint.
    """
    if os.environ.get("ACCELERATE_USE_FSDP") == "true":
        raise InputError(
            "distributed_type=FSDP: a finetune keeps whole weights on each process; launch it with "
            "recipes/accelerate_configs/ddp.yaml or single.yaml"
        )
    check_launch()
    check_writable(config.output_dir)
    check_not_anothers(config.output_dir, model, data)
    with locked(config.output_dir):
        return _finetune(config, model, data, training)


def _finetune(
    config: FinetuneConfig, model: ModelConfig, data: DataConfig, training: TrainingConfig
) -> tuple[PeftModel, dict[str, Any]]:
    genotype = _load_genotype(config.genotype)
    collator = make_collator(model, data)
    rows = training_rows(data, config.seed)
    share = collator.check(rows)
    set_seed(config.seed)  # the initialisation of a new head, and of the LoRA weights
    base = load_model(model)  # the slowest, so behind what can be wrong before it
    set_seed(config.seed)
    adapted = add_adapter(base, config, genotype)
    record = {"genotype": config.genotype, "rank": config.rank, "init": config.init}
    record |= {"rows": None if data.streaming else len(rows), "supervised_share": share}
    record |= train(adapted, rows, collator, training, config.output_dir, seed=config.seed)
    if PartialState().is_main_process:
        if config.pad_to_max:
            save_padded(config.output_dir, os.path.join(config.output_dir, "padded"))
        write_json(os.path.join(config.output_dir, "finetune.json"), record)
    return adapted, record


def _load_genotype(path: str | None) -> Genotype | None:
    if path is not None and not os.path.isfile(path):
        raise InputError(
            f"genotype={path!r}: no such file; run `accelerate launch recipes/search.py` first, "
            "or name the file with --genotype"
        )
    return None if path is None else Genotype.load(path)


def add_adapter(base: nn.Module, config: FinetuneConfig, genotype: Genotype | None) -> PeftModel:
    """`base` with fresh or inherited LoRA weights.

    Raises:
        InputError: layers that are not in the model, or share their weights; no searched weights to
            inherit, or a genotype that does not train what the model's checkpoint lacks.
    """
    if genotype is None:
        names = match_modules(base, config.target_modules)
        saved = match_saved_modules(base, None)
        genotype = Genotype(dict.fromkeys(names, 1), config.scaling, modules_to_save=saved)
    if config.rank is not None:
        genotype = replace(genotype, ranks=dict.fromkeys(genotype.ranks, config.rank))
    genotype = genotype.with_shapes(base)
    check_unshared(base, [name for name, rank in genotype.ranks.items() if rank])
    lora_config = genotype.to_lora_config(base, task_type=task_type(base))
    model = get_peft_model(base, lora_config)
    check_fresh(model, f"genotype={config.genotype!r}")
    if config.init == "inherit":
        _inherit(model, genotype, os.path.join(os.path.dirname(config.genotype), SUPERNET_NAME))
    if config.adapter_dtype == "bfloat16":
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.data = parameter.data.bfloat16()
    return model


def _inherit(model: PeftModel, genotype: Genotype, path: str) -> None:
    """Copy the chosen branches in the supernet's file into the adapter: all, or an error."""
    state = genotype.inherited_state(path)
    try:
        result = set_peft_model_state_dict(model, state)
    except RuntimeError as error:
        reason = " ".join(str(error).split())[:300]
        raise InputError(f"init='inherit': {path} is of another model ({reason})") from error
    missing = [key for key in result.missing_keys if "lora_" in key]
    if missing or result.unexpected_keys:
        raise InputError(f"init='inherit': {path} does not fill {missing + result.unexpected_keys}")


def train(
    model: PeftModel,
    dataset: Rows,
    collator: Collator | LabelCollator,
    training: TrainingConfig,
    output_dir: str,
    *,
    seed: int = 0,
) -> dict[str, Any]:
    """Train the adapter in place with transformers' Trainer and save it to output_dir, in place of
    what an earlier finetune left there.

    Returns:
        trainable_parameters (count), losses ([step, mean since the entry before] pairs), loss (mean
        of their last tenth), steps, seconds, versions.

    Raises:
        DivergedError: a loss that is not finite; the adapter of output_dir/checkpoint stays.
    """
    hold_statistics(model, [m for m in model.modules() if isinstance(m, ModulesToSaveWrapper)])
    trainable = [p for p in model.parameters() if p.requires_grad]
    # Float32 adapters on a base in 16 bits: without autocast, PEFT copies activations to float32.
    half = model.dtype in (torch.bfloat16, torch.float16)
    if half and training.mixed_precision == "no" and trainable[0].dtype == torch.float32:
        precision = "bf16" if model.dtype == torch.bfloat16 else "fp16"
        training = replace(training, mixed_precision=precision)
    stop, folder = StopRequest(training.max_runtime), os.path.join(output_dir, "checkpoint")
    trainer = _Trainer(
        model=model,
        args=_arguments(training, output_dir, seed),
        train_dataset=dataset,
        data_collator=collator,
    )
    trainer.add_callback(_SaveAdapter(trainer, training.save_steps, folder, stop))
    trainer.remove_callback(ProgressCallback)  # prints whole dictionaries
    trainer.add_callback(_Progress)
    if trainer.is_world_process_zero():
        for name in RESULTS:
            remove(os.path.join(output_dir, name))
    start = time.perf_counter()
    with (
        stop,
        told_as_input_errors(lambda: _kept(folder)),
        disable_input_dtype_casting(model, active=half),
    ):
        trainer.train()
    seconds = time.perf_counter() - start
    if trainer.is_world_process_zero():
        write_into(output_dir, model.save_pretrained, SAFETENSORS_WEIGHTS_NAME)
    return _record(trainer, seconds)


def _arguments(training: TrainingConfig, output_dir: str, seed: int) -> TrainingArguments:
    args = TrainingArguments(
        output_dir=output_dir,
        max_steps=training.max_steps,
        per_device_train_batch_size=training.batch_size,
        gradient_accumulation_steps=training.gradient_accumulation_steps,
        learning_rate=training.learning_rate,
        weight_decay=training.weight_decay,
        lr_scheduler_type=training.scheduler_type,
        warmup_steps=training.lr_warmup_steps,
        max_grad_norm=training.max_grad_norm,
        bf16=training.mixed_precision == "bf16",
        fp16=training.mixed_precision == "fp16",
        logging_steps=min(training.logging_steps, training.max_steps),
        logging_nan_inf_filter=False,  # our own check names the step
        save_strategy="no",  # its checkpoints are pickles; _SaveAdapter writes safetensors
        dataloader_num_workers=training.num_workers,
        dataloader_pin_memory=torch.cuda.is_available(),
        accelerator_config={"dispatch_batches": False},  # of a stream: batches are of all lengths
        remove_unused_columns=False,  # the collator reads the columns
        label_names=["labels"],
        report_to=["tensorboard"] if find_spec("tensorboard") else [],
        use_cpu=PartialState().device.type == "cpu",  # else it refuses bf16 there
        seed=seed,
    )
    # One process uses one GPU, as in a search; the Trainer would feed all of them (DataParallel).
    args._n_gpu = min(args.n_gpu, 1)
    return args


class _Trainer(Trainer):
    """Stops at a loss that is not finite, on any process, before it enters the weights."""

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


class _Progress(ProgressCallback):
    """The bar with the time left; beside it one number, the loss."""

    def on_log(self, args, state, control, logs=None, **kwargs):
        if self.training_bar is not None and "loss" in logs:
            self.training_bar.set_postfix(loss=f"{logs['loss']:.4f}")


class _SaveAdapter(TrainerCallback):
    """The adapter to `folder` every `save_steps` steps (0: never) and where a stop is asked for."""

    def __init__(self, trainer: Trainer, save_steps: int, folder: str, stop: StopRequest):
        self.trainer, self.save_steps, self.folder, self.stop = trainer, save_steps, folder, stop

    def on_step_end(self, args, state, control, model=None, **kwargs):
        last = state.global_step == state.max_steps
        status = 0 if last else self.stop.agreed(self.trainer.accelerator)
        due = self.save_steps > 0 and state.global_step % self.save_steps == 0
        if (due or status) and state.is_world_process_zero:
            write_whole(self.folder, model.save_pretrained)
        if status:
            if state.is_world_process_zero:
                print(
                    f"\n{self.stop.reason(status)}: stopped after step {state.global_step} of "
                    f"{state.max_steps}; {_kept(self.folder)}",
                    file=sys.stderr,
                    flush=True,
                )
            raise Stopped(status)


def _kept(folder: str) -> str:
    if not os.path.isdir(folder):
        return "no adapter was written"
    return f"{folder} has the last adapter that was saved; a finetune starts anew"


def _record(trainer: Trainer, seconds: float) -> dict[str, Any]:
    losses = [(log["step"], log["loss"]) for log in trainer.state.log_history if "loss" in log]
    last = [loss for _, loss in losses[-max(1, len(losses) // 10) :]]
    return {
        "trainable_parameters": trainer.get_num_trainable_parameters(),
        "loss": sum(last) / len(last) if last else None,
        "losses": losses,
        "steps": trainer.state.global_step,
        "seconds": round(seconds, 3),
        "versions": {m.__name__: m.__version__ for m in (torch, transformers, peft)},
    }
