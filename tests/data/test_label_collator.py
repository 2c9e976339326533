"""Texts and their classes to batches; labels that the model lacks. Not here: chats and images
(test_collator.py), what limits a row (there too), rows out of files (test_rows.py)."""

import pytest
import torch
from datasets import ClassLabel, Dataset, Features, Value

from darts_lora.base.errors import InputError
from darts_lora.config import DataConfig
from darts_lora.data.label_collator import LabelCollator
from darts_lora.data.loaders import load_splits
from darts_lora.data.places import ROW
from small_models import make_tokenizer

LABELS = {"no": 0, "maybe": 1, "yes": 2}


@pytest.mark.parametrize("side", ["left", "right"])
def test_labels_against_a_hand_made_expectation(side):
    tokenizer = make_tokenizer(None)
    tokenizer.padding_side = side
    collator = LabelCollator(tokenizer, 8, LABELS)
    rows = [
        {"text": "a b c", "label": "yes"},
        {"text": "d", "label": 1},
        {"text": "e", "label": 0.0},
    ]
    batch = collator(rows)
    assert batch["input_ids"].tolist() == [[6, 7, 8], [9, 0, 0], [10, 0, 0]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 0, 0], [1, 0, 0]]
    assert batch["labels"].tolist() == [2, 1, 0] and batch["labels"].dtype == torch.int64
    assert collator.check(rows) is None
    whole = collator.evaluation(rows)
    assert set(whole) == {"whole"}
    assert all(torch.equal(whole["whole"][name], batch[name]) for name in batch)


def test_batches_are_padded_to_a_multiple():
    collator = LabelCollator(make_tokenizer(None), 8, LABELS, pad_to_multiple_of=4)
    rows = [{"text": "a b c d e", "label": 0}, {"text": "a", "label": 1}]
    for made, length in ((rows, 8), (rows[1:], 4)):
        batch = collator(made)
        assert batch["input_ids"].shape == batch["attention_mask"].shape == (len(made), length)
        assert batch["attention_mask"].sum(1).tolist() == [5, 1][-len(made) :]


def test_pairs_of_texts_are_one_sequence():
    rows = [
        {"text": "a b", "text_pair": "c", "label": 0},
        {"text": "d", "text_pair": "e", "label": 1},
    ]
    batch = LabelCollator(make_tokenizer(None), 3, LABELS)(rows)
    assert batch["input_ids"].tolist() == [[6, 7, 8], [9, 10, 0]]
    with pytest.raises(InputError, match="column 'text': 3 tokens, max_length=2"):
        LabelCollator(make_tokenizer(None), 2, LABELS)(rows)


@pytest.mark.parametrize(
    ("label", "text"),
    [(3, "3 is none of the model's 3 classes"), (-1, "-1 is none"), ("other", "'other' is none"),
     (1.5, "1.5 is none"), (float("nan"), "nan is none"), (True, "True is none"),
     (None, "None is none"), ([1], r"\[1\] is none")],
)  # fmt: skip
def test_labels_that_the_model_does_not_have(label, text):
    collator = LabelCollator(make_tokenizer(None), 8, LABELS)
    rows = [{"text": "a", "label": 0, ROW: 3}, {"text": "a", "label": label, ROW: 4}]
    for read in (collator, collator.check):
        with pytest.raises(
            InputError, match=rf"^row 4, column 'label': {text}.*\(0: no, 1: maybe, 2: yes\)"
        ):
            read(rows)


NAMES = {"negative": 0, "neutral": 1, "positive": 2}  # the model's classes
OTHER = ["positive", "negative", "neutral"]  # those of the data, in their order


@pytest.mark.parametrize("streaming", [False, True], ids=["", "stream"])
@pytest.mark.parametrize("case", [str.lower, str.upper])
def test_a_class_that_the_data_name_is_the_models_class_of_that_name(tmp_path, streaming, case):
    names = [case(name) for name in OTHER]
    column = ClassLabel(names=names)
    rows = [{"text": f"a {i}", "label": i % 3} for i in range(30)]
    path = str(tmp_path / "rows.parquet")
    Dataset.from_list(rows, Features({"text": Value("string"), "label": column})).to_parquet(path)
    config = DataConfig("parquet", path, streaming=streaming, split_by="row")
    rows = list(load_splits(config)["train"])
    tokenizer = make_tokenizer(None)
    labels = LabelCollator(tokenizer, 8, NAMES)(rows)["labels"].tolist()
    assert labels == [NAMES[OTHER[row["label"]]] for row in rows] and len(set(labels)) == 3
    # where the model's classes have no names yet, the data's order is as good as any
    fresh = LabelCollator(tokenizer, 8, {f"LABEL_{i}": i for i in range(3)})
    assert fresh(rows)["labels"].tolist() == [row["label"] for row in rows]
    words = ("'positive'", "0: pos, 1: neg", "a name counts, whatever its number in the data")
    with pytest.raises(InputError) as error:
        LabelCollator(tokenizer, 8, {"pos": 0, "neg": 1}).check(rows)
    assert all(word in str(error.value).lower() for word in words)


@pytest.mark.parametrize(
    ("label", "wanted"), [("yes", 2), ("YES", 2), ("1", 1), ("1.0", 1), ("0", 0)]
)
def test_labels_as_a_table_holds_them(label, wanted):
    batch = LabelCollator(make_tokenizer(None), 8, LABELS)([{"text": "a", "label": label}])
    assert batch["labels"].tolist() == [wanted]


def test_names_for_classes_that_have_none_are_told_where_to_write_them():
    collate = LabelCollator(make_tokenizer(None), 8, {"LABEL_0": 0, "LABEL_1": 1})
    with pytest.raises(InputError, match=r"write labels as numbers .* \(id2label and label2id\)$"):
        collate([{"text": "a", "label": "good"}])
