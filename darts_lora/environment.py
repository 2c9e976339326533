"""accelerate's environment variables: what they may decide of a run, and bad ones told in a line.
Not here: the number of processes and their devices, which accelerate alone decides."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

from accelerate import Accelerator

from darts_lora.errors import InputError, one_line


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


def check_accumulation(accelerator: Accelerator) -> None:
    """InputError where accelerate would divide each loss once more than a search does."""
    steps = accelerator.gradient_accumulation_steps
    if steps != 1:
        raise InputError(
            f"gradient_accumulation_steps={steps} of the accelerator: a search accumulates by "
            "TrainingConfig.gradient_accumulation_steps; make the accelerator with 1"
        )


def decided(accelerator: Accelerator) -> dict[str, Any]:
    """What the environment decided of how a model is computed, by name."""
    return {
        "accelerate_mixed_precision": accelerator.mixed_precision,
        "accelerate_dynamo_backend": accelerator.state.dynamo_plugin.backend.value,
    }
