"""What a search leaves in its folder: metrics.jsonl over a resume, layers.json, numbers in JSON.
Folders that are no search's, or whose files were changed. Not here: pictures (test_report.py)."""

import json
import math
import re

import pytest
import torch

from darts_lora import Genotype, InputError, SearchConfig, Supernet
from darts_lora.run.records import Metrics, alpha_figures, number, read_metrics
from darts_lora.run.runs import Search, load_finetune
from small_models import residual

LAYERS = {"shapes": {"a": [4, 4]}, "candidates": [0, 2], "budget": 8, "parts": {"a": "vision"}}
RECORD = {
    "step": 1, "seconds": 0.5, "train_loss": 1.0, "validation_gain": None,
    "expected_parameters": 8.0, "expected_ranks": [1.0],
}  # fmt: skip
RESULT = {"loss": 0.5, "exact_match": None, "trainable_parameters": 8}


def write(folder, layers=LAYERS, record=RECORD, ranks=None):
    (folder / "layers.json").write_text(json.dumps(layers))
    (folder / "metrics.jsonl").write_text("" if record is None else json.dumps(record) + "\n")
    if ranks is not None:
        shapes = dict.fromkeys(ranks, (4, 4))
        Genotype(ranks, shapes=shapes, candidates=[0, 2]).save(folder / "genotype.json")
    return str(folder)


def test_a_good_one(tmp_path):
    search = Search.load(write(tmp_path))
    assert search.layers == {"a": (4, 4)} and search.ranks == {"a": 1.0}
    assert Search.load(write(tmp_path, ranks={"a": 2})).ranks == {"a": 2}


@pytest.mark.parametrize("content", [None, "{", "[]", '{"shapes": {}}'])
def test_a_folder_that_is_no_searchs(tmp_path, content):
    if content is not None:
        (tmp_path / "layers.json").write_text(content)
    with pytest.raises(InputError, match=r"search_dir=.*: no search's layers\.json there"):
        Search.load(str(tmp_path))
    with pytest.raises(InputError, match=r"finetune_dir=.*: no evaluation\.json there"):
        load_finetune(str(tmp_path))


@pytest.mark.parametrize(
    ("changed", "text"),
    [
        ({"shapes": {"a": [4]}}, "shapes={'a': [4]}: must give 2 or 3 numbers for every module"),
        ({"shapes": []}, "ranks={}: must map module names"),
        ({"candidates": ["x"]}, "ranks=['x']: candidate ranks must be"),
        ({"candidates": 3}, "not iterable"),
        ({"budget": "all"}, "budget_parameters='all': must be a number >= 0"),
        (
            {"parts": {"a": "tail"}},
            "parts must give each layer one of vision, audio, language",
        ),
        ({"parts": None}, "no attribute 'keys'"),
    ],
)
def test_layers_that_were_changed(tmp_path, changed, text):
    with pytest.raises(InputError) as error:
        Search.load(write(tmp_path, layers=LAYERS | changed))
    assert text in str(error.value) and f"search_dir='{tmp_path}'" in str(error.value)


@pytest.mark.parametrize(
    "changed",
    [{"step": "1"}, {"train_loss": None}, {"expected_ranks": [1.0, 2.0]}, {"seconds": [3]}],
)
def test_records_that_were_changed(tmp_path, changed):
    with pytest.raises(InputError, match=r"metrics\.jsonl: line 1 is no record of this search"):
        Search.load(write(tmp_path, record=RECORD | changed))


def test_a_search_without_a_record(tmp_path):
    with pytest.raises(InputError, match=r"metrics\.jsonl has no record yet"):
        Search.load(write(tmp_path, record=None))


def test_a_genotype_of_another_search(tmp_path):
    with pytest.raises(InputError, match=r"genotype\.json: its layers are not those of layers"):
        Search.load(write(tmp_path, ranks={"b": 2}))


@pytest.mark.parametrize(
    "results",
    [{"adapter": {}}, {"adapter": {**RESULT, "loss": "low"}}, {"adapter": RESULT, "base": [1]}],
)
def test_an_evaluation_that_was_changed(tmp_path, results):
    (tmp_path / "evaluation.json").write_text(json.dumps({"adapter": RESULT}))
    assert load_finetune(str(tmp_path))["loss"] == 0.5
    (tmp_path / "evaluation.json").write_text(json.dumps(results))
    with pytest.raises(InputError, match=r"finetune_dir=.*evaluation\.json there"):
        load_finetune(str(tmp_path))


def test_finetunes_of_another_model_or_other_data_are_not_set_beside_a_search(tmp_path):
    options = {"model_name_or_path": "m", "dataset": "d", "data_files": {"test": "t"}, "seed": 1}
    (tmp_path / "config.yaml").write_text(json.dumps(options))
    search = Search.load(write(tmp_path))
    for changed in ({}, {"seed": 2}, {"model_name_or_path": "n"}, {"data_files": {"test": "u"}}):
        folder = tmp_path / f"run{len(list(tmp_path.iterdir()))}"
        folder.mkdir()
        (folder / "evaluation.json").write_text(json.dumps({"adapter": RESULT}))
        assert load_finetune(str(folder), search)["loss"] == 0.5, "of another tool"
        (folder / "config.yaml").write_text(json.dumps(options | changed))
        if changed.keys() <= {"seed"}:
            assert load_finetune(str(folder), search)["loss"] == 0.5
        else:
            ((name, value),) = changed.items()
            text = re.escape(f"finetune_dir='{folder}': has {name}={value!r}, the search ")
            with pytest.raises(InputError, match=f"^{text}.*: their losses cannot be compared"):
                load_finetune(str(folder), search)


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
