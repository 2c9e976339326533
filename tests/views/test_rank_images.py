"""Pictures: each cell stands where it belongs, in its colour.
Not here: what TensorBoard makes of them (test_tensorboard.py)."""

import numpy as np
import torch

from darts_lora.views.rank_images import BLUE, CELL, probability_image, rank_image

NAMES = [f"text.layers.{i}.{kind}" for i in range(3) for kind in ("q", "v")]


def cells(image, rows, columns):
    """Colours of the cells of a picture that has one panel: right below its labels."""
    height = (rows + 2) * CELL
    corner = image[:height]
    left = next(x for x in range(image.shape[1]) if (corner[2 * CELL : height, x] == 230).all())
    ys = [2 * CELL + CELL * row + 3 for row in range(rows)]
    return np.array([[corner[y, left + CELL * c + 2] for c in range(columns)] for y in ys])


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


def test_probabilities_by_layer_and_candidate():
    names = ["text.layers.0.q", "text.layers.10.q"]
    image = probability_image(names, torch.tensor([[1.0, 0.0], [0.5, 0.5]]), [0, 4])
    found = cells(image, 2, 2)
    assert (found[0, 0] == BLUE).all() and (found[0, 1] == 255).all()
    assert np.allclose(found[1], (255 + BLUE) / 2, atol=1)


def test_many_module_types_make_several_lines():
    names = [f"text.layers.{i}.kind_{k}" for k in range(40) for i in range(2)]
    image = probability_image(names, torch.full((80, 3), 1 / 3), [0, 1, 2])
    assert image.shape[1] <= 1400 + 100 and image.shape[0] > 2 * 4 * CELL


def test_cross_attention_has_a_panel_of_its_own():
    ranks = dict.fromkeys(NAMES, 0) | {"text.layers.1.cross": 8, "projector": 8}
    parts = {"text.layers.1.cross": "connector", "projector": "connector"}
    apart, together = rank_image(ranks, 8, parts), rank_image(ranks, 8)
    assert apart.shape[0] == together.shape[0] + 2 * CELL + 10, "two lines of labels and a gap more"
    assert (cells(apart, 2, 3) == 255).all(), "the first panel holds the self-attention alone"
