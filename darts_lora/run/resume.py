"""The state of a search: all that another process needs to go on exactly where this one was, and
whether it may. Not here: files (checkpoint.py), what is done with it (search.py)."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator
from dataclasses import asdict
from typing import Any

import torch
from accelerate.utils import broadcast_object_list, gather_object

from darts_lora.base.errors import InputError, one_line
from darts_lora.base.files import remove
from darts_lora.base.interruption import lacks_memory
from darts_lora.lora.models import frozen_digest
from darts_lora.lora.sharded import full, shard_as
from darts_lora.run.checkpoint import (
    SEARCH,
    check_free,
    checkpoints,
    remove_checkpoints,
    steps_done,
)
from darts_lora.run.course import training_options
from darts_lora.run.launch import launched


def course_options(search: Any, more: dict[str, Any]) -> dict[str, Any]:
    """All options that decide the course of a search, as JSON gives them back; to be called before
    anything shards the model."""
    options = asdict(search.supernet.config) | training_options(search.training) | more
    options["search_steps"] = search.steps
    options |= launched(search.accelerator)
    # of the first process: with FSDP2 the others may have no weights yet
    options["base_weights"] = broadcast_object_list([frozen_digest(search.supernet.model)])[0]
    return json.loads(json.dumps(options))


def check_start(output_dir: str | None, resume: bool) -> None:
    """Whether a search may start, or go on, in this folder; or InputError (check_free)."""
    check_free(output_dir, SEARCH, resume, is_finished(output_dir))


def is_finished(output_dir: str | None) -> bool:
    """Whether a search ended there."""
    done = steps_done(output_dir)
    ended = done is not None and done[0] >= done[1]["search_steps"]
    return ended and os.path.exists(os.path.join(output_dir or "", "genotype.json"))


def remove_search(output_dir: str) -> None:
    """Remove what a finished search left (see check_start), before anything of a new one is
    written: what a killed run leaves is of one search."""
    for name in ("genotype.json", "supernet.safetensors"):
        remove(os.path.join(output_dir, name))
    remove_checkpoints(checkpoints(output_dir))


def capture(search: Any) -> dict[str, Any]:
    """Tensors and plain numbers; on all processes at once."""
    return {
        "step": search.step,
        "seconds": search.seconds,
        "supernet": full(search.supernet.state_dict()),
        "optimizer": full(search.weights.optimizer.state_dict()),
        "scaler": search.accelerator.scaler and search.accelerator.scaler.state_dict(),
        "scheduler": search.weights.scheduler.state_dict(),
        "architect": full(search.architect.state_dict()),
        "streams": [stream.position for stream in search.streams],
        "random": gather_object([random_state(search.accelerator.device)]),
    }


def restore(search: Any, state: dict[str, Any]) -> None:
    """Set what capture gave; raises InputError where the state is not of such a search."""
    with _of_this_release():
        _restore(search, state)
        positions = [(int(epoch), int(taken)) for epoch, taken in state["streams"]]
        streams = list(zip(search.streams, positions, strict=True))
    for stream, position in streams:
        stream.move_to(position)
    with _of_this_release():  # last: opening a stream draws random numbers
        restore_random_state(state["random"][search.accelerator.process_index])


@contextlib.contextmanager
def _of_this_release() -> Iterator[None]:
    """What does not fit into this search, as an InputError."""
    try:
        yield
    except InputError:
        raise
    except (LookupError, TypeError, ValueError, AttributeError, RuntimeError) as error:
        if lacks_memory(error):
            raise
        raise InputError(
            "resume: the checkpoint's state is of another release, or of another search "
            f"({type(error).__name__}: {one_line(error)}); go on with the release that wrote it, "
            "or start anew in another output_dir"
        ) from error


def _restore(search: Any, state: dict[str, Any]) -> None:
    search.step, search.seconds = state["step"], state["seconds"]
    own, saved = search.supernet.state_dict(), state["supernet"]
    if own.keys() == saved.keys():
        saved = {name: shard_as(own[name], value) for name, value in saved.items()}
    search.supernet.load_state_dict(saved)
    parameters = search.weights.parameters
    optimizer = {
        number: {
            name: shard_as(parameters[number], value) if value.dim() else value  # a count of steps
            for name, value in values.items()
        }
        for number, values in state["optimizer"]["state"].items()
    }
    search.weights.optimizer.load_state_dict({**state["optimizer"], "state": optimizer})
    if search.accelerator.scaler is not None:
        search.accelerator.scaler.load_state_dict(state["scaler"])
    search.weights.scheduler.load_state_dict(state["scheduler"])
    architect = state["architect"]
    weights = {
        name: [shard_as(*pair) for pair in zip(parameters, architect[name], strict=False)]
        for name in ("mean", "half")
    }
    search.architect.load_state_dict(architect | weights)


def check_alpha_is_one(search: Any) -> None:
    """Raises InputError where the processes' alphas are not bitwise equal."""
    if search.accelerator.num_processes == 1:
        return
    alpha = search.supernet.alpha.detach()
    copies = search.accelerator.gather(alpha[None])
    if not all(torch.equal(copy, copies[0]) for copy in copies):
        raise InputError(
            f"num_processes={search.accelerator.num_processes}: alpha differs between processes at "
            f"step {search.step}: stopped; does code of yours change it on some of them?"
        )


def random_state(device: torch.device) -> dict[str, torch.Tensor]:
    """State of the generators that samples and dropout draw from, on this process."""
    state = {"cpu": torch.get_rng_state()}
    if device.type == "cuda":
        state["cuda"] = torch.cuda.get_rng_state(device)
    return state


def restore_random_state(state: dict[str, torch.Tensor]) -> None:
    """Set what random_state gave."""
    torch.set_rng_state(state["cpu"])
    if "cuda" in state:
        torch.cuda.set_rng_state(state["cuda"])
