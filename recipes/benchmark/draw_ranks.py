"""Draws the ranks of a genotype: the README's picture.
Not here: how they are drawn (darts_lora/views/rank_images.py).

python recipes/benchmark/draw_ranks.py --genotype runs/search/genotype.json
"""

from dataclasses import dataclass

from PIL import Image

from darts_lora import Genotype
from darts_lora.base.options import run
from darts_lora.views.rank_images import rank_image


@dataclass
class Drawing:
    """What is drawn, and where it goes."""

    genotype: str = "runs/search/genotype.json"
    """File of the genotype (JSON)."""
    output: str = "recipes/benchmark/ranks.png"
    """File of the picture (PNG or PDF)."""
    widest: int = 1600
    """Width above which panels stand below each other (pixels)."""


def main(options: Drawing) -> None:
    """Draw the rank of each layer: a panel for each part of the model, depth to the right."""
    genotype = Genotype.load(options.genotype)
    largest = max(genotype.ranks.values())
    pixels = rank_image(genotype.ranks, largest, widest=options.widest)
    Image.fromarray(pixels).save(options.output)
    print(f"Picture: {options.output}")


if __name__ == "__main__":
    run(main, Drawing)
