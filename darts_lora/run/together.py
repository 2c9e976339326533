"""What lies in one folder, or stands in one report, is of one base model and one data set.
Not here: what else a resumed search must share (resume.py)."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from darts_lora.base.errors import InputError
from darts_lora.base.options import CONFIG_NAME, load_config

# The options whose values make losses comparable.
TASK = ("model_name_or_path", "gguf_file", "dataset", "dataset_config", "data_files", "test_split")


def other_task(ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> str | None:
    """The first option of TASK that both have and that differs; None: what both know is one."""
    known = (name for name in TASK if name in ours and name in theirs)
    return next((name for name in known if ours[name] != theirs[name]), None)


def task_of(folder: str) -> dict[str, Any]:
    """The options of the run that left its config.yaml there; none without one."""
    path = os.path.join(folder, CONFIG_NAME)
    return load_config(path) if os.path.isfile(path) else {}


def check_not_anothers(output_dir: str, *configs) -> None:
    """Whether a run with these options (dataclass objects) may replace what lies in its folder.

    Raises:
        InputError: an adapter of another model, or of other data.
    """
    if not os.path.isfile(os.path.join(output_dir, "adapter_config.json")):
        return
    ours = {name: value for config in configs for name, value in asdict(config).items()}
    theirs = task_of(output_dir)
    name = other_task(ours, theirs)
    if name is not None:
        raise InputError(
            f"output_dir={output_dir!r}: an adapter with {name}={theirs[name]!r} is there, this "
            f"run has {name}={ours[name]!r}; name another folder, or remove that one"
        )
