"""Pictures of ranks, probabilities and worth: cells of colours, painted fast enough for a search.
Not here: where they go (search_views.py, report.py), the curves of a report (report.py)."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from functools import cache

import matplotlib
import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont

from darts_lora.views.console import by_part, short_name

# Pixels, twice those of a page: screens are fine, and TensorBoard shows pictures small.
CELL = 32  # a number of two digits fits
SMALL_CELL = 20
FONT_SIZE = 20
GAP = 20
WIDEST = 700  # twice the width of a card in TensorBoard, which shows every second pixel
MOST_TIMES, MOST_ROWS = 12, 12  # of a picture of worth
PAPER, INK = (255, 255, 255), (30, 30, 30)
BLUE = np.array([8, 48, 107])  # of the largest value; 0 is white


@cache
def _font() -> ImageFont.FreeTypeFont:
    path = os.path.join(matplotlib.get_data_path(), "fonts", "ttf", "DejaVuSans.ttf")
    return ImageFont.truetype(path, FONT_SIZE)


def rank_image(
    ranks: Mapping[str, float],
    largest: float,
    parts: Mapping[str, str] | None = None,
    widest: int = WIDEST,
) -> np.ndarray:
    """A panel for each part of the model: a row a module type, depth to the right, ranks (or their
    means) as colour and rounded number; (height, width, 3) uint8.

    Args:
        ranks: module name -> rank.
        largest: the rank of the darkest colour.
        parts: targets.model_parts; gives cross-attention within a part a panel of its own.
        widest: pixels; what is deeper goes on below.
    """
    panels = []
    for part, kinds in _apart(by_part(ranks), parts or {}).items():
        depths = sorted({depth for layers in kinds.values() for depth in layers})
        values = np.full((len(kinds), len(depths)), np.nan)
        for row, layers in enumerate(kinds.values()):
            for depth, name in layers.items():
                values[row, depths.index(depth)] = ranks[name]
        titles = [str(depth) for depth in depths]
        name, _, about = part.partition(": ")
        title = short_name(name) + (about and f": {about}")
        panels.append(_panel(title, list(kinds), titles, values, largest, widest=widest))
    return _side_by_side(panels, widest)


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
    """For each part and module type: a row a candidate rank, depth to the right, (N, K)
    probabilities as colour; (height, width, 3) uint8."""
    rows = {name: row for name, row in zip(names, probabilities.numpy(), strict=True)}
    labels, panels = [str(rank) for rank in candidates], []
    for part, kinds in by_part(names).items():
        panels.append(_heading(short_name(part)))
        for kind, layers in kinds.items():
            ordered = sorted(layers.items())
            values = np.stack([rows[name] for _, name in ordered], axis=1)
            depths = [str(depth) for depth, _ in ordered]
            panels.append(_panel(kind, labels, depths, values, 1.0, numbers=False))
    return _side_by_side(panels)


def worth_image(
    names: Sequence[str], steps: Sequence[int], parameters: np.ndarray, widest: int = WIDEST
) -> np.ndarray:
    """What alpha gives to module types and to depths, steps to the right: per cent of all expected
    parameters, as colour and number; (height, width, 3) uint8.

    Args:
        names: of the layers.
        steps: of the records, ascending.
        parameters: (len(steps), len(names)), expected ones.
    """
    spread = np.linspace(steps[0], steps[-1], MOST_TIMES)
    chosen = sorted({int(np.searchsorted(steps, step)) for step in spread})
    shares = 100 * parameters / parameters.sum(1, keepdims=True).clip(1e-9)
    shares = dict(zip(names, shares[chosen].T, strict=True))
    columns, tables = [str(steps[i]) for i in chosen], []
    for part, kinds in by_part(names).items():
        groups = {kind: list(layers.values()) for kind, layers in kinds.items()}
        tables.append((f"{short_name(part)}: % of parameters", _summed(groups, shares)))
        if len(depths := sorted({d for layers in kinds.values() for d in layers})) > 2:
            size = math.ceil(len(depths) / MOST_ROWS)
            runs = [depths[i : i + size] for i in range(0, len(depths), size)]
            groups = {
                f"{run[0]}-{run[-1]}" if size > 1 else str(run[0]): [
                    layers[depth] for layers in kinds.values() for depth in run if depth in layers
                ]
                for run in runs
            }
            tables.append((f"{short_name(part)}: % by depth", _summed(groups, shares)))
    largest = max(rows.max() for _, groups in tables for rows in groups.values())
    panels = [
        _panel(title, list(rows), columns, np.stack(list(rows.values())), largest, widest=widest)
        for title, rows in tables
    ]
    return _side_by_side(panels, widest)


def padded(image: np.ndarray, width: int = WIDEST) -> np.ndarray:
    """With paper on its right up to `width`: pictures of one width are shown at one scale."""
    missing = max(0, width - image.shape[1])
    return np.pad(image, ((0, 0), (0, missing), (0, 0)), constant_values=PAPER[0])


def _summed(groups: dict[str, list[str]], shares: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The share of each group of layers; of too many groups the last ones together."""
    sums = {g: np.sum([shares[name] for name in names], axis=0) for g, names in groups.items()}
    if len(sums) <= MOST_ROWS:
        return sums
    items = list(sums.items())
    own, others = dict(items[: MOST_ROWS - 1]), items[MOST_ROWS - 1 :]
    return own | {f"{len(others)} others": np.sum([rows for _, rows in others], axis=0)}


