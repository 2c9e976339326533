"""Checkpoints of a search: written whole, the newest few kept, read back checked, never pickled
code. Not here: what a search puts into one (resume.py)."""

from __future__ import annotations

import contextlib
import glob
import hashlib
import json
import os
import re
import warnings
from typing import Any

import torch

from darts_lora.base.errors import InputError, one_line
from darts_lora.base.files import read_json, remove, write_json, write_whole

KEPT = 2
FORMAT = 1  # rises where a state holds other things than before
STATE_NAME, RECORD_NAME = "state.pt", "checkpoint.json"


def checkpoints(output_dir: str | None) -> list[str]:
    """Paths of the checkpoints (folders) there, oldest first."""
    if output_dir is None:
        return []
    paths = glob.glob(os.path.join(glob.escape(output_dir), "checkpoints", "step-*"))
    steps = {path: re.search(r"step-([0-9]+)$", path) for path in paths}  # None: half written
    found = (path for path in paths if steps[path] and os.path.isdir(path))
    return sorted(found, key=lambda path: int(steps[path][1]))


def save_checkpoint(output_dir: str, state: dict[str, Any], options: dict[str, Any]) -> None:
    """Write `state` (tensors, numbers, texts) with the run's options, then remove all but the
    newest few. A checkpoint is a folder: state.pt, and checkpoint.json with the SHA-256 over both.

    Raises:
        InputError: it cannot be written; those before are still there.
    """

    def write(folder: str) -> None:
        os.mkdir(folder)
        path = os.path.join(folder, STATE_NAME)
        try:
            torch.save(state, path)
        except RuntimeError as error:
            if not re.search("inline_container|PytorchStreamWriter", str(error)):
                raise
            # its writer does not give the system's own error
            raise OSError(f"is the disk full? {error}") from error
        record = {"format": FORMAT, "step": state["step"], "options": options}
        record["sha256"] = _digest(path, record)
        write_json(os.path.join(folder, RECORD_NAME), record)

    write_whole(os.path.join(output_dir, "checkpoints", f"step-{state['step']:07d}"), write)
    remove_checkpoints(checkpoints(output_dir)[:-KEPT])


def load_checkpoint(output_dir: str | None) -> tuple[dict[str, Any], dict[str, Any]]:
    """State (on the CPU) and options of the newest checkpoint that is whole; one warning names
    those that are not.

    Raises:
        InputError: there is none, or none is whole.
    """
    found = checkpoints(output_dir)
    if not found:
        raise InputError(f"resume: there is no checkpoint in {output_dir!r}; start without it")
    damaged = []
    for path in reversed(found):
        try:
            record = _read_record(path)
            state = _read_state(path, record)
        except InputError as error:
            damaged.append(str(error))
            continue
        if damaged:
            warnings.warn(f"resume: {'; '.join(damaged)}: going on from {path}", stacklevel=2)
        return state, record["options"]
    raise InputError(f"resume: {'; '.join(damaged)}: no checkpoint is left to go on from")


def steps_done(output_dir: str | None) -> tuple[int, dict[str, Any]] | None:
    """Step and options of the newest checkpoint whose record can be read; None: there is none."""
    for path in reversed(checkpoints(output_dir)):
        try:
            record = _read_record(path)
        except InputError:
            continue
        return record["step"], record["options"]
    return None


def remove_checkpoints(paths: list[str]) -> None:
    """Remove them: of a link the link, of a folder what a search wrote; what else lies there stays,
    with its folder. A killed process leaves one that load_checkpoint finds damaged."""
    for path in paths:
        if os.path.islink(path):
            remove(path)
            continue
        for name in (STATE_NAME, RECORD_NAME):
            remove(os.path.join(path, name))
        with contextlib.suppress(OSError):
            os.rmdir(path)


def _read_record(path: str) -> dict[str, Any]:
    try:
        record = read_json(os.path.join(path, RECORD_NAME))
    except InputError as error:
        raise InputError(f"{path} {error}") from error
    kinds = {"step": int, "options": dict, "sha256": str}
    found = record if isinstance(record, dict) else {}
    right = all(isinstance(found.get(name), kind) for name, kind in kinds.items())
    if not right or not isinstance(found["options"].get("search_steps"), int):
        raise InputError(f"{path} cannot be read ({RECORD_NAME} is not of a checkpoint)")
    return record


def _read_state(path: str, record: dict[str, Any]) -> dict[str, Any]:
    state = os.path.join(path, STATE_NAME)
    content = {key: value for key, value in record.items() if key != "sha256"}
    if record.get("format") != FORMAT:
        found = f"format {record.get('format')!r:.20}, this one reads {FORMAT}"
        raise InputError(f"{path} is of another release ({found})")
    try:
        if _digest(state, content) != record["sha256"]:
            raise InputError(f"{path} is damaged (its checksum is another)")
        return torch.load(state, map_location="cpu", weights_only=True)
    except InputError:
        raise
    except Exception as error:  # any kind: what is no archive, or of another release of PyTorch
        raise InputError(f"{path} cannot be read ({one_line(error, 200)})") from error


def _digest(path: str, record: dict[str, Any]) -> str:
    """SHA-256 over a file and a record, in hexadecimal digits."""
    digest = hashlib.sha256(json.dumps(record, sort_keys=True).encode())
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
