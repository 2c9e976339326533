"""Data sets: the fixed split, and what is wrong with a source.
Not here: what a row becomes (test_collator.py)."""

import json
from itertools import chain

import pytest

from darts_lora.collator import Collator
from darts_lora.config import DataConfig, ModelConfig
from darts_lora.data import load_splits, make_dataloader, split_record
from darts_lora.errors import InputError
from darts_lora.models import load_processor
from darts_lora.rows import ROW, row_images

NAMES = ("train", "validation", "test")


def row_numbers(splits):
    return split_record(splits, DataConfig())


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.fixture
def source(tmp_path):
    """A jsonl file of 40 prompt/completion rows."""
    rows = [{"prompt": f"q{i}", "completion": f"a{i}"} for i in range(40)]
    return write(tmp_path / "rows.jsonl", rows)


def test_the_embedded_splits_are_disjoint_and_the_same_each_time():
    splits = load_splits(DataConfig(), NAMES)
    assert tuple(splits) == NAMES
    indices = row_numbers(splits)
    total = len(indices["train"]) + len(indices["validation"])
    assert sorted(indices["train"] + indices["validation"]) == list(range(total))
    assert len(indices["validation"]) == round(0.3 * total)
    assert row_numbers(load_splits(DataConfig(), NAMES)) == indices
    assert row_numbers(load_splits(DataConfig(split_seed=1)))["train"] != indices["train"]


def test_rows_are_the_ones_that_the_indices_name(source):
    config = DataConfig("json", source, test_split=None, validation_fraction=0.25)
    splits = load_splits(config, NAMES)
    indices = row_numbers(splits)
    assert [len(indices[name]) for name in NAMES] == [27, 9, 4]
    assert sorted(chain(*indices.values())) == list(range(40))
    for split in splits.values():
        assert split["prompt"] == [f"q{i}" for i in split[ROW]]


def test_sample_limits_come_before_the_split(source):
    files = {"train": source, "test": source}
    config = DataConfig("json", files, max_train_samples=10, max_test_samples=5)
    sizes = {name: len(split) for name, split in load_splits(config, NAMES).items()}
    assert sizes == {"train": 7, "validation": 3, "test": 5}


def test_only_what_is_asked_for_must_be_there(source):
    config = DataConfig("json", {"test": source})
    assert len(load_splits(config, ["test"])["test"]) == 40
    with pytest.raises(InputError, match=r"train_split='train': .* has only test"):
        load_splits(config)
    with pytest.raises(InputError, match=r"test_split='test': .* has only train; null holds rows"):
        load_splits(DataConfig("json", source), ["test"])


def test_the_splits_of_a_folder_with_images(data_folder):
    splits = load_splits(DataConfig(data_folder), NAMES)
    assert {name: len(split) for name, split in splits.items()} == {
        "train": 28, "validation": 12, "test": 12
    }  # fmt: skip
    indices = row_numbers(splits)
    assert sorted(indices["train"] + indices["validation"]) == list(range(40))
    assert indices["test"] == list(range(12))
    row = splits["test"][4]
    assert row_images(row)[0].size == (32, 16)
    assert row["messages"][1] == {"role": "assistant", "content": "green"}
    assert row_numbers(load_splits(DataConfig(data_folder), NAMES)) == indices
    other = row_numbers(load_splits(DataConfig(data_folder, split_seed=1)))
    assert other["validation"] != indices["validation"]


def test_files_may_be_named_relative_to_a_folder(data_folder):
    config = DataConfig(data_folder, {"test": "te*.parquet"})
    assert len(load_splits(config, ["test"])["test"]) == 12
    with pytest.raises(InputError, match=r"data_files=.* cannot be loaded \(.*no\.parquet"):
        load_splits(DataConfig(data_folder, "no.parquet"))


def test_missing_files_are_named(source):
    for files in ("no.json", [source, "no.json"], {"train": source, "test": "no.json"}):
        with pytest.raises(InputError, match=r"data_files: no such file: 'no\.json'"):
            load_splits(DataConfig("json", files))


def test_missing_columns_are_named_with_those_found(tmp_path):
    path = write(tmp_path / "rows.jsonl", [{"question": "q", "completion": "a"}] * 4)
    rows = load_splits(DataConfig("json", path))["train"]
    with pytest.raises(InputError) as error:
        Collator(load_processor(ModelConfig())).check(rows)
    assert f"{path}, row {rows[0][ROW]}: needs the columns messages, or prompt" in str(error.value)
    assert "found: question, completion" in str(error.value)


def test_empty_files_and_broken_files(tmp_path):
    with pytest.raises(InputError, match=r"data_files: '.*empty\.jsonl': the file is empty"):
        load_splits(DataConfig("json", write(tmp_path / "empty.jsonl", [])))
    (tmp_path / "broken.jsonl").write_text('{"prompt": "a", ')
    with pytest.raises(InputError, match="cannot be loaded"):
        load_splits(DataConfig("json", str(tmp_path / "broken.jsonl")))
    (tmp_path / "header.csv").write_text("prompt,completion\n")
    with pytest.raises(InputError, match=r"(has no sample in it|cannot be loaded)"):
        load_splits(DataConfig("csv", str(tmp_path / "header.csv")))


@pytest.mark.parametrize(
    ("fraction", "text"),
    [(0.01, "leaves no sample in the validation split"), (0.99, "no sample in the training split")],
)
def test_a_split_with_no_sample_in_it(source, fraction, text):
    config = DataConfig("json", source, validation_fraction=fraction)
    with pytest.raises(InputError, match=rf"validation_fraction={fraction}: .*{text} \(40 rows"):
        load_splits(config)


def test_a_loader_shuffles_by_its_seed_and_never_drops_all(source):
    rows = load_splits(DataConfig("json", source))["train"]

    def order(seed):
        loader = make_dataloader(rows, lambda b: [r[ROW] for r in b], 8, shuffle=True, seed=seed)
        return list(loader)

    assert order(0) == order(0) != order(1)
    assert [len(batch) for batch in order(0)] == [8, 8, 8, 4]
    assert len(make_dataloader(rows, list, 8, drop_last=True)) == 3
    assert len(make_dataloader(rows, list, 64, drop_last=True)) == 1
