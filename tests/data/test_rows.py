"""Rows of every layout out of real files: what a model gets of them, where a bad one stands.
Not here: how rows are split and streamed (test_loaders.py), tokens and masks (test_collator.py)."""

import csv
import json
import os

import pytest
import torch
from datasets import Dataset, DatasetDict, Features, Image, List, Value
from families import TEXT_FAMILIES, bert, llava, make_family, tokenizer
from PIL import Image as PILImage
from transformers import RobertaConfig, RobertaForSequenceClassification

from darts_lora.base.errors import InputError
from darts_lora.config import DataConfig, ModelConfig
from darts_lora.data.collator import IGNORED
from darts_lora.data.label_collator import LabelCollator
from darts_lora.data.loaders import load_splits, make_collator
from darts_lora.data.places import ROW, SOURCE
from darts_lora.data.rows import placed_images, row_images, row_text
from small_models import COLOURS

QUESTION, ANSWER = "which colour is it please", "very red"
USER, ASSISTANT = {"role": "user", "content": QUESTION}, {"role": "assistant", "content": ANSWER}
PARTS = [{**m, "content": [{"type": "text", "text": m["content"]}]} for m in (USER, ASSISTANT)]
CHAT = f"<s> user {QUESTION} assistant {ANSWER} </s>"
LAYOUTS = {
    "messages": {"messages": [USER, ASSISTANT]},
    "messages of parts": {"messages": PARTS},
    "prompt and completion": {"prompt": QUESTION, "completion": ANSWER},
    "prompt and completion of messages": {"prompt": [USER], "completion": [ASSISTANT]},
    "texts": {"texts": [{"user": QUESTION, "assistant": ANSWER, "source": "made"}]},
    "text": {"text": f"{QUESTION} {ANSWER}"},
}


@pytest.fixture(scope="module")
def models(tmp_path_factory, vision_folder):
    """Models for text, labels of 3 classes, and images (two); of 512 positions, vision of 64."""
    folder = tmp_path_factory.mktemp("models")
    made = {"text": TEXT_FAMILIES["llama"], "labels": bert, "llava": llava}
    made = {name: make_family(make, str(folder / name)) for name, make in made.items()}
    return {name: ModelConfig(path) for name, path in {**made, "vision": vision_folder}.items()}


def write_jsonl(folder, rows):
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return "json", str(path)


def write_json(folder, rows):
    path = folder / "rows.json"
    path.write_text(json.dumps(rows, indent=1))
    return "json", str(path)


