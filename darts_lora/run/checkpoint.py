"""Checkpoints of a search and of a finetune: the newest few kept, read back checked, never pickled
code. Not here: what a search (resume.py) or a finetune (callbacks.py) puts into one."""

from __future__ import annotations

import contextlib
import glob
import hashlib
import json
import os
import re
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch

from darts_lora.base.errors import InputError, told_as
from darts_lora.base.files import flush, read_json, remove, write_json, write_whole

KEPT = 2
FORMAT = 1  # rises where a state holds other things than before
FOLDER, STATE_NAME, RECORD_NAME = "checkpoints", "state.pt", "checkpoint.json"
# How the folders are named: a search's by us, a finetune's by transformers' Trainer.
SEARCH, FINETUNE = "step", "checkpoint"
# The option that says how many steps there are in all.
LENGTHS = {SEARCH: "search_steps", FINETUNE: "finetune_steps"}
# All that stands in them, and what a killed process leaves there half written.
FILES = re.compile(
    r"state\.pt|checkpoint\.json(\.darts_lora-tmp-\d+)?|trainer_state\.json"
    r"|README\.md|adapter_config\.json|adapter_model\.safetensors|\.tmp\w{6}"
    r"|(optimizer|scheduler|scaler)\.pt|rng_state(_\d+)?\.pth"
)


def checkpoints(output_dir: str | None, kind: str = SEARCH) -> list[str]:
    """Paths of the checkpoints (folders) there, oldest first."""
    if output_dir is None:
        return []
    paths = glob.glob(os.path.join(glob.escape(output_dir), FOLDER, f"{kind}-*"))
    steps = {path: re.search(rf"{kind}-([0-9]+)$", path) for path in paths}  # None: half written
    found = (path for path in paths if steps[path] and os.path.isdir(path))
    return sorted(found, key=lambda path: int(steps[path][1]))


def sealed(output_dir: str | None) -> list[str]:
    """Paths of a finetune's checkpoints that were written to their end, oldest first."""
    found = checkpoints(output_dir, FINETUNE)
    return [path for path in found if os.path.isfile(os.path.join(path, RECORD_NAME))]


def kept(output_dir: str | None, kind: str = SEARCH) -> str:
    """What is left to go on from, in words."""
    found = checkpoints(output_dir) if kind == SEARCH else sealed(output_dir)
    if not found:
        return "no checkpoint was written"
    return f"the last checkpoint is {found[-1]}, --resume goes on from it"


def check_free(output_dir: str | None, kind: str, resume: bool, ended: bool) -> None:
    """Whether a run of this kind may start, or go on, in this folder; `ended`: one has ended there.

    Raises:
        InputError: nothing to go on from, or a new one would overwrite an unfinished one.
    """
    found = checkpoints(output_dir) if kind == SEARCH else sealed(output_dir)
    if resume and not found:
        raise InputError(f"resume: there is no checkpoint in {output_dir!r}; start without it")
    done = steps_done(output_dir, kind)
    if not resume and done is not None and not ended:
        run = "search" if kind == SEARCH else "finetune"
        raise InputError(
            f"output_dir={output_dir!r}: an unfinished {run} is there (step {done[0]} of "
            f"{done[1][LENGTHS[kind]]}); go on with --resume, name another folder, or remove its "
            "checkpoints"
        )


def save_checkpoint(output_dir: str, state: dict[str, Any], options: dict[str, Any]) -> None:
    """Write `state` (tensors, numbers, texts) with the run's options, then remove all but the
    newest few. A checkpoint is a folder: state.pt, and checkpoint.json with the SHA-256 over both.

    Raises:
        InputError: it cannot be written; those before are still there.
    """

    def write(folder: str) -> None:
        os.mkdir(folder)
        with told_as_os_error():
            torch.save(state, os.path.join(folder, STATE_NAME))
        seal(folder, {"step": state["step"], "options": options})

    write_whole(os.path.join(output_dir, FOLDER, f"{SEARCH}-{state['step']:07d}"), write)
    remove_checkpoints(checkpoints(output_dir)[:-KEPT])


def seal(folder: str, record: dict[str, Any]) -> None:
    """Write checkpoint.json, by which what lies in the folder becomes a checkpoint.

    Args:
        record: step, and options (name to value); what else is to be read back.

    Raises:
        InputError: it cannot be written.
    """
    names = sorted(name for name in os.listdir(folder) if name != RECORD_NAME)
    record = {"format": FORMAT, "files": names, **record}
    flush(folder)
    write_json(
        os.path.join(folder, RECORD_NAME), {**record, "sha256": _digest(folder, names, record)}
    )


