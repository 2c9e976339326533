"""Files as they are named and written, whatever a loader makes of them by default; the line where a
row stands; nesting and text, which Arrow takes for granted.
Not here: layouts of rows (test_rows.py), splits (test_splits.py), bad ones (test_bad_input.py)."""

import csv
import json
from pathlib import Path

import pyarrow as pa
import pytest

from darts_lora import InputError
from darts_lora.config import DataConfig
from darts_lora.data import rawdata
from darts_lora.data.loaders import load_splits
from darts_lora.data.places import ROW, row_name
from darts_lora.data.rawdata import check_nesting, check_text
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


def write_json_lines(path, texts):
    lines = (json.dumps({"text": text}) for text in texts)
    path.write_text("\n\n".join(lines) + "\n")  # with blank lines between


def write_table(path, texts):
    with open(path, "w", newline="") as file:
        csv.writer(file).writerows([["text"], *([text] for text in texts)])


@pytest.mark.parametrize("streaming", [False, True], ids=["", "stream"])
@pytest.mark.parametrize("kind", ["jsonl", "csv"])
def test_a_row_is_named_by_file_and_line(tmp_path, kind, streaming):
    files = [tmp_path / f"{name}.{kind}" for name in "ab"]
    write = write_json_lines if kind == "jsonl" else write_table
    for name, file in zip("ab", files, strict=True):
        write(file, [f"{name}0", f"{name}1\nof two\nlines", f"{name}2", f"{name}3"])
    loader, paths = {"jsonl": "json", "csv": "csv"}[kind], [str(file) for file in files]
    splits = load_splits(DataConfig(loader, paths, split_by="row", streaming=streaming))
    rows = [row for split in splits.values() for row in split]
    assert len(rows) == 8
    for row in rows:
        place = row_name(row).removesuffix(f", row {row[ROW]}")
        file, _, line = place.rpartition(":")
        shown = Path(file).read_bytes().decode().split("\n")[int(line) - 1]
        assert row["text"].split("\n")[0] in shown and file == paths[row["text"][0] == "b"]


@pytest.mark.parametrize("content", ["[{},\n{}]", "{}\n", "\x80", ""])
def test_a_file_whose_rows_are_no_lines_is_named_alone(tmp_path, content):
    path = tmp_path / "rows.json"
    path.write_bytes(content.encode("latin-1"))
    row = {"row_index": 3, "row_source": str(path)}
    assert row_name(row, "text") == f"{path}, row 3, column 'text'"


def nested(depth):
    return '{"prompt": "it", "completion": "red", "x": ' + "[" * depth + "]" * depth + "}"


GOOD = json.dumps({"prompt": 'a "[[[" \\ ' + "[{" * 500, "completion": "red"})


@pytest.mark.parametrize("block", [16, 1 << 24])
@pytest.mark.parametrize("end", ["\n", ""])
def test_a_row_that_is_nested_too_deep_is_named_by_its_line(tmp_path, monkeypatch, block, end):
    """Arrow's reader would end the process; brackets in texts do not count."""
    monkeypatch.setattr(rawdata, "BLOCK", block)
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join([GOOD, nested(99), "", nested(100), GOOD]) + end)
    with pytest.raises(InputError, match=r"rows\.jsonl', line 4: lists and objects are nes"):
        check_nesting([str(path)])
    path.write_text("\n".join([GOOD, nested(99)]) + end)
    check_nesting([str(path), "hf://somewhere.jsonl", str(tmp_path / "no.csv")])


@pytest.mark.parametrize("streaming", [False, True])
def test_a_data_set_with_such_a_row_is_refused(tmp_path, streaming):
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join([GOOD] * 20 + [nested(10_000)]))
    for source in (("json", str(path)), (str(tmp_path), None)):
        with pytest.raises(InputError, match=r"line 21: lists and objects are nested"):
            load_splits(DataConfig(*source, streaming=streaming))


def texts(kind, values):
    bytes_of = [[value] if kind == "list" else value for value in values]
    made = pa.array(bytes_of, pa.list_(pa.binary()) if kind == "list" else pa.binary())
    if kind == "list":
        return pa.ListArray.from_arrays(made.offsets, made.values.view(pa.string()))
    made = made.view(pa.string())
    return pa.StructArray.from_arrays([made], ["content"]) if kind == "struct" else made


@pytest.mark.parametrize("kind", ["text", "list", "struct"])
def test_a_text_that_is_not_utf_8_is_named_by_row_and_column(kind):
    good, bad = texts(kind, [b"a", b"\xc3\xa9"]), texts(kind, [b"b", b"wh\xffch", b"\xff"])
    images = pa.array([b"\xff\xd8"] * 5)
    table = pa.table({"image": images, "prompt": pa.chunked_array([good, bad])})
    with pytest.raises(InputError, match=r"^rows, row 3, column 'prompt': is not text in UTF-8"):
        check_text(table, "rows")
    check_text(table.slice(0, 3), "rows")


def test_a_file_with_such_a_text_is_refused_when_it_is_loaded(tmp_path):
    path, lines = tmp_path / "rows.jsonl", [GOOD.encode()] * 20
    lines[5] = lines[5].replace(b"red", b"r\xffd")
    path.write_bytes(b"\n".join(lines) + b"\n")
    with pytest.raises(InputError, match=r"rows\.jsonl, row 5, column 'completion': is not text"):
        load_splits(DataConfig("json", str(path), split_by="row"))
