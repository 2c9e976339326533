"""Pictures: each cell stands where it belongs, in its colour, and fits a card of TensorBoard; which
pictures a report has. Not here: the page (test_report.py), trackers (test_search_views.py)."""

import numpy as np
import pytest
import torch

from darts_lora.run.runs import Search
from darts_lora.views.charts import pictures
from darts_lora.views.rank_images import (
    BLUE,
    CELL,
    EDGE,
    WIDEST,
    _font,
    probability_image,
    rank_image,
    worth_images,
)

NAMES = [f"text.layers.{i}.{kind}" for i in range(3) for kind in ("q", "v")]
LOWEST = 430  # pixels that a card of the first page has room for below a picture of WIDEST


def cells(image, rows, columns, high=CELL, top=2 * CELL):
    """Colours of the cells (or strips of cells) of a panel whose first row begins at `top`."""
    inside = image[top : top + rows * high]
    left = next(x for x in range(image.shape[1]) if (inside[:, x] == EDGE).all())
    ys = [top + high * row + 3 for row in range(rows)]
    return np.array([[image[y, left + CELL * c + 2] for c in range(columns)] for y in ys])


def test_the_font_has_outlines():
    assert _font().getname() == ("DejaVu Sans", "Book")


def test_ranks_by_module_type_and_depth():
    ranks = dict.fromkeys(NAMES, 0) | {"text.layers.2.v": 8, "text.layers.0.q": 4}
    image = rank_image(ranks, 8)
    assert image.dtype == np.uint8 and image.shape[2] == 3
    found = cells(image, 2, 3)
    assert (found[1, 2] == BLUE).all() and (found[0, 1] == 255).all()
    assert np.allclose(found[0, 0], (255 + BLUE) / 2, atol=1)


def test_a_depth_that_a_module_type_lacks_is_empty():
    image = rank_image({"a.layers.0.q": 2, "a.layers.1.v": 2}, 2)
    found = cells(image, 2, 2)
    assert (found[0, 0] == BLUE).all() and (found[0, 1] == 255).all()


@pytest.mark.parametrize("widest", [WIDEST, 2000])
def test_thirty_layers_go_on_below_where_they_are_too_wide(widest):
    """In equal parts, so that cells stay large enough to be read in a card."""
    kinds = ("self_attn.q_proj", "mlp.gate_proj")
    ranks = {f"model.layers.{i}.{kind}": 0 for i in range(30) for kind in kinds}
    image = rank_image(ranks | {"model.layers.17.mlp.gate_proj": 8}, 8, widest=widest)
    assert image.shape[1] <= widest
    folded = widest == WIDEST
    top = 2 * CELL + folded * 3 * CELL  # labels and two rows stand above the second half
    found = cells(image, 2, 15 if folded else 30, top=top)
    dark = [place for place in zip(*np.nonzero((found == BLUE).all(-1)), strict=True)]
    assert dark == [(1, 2 if folded else 17)]