def write_csv(folder, rows):
    path = folder / "rows.csv"
    with open(path, "w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    return "csv", str(path)


def write_parquet(folder, rows, features=None):
    path = str(folder / "rows.parquet")
    Dataset.from_list(rows, features).to_parquet(path)
    return "parquet", path


def write_disk(folder, rows, features=None):
    Dataset.from_list(rows, features).save_to_disk(folder / "saved")
    return str(folder / "saved"), None


def write_disk_of_splits(folder, rows, features=None):
    DatasetDict(train=Dataset.from_list(rows, features)).save_to_disk(folder / "saved")
    return str(folder / "saved"), None


WRITERS = [write_jsonl, write_json, write_csv, write_parquet, write_disk, write_disk_of_splits]
TABLES = ("prompt and completion", "text")  # the layouts that csv can hold
CASES = [(w, name) for w in WRITERS for name in (TABLES if w is write_csv else LAYOUTS)]


def rows_and_collator(source, model, **options):
    """All rows of a source, in order, and what makes batches of them for a model."""
    dataset, files = source
    config = DataConfig(dataset, files, **{"split_by": "row"} | options)
    rows = [row for split in load_splits(config).values() for row in split]
    return sorted(rows, key=lambda row: row[ROW]), make_collator(model, config)


@pytest.mark.parametrize("streaming", [False, True], ids=["", "stream"])
@pytest.mark.parametrize(
    ("writer", "layout"), CASES, ids=[f"{w.__name__[6:]}-{name}" for w, name in CASES]
)
def test_every_layout_out_of_every_kind_of_file(models, tmp_path, writer, layout, streaming):
    source = writer(tmp_path, [LAYOUTS[layout]] * 6)
    rows, collator = rows_and_collator(source, models["text"], streaming=streaming)
    batch, decode = collator(rows), collator.tokenizer.decode
    whole = f"<s> {QUESTION} {ANSWER} </s>" if layout == "text" else CHAT
    learnt = whole.removeprefix("<s> ") if layout == "text" else f"{ANSWER} </s>"
    assert [decode(row) for row in batch["input_ids"]] == [whole] * 6
    assert [decode(row[row != IGNORED]) for row in batch["labels"]] == [learnt] * 6
    assert [row[ROW] for row in rows] == list(range(6))
    assert rows[0][SOURCE] == source[1] or rows[0][SOURCE].startswith(f"{source[0]}/, split")
    share = len(learnt.split()) / len(whole.split())
    assert collator.check(rows) == pytest.approx(share)


def test_several_pairs_in_a_row_of_texts(models, tmp_path):
    texts = [
        {"user": word, "assistant": answer} for word, answer in (("it", "red"), ("is", "blue"))
    ]
    rows, collator = rows_and_collator(
        write_jsonl(tmp_path, [{"texts": texts}] * 4), models["text"]
    )
    batch = collator(rows[:1])
    learnt = batch["labels"][0]
    assert collator.tokenizer.decode(learnt[learnt != IGNORED]) == "red </s> blue </s>"
    assert (learnt != IGNORED).tolist() == [bool(b) for b in (0, 0, 0, 0, 1, 1, 0, 0, 0, 1, 1)]


# Rows with images.


def coloured():
    """Six images that differ from row to row, with their names."""
    names = [list(COLOURS)[i % 3] for i in range(6)]
    return [(PILImage.new("RGB", (16, 16), COLOURS[name]), name) for name in names]


def questions(**columns):
    """Six rows; a column is a function of the row's number."""
    rows = [{"prompt": "which colour", "completion": name} for _, name in coloured()]
    return [row | {c: value(i) for c, value in columns.items()} for i, row in enumerate(rows)]


def save_images(folder):
    (folder / "pictures").mkdir()
    for i, (image, _) in enumerate(coloured()):
        image.save(folder / "pictures" / f"{i}.png")


def jsonl_with_image(folder):
    save_images(folder)
    return write_jsonl(folder, questions(image=lambda i: f"pictures/{i}.png"))


def jsonl_with_images(folder):
    save_images(folder)
    return write_jsonl(folder, questions(images=lambda i: [f"pictures/{i}.png"]))


def csv_with_whole_paths(folder):
    save_images(folder)
    return write_csv(folder, questions(image=lambda i: str(folder / "pictures" / f"{i}.png")))


def image_folder(folder):
    save_images(folder)
    _, rows = write_jsonl(folder, questions(file_name=lambda i: f"{i}.png"))
    os.replace(rows, folder / "pictures" / "metadata.jsonl")
    return str(folder / "pictures"), None


def image_folder_by_its_loader(folder):
    return "imagefolder", f"{image_folder(folder)[0]}/*"


def the_cauldron(folder):
    pair = {"user": Value("string"), "assistant": Value("string")}
    rows = [
        {"images": [image], "texts": [{"user": "which colour", "assistant": name}]}
        for image, name in coloured()
    ]
    return write_parquet(folder, rows, Features({"images": [Image()], "texts": [pair]}))


def messages_in_parquet(folder):
    turn = {"role": Value("string"), "content": Value("string")}
    turns = [
        [{"role": "user", "content": "which colour"}, {"role": "assistant", "content": name}]
        for _, name in coloured()
    ]
    rows = [{"messages": t, "image": i} for t, (i, _) in zip(turns, coloured(), strict=True)]
    return write_parquet(folder, rows, Features({"messages": [turn], "image": Image()}))


def saved_with_images(folder):
    text, rows = Value("string"), questions(images=lambda i: [coloured()[i][0]])
    features = {"prompt": text, "completion": text, "images": List(Image())}
    return write_disk(folder, rows, Features(features))


IMAGE_SOURCES = [jsonl_with_image, jsonl_with_images, csv_with_whole_paths, image_folder]
IMAGE_SOURCES += [image_folder_by_its_loader, the_cauldron, messages_in_parquet, saved_with_images]


@pytest.mark.parametrize("streaming", [False, True], ids=["", "stream"])
@pytest.mark.parametrize("make", IMAGE_SOURCES, ids=lambda make: make.__name__)
def test_images_out_of_every_kind_of_source(models, tmp_path, make, streaming):
    source = make(tmp_path)
    before = sorted(tmp_path.rglob("*"))
    rows, collator = rows_and_collator(source, models["vision"], streaming=streaming)
    batch = collator(rows)
    expected = collator(questions(image=lambda i: coloured()[i][0]))
    assert set(batch) == set(expected) and "pixel_values" in batch
    assert all(torch.equal(batch[name], expected[name]) for name in expected)
    learnt = [row[row != IGNORED] for row in batch["labels"]]
    names = [f"{name} </s>" for _, name in coloured()]
    assert [collator.tokenizer.decode(row) for row in learnt] == names
    assert len(batch["pixel_values"].flatten(1).unique(dim=0)) == 3
    assert sorted(tmp_path.rglob("*")) == before, "nothing is written beside the user's data"


def test_rows_with_several_images_and_with_none(models, tmp_path):
    save_images(tmp_path)
    many = questions(images=lambda i: [f"pictures/{k}.png" for k in range(i % 3)])
    source = write_jsonl(tmp_path, many)
    rows, collator = rows_and_collator(source, models["llava"])
    marks = (collator(rows)["input_ids"] == collator.processor.image_token_id).sum(1)
    assert marks.tolist() == [0, 4, 8, 0, 4, 8]
    assert [len(row_images(row)) for row in rows] == [0, 1, 2, 0, 1, 2]
    rows, collator = rows_and_collator(source, models["vision"])  # whose processor cannot mix them
    assert collator(rows[1:3])["pixel_values"].shape[:2] == (2, 2)
    with pytest.raises(InputError, match=r"row 0, .*row 1: .* cannot .*; some have no image"):
        collator(rows[:2])


@pytest.mark.parametrize("named", ["list", "pattern"])
def test_images_beside_each_of_several_files(models, tmp_path, named):
    files = []
    for i, name in enumerate(("red", "blue")):
        folder = tmp_path / name
        folder.mkdir()
        PILImage.new("RGB", (16, 16), COLOURS[name]).save(folder / f"{i}.png")
        rows = [{"prompt": "which", "completion": name, "image": f"{i}.png"}] * 3
        files.append(write_jsonl(folder, rows)[1])
    files = files if named == "list" else str(tmp_path / "*" / "rows.jsonl")
    rows, _ = rows_and_collator(("json", files), models["vision"])
    assert {row["completion"] for row in rows} == {"red", "blue"}
    for row in rows:
        assert row_images(row)[0].getpixel((0, 0)) == COLOURS[row["completion"]]
    PILImage.new("RGB", (16, 16)).save(tmp_path / "red" / "1.png")
    with pytest.raises(InputError, match=r"'1\.png' is in several folders .*give its whole path"):
        [row_images(row) for row in rows]


def test_an_image_beside_the_file_comes_before_one_in_the_working_folder(
    models, tmp_path, monkeypatch
):
    source = jsonl_with_image(tmp_path)
    (tmp_path / "elsewhere" / "pictures").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "elsewhere")
    PILImage.new("RGB", (4, 4)).save("pictures/0.png")
    rows, _ = rows_and_collator(source, models["vision"])
    assert row_images(rows[0])[0].size == (16, 16)
    PILImage.new("RGB", (4, 4)).save("pictures/6.png")
    assert row_images({**rows[0], "image": "pictures/6.png"})[0].size == (4, 4)


