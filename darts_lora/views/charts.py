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

from darts_lora.alpha.sizes import recommended
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
        if sizes := search.sizes:
            found["sizes"] = _figure(_draw_sizes, (sizes, finetunes), height=4.2)
        elif any(run["loss"] is not None for run in finetunes):
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


def sizes_image(sizes: dict[str, Any]) -> np.ndarray:
    """The predicted losses at each size, as pixels (height, width, 3)."""
    picture = Image.open(io.BytesIO(_figure(_draw_sizes, (sizes, []), height=4.2)))
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
