"""Retrains a genotype, or one rank for all of its layers, as a plain PEFT adapter.
Not here: the search itself (search.py), the weights that it begins with (beginning.py), nor how
good the adapter is (evaluate.py)."""

from __future__ import annotations

import contextlib
import json
import os
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
from darts_lora.data.loaders import (
    Rows,
    checked_rows,
    make_collator,
    rows_digest,
    rows_read,
    split_record,
    training_rows,
)
from darts_lora.data.places import ROW
from darts_lora.genotype import Genotype
from darts_lora.lora.frozen import hold_statistics
from darts_lora.lora.models import frozen_digest, load_model
from darts_lora.lora.padded import save_padded
from darts_lora.lora.variants import check_quantized, eva_weights
from darts_lora.run.beginning import (
    RECORD_NAME,
    FinetuneConfig,
    add_adapter,
    check_finetune_start,
    finished,
    first_rows,
    first_step,
    load_adapter,
    resolve_init,
)
from darts_lora.run.callbacks import (
    Checkpoints,
    FinetuneTrainer,
    Progress,
    remove_unfinished,
    training_arguments,
    training_record,
)
from darts_lora.run.checkpoint import FINETUNE, LENGTHS, find_checkpoint, kept
from darts_lora.run.course import check_same_course, digest, task_options, training_options
from darts_lora.run.hub import open_repository, upload
from darts_lora.run.launch import check_launch, explained, launched
from darts_lora.run.together import check_not_anothers
from darts_lora.supernet import Supernet
from darts_lora.views.card import remove_card, write_card
from darts_lora.views.trackers import Views, check_trackers

