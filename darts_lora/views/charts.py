"""The pictures of a report, as PNGs: ranks, losses, worth over time, where the parameters are.
Not here: the page that they stand in (report.py), how cells are painted (rank_images.py)."""

from __future__ import annotations

import io
from collections.abc import Callable
from typing import Any

import matplotlib
import numpy as np
from matplotlib.figure import Figure
from PIL import Image

from darts_lora.lora.cost import parameters_per_rank
from darts_lora.run.runs import Search
from darts_lora.views.console import by_part, short_names
from darts_lora.views.rank_images import rank_image, side_by_side, worth_images

WIDEST = 1400  # pixels of a picture of cells, those of the page and half as many again
MOST_BARS = 24


def pictures(search: Search, finetunes: list[dict[str, Any]]) -> dict[str, bytes]:
    """Name -> PNG. One that would show nothing is left out: a curve of one point, a single bar."""
    ranks = rank_image(search.ranks, search.candidates[-1], search.parts, WIDEST)
    found = {"ranks": _png(ranks)}
    with matplotlib.rc_context({"text.parse_math": False}):  # "$" in a name is a character
        if any(run["loss"] is not None for run in finetunes):
            found["finetunes"] = _figure(_draw_finetunes, finetunes)
        if len(search.records) > 1:
            found["losses"] = _figure(_draw_losses, search)
            found["worth"] = _png(_worth(search))
        sizes = parameters_by_part(search)
        if len(sizes) > 1:
            found["parts"] = _figure(_draw_parts, sizes, height=1 + 0.28 * len(sizes))
    return found


def parameters_by_part(search: Search) -> dict[str, float]:
    """Trainable parameters of each part of the model; of a model of one part, of each module
    type."""
    parts = by_part(search.layers)
    titles = short_names(parts)
    groups = {
        titles[part]: [name for layers in kinds.values() for name in layers.values()]
        for part, kinds in parts.items()
    }
    if len(groups) == 1:
        (kinds,) = parts.values()
        groups = {kind: list(layers.values()) for kind, layers in kinds.items()}
    size = {n: parameters_per_rank(*shape) * search.ranks[n] for n, shape in search.layers.items()}
    sizes = {group: sum(size[name] for name in names) for group, names in groups.items()}
    if len(sizes) <= MOST_BARS:
        return sizes
    largest = sorted(sizes, key=sizes.get, reverse=True)
    own, others = largest[: MOST_BARS - 1], largest[MOST_BARS - 1 :]
    return {name: sizes[name] for name in own} | {
        f"{len(others)} others": sum(sizes[name] for name in others)
    }


def _worth(search: Search) -> np.ndarray:
    costs = np.array([parameters_per_rank(*shape) for shape in search.layers.values()])
    expected = np.array([record["expected_ranks"] for record in search.records]) * costs
    steps = [record["step"] for record in search.records]
    images = worth_images(list(search.layers), steps, expected, WIDEST)
    return side_by_side([Image.fromarray(image) for image in images.values()], WIDEST)


def _png(pixels: np.ndarray) -> bytes:
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, "PNG")
    return stream.getvalue()


def _figure(draw: Callable, content: Any, height: float = 3.4) -> bytes:
    figure, stream = Figure(figsize=(7, height), layout="constrained"), io.BytesIO()
    panel = figure.subplots()
    panel.spines[["top", "right"]].set_visible(False)
    draw(panel, content)
    figure.savefig(stream, format="png", dpi=150)
    return stream.getvalue()


def _draw_losses(panel, search: Search) -> None:
    shown = {
        "train_loss": "training loss",
        "validation_gain": "gain on validation rows",
    }
    for name, label in shown.items():
        points = [(r["step"], r[name]) for r in search.records if r[name] is not None]
        panel.plot(*zip(*points, strict=True), label=label) if points else None
    panel.set(xlabel="step", ylabel="loss")
    panel.legend(frameon=False)


def _draw_parts(panel, sizes: dict[str, float]) -> None:
    bars = panel.barh(list(sizes), list(sizes.values()))
    panel.bar_label(bars, [f"{size:,.0f}" for size in sizes.values()], padding=3)
    panel.invert_yaxis()
    panel.margins(x=0.2)
    panel.set(xlabel="trainable parameters")


def _draw_finetunes(panel, finetunes: list[dict[str, Any]]) -> None:
    """Test loss against parameters, uniform ranks and derived models alike."""
    for run in finetunes:
        if run["loss"] is None:  # not finite: the table says so
            continue
        (point,) = panel.plot(run["trainable_parameters"], run["loss"], "o")
        place = (run["trainable_parameters"], run["loss"])
        panel.annotate(
            run["name"], place, xytext=(5, 5), textcoords="offset points", color=point.get_color()
        )
    panel.margins(0.25)
    panel.set(xlabel="trainable parameters", ylabel="test loss per token")