def test_probabilities_as_strips_of_a_cell():
    """The smallest candidate rank on top, depth to the right."""
    names = ["text.layers.0.q", "text.layers.10.q"]
    image = probability_image(names, torch.tensor([[1.0, 0.0], [0.5, 0.5]]), [0, 4])
    top = next(y for y in range(3 * CELL, image.shape[0]) if (image[y] == EDGE).any())
    found = cells(image, 2, 2, CELL // 2, top)
    assert (found[0, 0] == BLUE).all() and (found[1, 0] == 255).all()
    assert np.allclose(found[:, 1], (255 + BLUE) / 2, atol=1)


@pytest.mark.parametrize("candidates", [2, 5, 6])
def test_pictures_of_thirty_layers_of_seven_types_fit_a_card(candidates):
    """What is higher than a card of TensorBoard's first page is made small there, with its text."""
    names = [f"text.layers.{i}.kind_{k}" for i in range(30) for k in range(7)]
    probabilities = torch.full((len(names), candidates), 1 / candidates)
    probability = probability_image(names, probabilities, range(candidates))
    assert probability.shape[1] <= WIDEST and probability.shape[0] <= 1.6 * LOWEST
    (worth,) = worth_images(names, range(5, 500, 5), np.ones((99, len(names)))).values()
    assert WIDEST / 2 < worth.shape[1] <= WIDEST and worth.shape[0] <= LOWEST


def test_many_module_types_make_many_rows():
    names = [f"text.layers.{i}.kind_{k}" for k in range(40) for i in range(2)]
    image = probability_image(names, torch.full((80, 3), 1 / 3), [0, 1, 2])
    assert image.shape[1] <= WIDEST and image.shape[0] > 40 * 3 * 10


def test_cross_attention_has_a_panel_of_its_own():
    ranks = dict.fromkeys(NAMES, 0) | {"text.layers.1.cross": 8}
    parts = {"text.layers.1.cross": "connector"}
    apart, together = rank_image(ranks, 8, parts), rank_image(ranks, 8)
    assert (cells(together, 3, 3)[2, 1] == BLUE).all()
    assert (cells(apart, 2, 3) == 255).all(), "the first panel holds the self-attention alone"
    assert (apart == BLUE).all(-1).any() and apart.shape[1] > together.shape[1], "it is beside"


def test_worth_by_module_type_and_by_depth_over_time():
    """Most parameters go from layer to layer: those of q to v, those of depth 0 to depth 2."""
    parameters = np.ones((2, len(NAMES)))
    parameters[0, NAMES.index("text.layers.0.q")] = 15
    parameters[1, NAMES.index("text.layers.2.v")] = 15
    image = worth_images(NAMES, [10, 20], parameters, widest=250)["text"]
    below = 4 * CELL + 1 + 20  # the last line, and the gap between panels
    by_type, by_depth = (cells(part, n, 2).sum(-1) for part, n in ((image, 2), (image[below:], 3)))
    assert list(by_type.argmin(0)) == [0, 1] and list(by_depth.argmin(0)) == [0, 2]
    assert by_type.min() == BLUE.sum() < by_depth.min() < by_depth.max() == by_depth[1, 0]


def test_worth_of_a_long_search_of_many_types_fits_a_card():
    names = [f"text.layers.{i}.kind_{k}" for i in range(48) for k in range(30)]
    (image,) = worth_images(names, range(5, 5000, 5), np.ones((999, len(names)))).values()
    assert image.shape[1] <= WIDEST and image.shape[0] <= 14 * CELL + 1


def test_parts_of_one_layer_share_a_picture_of_worth():
    names = [*NAMES, "connector", "head"]
    images = worth_images(names, [10, 20], np.ones((2, len(names))))
    assert list(images) == ["text", "others"]
    assert (cells(images["others"], 2, 2) < 255).any(-1).all()


def search_of(ranks, steps=(1, 2)):
    shapes = dict.fromkeys(ranks, (4, 6))
    record = {"seconds": 1, "train_loss": 1.0, "validation_gain": 1.0, "expected_parameters": 1}
    record |= {"expected_ranks": list(ranks.values())}
    records = [record | {"step": step} for step in steps]
    return Search("runs", shapes, [0, 2, 4], None, dict.fromkeys(ranks, "language"), records)


def test_what_would_show_nothing_is_no_picture():
    whole = search_of({"a.layers.0.q": 2, "a.layers.1.q": 4})
    assert set(pictures(whole, [])) == {"ranks", "worth", "losses"}
    one_record = search_of({"a.layers.0.q": 2, "a.layers.0.v": 4}, steps=(1,))
    assert set(pictures(one_record, [])) == {"ranks"}
    failed = {"name": "x", "loss": None, "trainable_parameters": 3}
    assert "finetunes" not in pictures(one_record, [failed])
