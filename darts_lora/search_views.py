"""What trackers show of a search: scalars with each record, images now and then, the result.
Not here: what is measured (records.py, search.py), how images are drawn (images.py), trackers."""

from __future__ import annotations

import os
import time
import warnings
from collections.abc import Callable
from typing import Any

from darts_lora.cli import command
from darts_lora.genotype import Genotype
from darts_lora.images import probability_image, rank_image
from darts_lora.records import layer_parts
from darts_lora.supernet import Supernet
from darts_lora.trackers import Trackers
from darts_lora.verdict import verdict_text

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
    """Shows one record of a search after the other. Where it fails, the search goes on unseen.

    Args:
        trackers: where all goes.
        output_dir: of the search.
        supernet: what is searched.
        first_step: where this run starts.
        steps: of the whole search: images are spread over them.
    """

    def __init__(
        self,
        trackers: Trackers,
        output_dir: str,
        supernet: Supernet,
        first_step: int = 0,
        steps: int = 1,
    ):
        self.trackers, self.output_dir, self.supernet = trackers, output_dir, supernet
        self.parts = layer_parts(supernet)
        self.trackers.call("log_layout", LAYOUT, step=first_step)
        self.started, self.drawing = time.monotonic(), 0.0
        self.apart = max(1, steps // MOST_IMAGES)
        self.next_image = first_step
        self.failed = False

    def write(self, record: dict[str, Any]) -> None:
        """One record: a point of each scalar, now and then the images."""
        self._guarded(self._write, record)

    def finish(self, genotype: Genotype, step: int) -> None:
        """The last images, the map of the chosen ranks, the result in words and in numbers."""
        self._guarded(self._finish, genotype, step)
        self.close()

    def close(self) -> None:
        """Write out what is still held back."""
        self.trackers.finish()

    def _guarded(self, show: Callable, *args) -> None:
        if self.failed:
            return
        try:
            show(*args)
        except Exception as error:
            self.failed = True
            warnings.warn(
                f"the search is no longer shown ({type(error).__name__}: {error}); "
                f"{self.trackers.otherwise}",
                stacklevel=3,
            )

    def _write(self, record: dict[str, Any]) -> None:
        step, budget = record["step"], self.supernet.budget
        scalars = {
            tag: record[name] for name, tag in SCALARS.items() if record.get(name) is not None
        }
        if budget:
            scalars["budget/budget_parameters"] = float(budget)
        self.trackers.log(scalars, step)
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
        images = {
            "alpha/probability": probability_image(names, probabilities, candidates),
            "ranks/expected": rank_image(expected, candidates[-1], self.parts),
        }
        self.trackers.log_images(images, step)
        histograms = {f"alpha/rank_{rank}": alpha[:, k] for k, rank in enumerate(candidates)}
        self.trackers.call("log_histograms", histograms, step=step)
        self.next_image = step + self.apart
        self.drawing += time.monotonic() - begun

    def _finish(self, genotype: Genotype, step: int) -> None:
        self.draw(step)
        image = rank_image(genotype.ranks, genotype.candidates[-1], self.parts)
        self.trackers.log_images({"ranks/chosen": image}, step)
        results = {
            f"result/{name}": float(value)
            for name, value in genotype.found_by["verdict"].items()
            if isinstance(value, bool | int | float)
        }
        self.trackers.call("log_results", results, step=step)
        self.trackers.log({**results, "result": self._result(genotype)}, step)

    def _result(self, genotype: Genotype) -> str:
        path = os.path.join(self.output_dir, "genotype.json")
        adapted = sum(rank > 0 for rank in genotype.ranks.values())
        return (
            f"{adapted} of {len(genotype.ranks)} layers adapted, "
            f"{genotype.num_parameters:,} trainable parameters.\n\n"
            f"{verdict_text(genotype.found_by['verdict'])}\n\n"
            f"Next: `{command('finetune', genotype=path)}`"
        )
