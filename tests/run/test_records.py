"""The record of a search in files: metrics.jsonl over a resume, layers.json, what JSON must know.
Not here: TensorBoard (test_tensorboard.py), the figures of a whole search (test_search.py)."""

import json
import math

import pytest
import torch

from darts_lora import InputError, SearchConfig, Supernet
from darts_lora.run.records import Metrics, alpha_figures, number, read_metrics
from small_models import residual


@pytest.fixture(scope="module")
def supernet():
    return Supernet(residual(), SearchConfig(ranks=(0, 1, 2), budget_rank=1))


def test_a_resumed_search_takes_back_what_came_after_its_checkpoint(supernet, tmp_path):
    metrics = Metrics(str(tmp_path), supernet)
    for step in (10, 20, 30):
        metrics.write({"step": step, "train_loss": 1 / step})
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"step": 4')  # the line that was being written when it was killed
    Metrics(str(tmp_path), supernet, first_step=20).write({"step": 30, "train_loss": 0.25})
    found = read_metrics(tmp_path / "metrics.jsonl")
    assert [(r["step"], r["train_loss"]) for r in found] == [(10, 0.1), (20, 0.05), (30, 0.25)]
    Metrics(str(tmp_path), supernet)
    assert read_metrics(tmp_path / "metrics.jsonl") == [], "a new search has a record of its own"
    layers = json.loads((tmp_path / "layers.json").read_text())
    assert layers["shapes"] == {name: [16, 16] for name in supernet.layers}
    assert layers["parts"].keys() == supernet.layers.keys() and layers["candidates"] == [0, 1, 2]


def test_a_record_that_cannot_be_written_is_an_error_in_one_line(supernet, tmp_path):
    metrics = Metrics(str(tmp_path), supernet)
    (tmp_path / "metrics.jsonl").unlink()
    (tmp_path / "metrics.jsonl").mkdir()
    with pytest.raises(InputError, match=r"metrics\.jsonl: cannot be written \(Is a directory\)"):
        metrics.write({"step": 1})


@pytest.mark.parametrize(
    "line", [b"3", b"{}", b"[1]", b'{"step": "1"}', b'{"step": 1', b"\xff\xfe"]
)
def test_a_line_that_is_no_record_is_named(supernet, tmp_path, line):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"step": 1}\n' + line + b"\n")
    for read in (lambda: read_metrics(path), lambda: Metrics(str(tmp_path), supernet, 1)):
        with pytest.raises(InputError) as error:
            read()
        assert str(error.value).startswith(f"{path}: line 2 is no record of this search (")
    path.write_bytes(b'{"step": 1}\n' + line)
    assert read_metrics(path) == [{"step": 1}], "a line that a killed run did not finish"


def test_figures_of_an_alpha_that_is_not_finite_say_so(supernet):
    figures = alpha_figures(supernet)
    assert figures["entropy"] == pytest.approx(1) and figures["expected_ranks"] == 4 * [1.0]
    before = supernet.alpha.detach().clone()
    supernet.alpha.data[0, 0] = math.inf
    assert math.isnan(alpha_figures(supernet)["expected_parameters"])
    supernet.alpha.data.copy_(before)


def test_numbers_that_json_does_not_know_become_none():
    assert [number(x) for x in (None, torch.tensor(math.inf), torch.tensor(2.5))] == [
        None,
        None,
        2.5,
    ]