# all that a finetune leaves, removed before another one trains
RESULTS = [RECORD_NAME, "evaluation.json", SAFETENSORS_WEIGHTS_NAME, "adapter_config.json"]
RESULTS += ["padded"]
# options that change no weight
WHERE = ("output_dir", "resume", "report_to", "push_to_hub", "hub_model_id")


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
    once, the weights last: no file lies beside those of another run. Until then there are
    checkpoints, from which config.resume goes on, bit for bit on a CPU; one that has ended is not
    trained again. A `supernet`, searched in this process, gives its model and what it learnt, so
    that neither is loaded again.

    Returns:
        The trained model, and the record that stands in finetune.json.

    Raises:
        InputError: bad input of any kind, before training starts; a live run in output_dir, an
            unfinished one or one of other options, or an adapter of another model or other data; no
            memory is left; a data worker died.
        DivergedError: a loss that is not finite.
        Stopped: SIGTERM, SIGINT or max_runtime, as of RankSearch.run; a checkpoint was written.
    """
    check_trackers(config.report_to)
    check_finetune(config.output_dir, model, data)
    with locked(config.output_dir):
        check_finetune_start(config.output_dir, config.resume)
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
    check_quantized(config.init_lora_weights, config.use_dora, model.quantization)
    genotype = _load_genotype(config.genotype)
    if config.push_to_hub and PartialState().is_main_process:
        open_repository(config.hub_model_id)
    config = replace(config, init=resolve_init(config, genotype))
    first = first_step(config, genotype, training)
    collator = make_collator(model, data)
    rows = training_rows(data)
    rows, share = checked_rows(rows, collator, data, rows_read(training))
    set_seed(config.seed)  # the initialisation of a new head, and of the LoRA weights
    base: Any
    if supernet is None:
        base = load_model(model)  # the slowest, so behind what can be wrong before it
    else:
        AcceleratorState._reset_state()  # of the search: a Trainer makes its own
        base = supernet.remove()
    collator.limits.of_model(base)
    set_seed(config.seed)
    adapted = add_adapter(base, config, genotype, supernet)
    if config.init_lora_weights == "eva":
        eva_weights(adapted, rows, collator, training.batch_size)
    record = {"genotype": config.genotype, "rank": config.rank, "init": config.init}
    record["supernet_digest"] = genotype and genotype.found_by.get("supernet_digest")
    record |= {"rows": None if data.streaming else len(rows), "supervised_share": share}
    begins_with = first_rows(config, rows, model, data)

    def begin() -> None:
        for name in RESULTS:
            remove(os.path.join(config.output_dir, name))
        remove_card(config.output_dir)
        save_config(config.output_dir, replace(config, resume=False), model, data, training)

    def describe(folder: str, figures: dict[str, Any]) -> None:
        record.update(figures)
        if config.pad_to_max:
            save_padded(adapted, folder, os.path.join(folder, "padded"))
        write_card(folder, adapted, model, data, training, genotype, record)
        write_json(os.path.join(folder, RECORD_NAME), record)

    figures = train(
        adapted, rows, collator, training, config.output_dir,
        seed=config.seed, first_step=first, first_rows=begins_with, resume=config.resume,
        loraplus_lr_ratio=config.loraplus_lr_ratio, report_to=config.report_to,
        course=_course(config, genotype, model, data, training, rows, begins_with),
        begin=begin, describe=describe,
    )  # fmt: skip
    if config.push_to_hub and PartialState().is_main_process:
        record["uploaded"] = upload(config.output_dir, config.hub_model_id)
    return adapted, record | figures


def _course(
    config: FinetuneConfig,
    genotype: Genotype | None,
    model: ModelConfig,
    data: DataConfig,
    training: TrainingConfig,
    rows: Rows,
    begins_with: Sequence[int] | None,
) -> dict[str, Any]:
    """What one that goes on must share; what else the machine decides comes in `train`."""
    if data.streaming:
        which = split_record({}, data)
    else:
        which = {"rows": list(rows[ROW]), "first": begins_with, "digest": rows_digest([rows])}
    own = {name: value for name, value in asdict(config).items() if name not in WHERE}
    own["genotype"] = genotype and digest(asdict(genotype))
    return own | task_options(model, data, which, training) | training_options(training)


def _check_folders(output_dir: str) -> None:
    """InputError where a folder that a finetune replaces is none that a finetune left."""
    folder = os.path.join(output_dir, "padded")
    names = os.listdir(folder) if os.path.isdir(folder) else []
    if names and "adapter_config.json" not in names:
        raise InputError(
            f"output_dir={output_dir!r}: has a folder 'padded' that holds no adapter, and that "
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
    first_rows: Sequence[int] | None = None,
    resume: bool = False,
    course: dict[str, Any] | None = None,
    begin: Callable[[], None] = lambda: None,
    loraplus_lr_ratio: float | None = None,
    describe: Callable[[str, dict[str, Any]], None] = lambda folder, figures: None,
    report_to: str | Sequence[str] = "tensorboard",
) -> dict[str, Any]:
    """Train the adapter in place with transformers' Trainer and save it to output_dir.

    Args:
        first_step: steps of training.max_steps, and of its learning rate, that a search took.
        first_rows: numbers of the rows that come before all others; None: none do.
        resume: go on from the newest checkpoint; where the training has ended, take what it left.
        course: options that decide what is computed, name to value, which one to resume must share.
        begin: called on the first process when nothing can be wrong any more.
        loraplus_lr_ratio: the rate of B over that of A; None: 1.
        describe: (folder, what this returns) -> writes what else belongs to the adapter, which is
            in that folder, there; on the first process.
        report_to: trackers of the losses, as of RankSearch.

    Returns:
        trainable_parameters (count), losses ([step, mean since the entry before] pairs), loss (mean
        of their last tenth), steps, seconds, versions, course; of one that has ended its record.

    Raises:
        InputError: nothing to resume from, or a training of another course.
        DivergedError: a loss that is not finite; the last checkpoint stays.
    """
    hold_statistics(model, [m for m in model.modules() if isinstance(m, ModulesToSaveWrapper)])
    trainable = [p for p in model.parameters() if p.requires_grad]
    course = {**(course or training_options(training)), "base_weights": frozen_digest(model)}
    # Float32 adapters on a base in 16 bits: without autocast, PEFT copies activations to float32.
    half = model.dtype in (torch.bfloat16, torch.float16)
    if half and training.mixed_precision == "no" and trainable[0].dtype == torch.float32:
        bf16 = model.dtype == torch.bfloat16
        training = replace(training, mixed_precision="bf16" if bf16 else "fp16")
    stop = StopRequest(training.max_runtime)
    with explained():
        trainer = FinetuneTrainer(
            model=model,
            args=training_arguments(training, output_dir, seed, first_step),
            train_dataset=dataset,
            data_collator=collator,
        )
    with contextlib.suppress(OSError):
        os.rmdir(trainer.args.output_dir)  # which the Trainer makes; an empty one
    trainer.training, trainer.first_step, trainer.first_rows = training, first_step, first_rows
    trainer.loraplus_lr_ratio = loraplus_lr_ratio
    course |= {LENGTHS[FINETUNE]: trainer.args.max_steps} | launched(trainer.accelerator)
    course = json.loads(json.dumps(course))
    path, seconds = None, 0.0
    if resume and (done := finished(output_dir)):
        check_same_course(course, done["course"], "finetune")
        load_adapter(model, os.path.join(output_dir, SAFETENSORS_WEIGHTS_NAME))
        if trainer.is_world_process_zero():
            remove_unfinished(output_dir)  # of a process killed just behind its end
        return done
    if resume:
        path, found = find_checkpoint(output_dir)
        check_same_course(course, found["options"], "finetune")
        seconds = found["seconds"]
    if trainer.is_world_process_zero():
        begin()
        remove_unfinished(output_dir, but=path)
    saved = Checkpoints(trainer, training.save_steps, output_dir, stop, course, seconds)
    trainer.add_callback(saved)
    trainer.remove_callback(ProgressCallback)  # prints whole dictionaries
    trainer.add_callback(Progress)
    trainer.add_callback(Views(check_trackers(report_to), output_dir, asdict(training)))
    with (
        stop,
        told_as_input_errors(lambda: kept(output_dir, FINETUNE)),
        disable_input_dtype_casting(model, active=half),
    ):
        trainer.go_on(path)
        # within: a request to stop behind the last step waits until all is written
        figures = training_record(trainer, saved.seconds) | {"course": course}

        def write(folder: str) -> None:
            model.save_pretrained(folder)
            describe(folder, figures)

        if trainer.is_world_process_zero():
            write_into(output_dir, write, SAFETENSORS_WEIGHTS_NAME)
            remove_unfinished(output_dir)
    return figures
