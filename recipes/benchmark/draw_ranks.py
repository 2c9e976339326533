"""Draws the ranks of a genotype: the README's picture. Needs matplotlib (pip install ".[test]").
Not here: the table on the screen (darts_lora/views/console.py).

python recipes/benchmark/draw_ranks.py --genotype runs/search/genotype.json
"""

from dataclasses import dataclass

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np

from darts_lora import Genotype
from darts_lora.base.options import run
from darts_lora.views.console import by_part


@dataclass
class Drawing:
    """What is drawn, and where it goes."""

    genotype: str = "runs/search/genotype.json"
    """File of the genotype (JSON)."""
    output: str = "recipes/benchmark/ranks.png"
    """File of the picture (PNG, SVG or PDF)."""


def main(options: Drawing) -> None:
    """Draw the rank of each layer: a panel for each part of the model, depth to the right."""
    genotype = Genotype.load(options.genotype)
    parts = by_part(genotype.ranks)
    depths = [
        1 + max(depth for layers in kinds.values() for depth in layers) for kinds in parts.values()
    ]
    figure, panels = plt.subplots(
        1, len(parts), width_ratios=[d + 2 for d in depths], figsize=(2.2 * len(parts) + 3, 3.4)
    )
    largest = max(genotype.ranks.values())
    for panel, (part, kinds), depth in zip(
        np.atleast_1d(panels), parts.items(), depths, strict=True
    ):
        ranks = np.full((len(kinds), depth), np.nan)
        for row, layers in enumerate(kinds.values()):
            for column, name in layers.items():
                ranks[row, column] = genotype.ranks[name]
                light = genotype.ranks[name] <= largest / 2
                style = {"ha": "center", "va": "center", "fontsize": 8}
                panel.text(column, row, genotype.ranks[name], color="k" if light else "w", **style)
        panel.imshow(ranks, cmap="Blues", vmin=0, vmax=1.2 * largest)
        panel.set_title(part.removeprefix("model.").replace(".", "\n", 1), fontsize=8)
        panel.set_yticks(range(len(kinds)), kinds, fontsize=7)
        panel.set_xticks(range(depth), range(depth), fontsize=7)
        panel.spines[:].set_visible(False)
        panel.tick_params(length=0)
        panel.set_anchor("N")
        panel.set_ylim(max(map(len, parts.values())) - 0.5, -0.5)  # cells of one size
    figure.supxlabel("layer", fontsize=8)
    figure.tight_layout()
    figure.savefig(options.output, dpi=160)
    print(f"Picture: {options.output}")


if __name__ == "__main__":
    run(main, Drawing)