@contextlib.contextmanager
def told_as_os_error() -> Iterator[None]:
    """PyTorch's writer does not give the system's own error where the disk is full."""
    try:
        yield
    except RuntimeError as error:
        if not re.search("inline_container|PytorchStreamWriter", str(error)):
            raise
        raise OSError(f"is the disk full? {error}") from error


def load_checkpoint(output_dir: str | None) -> tuple[dict[str, Any], dict[str, Any]]:
    """State (on the CPU) and options of a search's newest checkpoint that is whole; one warning
    names those that are not.

    Raises:
        InputError: there is none, or none is whole.
    """
    _, record, state = _newest(output_dir, checkpoints(output_dir), SEARCH, _read_state)
    return state, record["options"]


def find_checkpoint(output_dir: str) -> tuple[str, dict[str, Any]]:
    """Path and record of a finetune's newest checkpoint that is whole; else as load_checkpoint."""
    path, record, _ = _newest(output_dir, sealed(output_dir), FINETUNE, lambda path: None)
    return path, record


def _newest(
    output_dir: str | None, found: list[str], kind: str, read: Callable[[str], Any]
) -> tuple[str, dict[str, Any], Any]:
    if not found:
        raise InputError(f"resume: there is no checkpoint in {output_dir!r}; start without it")
    damaged = []
    for path in reversed(found):
        try:
            record = _read_record(path, kind)
            _check_files(path, record)
            content = read(path)
        except InputError as error:
            damaged.append(str(error))
            continue
        if damaged:
            warnings.warn(f"resume: {'; '.join(damaged)}: going on from {path}", stacklevel=3)
        return path, record, content
    raise InputError(f"resume: {'; '.join(damaged)}: no checkpoint is left to go on from")


def steps_done(output_dir: str | None, kind: str = SEARCH) -> tuple[int, dict[str, Any]] | None:
    """Step and options of the newest checkpoint whose record can be read; None: there is none."""
    for path in reversed(checkpoints(output_dir, kind)):
        try:
            record = _read_record(path, kind)
        except InputError:
            continue
        return record["step"], record["options"]
    return None


def remove_checkpoints(paths: list[str]) -> None:
    """Remove them: of a link the link, of a folder what a run wrote; what else lies there stays,
    with its folder. A killed process leaves one that load_checkpoint finds damaged."""
    for path in paths:
        if os.path.islink(path):
            remove(path)
            continue
        names = sorted(filter(FILES.fullmatch, os.listdir(path)), key=lambda n: n != RECORD_NAME)
        for name in names:
            remove(os.path.join(path, name))
        with contextlib.suppress(OSError):
            os.rmdir(path)


def _read_record(path: str, kind: str) -> dict[str, Any]:
    try:
        record = read_json(os.path.join(path, RECORD_NAME))
    except InputError as error:
        raise InputError(f"{path} {error}") from error
    kinds = {"step": int, "options": dict, "files": list, "sha256": str}
    found = {"files": [STATE_NAME], **record} if isinstance(record, dict) else {}
    right = all(isinstance(found.get(name), kind) for name, kind in kinds.items())
    right = right and all(isinstance(name, str) for name in found["files"])
    if not right or not isinstance(found["options"].get(LENGTHS[kind]), int):
        raise InputError(f"{path} cannot be read ({RECORD_NAME} is not of a checkpoint)")
    return record


def _check_files(path: str, record: dict[str, Any]) -> None:
    content = {key: value for key, value in record.items() if key != "sha256"}
    if record.get("format") != FORMAT:
        found = f"format {record.get('format')!r:.20}, this one reads {FORMAT}"
        raise InputError(f"{path} is of another release ({found})")
    # ValueError: a name with a null character
    with told_as(f"{path} cannot be read", OSError, ValueError):
        whole = _digest(path, record.get("files", [STATE_NAME]), content) == record["sha256"]
    if not whole:
        raise InputError(f"{path} is damaged (its checksum is another)")


def _read_state(path: str) -> dict[str, Any]:
    # any kind: what is no archive, or of another release of PyTorch
    with told_as(f"{path} cannot be read", Exception):
        return torch.load(os.path.join(path, STATE_NAME), map_location="cpu", weights_only=True)


def _digest(folder: str, names: list[str], record: dict[str, Any]) -> str:
    """SHA-256 over a record and the files that it names, in hexadecimal digits."""
    digest = hashlib.sha256(json.dumps(record, sort_keys=True).encode())
    for name in names:
        with open(os.path.join(folder, name), "rb") as file:
            while block := file.read(1 << 20):
                digest.update(block)
    return digest.hexdigest()
