"""Pictures of a report: which there are, and what they hold.
Not here: the page (test_report.py), cells (test_rank_images.py)."""

import pytest

from darts_lora.run.runs import Search
from darts_lora.views.charts import MOST_BARS, parameters_by_part, pictures


def search_of(ranks, steps=(1, 2)):
    shapes = dict.fromkeys(ranks, (4, 6))
    record = {"seconds": 1, "train_loss": 1.0, "validation_gain": 1.0, "expected_parameters": 1}
    record |= {"expected_ranks": list(ranks.values())}
    records = [record | {"step": step} for step in steps]
    return Search("runs", shapes, [0, 2, 4], None, dict.fromkeys(ranks, "language"), records)


@pytest.mark.parametrize(
    ("ranks", "sizes"),
    [
        ({"a.layers.0.q": 2, "a.layers.1.q": 4, "b.layers.0.q": 1}, {"a": 60, "b": 10}),
        ({"a.layers.0.q": 2, "a.layers.1.q": 4, "a.layers.0.v": 1}, {"q": 60, "v": 10}),
        ({"a.layers.0.q": 2, "model.a.0.q": 1}, {"a.layers": 20, "model.a": 10}),
    ],
)
def test_bars_stand_for_parts_or_in_one_part_for_module_types(ranks, sizes):
    assert parameters_by_part(search_of(ranks)) == sizes
    assert "parts" in pictures(search_of(ranks), [])


def test_what_would_show_nothing_is_no_picture():
    one_bar = search_of({"a.layers.0.q": 2, "a.layers.1.q": 4})
    assert set(pictures(one_bar, [])) == {"ranks", "worth", "losses"}
    one_record = search_of({"a.layers.0.q": 2, "a.layers.0.v": 4}, steps=(1,))
    assert set(pictures(one_record, [])) == {"ranks", "parts"}
    failed = {"name": "x", "loss": None, "trainable_parameters": 3}
    assert "finetunes" not in pictures(one_record, [failed])


def test_many_module_types_make_no_endless_chart():
    ranks = {f"a.layers.0.kind_{k}": k for k in range(100)}
    sizes = parameters_by_part(search_of(ranks))
    assert len(sizes) == MOST_BARS and sum(sizes.values()) == 10 * sum(range(100))
    assert list(sizes)[-1] == f"{101 - MOST_BARS} others"
