"""What trackers show of a search: scalars with each record, images now and then, the result.
Not here: what is measured (records.py, search.py), how images are drawn (rank_images.py)."""

from __future__ import annotations

import os
import time
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np

from darts_lora.alpha.sizes import recommended, sizes_text
from darts_lora.alpha.verdict import verdict_text
from darts_lora.base.options import command
from darts_lora.genotype import Genotype
from darts_lora.lora.cost import parameters_per_rank
from darts_lora.run.records import layer_parts, read_metrics
from darts_lora.supernet import Supernet
from darts_lora.views.console import by_part, short_names
from darts_lora.views.rank_images import padded, probability_image, rank_image, worth_images
from darts_lora.views.trackers import Trackers

SCALARS = {
    "train_loss": "loss/train",
    "validation_gain": "alpha/validation_gain",
    "entropy": "alpha/entropy",
    "expected_parameters": "budget/expected_parameters",
    "learning_rate": "weights/learning_rate",
    "gradient_norm": "weights/gradient_norm",
    "samples_per_second": "speed/samples_per_second",
    "peak_memory_gib": "speed/peak_memory_gib",
}
MOST_TYPES = 24  # module types with a scalar of their own
MOST_HISTORY = 200  # records kept for a picture over time
DRAWING_SHARE = 0.005  # of a run's time: images are left out while they took more than that
MOST_IMAGES = 16  # of each kind in one run: TensorBoard loads ten


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
        shapes = [layer.shape for layer in supernet.layers.values()]
        self.costs = np.array([parameters_per_rank(*shape) for shape in shapes])
        self.groups = _groups(list(supernet.layers))
        self.history: list[tuple[int, np.ndarray]] = []
        for record in read_metrics(os.path.join(output_dir, "metrics.jsonl")):  # before a resume
            self._remember(record)
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
        self._remember(record)
        shares = 100 * self.history[-1][1] / max(self.history[-1][1].sum(), 1e-9)
        scalars |= {tag: float(shares[places].sum()) for tag, places in self.groups.items()}
        self.trackers.log(scalars, step)
        share = self.drawing / max(time.monotonic() - self.started, 1e-9)
        if step >= self.next_image and (share <= DRAWING_SHARE or not self.drawing):
            self.draw(step)

    def _remember(self, record: dict[str, Any]) -> None:
        """The expected parameters of each layer; of a long search not those of all records."""
        expected = self.costs * np.array(record["expected_ranks"])
        self.history.append((record["step"], expected.astype(np.float32)))
        if len(self.history) > MOST_HISTORY:
            del self.history[1:-1:2]

    def draw(self, step: int) -> None:
        """The images and the histogram of alpha as they are now."""
        begun = time.monotonic()
        names, candidates = list(self.supernet.layers), self.supernet.config.ranks
        alpha = self.supernet.alpha.detach().float().cpu()
        probabilities = alpha.softmax(-1)
        ranks = (probabilities * self.supernet.layer_ranks).sum(-1).tolist()
        expected = dict(zip(names, ranks, strict=True))
        steps, parameters = zip(*self.history, strict=True)
        images = {
            "alpha/probability": probability_image(names, probabilities, candidates, self.parts),
            "ranks/expected": rank_image(expected, candidates[-1], self.parts),
        }
        worth = worth_images(names, steps, np.stack(parameters))
        images |= {f"ranks/worth/{part}": image for part, image in worth.items()}
        self._show(images, step)
        histograms = {f"alpha/rank_{rank}": alpha[:, k] for k, rank in enumerate(candidates)}
        self.trackers.call("log_histograms", histograms, step=step)
        self.next_image = step + self.apart
        self.drawing += time.monotonic() - begun

    def _show(self, images: dict[str, np.ndarray], step: int) -> None:
        self.trackers.log_images({tag: padded(image) for tag, image in images.items()}, step)

    def _finish(self, genotype: Genotype, step: int) -> None:
        self.draw(step)
        image = rank_image(genotype.ranks, genotype.candidates[-1], self.parts)
        self._show({"ranks/chosen": image}, step)
        if sizes := genotype.found_by.get("sizes"):
            self._show_sizes(sizes, step)
        results = {
            f"result/{name}": float(value)
            for name, value in genotype.found_by["verdict"].items()
            if isinstance(value, bool | int | float)
        }
        self.trackers.log({**results, "result": self._result(genotype)}, step)

    def _show_sizes(self, sizes: dict[str, Any], step: int) -> None:
        """What is predicted of each size: a chart, and a scalar for each point of its curves."""
        from darts_lora.views.charts import sizes_image  # matplotlib takes a while to load

        self._show({"sizes/predicted": sizes_image(sizes)}, step)
        curves = [(p, name) for p in sizes["points"] for name in ("uniform", "searched")]
        scalars = {f"sizes/{name}/rank_{p['rank']}": float(p[name]) for p, name in curves}
        self.trackers.log(scalars | {"sizes/recommended": recommended(sizes)["rank"]}, step)

    def _result(self, genotype: Genotype) -> str:
        path = os.path.join(self.output_dir, "genotype.json")
        adapted = sum(rank > 0 for rank in genotype.ranks.values())
        return (
            f"{adapted} of {len(genotype.ranks)} layers adapted, "
            f"{genotype.num_parameters:,} trainable parameters.\n\n"
            + (f"{sizes_text(sizes)}\n\n" if (sizes := genotype.found_by.get("sizes")) else "")
            + f"{verdict_text(genotype.found_by['verdict'])}\n\n"
            f"Next: `{command('finetune', genotype=path)}`"
        )


def _groups(names: list[str]) -> dict[str, list[int]]:
    """Tag -> places of the layers of one module type; of very many types, of one part."""
    places = {name: place for place, name in enumerate(names)}
    parts = by_part(names)
    titles = short_names(parts)
    groups = {
        f"worth/{titles[part]}" + ("" if kind == "-" else f".{kind}"): list(layers.values())
        for part, kinds in parts.items()
        for kind, layers in kinds.items()
    }
    if len(groups) > MOST_TYPES:
        groups = {
            f"worth/{titles[part]}": [n for layers in kinds.values() for n in layers.values()]
            for part, kinds in parts.items()
        }
    return {tag: [places[n] for n in group] for tag, group in list(groups.items())[:MOST_TYPES]}
