"""Folders that are no search's or no finetune's, or whose files were changed: one clear error each.
Not here: what is drawn of a good one (test_report.py)."""

import json
import re

import pytest

from darts_lora import Genotype, InputError
from darts_lora.run.runs import Search, load_finetune

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
