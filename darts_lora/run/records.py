"""Records of a search: the figures of one, metrics.jsonl that holds them, layers.json beside it.
Not here: when a record is made (search.py), pictures and TensorBoard (tensorboard.py)."""

from __future__ import annotations

import json
import math
import os
import sys
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm

from darts_lora.base.errors import InputError, told_as
from darts_lora.base.files import check_lock, parse_json, write_json, write_text
from darts_lora.lora.parts import model_parts
from darts_lora.lora.relaxation import entropies
from darts_lora.supernet import Supernet


def alpha_figures(supernet: Supernet) -> dict[str, Any]:
    """What alpha says now: entropy, expected parameters and the expected rank of each layer; NaN
    where alpha is not finite."""
    with torch.no_grad():
        probabilities = supernet.probabilities()
        expected = float(supernet.expected_parameters())
    ranks = (probabilities.double().cpu() * supernet.layer_ranks).sum(-1)
    return {
        "entropy": float(entropies(probabilities).mean()),
        "expected_parameters": expected,
        "expected_ranks": [round(rank, 3) for rank in ranks.tolist()],
    }


def number(value: Tensor | float | None) -> float | None:
    """A scalar as a number that JSON knows; what is not finite as None."""
    return None if value is None or not math.isfinite(float(value)) else float(value)


def peak_memory(device: torch.device) -> float | None:
    """Most memory that tensors took on this GPU (GiB), None on a CPU."""
    if device.type != "cuda":
        return None
    return round(torch.cuda.max_memory_allocated(device) / 2**30, 3)


def progress_bar(first: int, steps: int, shown: bool) -> tqdm:
    """The bar of a search, over its steps from `first` on."""
    return tqdm(
        range(first, steps),
        initial=first,
        total=steps,
        desc="search",
        unit="step",
        disable=not shown,
        mininterval=0.5 if sys.stderr.isatty() else 10,  # few lines in a file
    )


def progress_text(record: dict[str, Any], budget: float | None) -> str:
    """The few figures of a record that stand beside the bar."""
    size = record["expected_parameters"]
    parts = [f"train {record['train_loss']:.4f}"]
    if record["validation_gain"] is not None:
        parts.append(f"gain {record['validation_gain']:.4f}")
    parts.append(f"size {size / budget:.0%} of budget" if budget else f"size {size:,.0f}")
    return ", ".join([*parts, f"entropy {record['entropy']:.2f}"])


def layer_parts(supernet: Supernet) -> dict[str, str]:
    """The part of the model that each searched layer belongs to, by name."""
    parts = model_parts(supernet.model)
    return {name: parts.get(name, "language") for name in supernet.layers}


class Metrics:
    """metrics.jsonl in `output_dir`, one line a record, and layers.json, written once.

    Args:
        first_step: where this run starts; what an earlier run wrote behind it is taken back.

    Raises:
        InputError: they cannot be written; also of write.
    """

    def __init__(self, output_dir: str, supernet: Supernet, first_step: int = 0):
        self.path = os.path.join(output_dir, "metrics.jsonl")
        shapes = {name: list(layer.shape) for name, layer in supernet.layers.items()}
        layers: dict[str, Any] = {"shapes": shapes, "candidates": list(supernet.config.ranks)}
        layers |= {"parts": layer_parts(supernet), "budget": supernet.budget}
        write_json(os.path.join(output_dir, "layers.json"), layers)
        kept = read_metrics(self.path, first_step) if first_step else []
        write_text(self.path, "".join(json.dumps(record) + "\n" for record in kept))

    def write(self, record: dict[str, Any]) -> None:
        """Add one record."""
        check_lock(self.path)
        unwritten = told_as(f"{self.path}: cannot be written", OSError)
        with unwritten, open(self.path, "a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")


def read_metrics(path: str, last_step: int | None = None) -> list[dict[str, Any]]:
    """The records in metrics.jsonl up to and with `last_step`; a last line without an end, of a
    killed run, is left out.

    Raises:
        InputError: the file cannot be read, or a line of it is no record.
    """
    if not os.path.exists(path):
        return []
    with told_as(f"{path}: cannot be read", OSError), open(path, "rb") as file:
        *lines, _ = file.read().split(b"\n")
    records = [_read_record(line, f"{path}: line {i}") for i, line in enumerate(lines, start=1)]
    return [r for r in records if last_step is None or r["step"] <= last_step]


def _read_record(line: bytes, where: str) -> dict[str, Any]:
    with told_as(f"{where} is no record of this search", InputError, TypeError, KeyError):
        record = parse_json(line)
        if type(record["step"]) is not int:
            raise TypeError("its step is no integer")
    return record