# Rows with labels.


@pytest.mark.parametrize("streaming", [False, True], ids=["", "stream"])
@pytest.mark.parametrize("writer", WRITERS, ids=lambda writer: writer.__name__[6:])
def test_labels_as_numbers_and_as_names(models, tmp_path, writer, streaming):
    for kind, labels in {
        "numbers": [0, 1, 2] * 2,
        "names": ["LABEL_0", "LABEL_1", "LABEL_2"] * 2,
    }.items():
        (tmp_path / kind).mkdir()
        source = writer(tmp_path / kind, [{"text": "it is red", "label": v} for v in labels])
        rows, collator = rows_and_collator(source, models["labels"], streaming=streaming)
        batch = collator(rows)
        assert isinstance(collator, LabelCollator)
        assert batch["labels"].tolist() == [0, 1, 2] * 2
        assert collator.tokenizer.decode(batch["input_ids"][5]) == "it is red"


@pytest.mark.parametrize("streaming", [False, True], ids=["", "stream"])
@pytest.mark.parametrize("key", ["image", "path"])
def test_images_inside_the_messages_are_used(models, tmp_path, key, streaming):
    rows = []
    for name, colour in COLOURS.items():
        PILImage.new("RGB", (16, 16), colour).save(tmp_path / f"{name}.png")
        part = {"type": "image", key: f"{name}.png"}
        user = {**PARTS[0], "content": [part, *PARTS[0]["content"]]}
        rows += [{"messages": [user, {**PARTS[1], "content": name}]}] * 2
    answers = [row["messages"][1]["content"] for row in rows]
    columns = [
        {"messages": LAYOUTS["messages"]["messages"], "image": f"{answer}.png"}
        for answer in answers
    ]
    source = write_jsonl(tmp_path, rows)
    inside, collator = rows_and_collator(source, models["vision"], streaming=streaming)
    collator.check(inside)
    message = refused(source, models["text"])
    assert "the model takes text only, a message has a part of type 'image'" in message
    beside, _ = rows_and_collator(write_jsonl(tmp_path, columns), models["vision"])
    assert torch.equal(collator(inside)["pixel_values"], collator(beside)["pixel_values"])


