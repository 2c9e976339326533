"""Lines of libraries that a user cannot act on: left out by words, logger or place.
Not here: warnings that say what to change, which stay."""

from __future__ import annotations

import contextlib
import ctypes
import logging
import os
import sys
import warnings
from collections.abc import Iterator
from functools import partial

# logger -> how the line begins. Both come of imports by transformers and PEFT, wanted or not.
LINES = {
    "torch.utils._pytree": "%s is an Enum subclass and is now natively supported",
    "bitsandbytes.backends.cpu.ops": "Failed to load CPU gemm_4bit_forward",
}
# How warnings begin. PEFT asks newer models of transformers for what they have renamed.
WARNINGS = ("`is_gradient_checkpointing` is deprecated",)


def hush() -> None:
    """Leave out these lines from now on."""
    for start in WARNINGS:
        warnings.filterwarnings("ignore", message=start)
    for name, start in LINES.items():
        logging.getLogger(name).addFilter(partial(_is_told, start))


@contextlib.contextmanager
def without_native_lines() -> Iterator[None]:
    """Inside, nothing comes to the process's standard output. HiGHS prints lines of its own there,
    which none of its options stops, and what is read from there may be YAML or JSON."""
    try:
        kept = os.dup(1)
    except OSError:  # it is closed
        yield
        return
    if sys.stdout is not None:
        sys.stdout.flush()
    nothing = os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(nothing, 1)
        yield
    finally:
        if os.name == "posix":
            ctypes.CDLL(None).fflush(None)  # of a file or a pipe, C keeps lines back
        os.dup2(kept, 1)
        os.close(kept)
        os.close(nothing)


def _is_told(start: str, record: logging.LogRecord) -> bool:
    return not str(record.msg).startswith(start)
