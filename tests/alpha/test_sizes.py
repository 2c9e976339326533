"""Which size is recommended, in which words, and what a file may hold.
Not here: the prediction (test_prediction.py)."""

import copy
import math

import pytest

from darts_lora import InputError
from darts_lora.alpha.sizes import check_sizes, predicted_loss, recommended, sizes_text


def sizes(behind=(0.5, 0.2, 0.05, 0.0), noise=0.01, base=3.0, tolerance=0.1, final=1.0):
    """Of ranks 1, 2, 4 and 8; errors are a tenth of what is behind."""
    return {
        "base_loss": base,
        "noise": noise,
        "tolerance": tolerance,
        "points": [
            {"rank": 2**k, "parameters": 100 * 2**k, "uniform": final + b, "uniform_error": 0.1}
            | {"searched": final + b / 2, "searched_error": 0.1}
            | {"behind": b, "behind_error": 0.1 * b}
            for k, b in enumerate(behind)
        ],
    }


@pytest.mark.parametrize(
    ("tolerance", "rank"), [(0.0, 8), (0.01, 8), (0.025, 4), (0.1, 2), (0.24, 2), (0.25, 1)]
)
def test_the_smallest_size_within_the_tolerance_of_the_largest(tolerance, rank):
    """2 are gained, of which ranks 1, 2 and 4 lack 0.25, 0.1 and 0.025."""
    assert recommended(sizes(), tolerance)["rank"] == rank
    assert recommended(sizes(tolerance=tolerance))["rank"] == rank


def test_where_rank_does_not_matter_within_noise_it_says_so_and_takes_the_smallest():
    flat = sizes((0.0, 0.0, 0.0, 0.0))
    assert recommended(flat, 0.0)["rank"] == 1
    assert sizes_text(flat).startswith("Rank does not matter here within noise: take rank 1 (100 ")
    noisy = sizes((0.05, 0.02, 0.01, 0.0), noise=0.3)
    assert recommended(noisy)["rank"] == 1
    assert "does not matter here within noise" in sizes_text(noisy)
    assert "+- 0.3 of the 2 that rank 8 gains" in sizes_text(noisy)


def test_noise_that_hides_what_rank_is_worth_is_told_and_decides_nothing():
    noisy = sizes(noise=0.3)
    assert recommended(noisy) == recommended(sizes())
    assert sizes_text(noisy) == (
        f"{sizes_text(sizes())} Rank 1 lacks 0.5 +- 0.3, within noise: a longer search may tell "
        "more."
    )


def test_where_nothing_is_gained_the_smallest_is_taken():
    assert recommended(sizes(base=0.5))["rank"] == 1


def test_where_it_matters_less_than_the_tolerance_it_says_that():
    text = sizes_text(sizes((0.02, 0.01, 0.005, 0.0), noise=0.001, tolerance=0.01))
    assert text.startswith("Rank hardly matters here: take rank 1 (100 parameters). It lacks 0.02")


def test_the_recommendation_in_words():
    assert sizes_text(sizes()) == (
        "Recommended size: rank 2 (200 parameters), the smallest that is predicted to lack at most "
        "0.1 of the 2 that rank 8 gains over the base model. It lacks 0.2 +- 0.02."
    )
    assert "cannot tell how much rank is needed" in sizes_text(sizes(base=0.5))
    assert sizes_text(None).startswith("Too early to tell how much rank is needed")
    one = sizes()
    del one["points"][1:]
    assert sizes_text(one) == "There is one candidate rank: rank 1 (100 parameters)."


def test_between_sizes_the_curve_is_linear_in_the_logarithm():
    assert predicted_loss(sizes(), 200, "uniform") == pytest.approx(1.2)
    assert predicted_loss(sizes(), 100 * 2**0.5, "uniform") == pytest.approx(1.35)
    assert predicted_loss(sizes(), 100 * 2**0.5, "searched") == pytest.approx(1.175)
    assert [predicted_loss(sizes(), n, "uniform") for n in (0, 99, 801)] == [None] * 3


def broken(change):
    one = copy.deepcopy(sizes())
    change(one)
    return one


@pytest.mark.parametrize(
    "value",
    [
        3,
        [],
        {},
        broken(lambda s: s.pop("base_loss")),
        broken(lambda s: s.update(base_loss=math.nan)),
        broken(lambda s: s.pop("noise")),
        broken(lambda s: s.update(tolerance=1.0)),
        broken(lambda s: s.update(tolerance=None)),
        broken(lambda s: s.update(points=[])),
        broken(lambda s: s.update(points={})),
        broken(lambda s: s["points"].append(7)),
        broken(lambda s: s["points"].reverse()),
        broken(lambda s: s["points"][1].update(rank=True)),
        broken(lambda s: s["points"][1].update(parameters=0)),
        broken(lambda s: s["points"][1].update(parameters=2**70)),
        broken(lambda s: s["points"][1].pop("searched_error")),
        broken(lambda s: s["points"][1].update(uniform="1")),
    ],
)
def test_anything_else_in_a_file_is_refused(value):
    check_sizes(None)
    check_sizes(sizes())
    with pytest.raises(InputError, match=r"genotype: sizes=.*must give base_loss, noise"):
        check_sizes(value)
