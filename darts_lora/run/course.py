"""The course of a run: all that decides what it computes, and whether another process may go on
with it. Not here: the state that it goes on from (resume.py, callbacks.py)."""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import asdict
from typing import Any

from darts_lora.base.errors import InputError
from darts_lora.config import DataConfig, ModelConfig, TrainingConfig

# May differ in a resumed run: they don't change what is computed.
FREE = ("logging_steps", "save_steps", "num_workers", "max_runtime")


def training_options(training: TrainingConfig) -> dict[str, Any]:
    """The options of a training that a resumed run must share."""
    return {name: value for name, value in asdict(training).items() if name not in FREE}


def task_options(
    model: ModelConfig, data: DataConfig, rows: dict[str, Any], training: TrainingConfig
) -> dict[str, Any]:
    """What a resumed run must share of model and data, and a name of its rows.

    Args:
        rows: which they are and in which order, as JSON.
    """
    free: tuple[str, ...] = ("gradient_checkpointing", "trust_remote_code")
    free += ("max_test_samples", "max_image_pixels")
    if data.on_long_row != "truncate":  # a longer row is an error, or left out: no shorter batch
        free += ("max_length",)
    options = {n: v for n, v in {**asdict(model), **asdict(data)}.items() if n not in free}
    # the weights are compared as they were loaded
    options["model_name_or_path"] = placeless(model.model_name_or_path)
    if not data.streaming:  # else nothing tells the rows but where they are
        options |= {name: placeless(options[name]) for name in ("dataset", "data_files")}
    if data.streaming:  # workers share a stream's files: their number decides the order
        options["num_workers"] = training.num_workers
    return options | {"split": digest(rows)}


def digest(content: Any) -> str:
    """Names what JSON can hold."""
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()[:12]


def placeless(value: Any) -> Any:
    """An option with paths (texts in lists and mappings) that stays the same where they move: local
    ones all alike, for rows that a digest tells apart; names of the hub as they are."""
    if isinstance(value, dict):
        return {name: placeless(part) for name, part in value.items()}
    if isinstance(value, list | tuple):
        return [placeless(part) for part in value]
    folder = os.path.dirname(value) if isinstance(value, str) else ""
    local = isinstance(value, str) and (os.path.exists(value) or os.path.isdir(folder))
    return "a local path" if local else value


def check_same_course(options: dict[str, Any], saved: dict[str, Any], run: str = "search") -> None:
    """Raises InputError where a run with `options` would not go on as the `saved` one."""
    for name in {**options, **saved}:
        ours, theirs = options.get(name), saved.get(name)
        if ours != theirs:
            raise InputError(
                f"{name}={ours!r}: the {run} to resume has {name}={theirs!r}; go on with that, or "
                "start anew in another output_dir"
            )