def test_images_inside_the_messages_of_a_table_stay_encoded(models, tmp_path):
    part = {"type": Value("string"), "text": Value("string"), "image": Image()}
    feature = Features({"messages": [{"role": Value("string"), "content": [part]}]})
    user = [{"type": "image", "text": None, "image": PILImage.new("RGB", (8, 8), "red")}]
    user += [{"type": "text", "text": QUESTION, "image": None}]
    answer = [{"type": "text", "text": ANSWER, "image": None}]
    turns = [{"role": "user", "content": user}, {"role": "assistant", "content": answer}]
    rows, collator = rows_and_collator(
        write_parquet(tmp_path, [{"messages": turns}] * 6, feature), models["vision"]
    )
    assert set(rows[0]["messages"][0]["content"][0]["image"]) == {"bytes", "path"}
    assert collator(rows)["pixel_values"].shape[0] == 6


def test_images_inside_messages_stand_among_those_of_the_column(models):
    inside, first, second = (PILImage.new("RGB", (8, 8), colour) for colour in COLOURS)
    question = [{"type": "image", "image": inside}, {"type": "image"}, *PARTS[0]["content"]]
    row = {"messages": [{**USER, "content": question}, ASSISTANT], "images": [first, second]}
    messages, pictures = placed_images(row, row["messages"], "<|image|>")
    assert [picture.stored for picture in pictures] == [first, inside, second]
    assert [part["type"] for part in messages[0]["content"]] == ["image"] * 3 + ["text"]
    with pytest.raises(InputError, match="2 places for images, 1 images"):
        placed_images({**row, "images": [first]}, [USER | {"content": question[1:2] * 2}], None)


LOST = {
    "url": {"type": "image", "url": "https://example.org/a.png"},
    "base64": {"type": "image", "base64": "iVBO"},
    "image_url": {"type": "image_url", "image_url": {"url": "https://example.org/a.png"}},
    "video": {"type": "video", "video": "a.mp4"},
    "audio": {"type": "text", "text": "a", "audio": "a.wav"},
}


@pytest.mark.parametrize("key", LOST)
def test_what_a_part_of_a_message_would_lose_is_refused(models, tmp_path, key):
    bad = {"messages": [{**USER, "content": [LOST[key], *PARTS[0]["content"]]}, PARTS[1]]}
    rows = [LAYOUTS["messages of parts"]] * 3 + [bad] * 3
    message = refused(write_jsonl(tmp_path, rows), models["vision"])
    assert f"{key!r} of a part of type {LOST[key]['type']!r} would be lost" in message


# What is wrong with a row.


