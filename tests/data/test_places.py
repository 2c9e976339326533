"""Where messages say that a row stands: in the line that an editor shows.
Not here: the messages (test_rows.py)."""

import csv
import json
from pathlib import Path

import pytest

from darts_lora.config import DataConfig
from darts_lora.data.loaders import load_splits
from darts_lora.data.places import ROW, row_name


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
