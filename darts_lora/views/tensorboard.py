"""TensorBoard as a tracker: one file of events, which a resumed run goes on with.
Not here: what is shown (search_views.py), the trackers beside it (trackers.py)."""

from __future__ import annotations

import os
from typing import Any

import numpy as np
from torch import Tensor
from torch.utils.tensorboard import SummaryWriter


class TensorBoard:
    """Speaks as accelerate's trackers do. In place of accelerate's own: that opens a second folder
    for the options, and does not take back what came after a checkpoint.

    Args:
        output_dir: tensorboard/ goes there.
        first_step: where this run starts; what an earlier run wrote behind it is taken back (from
            0 on: all of it).
    """

    name = "tensorboard"

    def __init__(self, output_dir: str, first_step: int = 0):
        purge = first_step + 1 if first_step else 0  # a run before this one, too
        self.writer = SummaryWriter(os.path.join(output_dir, "tensorboard"), purge_step=purge)
        self.first_step = first_step

    def store_init_configuration(self, values: dict[str, Any]) -> None:
        """The options as a text."""
        lines = "\n".join(f"    {name}: {value}" for name, value in values.items())
        self.writer.add_text("configuration", lines, self.first_step)

    def log(self, values: dict[str, float | str], step: int) -> None:
        """Numbers and texts by tag."""
        for tag, value in values.items():
            add = self.writer.add_text if isinstance(value, str) else self.writer.add_scalar
            add(tag, value, step)

    def log_images(self, images: dict[str, np.ndarray], step: int, dataformats: str) -> None:
        """Batches of images by tag, uint8, of this order of dimensions."""
        for tag, batch in images.items():
            self.writer.add_images(tag, batch, step, dataformats=dataformats)

    def log_histograms(self, values: dict[str, Tensor], step: int) -> None:
        """Histograms of tensors by tag."""
        for tag, value in values.items():
            self.writer.add_histogram(tag, value, step, bins=20)

    def finish(self) -> None:
        """Write out what is still held back."""
        self.writer.close()
