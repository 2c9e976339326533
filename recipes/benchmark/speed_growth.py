"""How time and memory of a bilevel step grow with candidates, the largest rank and searched layers.
Not here: other ways to mix ranks (speed.py), whose clock and models this uses.

python recipes/benchmark/speed_growth.py --output growth.json --plot growth.png
python recipes/benchmark/speed_growth.py --shape tiny --device cpu      # only to keep it alive
"""

import gc
from dataclasses import dataclass, replace

import matplotlib
import torch
from speed import SHAPES, SpeedRun, make_batches, make_model, measure
from speed_methods import METHODS

from darts_lora import InputError
from darts_lora.base.files import write_json, write_whole
from darts_lora.base.options import run

matplotlib.use("Agg")
import matplotlib.pyplot as plt

CANDIDATES = (2, 3, 4, 5, 6, 7, 8)  # count, the largest rank stays
LARGEST = (16, 32, 64, 128, 256)  # rank, five candidates
SHARES = (0.25, 0.5, 0.75, 1.0)  # of the model's blocks
AXES = {
    "candidates": "candidate ranks (largest: 64)",
    "rank": "largest of five candidate ranks",
    "layers": "searched layers",
}


@dataclass
class GrowthRun:
    """What grows, and where the figures go."""

    shape: str = "llama_1b"
    """Model and batch, as in speed.py: llama_1b, llama_8b, smollm2, tiny."""
    steps: int = 20
    """Timed bilevel steps of each point (count)."""
    device: str = "cuda"
    """Device: cuda or cpu."""
    graphs: bool = True
    """Steps as CUDA graphs: without, launches hide what the arithmetic costs. Not on a CPU."""
    output: str = "growth.json"
    """File for the figures (JSON)."""
    plot: str = "growth.png"
    """File for the plot (PNG, SVG or PDF)."""


def main(options: GrowthRun) -> None:
    """Median milliseconds and peak memory of a bilevel step as one thing grows, nested and
    independent branches."""
    if options.shape not in SHAPES or SHAPES[options.shape].config is None:
        possible = [name for name, shape in SHAPES.items() if shape.config]
        raise InputError(f"shape={options.shape!r}: must be one of {', '.join(possible)}")
    largest = 64 if options.shape != "tiny" else 16
    points = []
    for axis, value, ranks, share in _points(largest, SHAPES[options.shape].config):
        for branches in ("nested", "independent"):
            layers, result = _measure(options, branches, ranks, share)
            at = layers if axis == "layers" else value
            points.append({"axis": axis, "value": at, "branches": branches} | result)
            print(
                f"{axis} {at}, {branches}: {result['ms']} ms, {result['peak_gib']} GiB", flush=True
            )
            device = torch.cuda.get_device_name() if options.device == "cuda" else "cpu"
            about = {"shape": options.shape, "device": device, "torch": torch.__version__}
            write_json(options.output, {**about, "points": points})
    write_whole(options.plot, lambda path: _plot(points, path, options))


def _points(largest: int, config: dict) -> list[tuple]:
    """(axis, value, candidate ranks, share of the blocks) of each point; no rank is above the
    smallest side of a layer, that of keys and values."""
    heads, groups = config["num_attention_heads"], config["num_key_value_heads"]
    side = config["hidden_size"] * groups // heads
    candidates = [
        ("candidates", k, [largest * (i + 1) // k for i in range(k)], 1.0) for k in CANDIDATES
    ]
    ranks = [("rank", r, [r // 16, r // 8, r // 4, r // 2, r], 1.0) for r in LARGEST if r <= side]
    layers = [("layers", share, [4, 8, 16, 32, 64], share) for share in SHARES]
    if largest < 64:  # the tiny shape
        layers = [("layers", s, [1, 2, 4, 8, 16], s) for s in (0.5, 1.0)]
    return candidates + ranks + layers


def _measure(options: GrowthRun, branches: str, ranks: list[int], share: float):
    shape = SHAPES[options.shape]
    blocks = max(1, round(share * shape.config["num_hidden_layers"]))
    shape = replace(shape, config={**shape.config, "num_hidden_layers": blocks})
    speed = SpeedRun(shape=options.shape, device=options.device, steps=options.steps)
    graphs = options.graphs and options.device == "cuda"
    method = METHODS[f"{branches}_graphs" if graphs else branches]
    torch.manual_seed(0)
    model, batches = make_model(shape, options.device), make_batches(shape, speed)
    steps, close = method(model, ranks)
    result = measure(steps["bilevel"], batches, speed)
    layers = sum(type(m).__name__ == "MixedRankLinear" for m in model.modules())
    close()
    del steps, close, model
    gc.collect()
    return layers, result


def _plot(points: list[dict], path: str, options: GrowthRun) -> None:
    figure, panels = plt.subplots(2, len(AXES), figsize=(11, 5.5), sharey="row")
    for column, (axis, label) in enumerate(AXES.items()):
        for row, (key, unit) in enumerate((("ms", "bilevel step, ms"), ("peak_gib", "peak, GiB"))):
            panel = panels[row][column]
            for branches in ("nested", "independent"):
                chosen = [p for p in points if (p["axis"], p["branches"]) == (axis, branches)]
                heights = [p[key] or 0 for p in chosen]
                panel.plot([p["value"] for p in chosen], heights, "o-", label=branches)
            panel.set_xlabel(label if row else "")
            panel.set_ylabel(unit if not column else "")
    for first, *_ in panels:
        first.set_ylim(bottom=0)  # of the whole row; after all lines, or it would cut them off
    panels[0][0].legend()
    figure.suptitle(f"{options.shape}, {options.device}: cost of a bilevel step")
    figure.tight_layout()
    figure.savefig(path, dpi=110, format=options.plot.rsplit(".", 1)[-1])
    plt.close(figure)


if __name__ == "__main__":
    run(main, GrowthRun)
