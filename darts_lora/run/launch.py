"""How processes were launched, and the accelerator of a search: what works of accelerate's ways,
what its environment variables may decide, and bad ones told in a line.
Not here: what is trained in them (bilevel.py, finetune.py)."""

from __future__ import annotations

import contextlib
import os
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.data_loader import SeedableRandomSampler
from accelerate.utils import (
    DataLoaderConfiguration,
    DistributedDataParallelKwargs,
    DistributedType,
    GradientAccumulationPlugin,
)
from torch import nn
from torch.utils.data import DataLoader, IterableDataset, SequentialSampler

from darts_lora.base.errors import InputError, one_line

WAYS = "launch with recipes/accelerate_configs/ddp.yaml, fsdp2.yaml or single.yaml"
# What accelerate launch says of the ways that shard or cut a model -> the name of the way.
ENGINES = {"ACCELERATE_USE_DEEPSPEED": "DEEPSPEED", "ACCELERATE_USE_MEGATRON_LM": "MEGATRON_LM"}
# Every layer's membership is a constant buffer: not to be sent anew before each forward. Gradients
# are views of what DDP reduces: no second copy of them. Layers may rest: the last ones of a vision
# tower that is read before its end, all of it on rows without images.
DDP_OPTIONS = DistributedDataParallelKwargs(
    broadcast_buffers=False, gradient_as_bucket_view=True, find_unused_parameters=True
)


def check_launch() -> None:
    """Refuse, before anything is loaded, what check_distribution would refuse later.

    Raises:
        InputError: accelerate launch was told to use FSDP's first version, DeepSpeed, Megatron-LM.
    """
    for variable, name in ENGINES.items():
        if os.environ.get(variable, "").lower() == "true":
            _refuse(f"distributed_type={name}")
    sharded = os.environ.get("ACCELERATE_USE_FSDP", "").lower() == "true"
    if sharded and os.environ.get("FSDP_VERSION", "1") != "2":
        _refuse("fsdp_version=1")


@contextlib.contextmanager
def explained() -> Iterator[None]:
    """What accelerate raises of its environment variables while it starts, as an InputError."""
    try:
        yield
    except InputError:
        raise
    except (ValueError, KeyError, ImportError, NotImplementedError) as error:
        raise InputError(
            f"accelerate cannot start ({type(error).__name__}: {one_line(error)}); look at the "
            "environment variables ACCELERATE_* and FSDP_*, and at `accelerate env`"
        ) from error


def check_distribution(accelerator: Accelerator) -> None:
    """Whether a search can train in this accelerator's way.

    Raises:
        InputError: it flattens, cuts or owns the weights.
    """
    kind = accelerator.distributed_type
    if kind == DistributedType.FSDP and not accelerator.is_fsdp2:
        _refuse("fsdp_version=1")
    if kind in (DistributedType.DEEPSPEED, DistributedType.MEGATRON_LM):
        _refuse(f"distributed_type={kind.value}")


def _refuse(what: str) -> None:
    raise InputError(
        f"{what}: hides which weights belong to which layer, and alpha's beside them; {WAYS} "
        "(fsdp_version: 2)"
    )


def check_accumulation(accelerator: Accelerator) -> None:
    """InputError where accelerate would divide each loss once more than a search does."""
    steps = accelerator.gradient_accumulation_steps
    if steps != 1:
        raise InputError(
            f"gradient_accumulation_steps={steps} of the accelerator: a search accumulates by "
            "TrainingConfig.gradient_accumulation_steps; make the accelerator with 1"
        )


def search_accelerator(model: nn.Module, precision: str, own: Accelerator | None) -> Accelerator:
    """The accelerator of a search: its caller's own, or one for the precision.

    Raises:
        InputError: a bad environment variable of accelerate's, or a way to train or to accumulate
            that a search does not go.
    """
    accelerator = own or _accelerator(model, precision)
    check_distribution(accelerator)
    check_accumulation(accelerator)
    return accelerator


def _accelerator(model: nn.Module, precision: str) -> Accelerator:
    if precision == "no" and getattr(model, "dtype", None) == torch.float16:
        precision = "fp16"  # as in a finetune: small gradients would be 0 without loss scaling
    with explained():
        return Accelerator(
            mixed_precision=precision,
            kwargs_handlers=[DDP_OPTIONS],
            # its environment variable would divide our losses
            gradient_accumulation_plugin=GradientAccumulationPlugin(num_steps=1),
            dataloader_config=DataLoaderConfiguration(dispatch_batches=False),
        )


def launched(accelerator: Accelerator) -> dict[str, Any]:
    """What launch and environment decided of how a model is computed, by name."""
    return {
        "num_processes": accelerator.num_processes,
        "device": accelerator.device.type,
        "accelerate_mixed_precision": accelerator.mixed_precision,
        "accelerate_dynamo_backend": accelerator.state.dynamo_plugin.backend.value,
    }


def prepare_loaders(
    accelerator: Accelerator, loaders: Sequence[DataLoader], seed: int, resumable: bool
) -> list[DataLoader]:
    """The loaders, prepared so that `seed` decides the order of rows: the same on all processes,
    although each draws samples of its own, and again when a search resumes; with `resumable`, a
    warning where that cannot be."""
    own = accelerator.dataloader_config
    given = seed if own.data_seed is None else own.data_seed
    accelerator.dataloader_config = replace(own, use_seedable_sampler=True, data_seed=given)
    try:
        prepared = [accelerator.prepare(loader) for loader in loaders]
    finally:
        accelerator.dataloader_config = own
    try:
        check_replays(prepared)
    except InputError as error:
        if resumable:
            warnings.warn(f"this search cannot be resumed; {error}", stacklevel=3)
    return prepared


def check_replays(loaders: Sequence[DataLoader]) -> None:
    """Whether a resumed search sees rows in the order that one in one go would.

    Raises:
        InputError: a sampler draws an order that no epoch's number brings back.
    """
    for loader in loaders:
        if isinstance(loader.dataset, IterableDataset):
            continue  # by its own set_epoch, or as it lies
        batches = loader.sampler if loader.batch_sampler is None else loader.batch_sampler
        batches = getattr(batches, "batch_sampler", batches)  # shared out to processes
        sampler = getattr(batches, "sampler", batches)
        known = isinstance(sampler, SequentialSampler | SeedableRandomSampler)
        if not known and not hasattr(sampler, "set_epoch"):
            raise InputError(
                f"resume: the {type(sampler).__name__} of a data loader does not give its order of "
                "rows again; use shuffle=True, a sampler with set_epoch, or start anew"
            )
