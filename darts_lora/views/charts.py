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

from darts_lora.alpha.sizes import recommended
from darts_lora.lora.cost import parameters_per_rank
from darts_lora.run.runs import Search
from darts_lora.views.rank_images import rank_image, side_by_side, worth_images

WIDEST = 1400  # pixels of a picture of cells, those of the page and half as many again


def pictures(search: Search, finetunes: list[dict[str, Any]]) -> dict[str, bytes]:
    """Name -> PNG. One that would show nothing is left out: a curve of one point."""
    ranks = rank_image(search.ranks, search.candidates[-1], search.parts, WIDEST)
    found = {"ranks": _png(ranks)}
    with matplotlib.rc_context({"text.parse_math": False}):  # "$" in a name is a character
        if sizes := search.sizes:
            found["sizes"] = _figure(_draw_sizes, (sizes, finetunes))
        elif any(run["loss"] is not None for run in finetunes):
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


def sizes_image(sizes: dict[str, Any]) -> np.ndarray:
    """The predicted losses at each size, as pixels (height, width, 3)."""
    picture = Image.open(io.BytesIO(_figure(_draw_sizes, (sizes, []))))
    return np.asarray(picture.convert("RGB"))


def _draw_sizes(panel, content: tuple[dict[str, Any], list[dict[str, Any]]]) -> None:
    """The predicted losses against parameters, the recommended size, and what was measured."""
    sizes, finetunes = content
    points, best = sizes["points"], recommended(sizes)
    counts = [point["parameters"] for point in points]
    for curve, marker in {"uniform": "o", "searched": "s"}.items():
        losses = np.array([point[curve] for point in points])
        errors = np.array([point[f"{curve}_error"] for point in points])
        (line,) = panel.plot(counts, losses, f"{marker}-", ms=4, label=f"predicted, {curve} ranks")
        panel.fill_between(counts, losses - errors, losses + errors, alpha=0.15, lw=0,
                           color=line.get_color())  # fmt: skip
    panel.axvline(best["parameters"], color="0.5", ls="--", lw=1, label="recommended size")
    tested = [run for run in finetunes if run["loss"] is not None]
    for run in tested:
        place = (run["trainable_parameters"], run["loss"])
        panel.plot(*place, "D", color="C3", label="measured" if run is tested[0] else None)
        panel.annotate(
            run["name"], place, xytext=(6, 4), textcoords="offset points", color="C3", fontsize=9
        )
    panel.set_xscale("log", base=2)
    panel.set_xticks(counts, [f"{p['parameters']:,}\nrank {p['rank']}" for p in points], fontsize=9)
    panel.minorticks_off()
    panel.margins(x=0.08, y=0.12)
    panel.set(xlabel="trainable parameters", ylabel="loss per token")
    panel.legend(frameon=False, fontsize=9)


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
