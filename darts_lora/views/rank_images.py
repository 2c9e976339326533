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

from darts_lora.views.console import by_part, short_name, short_names

# Pixels, twice those of a page: screens are fine, and TensorBoard shows pictures small.
CELL = 32  # a number of two digits fits
STRIP = 6  # the least height of a strip of a cell
FONT_SIZE = 20
GAP = 20
WIDEST = 700  # twice the width of a card in TensorBoard, which shows every second pixel
PIXELS_A_TIME, MOST_ROWS = 115, 12  # of a picture of worth
PAPER, INK = (255, 255, 255), (30, 30, 30)
EDGE = 190  # grey of the lines between cells
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
    values = {name: np.array([rank]) for name, rank in ranks.items()}
    return side_by_side(_by_depth(values, largest, parts, widest), widest)


def probability_image(
    names: Sequence[str],
    probabilities: torch.Tensor,
    candidates: Sequence[int],
    parts: Mapping[str, str] | None = None,
) -> np.ndarray:
    """As rank_image's panels; each cell holds a strip for each candidate rank, the smallest on top,
    with (N, K) probabilities as colour; (height, width, 3) uint8."""
    values = dict(zip(names, probabilities.numpy(), strict=True))
    about = _heading(f"In each cell from the top, ranks {', '.join(map(str, candidates))}")
    return side_by_side([about, *_by_depth(values, 1.0, parts, WIDEST)])


def _by_depth(
    values: Mapping[str, np.ndarray],
    largest: float,
    parts: Mapping[str, str] | None,
    widest: int,
) -> list[Image.Image]:
    """A panel for each part of the model, of (K,) values of each layer by its name."""
    panels, count = [], len(next(iter(values.values())))
    for part, kinds in _apart(by_part(values), parts or {}).items():
        depths = sorted({depth for layers in kinds.values() for depth in layers})
        cells = np.full((len(kinds), len(depths), count), np.nan)
        for row, layers in enumerate(kinds.values()):
            for depth, name in layers.items():
                cells[row, depths.index(depth)] = values[name]
        titles = [str(depth) for depth in depths]
        name, _, about = part.partition(": ")
        title = short_name(name) + (about and f": {about}")
        panels.append(_panel(title, list(kinds), titles, cells, largest, widest))
    return panels


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


