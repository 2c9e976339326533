"""Lines of libraries that a user cannot act on: left out by their words and their logger, if any.
Not here: warnings that say what to change, which stay."""

from __future__ import annotations

import logging
import warnings
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


def _is_told(start: str, record: logging.LogRecord) -> bool:
    return not str(record.msg).startswith(start)
