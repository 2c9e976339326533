"""What belongs together stays on one side of a split: rows of one image, rows of one prompt.
Not here: sizes, records and other options of a split (test_loaders.py)."""

import pytest
from datasets import Dataset, Features, Image, List, Value
from PIL import Image as PILImage

from darts_lora.config import DataConfig
from darts_lora.data import splits
from darts_lora.data.loaders import load_splits, training_rows
from darts_lora.data.places import ROW
from darts_lora.data.rows import row_prompt
from small_models import vision_rows

NAMES = ("train", "validation", "test")


def picture(number):
    return PILImage.new("RGB", (4, 4), (number, 0, 0))


def write(folder, rows):
    features = Features(
        {"prompt": Value("string"), "completion": Value("string"), "images": List(Image())}
    )
    folder.mkdir(exist_ok=True)
    Dataset.from_list(rows, features).to_parquet(folder / "train.parquet")
    return str(folder / "train.parquet")


@pytest.mark.parametrize("streaming", [False, True], ids=["", "stream"])
def test_rows_of_an_image_stay_on_one_side(tmp_path, streaming):
    rows = [
        {"prompt": f"q{i % 7}", "completion": f"a{i}", "images": [picture(i % 60)]}
        for i in range(180)
    ]
    config = DataConfig(write(tmp_path, rows), test_split=None, streaming=streaming)
    parts = load_splits(config, NAMES).values()
    images = [{row[ROW] % 60 for row in part} for part in parts]
    assert sum(map(len, images)) == 60 and min(map(len, images)) > 0
    by_prompt = load_splits(
        DataConfig(config.dataset, test_split=None, streaming=streaming, split_by="prompt"), NAMES
    )
    shared = [{row[ROW] % 60 for row in part} for part in by_prompt.values()]
    assert sum(map(len, shared)) > 60, "three questions about each"


def test_images_of_one_row_belong_together_with_all_of_their_rows(tmp_path):
    pairs = [(i % 40, 40 + i % 40) for i in range(80)] + [(40 + i, 80 + i) for i in range(20)]
    rows = [
        {"prompt": "q", "completion": f"a{i}", "images": list(map(picture, pair))}
        for i, pair in enumerate(pairs)
    ]
    parts = load_splits(DataConfig(write(tmp_path, rows), test_split=None), NAMES).values()
    images = [{image for row in part for image in pairs[row[ROW]]} for part in parts]
    assert sum(map(len, images)) == len(set.union(*images)) == 100


@pytest.mark.parametrize("test_split", ["test", None])
def test_a_finetune_takes_the_rows_of_the_search(tmp_path, monkeypatch, test_split):
    """It looks for what belongs together only where test rows have to be held back."""
    rows = [{"prompt": f"q{i % 40}", "completion": "a", "images": []} for i in range(80)]
    files = {name: write(tmp_path / name, rows) for name in ("train", "test")}
    config = DataConfig("parquet", files, test_split=test_split, max_train_samples=60)
    parts = load_splits(config)
    read = []
    monkeypatch.setattr(splits, "row_prompt", lambda row: read.append(row) or row_prompt(row))
    found = training_rows(config)
    assert sorted(found[ROW]) == sorted([*parts["train"][ROW], *parts["validation"][ROW]])
    assert bool(read) == (test_split is None)


def test_images_inside_messages_count_as_those_of_a_column(tmp_path):
    rows = []
    for i, row in enumerate(vision_rows(12)):
        path = tmp_path / f"{i}.png"
        row["image"].save(path)
        part = {"type": "image", "image": str(path)}
        rows.append({"messages": [{"role": "user", "content": [part]}, row["messages"][1]]})
    groups = splits.image_groups([*rows, *rows[:3]])
    assert groups[:3] == groups[12:] and len(set(groups)) == 12