def worth_images(
    names: Sequence[str], steps: Sequence[int], parameters: np.ndarray, widest: int = WIDEST
) -> dict[str, np.ndarray]:
    """What alpha gives to module types and to depths, steps to the right: per cent of all expected
    parameters, as colour and number. Part of the model -> (height, width, 3) uint8; parts of one
    layer each share a picture.

    Args:
        names: of the layers.
        steps: of the records, ascending.
        parameters: (len(steps), len(names)), expected ones.
    """
    spread = np.linspace(steps[0], steps[-1], widest // PIXELS_A_TIME)
    chosen = sorted({int(np.searchsorted(steps, step)) for step in spread})
    shares = 100 * parameters / parameters.sum(1, keepdims=True).clip(1e-9)
    shares = dict(zip(names, shares[chosen].T, strict=True))
    columns, tables = [str(steps[i]) for i in chosen], {}
    for part, kinds in _parts_over_time(names).items():
        groups = {kind: list(layers.values()) for kind, layers in kinds.items()}
        tables[part] = {f"{part}: worth in %": _summed(groups, shares)}
        if len(depths := sorted({d for layers in kinds.values() for d in layers})) > 2:
            size = math.ceil(len(depths) / MOST_ROWS)
            runs = [depths[i : i + size] for i in range(0, len(depths), size)]
            groups = {
                f"{run[0]}-{run[-1]}" if size > 1 else str(run[0]): [
                    layers[depth] for layers in kinds.values() for depth in run if depth in layers
                ]
                for run in runs
            }
            tables[part]["by depth"] = _summed(groups, shares)
    values = [
        rows for pair in tables.values() for table in pair.values() for rows in table.values()
    ]
    largest = max(rows.max() for rows in values)
    return {
        part: side_by_side(
            [
                _panel(
                    title,
                    list(rows),
                    columns,
                    np.stack(list(rows.values()))[..., None],
                    largest,
                    widest,
                )
                for title, rows in pair.items()
            ],
            widest,
        )
        for part, pair in tables.items()
    }


def _parts_over_time(names: Sequence[str]) -> dict[str, dict[str, dict[int, str]]]:
    """by_part's result by short names; parts of one layer are module types of one part."""
    parts = by_part(names)
    titles, result, alone = short_names(parts), {}, {}
    for part, kinds in parts.items():
        if sum(map(len, kinds.values())) > 1:
            result[titles[part]] = kinds
        else:
            (alone[titles[part]],) = kinds.values()
    return result | ({"others": alone} if alone else {})


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
    widest: int,
) -> Image.Image:
    """Cells with labels on the left and above; what is too wide goes on below. NaN is left empty.

    Args:
        values: (len(rows), len(columns), K): one each is a colour and a number, several are strips.
        largest: the value of the darkest colour.
    """
    count, font = values.shape[2], _font()
    high = count * max(STRIP, CELL // count)
    left = 8 + max(int(font.getlength(label)) for label in rows)
    fit = max(1, (widest - left) // CELL)
    lines = math.ceil(len(columns) / fit)
    fit = math.ceil(len(columns) / lines)
    height = CELL + len(rows) * high
    width = max(left + CELL * fit + 4, 8 + int(font.getlength(title)))
    panel = Image.new("RGB", (width, CELL + lines * height + 1), PAPER)
    draw = ImageDraw.Draw(panel)
    draw.text((4, 2), title, INK, font)
    shares = np.clip(np.nan_to_num(values) / max(largest, 1e-9), 0, 1)
    for line in range(lines):
        part, top = slice(line * fit, (line + 1) * fit), CELL + line * height
        _label(draw, rows, columns[part], left, top, high)
        panel.paste(_cells(values[:, part], shares[:, part], high), (left, top + CELL))
        for (row, column, _), value in np.ndenumerate(values[:, part]):
            if count == 1 and not np.isnan(value):
                ink = PAPER if shares[:, part][row, column, 0] > 0.5 else INK
                place = (left + CELL * (column + 0.5), top + CELL + high * (row + 0.5))
                draw.text(place, f"{value:.0f}", ink, font, "mm")
    return panel


def _label(
    draw: ImageDraw.ImageDraw, rows: list[str], columns: list[str], left: int, top: int, high: int
) -> None:
    """Names of rows on the left, and of as many columns as have room."""
    font = _font()
    apart = math.ceil((6 + max(font.getlength(label) for label in columns)) / CELL)
    for column, label in enumerate(columns):
        if column % apart == 0:
            draw.text((left + CELL * (column + 0.5), top + CELL / 2), label, INK, font, "mm")
    for row, label in enumerate(rows):
        draw.text((left - 4, top + CELL + high * (row + 0.5)), label, INK, font, "rm")


def _cells(values: np.ndarray, shares: np.ndarray, high: int) -> Image.Image:
    """(rows, columns, K) as cells of K strips each, the first on top, with lines around them."""
    colours = (255 * (1 - shares[..., None]) + BLUE * shares[..., None]).astype(np.uint8)
    colours[np.isnan(values)] = PAPER
    rows, columns, count = values.shape
    strips = colours.transpose(0, 2, 1, 3).reshape(rows * count, columns, 3)
    cells = strips.repeat(high // count, 0).repeat(CELL, 1)
    cells = np.pad(cells, ((0, 1), (0, 1), (0, 0)), constant_values=EDGE)
    cells[::high], cells[:, ::CELL] = EDGE, EDGE
    return Image.fromarray(cells)


def side_by_side(panels: list[Image.Image], widest: int = WIDEST) -> np.ndarray:
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
