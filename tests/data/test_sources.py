"""Files as they are named and as they are written, whatever a loader makes of them by default.
Not here: layouts of rows (test_rows.py), splits (test_splits.py), bad ones (test_bad_input.py)."""

import csv
import json

import pytest

from darts_lora.base.errors import InputError
from darts_lora.config import DataConfig
from darts_lora.data.loaders import load_splits
from darts_lora.data.sources import load_source

ROWS = [{"prompt": f"say {i} ", "completion": "yes"} for i in range(20)]


def write(path):
    path.parent.mkdir(exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return str(path)


def numbers(config):
    return {name: len(list(split)) for name, split in load_source(config).splits.items()}


@pytest.mark.parametrize("streaming", [False, True], ids=["", "stream"])
@pytest.mark.parametrize("name", ["run[1]", "a*b", "what?", "a + b", "plain"])
def test_an_existing_path_stands_for_itself(tmp_path, name, streaming):
    folder = tmp_path / name
    train, test = (write(folder / f"{split} [{name}].jsonl") for split in ("train", "test"))
    write(tmp_path / "run1" / "train 1.jsonl")  # what a pattern would find
    both = {"train": 20, "test": 20}
    for options, wanted in (
        ({"dataset": "json", "data_files": train}, {"train": 20}),
        ({"dataset": "json", "data_files": [train, test]}, {"train": 40}),
        ({"dataset": "json", "data_files": {"train": train, "test": test}}, both),
        ({"dataset": str(folder)}, both),
        ({"dataset": str(folder), "data_files": f"train [{name}].jsonl"}, {"train": 20}),
        ({"dataset": train}, {"train": 20}),
    ):  # fmt: skip
        assert numbers(DataConfig(**options, streaming=streaming)) == wanted


def test_patterns_are_patterns_still(tmp_path):
    for number in (1, 2):
        write(tmp_path / f"run{number}" / "rows.jsonl")
    pattern = str(tmp_path / "run[12]" / "*.jsonl")
    assert numbers(DataConfig("json", pattern)) == {"train": 40}
    with pytest.raises(InputError, match="data_files: no such file"):
        load_source(DataConfig("json", str(tmp_path / "run[3]" / "*.jsonl")))


def test_a_file_in_place_of_a_data_set_is_loaded_by_its_ending(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "train.jsonl")
    assert len(load_splits(DataConfig("train.jsonl"))["train"]) == 14
    (tmp_path / "rows.txt").write_text("a\n")
    with pytest.raises(InputError, match=r"dataset='rows\.txt': a file must end in \.jsonl, \.jso"):
        load_source(DataConfig("rows.txt"))
    with pytest.raises(InputError, match="give a file once"):
        load_source(DataConfig("train.jsonl", "train.jsonl"))


WRITTEN = ["42", "007", "1e3", "None", "NA", "null", "nan", "True", "2024-01-01", "1,000", " x "]


@pytest.mark.parametrize("streaming", [False, True], ids=["", "stream"])
def test_the_texts_of_a_table_stay_as_they_are_written(tmp_path, streaming):
    path = tmp_path / "rows.csv"
    with open(path, "w", newline="") as file:
        columns = ("prompt", "completion", "text_pair", "number")
        csv.writer(file).writerows([columns, *((text, text, text, 3) for text in WRITTEN)])
    rows = list(load_source(DataConfig(str(path), streaming=streaming)).splits["train"])
    for column in ("prompt", "completion", "text_pair"):
        assert [row[column] for row in rows] == WRITTEN
    assert {row["number"] for row in rows} == {3}
