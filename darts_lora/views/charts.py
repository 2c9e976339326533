"""The pictures of a report, as PNGs: ranks, losses, worth over time, finetunes.
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
from darts_lora.views.rank_images import rank_image, side_by_side, worth_images

WIDEST = 1400  # pixels of a picture of cells, those of the page and half as many again


def pictures(search: Search, finetunes: list[dict[str, Any]]) -> dict[str, bytes]:
    """Name -> PNG. One that would show nothing is left out: a curve of one point."""
    ranks = rank_image(search.ranks, search.candidates[-1], search.parts, WIDEST)
    found = {"ranks": _png(ranks)}
    with matplotlib.rc_context({"text.parse_math": False}):  # "$" in a name is a character
        if any(run["loss"] is not None for run in finetunes):
            found["finetunes"] = _figure(_draw_finetunes, finetunes)
        if len(search.records) > 1:
            found["losses"] = _figure(_draw_losses, search)
            found["worth"] = _png(_worth(search))
    return found


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


def _figure(draw: Callable, content: Any) -> bytes:
    figure, stream = Figure(figsize=(7, 3.4), layout="constrained"), io.BytesIO()
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
