"""Lines of libraries that a user cannot act on: left out by their logger and their words.
Not here: warnings that say what to change, which stay."""

from __future__ import annotations

import logging
from functools import partial

# logger -> how the line begins. Both come of imports by transformers and PEFT, wanted or not.
LINES = {
    "torch.utils._pytree": "%s is an Enum subclass and is now natively supported",
    "bitsandbytes.backends.cpu.ops": "Failed to load CPU gemm_4bit_forward",
}


def hush() -> None:
    """Leave out these lines from now on."""
    for name, start in LINES.items():
        logging.getLogger(name).addFilter(partial(_is_told, start))


def _is_told(start: str, record: logging.LogRecord) -> bool:
    return not str(record.msg).startswith(start)
