"""Files that are there whole or not at all: written beside, then renamed.
Not here: what stands in them."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from typing import Any

from darts_lora.errors import InputError


def write_whole(path: str | os.PathLike, write: Callable[[str], Any]) -> None:
    """Call `write(temporary path)` and rename its file to `path`.

    Raises:
        InputError: it cannot be written.
    """
    path = os.fspath(path)
    temporary = f"{path}.tmp-{os.getpid()}"
    try:
        os.makedirs(os.path.dirname(path) or ".", exist_ok=True)
        write(temporary)
        os.replace(temporary, path)
    except OSError as error:
        raise InputError(f"{path}: cannot be written ({error.strerror or error})") from error
    finally:
        if os.path.exists(temporary):
            os.remove(temporary)


def write_text(path: str | os.PathLike, text: str) -> None:
    """Write a UTF-8 text file; raises InputError where it cannot be written."""

    def write(temporary: str) -> None:
        with open(temporary, "w", encoding="utf-8") as file:
            file.write(text)

    write_whole(path, write)


def write_json(path: str | os.PathLike, record: Any) -> None:
    """Write a JSON file; raises InputError where it cannot be written."""
    write_text(path, json.dumps(record, indent=1, allow_nan=False) + "\n")