def _heading(text: str) -> Image.Image:
    """As wide as all: what follows stands below."""
    strip = Image.new("RGB", (WIDEST, CELL), PAPER)
    ImageDraw.Draw(strip).text((4, 2), f"{text}:", INK, _font())
    return strip


def _panel(
    title: str,
    rows: list[str],
    columns: list[str],
    values: np.ndarray,
    largest: float,
    numbers: bool = True,
    widest: int = WIDEST,
) -> Image.Image:
    """Cells with labels on the left and above; what is too wide goes on below. NaN is left empty.

    Args:
        values: (len(rows), len(columns)).
        largest: the value of the darkest colour.
    """
    cell, font = (CELL if numbers else SMALL_CELL), _font()
    left = 8 + max(int(font.getlength(label)) for label in rows)
    fit = max(1, (widest - left) // cell)
    lines = math.ceil(len(columns) / fit)
    fit = math.ceil(len(columns) / lines)
    height = CELL + len(rows) * cell
    width = max(left + cell * fit + 4, 8 + int(font.getlength(title)))
    panel = Image.new("RGB", (width, CELL + lines * height), PAPER)
    draw = ImageDraw.Draw(panel)
    draw.text((4, 2), title, INK, font)
    shares = np.clip(np.nan_to_num(values) / max(largest, 1e-9), 0, 1)
    for line in range(lines):
        part, top = slice(line * fit, (line + 1) * fit), CELL + line * height
        _label(draw, rows, columns[part], left, top, cell)
        panel.paste(_cells(values[:, part], shares[:, part], cell), (left, top + CELL))
        for (row, column), value in np.ndenumerate(values[:, part]):
            if numbers and not np.isnan(value):
                ink = PAPER if shares[:, part][row, column] > 0.5 else INK
                place = (left + cell * (column + 0.5), top + CELL + cell * (row + 0.5))
                draw.text(place, f"{value:.0f}", ink, font, "mm")
    return panel


def _label(
    draw: ImageDraw.ImageDraw, rows: list[str], columns: list[str], left: int, top: int, cell: int
) -> None:
    """Names of rows on the left, and of as many columns as have room."""
    font = _font()
    apart = math.ceil((6 + max(font.getlength(label) for label in columns)) / cell)
    for column, label in enumerate(columns):
        if column % apart == 0:
            draw.text((left + cell * (column + 0.5), top + CELL / 2), label, INK, font, "mm")
    for row, label in enumerate(rows):
        draw.text((left - 4, top + CELL + cell * (row + 0.5)), label, INK, font, "rm")


def _cells(values: np.ndarray, shares: np.ndarray, cell: int) -> Image.Image:
    colours = (255 * (1 - shares[..., None]) + BLUE * shares[..., None]).astype(np.uint8)
    colours[np.isnan(values)] = PAPER
    cells = colours.repeat(cell, 0).repeat(cell, 1)
    cells[::cell], cells[:, ::cell] = 225, 225
    return Image.fromarray(cells)


def _side_by_side(panels: list[Image.Image], widest: int = WIDEST) -> np.ndarray:
    """Panels from left to right, in as many lines as they need."""
    lines: list[list[Image.Image]] = [[]]
    for panel in panels:
        if lines[-1] and sum(p.width + GAP for p in lines[-1]) + panel.width > widest:
            lines.append([])
        lines[-1].append(panel)
    width = max(sum(p.width + GAP for p in line) for line in lines) - GAP
    height = sum(max(p.height for p in line) + GAP for line in lines) - GAP
    whole, y = Image.new("RGB", (width, height), PAPER), 0
    for line in lines:
        x = 0
        for panel in line:
            whole.paste(panel, (x, y))
            x += panel.width + GAP
        y += max(panel.height for panel in line) + GAP
    return np.asarray(whole)