def refused(source, model, check=True, **options):
    """The message with which a batch, and the check before training, refuse the rows."""
    rows, collator = rows_and_collator(source, model, **options)
    with pytest.raises(InputError) as of_batch:
        collator(rows)
    message = str(of_batch.value)
    if check:
        with pytest.raises(InputError) as of_check:
            collator.check(rows)
        told = str(of_check.value)
        lines = [line.strip() for line in told.splitlines()]
        assert lines[0].startswith(message) or lines[1] == message
    return message


LONG = "red " * 600
BAD_ROWS = {  # layout of the good rows, what differs in row 3, the column, what is said of it
    "a number": ("prompt and completion", {"completion": 3}, "completion",
                 "must be text or messages, not int (3)"),
    "a number for a text": ("text", {"text": 3}, "text", "must be text, not int (3)"),
    "a list for a text": ("text", {"text": ["a"]}, "text", "must be text, not list"),
    "null": ("prompt and completion", {"completion": None}, "completion", "empty"),
    "null for a prompt": ("prompt and completion", {"prompt": None}, "prompt", "empty"),
    "null for messages": ("messages", {"messages": None}, "messages", "empty"),
    "null for texts": ("texts", {"texts": None}, "texts", "empty"),
    "null for a text": ("text", {"text": None}, "text", "empty"),
    "text for messages": ("messages", {"messages": "red"}, "messages",
                          "must be a list of messages, not str ('red')"),
    "no messages": ("messages", {"messages": []}, "messages", "the last message is not the"),
    "no role": ("messages", {"messages": [{"content": QUESTION}, ASSISTANT]}, "messages",
                "each message must have a role and a content"),
    "no content": ("messages", {"messages": [USER, {"role": "assistant"}]}, "messages",
                   "each message must have a role and a content"),
    "null for a content": ("messages", {"messages": [USER, ASSISTANT | {"content": None}]},
                           "messages", "each message must have a role and a content"),
    "a part without a type": ("messages of parts", {"messages": [PARTS[0], ASSISTANT | {
        "content": [{"text": "red"}]}]}, "messages", "text or a list of typed parts"),
    "null for a message": ("messages", {"messages": [None]}, "messages", "found None"),
    "no answer": ("messages", {"messages": [USER]}, "messages",
                  "the last message is not the assistant's answer"),
    "no answer in a completion": ("prompt and completion of messages", {"completion": [USER]},
                                  "completion", "the last message is not the assistant's answer"),
    "texts without an assistant": ("texts", {"texts": [{"user": QUESTION}]}, "texts",
                                   "must be a list of texts by user and assistant"),
    "null for an assistant": ("texts", {"texts": [{"user": QUESTION, "assistant": None}]},
                              "texts", "must be a list of texts by user and assistant"),
    "no texts": ("texts", {"texts": []}, "texts", "the last message is not the assistant's answer"),
    "one pair for texts": ("texts", {"texts": {"user": QUESTION, "assistant": ANSWER}}, "texts",
                           "must be a list of texts by user and assistant"),
    "a text for texts": ("texts", {"texts": "red"}, "texts", "must be a list of texts"),
    "too long an answer": ("prompt and completion", {"completion": LONG}, "completion",
                           "609 tokens, the model takes 512; shorten or leave out the row"),
    "too long a text": ("text", {"text": LONG}, "text", "602 tokens, the model takes 512;"),
    "too long messages": ("messages", {"messages": [USER, ASSISTANT | {"content": LONG}]},
                          "messages", "609 tokens, the model takes 512;"),
    "tool calls": ("messages", {"messages": [USER, {**ASSISTANT, "content": "", "tool_calls": [
                                {"type": "function", "function": {"name": "look"}}]}]},
                   "messages", "'tool_calls' of a message would be lost"),
    "reasoning": ("messages", {"messages": [USER, {**ASSISTANT, "reasoning_content": "red"}]},
                  "messages", "'reasoning_content' of a message would be lost"),
    "a name": ("prompt and completion of messages", {"prompt": [{**USER, "name": "it"}]}, "prompt",
               "'name' of a message would be lost"),
    "tools": ("prompt and completion", {"tools": [{"type": "function"}]}, "tools", "would be lost"),
    "an image for a model of text": ("messages", {"image": "red.png"}, "image",
                                     "the model takes text only; leave out the column"),
    "images for a model of text": ("text", {"images": ["red.png"]}, "images",
                                   "the model takes text only; leave out the column"),
}  # fmt: skip


