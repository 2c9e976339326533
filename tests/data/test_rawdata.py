"""What Arrow takes for granted of files is looked at first: nesting, and text in UTF-8.
Not here: what else is wrong with a source (test_loaders.py)."""

import json

import pyarrow as pa
import pytest

from darts_lora import InputError
from darts_lora.config import DataConfig
from darts_lora.data import rawdata
from darts_lora.data.loaders import load_splits
from darts_lora.data.rawdata import check_nesting, check_text


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
