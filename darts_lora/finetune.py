"""Retrains a genotype, or one rank for all of its layers, as a plain PEFT adapter.
Not here: the search itself (search.py), nor how good the adapter is (evaluate.py)."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from typing import Any

import torch
from accelerate import PartialState
from accelerate.state import AcceleratorState
from peft import PeftModel
from peft.helpers import disable_input_dtype_casting
from peft.utils import SAFETENSORS_WEIGHTS_NAME, ModulesToSaveWrapper
from transformers import (
    ProgressCallback,
    set_seed,
)

from darts_lora.base.errors import InputError
from darts_lora.base.files import check_writable, locked, remove, write_into, write_json
from darts_lora.base.interruption import StopRequest, told_as_input_errors
from darts_lora.base.options import save_config
from darts_lora.config import DataConfig, ModelConfig, TrainingConfig
from darts_lora.data.collator import Collator
from darts_lora.data.label_collator import LabelCollator
from darts_lora.data.loaders import Rows, checked_rows, make_collator, rows_read, training_rows
from darts_lora.genotype import Genotype
from darts_lora.lora.frozen import hold_statistics
from darts_lora.lora.models import load_model
from darts_lora.lora.padded import save_padded
from darts_lora.run.beginning import FinetuneConfig, add_adapter, first_step, resolve_init
from darts_lora.run.callbacks import (
    FinetuneTrainer,
    Progress,
    SaveAdapter,
    kept,
    training_arguments,
    training_record,
)
from darts_lora.run.launch import check_launch, explained
from darts_lora.run.together import check_not_anothers
from darts_lora.supernet import Supernet
from darts_lora.views.trackers import Views, check_trackers

# all that a finetune leaves, removed before another one trains
RESULTS = ("finetune.json", "evaluation.json", SAFETENSORS_WEIGHTS_NAME, "adapter_config.json")
RESULTS += ("checkpoint", "padded")


def finetune(
    config: FinetuneConfig,
    model: ModelConfig,
    data: DataConfig,
    training: TrainingConfig,
    supernet: Supernet | None = None,
) -> tuple[PeftModel, dict[str, Any]]:
    """Train an adapter on training and validation rows together and save it to output_dir.

    Writes config.yaml when training starts, in place of all that an earlier finetune left there;
    then adapter_model.safetensors and adapter_config.json (PEFT's own format) and finetune.json at
    once, the weights last: no file lies beside those of another run. A `supernet`, searched in this
    process, gives its model and what it learnt, so that neither is loaded again.

    Returns:
        The trained model, and the record that stands in finetune.json.

    Raises:
        InputError: bad input of any kind, before training starts; a live run in output_dir, or an
            adapter of another model or other data; no memory is left; a data worker died.
        DivergedError: a loss that is not finite.
        Stopped: SIGTERM, SIGINT or max_runtime, as of RankSearch.run; the adapter so far is in
            output_dir/checkpoint.
    """
    check_trackers(config.report_to)
    check_finetune(config.output_dir, model, data)
    with locked(config.output_dir):
        return _finetune(config, model, data, training, supernet)


def check_finetune(output_dir: str, model: ModelConfig, data: DataConfig) -> None:
    """Whether a finetune can run as this process was launched, and write there; or InputError."""
    if os.environ.get("ACCELERATE_USE_FSDP") == "true":
        raise InputError(
            "distributed_type=FSDP: a finetune keeps whole weights on each process; launch it with "
            "recipes/accelerate_configs/ddp.yaml or single.yaml"
        )
    check_launch()
    check_writable(output_dir)
    check_not_anothers(output_dir, model, data)
    _check_folders(output_dir)


def _finetune(
    config: FinetuneConfig,
    model: ModelConfig,
    data: DataConfig,
    training: TrainingConfig,
    supernet: Supernet | None,
) -> tuple[PeftModel, dict[str, Any]]:
    genotype = _load_genotype(config.genotype)
    config = replace(config, init=resolve_init(config, genotype))
    first = first_step(config, genotype, training)
    collator = make_collator(model, data)
    rows = training_rows(data, config.seed)
    rows, share = checked_rows(rows, collator, data, rows_read(training))
    set_seed(config.seed)  # the initialisation of a new head, and of the LoRA weights
    if supernet is None:
        base = load_model(model)  # the slowest, so behind what can be wrong before it
    else:
        AcceleratorState._reset_state()  # of the search: a Trainer makes its own
        base = supernet.remove()
    collator.limits.of_model(base)
    set_seed(config.seed)
    adapted = add_adapter(base, config, genotype, supernet)
    record = {"genotype": config.genotype, "rank": config.rank, "init": config.init}
    record["supernet_digest"] = genotype and genotype.found_by.get("supernet_digest")
    record |= {"rows": None if data.streaming else len(rows), "supervised_share": share}

    def describe(folder: str, figures: dict[str, Any]) -> None:
        record.update(figures)
        if config.pad_to_max:
            save_padded(folder, os.path.join(folder, "padded"))
        write_json(os.path.join(folder, "finetune.json"), record)

    if PartialState().is_main_process:
        for name in RESULTS:
            remove(os.path.join(config.output_dir, name))
        save_config(config.output_dir, config, model, data, training)
    figures = train(
        adapted, rows, collator, training, config.output_dir,
        seed=config.seed, first_step=first, describe=describe, report_to=config.report_to,
    )  # fmt: skip
    return adapted, record | figures


def _check_folders(output_dir: str) -> None:
    """InputError where a folder that a finetune replaces is none that a finetune left."""
    for name in ("checkpoint", "padded"):
        folder = os.path.join(output_dir, name)
        names = os.listdir(folder) if os.path.isdir(folder) else []
        if names and "adapter_config.json" not in names:
            raise InputError(
                f"output_dir={output_dir!r}: has a folder {name!r} that holds no adapter, and that "
                "a finetune would replace; name another output_dir, or rename that folder"
            )


def _load_genotype(path: str | None) -> Genotype | None:
    if path is not None and not os.path.isfile(path):
        raise InputError(
            f"genotype={path!r}: no such file; run `accelerate launch recipes/search.py` first, "
            "or name the file with --genotype"
        )
    return None if path is None else Genotype.load(path)


def train(
    model: PeftModel,
    dataset: Rows,
    collator: Collator | LabelCollator,
    training: TrainingConfig,
    output_dir: str,
    *,
    seed: int = 0,
    first_step: int = 0,
    describe: Callable[[str, dict[str, Any]], None] = lambda folder, figures: None,
    report_to: str | Sequence[str] = "tensorboard",
) -> dict[str, Any]:
    """Train the adapter in place with transformers' Trainer and save it to output_dir.

    Args:
        first_step: steps of training.max_steps, and of its learning rate, that a search took.
        describe: (folder, what this returns) -> writes what else belongs to the adapter, which is
            in that folder, there; on the first process.
        report_to: trackers of the losses, as of RankSearch.

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
    with explained():
        trainer = FinetuneTrainer(
            model=model,
            args=training_arguments(training, output_dir, seed, first_step),
            train_dataset=dataset,
            data_collator=collator,
        )
    trainer.first_step = first_step
    trainer.add_callback(SaveAdapter(trainer, training.save_steps, folder, stop))
    trainer.remove_callback(ProgressCallback)  # prints whole dictionaries
    trainer.add_callback(Progress)
    trainer.add_callback(Views(check_trackers(report_to), output_dir, asdict(training)))
    start = time.perf_counter()
    with (
        stop,
        told_as_input_errors(lambda: kept(folder)),
        disable_input_dtype_casting(model, active=half),
    ):
        trainer.train()
        # within: a request to stop behind the last step waits until all is written
        figures = training_record(trainer, time.perf_counter() - start)

        def write(folder: str) -> None:
            model.save_pretrained(folder)
            describe(folder, figures)

        if trainer.is_world_process_zero():
            write_into(output_dir, write, SAFETENSORS_WEIGHTS_NAME)
    return figures