@pytest.mark.parametrize("streaming", [False, True], ids=["", "stream"])
@pytest.mark.parametrize("case", BAD_ROWS)
def test_a_bad_row_is_named_by_file_number_and_column(models, tmp_path, case, streaming):
    layout, change, column, text = BAD_ROWS[case]
    good = LAYOUTS[layout]
    source = write_jsonl(tmp_path, [good, good, good, good | change, good, good])
    message = refused(source, models["text"], streaming=streaming)
    assert message.startswith(f"{source[1]}:4, row 3, column {column!r}: ")
    assert text in message


@pytest.mark.parametrize("kind", ["image", "video"])
def test_parts_that_a_model_of_text_would_lose(models, tmp_path, kind):
    texts, other = PARTS[0]["content"], {"type": kind, "text": None}
    bad = {"messages": [{**USER, "content": [other, *texts]}, PARTS[1]]}
    source = write_jsonl(tmp_path, [LAYOUTS["messages of parts"]] * 3 + [bad] * 3)
    wanted = f"row 3: the model takes text only, a message has a part of type {kind!r}; "
    assert wanted in refused(source, models["text"])


def test_images_for_a_model_of_text_are_told_before_training_of_tables_too(models, tmp_path):
    folder, _ = image_folder(tmp_path)
    message = refused((folder, None), models["text"])
    assert "row 0, column 'image': the model takes text only; " in message


@pytest.mark.parametrize("writer", [w for w in WRITERS if w is not write_csv])
def test_what_is_empty_or_beside_the_messages_is_not_lost(models, tmp_path, writer):
    empty = {"tool_calls": [], "name": None, "reasoning_content": ""}
    row = {"messages": [{**USER, **empty}, {**ASSISTANT, **empty}]}
    row |= {"tools": None, "images": [], "image": None, "id": "x", "source": {"name": "made"}}
    rows, collator = rows_and_collator(writer(tmp_path, [row] * 6), models["text"])
    assert [collator.tokenizer.decode(ids) for ids in collator(rows)["input_ids"]] == [CHAT] * 6
    collator.check(rows)


@pytest.mark.parametrize("writer", WRITERS, ids=lambda writer: writer.__name__[6:])
def test_a_null_is_found_in_every_kind_of_file(models, tmp_path, writer):
    good, bad = ({"prompt": QUESTION, "completion": c} for c in (ANSWER, None))
    dataset, files = writer(tmp_path, [good, good, good, bad, good, good])
    message = refused((dataset, files), models["text"])
    where = files or f"{dataset}/, split 'train'"
    line = {write_jsonl: ":4", write_csv: ":5"}.get(writer, "")
    assert message == f"{where}{line}, row 3, column 'completion': empty"


@pytest.mark.parametrize("writer", WRITERS, ids=lambda writer: writer.__name__[6:])
def test_a_missing_column_is_named_with_those_found(models, tmp_path, writer):
    dataset, files = writer(tmp_path, [{"prompt": QUESTION, "answer": ANSWER}] * 6)
    where = files or f"{dataset}/, split 'train'"
    where += {write_jsonl: ":1", write_csv: ":2"}.get(writer, "")
    message = refused((dataset, files), models["text"])
    assert message.startswith(f"{where}, row 0: needs the columns messages, or prompt and ")
    assert message.endswith("; found: prompt, answer")
    message = refused((dataset, files), models["labels"])
    wanted = "needs the columns text and label; found: prompt, answer"
    assert message == f"{where}, row 0: {wanted}"


def test_max_length_is_named_where_it_is_what_limits(models, tmp_path):
    rows = [{"prompt": "which", "completion": "red"}] * 3 + [LAYOUTS["prompt and completion"]]
    source = write_jsonl(tmp_path, rows)
    message = refused(source, models["text"], max_length=8)
    assert message.startswith(
        f"{source[1]}:4, row 3, column 'completion': 11 tokens, max_length=8;"
    )
    assert message.endswith("or raise max_length")
    rows, collator = rows_and_collator(source, models["text"], max_length=11)
    assert collator(rows)["input_ids"].shape == (4, 11), "as long as allowed"


