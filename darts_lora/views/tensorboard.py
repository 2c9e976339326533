"""TensorBoard's view of a search: scalars, images, texts.
Not here: what is measured (records.py, search.py), how images are drawn (rank_images.py)."""

from __future__ import annotations

import os
import time
from typing import Any

from torch.utils.tensorboard import SummaryWriter
from torch.utils.tensorboard.summary import hparams

from darts_lora.alpha.verdict import verdict_text
from darts_lora.base.options import command
from darts_lora.genotype import Genotype
from darts_lora.run.records import layer_parts
from darts_lora.supernet import Supernet
from darts_lora.views.rank_images import probability_image, rank_image

SCALARS = {
    "train_loss": "loss/train",
    "validation_loss": "loss/validation",
    "entropy": "alpha/entropy",
    "temperature": "alpha/temperature",
    "alpha_gradient_norm": "alpha/gradient_norm",
    "expected_parameters": "budget/expected_parameters",
    "learning_rate": "weights/learning_rate",
    "gradient_norm": "weights/gradient_norm",
    "samples_per_second": "speed/samples_per_second",
    "peak_memory_gib": "speed/peak_memory_gib",
}
LAYOUT = {
    "search": {
        "loss": ["Multiline", ["loss/train", "loss/validation"]],
        "parameters": ["Multiline", ["budget/expected_parameters", "budget/budget_parameters"]],
        "entropy": ["Multiline", ["alpha/entropy"]],
        "gradient norms": ["Multiline", ["weights/gradient_norm", "alpha/gradient_norm"]],
    }
}
DRAWING_SHARE = 0.005  # of a run's time: images are left out while they took more than that
MOST_IMAGES = 40  # of each kind in one run


class SearchViews:
    """Writes one record of a search after the other.

    Args:
        output_dir: tensorboard/ goes there.
        supernet: what is searched.
        first_step: where this run starts; what an earlier run wrote behind it is taken back (from
            0 on: all of it).
        steps: of the whole search: images are spread over them.
    """

    def __init__(self, output_dir: str, supernet: Supernet, first_step: int = 0, steps: int = 1):
        self.output_dir, self.supernet = output_dir, supernet
        self.parts = layer_parts(supernet)
        purge = first_step + 1 if first_step else 0  # a search before this one, too
        self.writer = SummaryWriter(os.path.join(output_dir, "tensorboard"), purge_step=purge)
        self.writer.add_custom_scalars(LAYOUT)
        self.started, self.drawing = time.monotonic(), 0.0
        self.apart = max(1, steps // MOST_IMAGES)
        self.next_image = first_step

    def write(self, record: dict[str, Any]) -> None:
        """One record: a point of each scalar, now and then the images."""
        step, budget = record["step"], self.supernet.budget
        for name, tag in SCALARS.items():
            if record.get(name) is not None:
                self.writer.add_scalar(tag, record[name], step)
        if budget:
            self.writer.add_scalar("budget/budget_parameters", budget, step)
        share = self.drawing / max(time.monotonic() - self.started, 1e-9)
        if step >= self.next_image and (share <= DRAWING_SHARE or not self.drawing):
            self.draw(step)

    def draw(self, step: int) -> None:
        """The images and the histogram of alpha as they are now."""
        begun = time.monotonic()
        names, candidates = list(self.supernet.layers), self.supernet.config.ranks
        alpha = self.supernet.alpha.detach().float().cpu()
        probabilities = alpha.softmax(-1)
        ranks = (probabilities * self.supernet.layer_ranks).sum(-1).tolist()
        expected = dict(zip(names, ranks, strict=True))
        image = probability_image(names, probabilities, candidates)
        self.writer.add_image("alpha/probability", image, step, dataformats="HWC")
        image = rank_image(expected, candidates[-1], self.parts)
        self.writer.add_image("ranks/expected", image, step, dataformats="HWC")
        for k, rank in enumerate(candidates):
            self.writer.add_histogram(f"alpha/rank_{rank}", alpha[:, k], step, bins=20)
        self.next_image = step + self.apart
        self.drawing += time.monotonic() - begun

    def finish(self, genotype: Genotype, options: dict[str, Any], step: int) -> None:
        """The last images, the map of the chosen ranks, the result in words, the hparams."""
        self.draw(step)
        image = rank_image(genotype.ranks, genotype.candidates[-1], self.parts)
        self.writer.add_image("ranks/chosen", image, step, dataformats="HWC")
        self.writer.add_text("result", self._result(genotype), step)
        lines = "\n".join(f"    {name}: {value}" for name, value in options.items())
        self.writer.add_text("configuration", lines, step)
        figures = genotype.found_by["verdict"]
        results = {
            f"result/{name}": float(figures[name])
            for name in ("entropy", "agreement", "chosen_parameters")
        }
        values = {
            name: value if isinstance(value, bool | int | float | str) else str(value)
            for name, value in options.items()
        }
        for summary in hparams(values, results):
            self.writer.file_writer.add_summary(summary)
        for name, value in results.items():
            self.writer.add_scalar(name, value, step)

    def _result(self, genotype: Genotype) -> str:
        path = os.path.join(self.output_dir, "genotype.json")
        adapted = sum(rank > 0 for rank in genotype.ranks.values())
        return (
            f"{adapted} of {len(genotype.ranks)} layers adapted, "
            f"{genotype.num_parameters:,} trainable parameters.\n\n"
            f"{verdict_text(genotype.found_by['verdict'])}\n\n"
            f"Next: `{command('finetune', genotype=path)}`"
        )

    def close(self) -> None:
        """Write out what is still held back."""
        self.writer.close()
