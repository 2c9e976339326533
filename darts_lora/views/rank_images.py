"""Pictures of ranks and probabilities, painted fast enough to be made during a search.
Not here: where they go (tensorboard.py), the plots of a report (report.py)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cache

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont

from darts_lora.views.console import by_part

CELL = 14  # pixels of a cell: a number of two digits fits
FONT_SIZE = 10
GAP = 10
PAPER, INK = (255, 255, 255), (30, 30, 30)
BLUE = np.array([8, 48, 107])  # of the largest value; 0 is white


@cache
def _font() -> ImageFont.FreeTypeFont:
    return ImageFont.load_default(FONT_SIZE)


def rank_image(
    ranks: Mapping[str, float], largest: float, parts: Mapping[str, str] | None = None
) -> np.ndarray:
    """A panel for each part of the model: a row a module type, depth to the right, ranks (or their
    means) as colour and rounded number; (height, width, 3) uint8.

    `parts` (targets.model_parts) gives cross-attention within a part a panel of its own.
    """
    panels = []
    for part, kinds in _apart(by_part(ranks), parts or {}).items():
        depths = sorted({depth for layers in kinds.values() for depth in layers})
        values = np.full((len(kinds), len(depths)), np.nan)
        for row, layers in enumerate(kinds.values()):
            for depth, name in layers.items():
                values[row, depths.index(depth)] = ranks[name]
        titles = [str(depth) for depth in depths]
        panels.append(_panel(part, list(kinds), titles, values, largest, numbers=True))
    return _stack(panels)


def _apart(grouped: dict, parts: Mapping[str, str]) -> dict:
    """by_part's result; the connector's module types in a mixed part are a part of their own."""
    result = {}
    for part, kinds in grouped.items():
        joins = {k for k, names in kinds.items() if parts.get(min(names.values())) == "connector"}
        for title, chosen in ((part, kinds.keys() - joins), (f"{part}: cross-attention", joins)):
            group = {kind: names for kind, names in kinds.items() if kind in chosen}
            if group:
                result[title if len(group) < len(kinds) else part] = group
    return result


def probability_image(
    names: Sequence[str], probabilities: torch.Tensor, candidates: Sequence[int]
) -> np.ndarray:
    """For each part and module type: a row a layer in order of depth, a column a candidate rank,
    (N, K) probabilities as colour; (height, width, 3) uint8."""
    rows = {name: row for name, row in zip(names, probabilities.numpy(), strict=True)}
    bands = []
    for part, kinds in by_part(names).items():
        panels = []
        for kind, layers in kinds.items():
            ordered = sorted(layers.items())
            values = np.stack([rows[name] for _, name in ordered])
            depths = [str(depth) for depth, _ in ordered]
            title = f"{part.rsplit('.', 2)[-2] if '.' in part else part} {kind}"
            columns = [str(rank) for rank in candidates]
            panels.append(_panel(title, depths, columns, values, 1.0, numbers=False))
        bands.append(_side_by_side(panels))
    return _stack(bands)


def _panel(
    title: str,
    rows: list[str],
    columns: list[str],
    values: np.ndarray,
    largest: float,
    numbers: bool,
) -> Image.Image:
    """Cells with labels on the left and above; NaN is left empty."""
    font = _font()
    left = 4 + max(int(font.getlength(label)) for label in rows)
    width = max(left + CELL * len(columns) + 2, 4 + int(font.getlength(title)))
    panel = Image.new("RGB", (width, (len(rows) + 2) * CELL), PAPER)
    draw = ImageDraw.Draw(panel)
    draw.text((2, 1), title, INK, font)
    for column, label in enumerate(columns):
        draw.text((left + CELL * (column + 0.5), CELL * 1.5), label, INK, font, "mm")
    for row, label in enumerate(rows):
        draw.text((left - 2, CELL * (row + 2.5)), label, INK, font, "rm")
    share = np.clip(np.nan_to_num(values) / largest, 0, 1)[..., None]
    colours = (255 * (1 - share) + BLUE * share).astype(np.uint8)
    colours[np.isnan(values)] = PAPER
    cells = colours.repeat(CELL, 0).repeat(CELL, 1)
    cells[::CELL], cells[:, ::CELL] = 230, 230
    panel.paste(Image.fromarray(cells), (left, 2 * CELL))
    if numbers:
        for (row, column), value in np.ndenumerate(values):
            if not np.isnan(value):
                ink = PAPER if share[row, column, 0] > 0.5 else INK
                place = (left + CELL * (column + 0.5), CELL * (row + 2.5))
                draw.text(place, f"{value:.0f}", ink, font, "mm")
    return panel


def _side_by_side(panels: list[Image.Image], widest: int = 1400) -> Image.Image:
    """Panels from left to right, in as many lines as they need."""
    lines: list[list[Image.Image]] = [[]]
    for panel in panels:
        if lines[-1] and sum(p.width + GAP for p in lines[-1]) + panel.width > widest:
            lines.append([])
        lines[-1].append(panel)
    width = max(sum(p.width + GAP for p in line) for line in lines)
    height = sum(max(p.height for p in line) + GAP for line in lines)
    whole, y = Image.new("RGB", (width, height), PAPER), 0
    for line in lines:
        x = 0
        for panel in line:
            whole.paste(panel, (x, y))
            x += panel.width + GAP
        y += max(panel.height for panel in line) + GAP
    return whole


def _stack(panels: list[Image.Image]) -> np.ndarray:
    whole = Image.new(
        "RGB", (max(p.width for p in panels), sum(p.height + GAP for p in panels)), PAPER
    )
    y = 0
    for panel in panels:
        whole.paste(panel, (0, y))
        y += panel.height + GAP
    return np.asarray(whole)