def test_what_the_images_need_counts(models, tmp_path):
    save_images(tmp_path)
    rows = questions(images=lambda i: [f"pictures/{k}.png" for k in range(6)] * (i == 3) * 22)
    message = refused(write_jsonl(tmp_path, rows), models["llava"], check=False)
    assert "row 3, column 'completion': 535 tokens, the model takes 512;" in message


BAD_IMAGES = {  # the image of row 3, what is said of it
    "garbage": ("garbage.png", "'garbage.png' does not open (cannot identify image file"),
    "cut off": ("cut.png", "'cut.png' does not open (image file is truncated"),
    "missing": ("no.png", "'no.png' does not open ([Errno 2] No such file"),
    "a folder": ("pictures", "'pictures' does not open ([Errno 21] Is a directory"),
    "a number": (3, "must be an image or its path, not a int"),
    "null": ([None], "must be an image or its path, not a NoneType"),
}


def save_bad_images(folder):
    save_images(folder)
    noise = PILImage.effect_noise((64, 64), 90)
    noise.save(folder / "cut.png")
    content = (folder / "cut.png").read_bytes()
    (folder / "cut.png").write_bytes(content[: len(content) // 2])
    (folder / "garbage.png").write_bytes(b"garbage" * 20)


@pytest.mark.parametrize("streaming", [False, True], ids=["", "stream"])
@pytest.mark.parametrize("case", BAD_IMAGES)
def test_an_image_that_does_not_open_is_named(models, tmp_path, case, streaming):
    image, text = BAD_IMAGES[case]
    column = "images" if isinstance(image, list) else "image"
    good = (lambda i: [f"pictures/{i}.png"]) if column == "images" else "pictures/{}.png".format
    save_bad_images(tmp_path)
    rows = questions(**{column: lambda i: image if i == 3 else good(i)})
    source = write_jsonl(tmp_path, rows)
    message = refused(source, models["vision"], check=False, streaming=streaming)
    assert message.startswith(f"{source[1]}:4, row 3, column {column!r}: ")
    assert text in message


@pytest.mark.parametrize("streaming", [False, True], ids=["", "stream"])
@pytest.mark.parametrize("case", ["garbage", "cut off", "missing"])
def test_a_bad_image_of_a_folder_is_named(models, tmp_path, case, streaming):
    (tmp_path / "bad").mkdir()
    save_bad_images(tmp_path / "bad")
    folder, _ = image_folder(tmp_path)
    path, text = tmp_path / "pictures" / "3.png", BAD_IMAGES[case][1].split("' ")[1]
    path.unlink()
    if case != "missing":
        os.replace(tmp_path / "bad" / BAD_IMAGES[case][0], path)
    message = refused((folder, None), models["vision"], check=False, streaming=streaming)
    where = f"{folder}/metadata.jsonl:4, row 3, column 'image': image {str(path)!r} "
    assert message.startswith(where + text)


@pytest.mark.parametrize("writer", [write_parquet, write_disk])
@pytest.mark.parametrize("column", ["image", "images"])
@pytest.mark.parametrize("case", ["garbage", "cut"])
def test_bad_bytes_in_a_table_are_named(models, tmp_path, case, column, writer):
    save_bad_images(tmp_path)

    def image(i):
        name = f"{case}.png" if i == 3 else f"pictures/{i}.png"
        value = {"bytes": (tmp_path / name).read_bytes(), "path": f"{i}.png"}
        return [value] if column == "images" else value

    feature = List(Image()) if column == "images" else Image()
    text = Value("string")
    features = Features({"prompt": text, "completion": text, column: feature})
    dataset, files = writer(tmp_path, questions(**{column: image}), features)
    message = refused((dataset, files), models["vision"], check=False)
    where = f"{files or dataset + '/, split ' + repr('train')}, row 3, column {column!r}: "
    reason = {"garbage": "cannot identify image file", "cut": "image file is truncated"}[case]
    assert message == f"{where}image '3.png' does not open ({reason})"


BAD_LABELS = {  # what differs in row 3, the column, what is said of it
    "a number too large": (
        {"label": 3},
        "label",
        "3 is none of the model's 3 classes (0: LABEL_0, ",
    ),
    "a negative number": ({"label": -1}, "label", "-1 is none of the model's 3 classes"),
    "no whole number": ({"label": 0.5}, "label", "0.5 is none of the model's 3 classes"),
    "another name": ({"label": "red"}, "label", "'red' is none of the model's 3 classes"),
    "a list": ({"label": [1]}, "label", "[1] is none of the model's 3 classes"),
    "true": ({"label": True}, "label", "True is none of the model's 3 classes"),
    "null": ({"label": None}, "label", "None is none of the model's 3 classes"),
    "a number for a text": ({"text": 3}, "text", "must be text, not int"),
    "null for a text": ({"text": None}, "text", "must be text, not NoneType"),
    "null for a pair": ({"text_pair": None}, "text_pair", "must be text, not NoneType"),
    "too long": ({"text": LONG}, "text", "601 tokens, the model takes 512;"),
}


@pytest.mark.parametrize("streaming", [False, True], ids=["", "stream"])
@pytest.mark.parametrize("case", BAD_LABELS)
def test_a_bad_row_of_a_classification_is_named(models, tmp_path, case, streaming):
    change, column, text = BAD_LABELS[case]
    good = {"text": "it is red", "text_pair": "blue", "label": 1}
    source = write_jsonl(tmp_path, [good, good, good, good | change, good, good])
    message = refused(source, models["labels"], streaming=streaming)
    assert message.startswith(f"{source[1]}:4, row 3, column {column!r}: ")
    assert text in message


def test_a_classifier_whose_tokenizer_knows_better_how_much_it_takes(models, tmp_path):
    """RoBERTa counts positions from 2: of 34, 32 tokens use all."""
    folder = str(tmp_path / "model")
    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "vocab_size": 64}
    config = RobertaConfig(**sizes, num_attention_heads=1, max_position_embeddings=34)
    model = RobertaForSequenceClassification(config)
    model.save_pretrained(folder)
    words = tokenizer()
    words.model_max_length = 32
    words.save_pretrained(folder)
    rows = [{"text": "red " * count, "label": 1} for count in (3, 32, 32, 33)]
    source = write_jsonl(tmp_path, rows)
    message = refused(source, ModelConfig(folder))
    assert message.startswith(
        f"{source[1]}:4, row 3, column 'text': 33 tokens, the model takes 32;"
    )
    rows, collator = rows_and_collator(source, ModelConfig(folder))
    assert model(**collator(rows[:3])).logits.shape == (3, 2)


def test_a_gap_in_a_csv_column_of_labels_is_what_is_named(models, tmp_path):
    """Such a column becomes one of floats: the other rows' labels stay good."""
    labels = [0, 1, 2, None, 0, 1]
    source = write_csv(tmp_path, [{"text": "it is red", "label": label} for label in labels])
    message = refused(source, models["labels"])
    assert message.startswith(f"{source[1]}:5, row 3, column 'label': None is none of")
    rows, collator = rows_and_collator(source, models["labels"])
    good = [row for row in rows if row[ROW] != 3]
    assert collator(good)["labels"].tolist() == [0, 1, 2, 0, 1]


def test_what_a_row_says_is_the_same_in_each_process():
    """Whatever types it holds, an image in a message among them, and wherever it was read."""
    pixels = [PILImage.new("RGB", (1, 1)) for _ in range(2)]
    rows = [{"messages": [{"role": "user", "content": "a", "image": x}]} for x in pixels]
    first = row_text({**rows[0], "row_source": "a.jsonl", "row_index": 1, "image": pixels[0]})
    assert first == row_text(rows[1]) and '"content": "a"' in first
    pair = {"text": "a", "text_pair": "b", "label": 0}
    assert len({row_text(pair | other) for other in ({}, {"text_pair": "c"}, {"label": 1})}) == 3


@pytest.mark.parametrize("name", ["a + b", "a + ", "+", " + "])
def test_images_are_found_where_a_folders_name_has_a_plus(tmp_path, name):
    folder, other = tmp_path / name, tmp_path / "other"
    for place in (folder, other):
        place.mkdir()
    PILImage.new("RGB", (4, 4), "red").save(folder / "red.png")
    for files in ([folder / "rows.jsonl"], [other / "x.jsonl", folder / "y + z.jsonl"]):
        row = {ROW: 0, SOURCE: " + ".join(map(str, files)), "image": "red.png"}
        assert row_images(row)[0].size == (4, 4)
