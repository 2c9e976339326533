"""The record of a search: TensorBoard scalars and heatmaps of alpha, and metrics.jsonl.
Not here: what is measured (search.py). The only room that knows TensorBoard."""

from __future__ import annotations

import json
import os
from typing import Any

import torch
from torch.utils.tensorboard import SummaryWriter

from darts_lora.supernet import Supernet

CELL = 8  # pixels of a layer and of a candidate in the heatmap
SCALARS = {
    "train_loss": "loss/train",
    "validation_loss": "loss/validation",
    "entropy": "alpha/entropy",
    "temperature": "alpha/temperature",
    "expected_parameters": "budget/expected_parameters",
    "multiplier": "budget/multiplier",
    "learning_rate": "weights/learning_rate",
}


class SearchViews:
    """Writes one record of a search after the other.

    Args:
        output_dir: tensorboard/ and metrics.jsonl go there.
        first_step: where this run starts; what an earlier run wrote behind it is taken back.
    """

    def __init__(self, output_dir: str, first_step: int = 0):
        self.path = os.path.join(output_dir, "metrics.jsonl")
        kept = read_metrics(self.path, first_step) if first_step else []
        self.metrics = open(self.path, "w", encoding="utf-8")  # noqa: SIM115 - open for the run
        self.metrics.writelines(json.dumps(record) + "\n" for record in kept)
        purge = first_step + 1 if first_step else None
        self.writer = SummaryWriter(os.path.join(output_dir, "tensorboard"), purge_step=purge)

    def write(self, record: dict[str, Any], supernet: Supernet) -> None:
        """One record: a line of metrics.jsonl, a point of each scalar, one heatmap."""
        self.metrics.write(json.dumps(record) + "\n")
        self.metrics.flush()
        step = record["step"]
        for name, tag in SCALARS.items():
            if record[name] is not None:
                self.writer.add_scalar(tag, record[name], step)
        if supernet.budget:
            self.writer.add_scalar("budget/budget_parameters", supernet.budget, step)
        with torch.no_grad():
            image = probability_image(supernet.probabilities())
        self.writer.add_image("alpha/probability (layers down, ranks across)", image, step)

    def close(self) -> None:
        """Write out what is still held back."""
        self.metrics.close()
        self.writer.close()


def read_metrics(path: str, last_step: int | None = None) -> list[dict[str, Any]]:
    """The records in metrics.jsonl up to and with `last_step`; a broken last line is left out."""
    records = []
    if os.path.exists(path):
        with open(path, encoding="utf-8") as file:
            for line in file:
                try:
                    records.append(json.loads(line))
                except ValueError:
                    break
    return [r for r in records if last_step is None or r["step"] <= last_step]


def probability_image(probabilities: torch.Tensor) -> torch.Tensor:
    """(N, K) probabilities as a grey image (1, N * 8, K * 8) uint8: white is 0, black is 1."""
    grey = (255 * (1 - probabilities)).round().to(torch.uint8).cpu()
    return grey.repeat_interleave(CELL, 0).repeat_interleave(CELL, 1)[None]
