"""Checkpoints of a search: written whole, the newest few kept, read back without pickled code.
Not here: what a search puts into one (search.py)."""

from __future__ import annotations

import glob
import os
import pickle
from typing import Any

import torch

from darts_lora.errors import InputError
from darts_lora.files import write_whole

KEPT = 2


def checkpoints(output_dir: str | None) -> list[str]:
    """Paths of the checkpoints there, oldest first."""
    if output_dir is None:
        return []
    return sorted(glob.glob(os.path.join(glob.escape(output_dir), "checkpoints", "step-*.pt")))


def save_checkpoint(output_dir: str, state: dict[str, Any]) -> None:
    """Write tensors, numbers and texts of `state`, then remove all but the newest few.

    Raises:
        InputError: it cannot be written.
    """
    path = os.path.join(output_dir, "checkpoints", f"step-{state['step']:07d}.pt")
    write_whole(path, lambda temporary: torch.save(state, temporary))
    for old in checkpoints(output_dir)[:-KEPT]:
        os.remove(old)


def load_checkpoint(output_dir: str | None, num_processes: int) -> dict[str, Any]:
    """The newest checkpoint, on the CPU.

    Raises:
        InputError: there is none, it cannot be read, or another number of processes wrote it.
    """
    found = checkpoints(output_dir)
    if not found:
        raise InputError(f"resume: there is no checkpoint in {output_dir!r}; start without it")
    try:
        state = torch.load(found[-1], map_location="cpu", weights_only=True)
    except (OSError, RuntimeError, EOFError, pickle.UnpicklingError) as error:
        raise InputError(
            f"resume: {found[-1]} cannot be read ({' '.join(str(error).split())[:200]}); "
            "remove it to go on from the one before"
        ) from error
    if len(state["random"]) != num_processes:
        raise InputError(
            f"resume: {found[-1]} was written by {len(state['random'])} processes, this run has "
            f"{num_processes}"
        )
    return state


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
