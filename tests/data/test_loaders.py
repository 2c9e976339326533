"""Data sets: the fixed split, also of streams, loaders, and what is wrong with a source.
Not here: what a row is (test_rows.py), and becomes (test_collator.py)."""

import json
import random
import re
import shutil
from dataclasses import replace
from functools import partial
from itertools import chain, combinations, islice

import pytest
import torch
from accelerate import Accelerator
from datasets import Dataset
from families import TEXT_FAMILIES, bert, make_family

from darts_lora import RankSearch, SearchConfig, Supernet
from darts_lora.base.errors import InputError
from darts_lora.config import DataConfig, ModelConfig, TrainingConfig
from darts_lora.data.collator import Collator
from darts_lora.data.loaders import (
    RunOrder,
    how_tested,
    load_splits,
    make_collator,
    make_dataloader,
    process_share,
    run_dataloader,
    search_dataloaders,
    split_record,
    training_rows,
)
from darts_lora.data.places import ROW, SOURCE
from darts_lora.data.rows import row_images, row_prompt
from darts_lora.data.sources import load_source
from darts_lora.lora.models import load_processor
from darts_lora.run.stream import BatchStream
from small_models import residual

NAMES = ("train", "validation", "test")


def row_numbers(splits):
    record = split_record(splits, DataConfig())
    return {name: record[name] for name in splits}


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.fixture
def source(tmp_path):
    """A jsonl file of 40 prompt/completion rows."""
    rows = [{"prompt": f"q{i}", "completion": f"a{i}"} for i in range(40)]
    return write(tmp_path / "rows.jsonl", rows)


@pytest.mark.parametrize(
    ("make", "rows"),
    [
        (bert, [{"text": "red green", "label": 0}, {"text": "red", "label": 1}]),
        (TEXT_FAMILIES["llama"], [{"prompt": "is it", "completion": "red"}]),
    ],
)
def test_batches_have_few_shapes_whatever_the_task(tmp_path, make, rows):
    model = ModelConfig(make_family(make, str(tmp_path)))
    batch = make_collator(model, DataConfig(pad_to_multiple_of=16))(rows)
    assert batch["input_ids"].shape == batch["attention_mask"].shape == (len(rows), 16)


def test_the_embedded_splits_are_disjoint_and_the_same_each_time():
    splits = load_splits(DataConfig(), NAMES)
    assert tuple(splits) == NAMES
    indices = row_numbers(splits)
    total = len(indices["train"]) + len(indices["validation"])
    assert sorted(indices["train"] + indices["validation"]) == list(range(total))
    assert len(indices["validation"]) == pytest.approx(0.3 * total, abs=1), "whole images"
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


def test_other_rows_of_the_same_numbers_have_another_record(tmp_path):
    def record(rows, name="rows.jsonl"):
        config = DataConfig("json", write(tmp_path / name, rows))
        return split_record(load_splits(config), config)

    rows = [{"prompt": f"q{i}", "completion": f"a{i}"} for i in range(40)]
    found = record(rows)
    assert record(rows, "moved.jsonl") == found
    for other in (
        [{**row, "prompt": row["prompt"].upper()} for row in rows],
        [*rows[:-1], {**rows[-1], "completion": "mended"}],
    ):
        changed = record(other)
        assert changed.pop("digest") != found["digest"]
        assert changed == {name: found[name] for name in ("train", "validation")}


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


@pytest.mark.parametrize("streaming", [False, True])
def test_rows_of_a_prompt_stay_on_one_side(tmp_path, streaming):
    rows = [{"prompt": f"q{i % 50}", "completion": f"a{i}"} for i in range(400)]
    path = write(tmp_path / "rows.jsonl", rows)
    config = DataConfig("json", path, test_split=None, streaming=streaming)
    parts = {
        name: [r["prompt"] for r in split] for name, split in load_splits(config, NAMES).items()
    }
    prompts = [set(part) for part in parts.values()]
    assert sum(map(len, prompts)) == len(set.union(*prompts)) == 50
    assert sum(map(len, parts.values())) == 400
    if not streaming:  # whole prompts of eight rows that are nearest to 10 % and 30 % of the rest
        assert [len(part) for part in parts.values()] == [256, 104, 40]
    alone = load_splits(replace(config, split_by="row"), NAMES)
    assert set(row["prompt"] for row in alone["validation"]) & prompts[0]


def test_different_prompts_are_split_as_rows_are(source):
    config = DataConfig("json", source, test_split=None)
    by_row = load_splits(replace(config, split_by="row"), NAMES)
    assert row_numbers(load_splits(config, NAMES)) == row_numbers(by_row)


def test_another_image_is_another_prompt(data_folder):
    rows = load_splits(DataConfig(data_folder, split_by="row"))["train"].select(range(12))
    prompts = [row_prompt(row) for row in rows]
    stored = [(str(row["messages"][:-1]), row["image"]["bytes"]) for row in rows]
    for i, j in combinations(range(12), 2):
        assert (prompts[i] == prompts[j]) == (stored[i] == stored[j])
    row = rows[0]
    other = {**row, "image": {"bytes": b"other", "path": None}}
    assert row_prompt(other) != row_prompt(row)
    answered = {**row, "messages": [row["messages"][0], {"role": "assistant", "content": "other"}]}
    assert row_prompt(answered) == row_prompt(row)
    texts = [row_prompt({"text": text}) for text in ("a", "b", "a")]
    assert texts[0] == texts[2] != texts[1], "of a text without a prompt all counts"


def test_of_labelled_pairs_both_texts_are_the_prompt(tmp_path):
    """A few questions over many documents are not split by question."""
    rows = [{"text": f"q{i % 3}", "text_pair": f"d{i}", "label": i % 2} for i in range(90)]
    parts = load_splits(DataConfig("json", write(tmp_path / "rows.jsonl", rows)))
    assert {name: len(part) for name, part in parts.items()} == {"train": 63, "validation": 27}
    assert all(set(part["text"]) == {"q0", "q1", "q2"} for part in parts.values())
    pairs = [row_prompt(row | {"label": 1 - row["label"]}) for row in rows]
    assert pairs == [row_prompt(row) for row in rows] and len(set(pairs)) == 90
    assert row_prompt({**rows[0], "text_pair": None}) == row_prompt({"text": "q0", "label": 0})


def test_prompts_that_cannot_be_split_are_refused(tmp_path):
    def config(*prompts):
        rows = [{"prompt": prompt, "completion": f"a{i}"} for i, prompt in enumerate(prompts)]
        return DataConfig("json", write(tmp_path / "rows.jsonl", rows))

    few = config(*["p"] * 19, "q")
    wanted = r"split_by='image': the 20 rows have 2 images or prompts, .*validation_fraction=0\.3; "
    with pytest.raises(InputError, match=wanted + "use split_by=prompt or row"):
        load_splits(few)
    for possible in (
        replace(few, split_by="row"),
        config(*["p"] * 20),
    ):  # one for all tells nothing
        assert len(load_splits(possible)["validation"]) == 6


def test_the_splits_of_a_folder_with_images(data_folder):
    splits = load_splits(DataConfig(data_folder, split_by="row"), NAMES)
    assert {name: len(split) for name, split in splits.items()} == {
        "train": 28, "validation": 12, "test": 12
    }  # fmt: skip
    indices = row_numbers(splits)
    assert sorted(indices["train"] + indices["validation"]) == list(range(40))
    assert indices["test"] == list(range(12))
    row = splits["test"][4]
    assert row_images(row)[0].size == (32, 16)
    assert row["messages"][1] == {"role": "assistant", "content": "green"}
    again = load_splits(DataConfig(data_folder, split_by="row"), NAMES)
    assert row_numbers(again) == indices
    other = row_numbers(load_splits(DataConfig(data_folder, split_by="row", split_seed=1)))
    assert other["validation"] != indices["validation"]


def test_files_may_be_named_relative_to_a_folder(data_folder):
    config = DataConfig(data_folder, {"test": "te*.parquet"})
    assert len(load_splits(config, ["test"])["test"]) == 12
    with pytest.raises(InputError, match=r"data_files=.* cannot be loaded \(.*no\.parquet"):
        load_splits(DataConfig(data_folder, "no.parquet"))


@pytest.mark.parametrize("options", [{"data_files": "mine.jsonl"}, {"dataset_config": "main"}])
def test_the_embedded_data_take_no_files_of_ones_own(options):
    (given,) = options
    with pytest.raises(InputError, match=f"{given}='.*': dataset='embedded' has its own; name"):
        load_splits(DataConfig(**options))


def test_missing_files_are_named(source):
    for files in ("no.json", [source, "no.json"], {"train": source, "test": "no.json"}):
        with pytest.raises(InputError, match=r"data_files: no such file: 'no\.json'"):
            load_splits(DataConfig("json", files))


def test_the_embedded_data_leave_nothing_in_the_temporary_folder(tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    assert load_splits(DataConfig())["train"].num_rows > 5000
    assert not list(tmp_path.iterdir())


def test_missing_columns_are_named_with_those_found(tmp_path):
    path = write(tmp_path / "rows.jsonl", [{"question": "q", "completion": "a"}] * 4)
    rows = load_splits(DataConfig("json", path))["train"]
    with pytest.raises(InputError) as error:
        Collator(load_processor(ModelConfig())).check(rows)
    first = rows[0][ROW]
    assert str(error.value).endswith("; so it is in all 3 rows")
    assert f"{path}:{first + 1}, row {first}: needs the columns messages, or" in str(error.value)
    assert "found: question, completion" in str(error.value)


GOOD = '{"prompt": "a", "completion": "b"}\n'
BAD_FILES = {  # name, content, what is said of it
    "empty": ("rows.jsonl", b"", "the file is empty"),
    "blank": ("rows.jsonl", b"\n\n", "no sample in it"),
    "no row": ("rows.json", b"[]", "no sample in it"),
    "a header alone": ("rows.csv", b"prompt,completion\n", "no sample in it"),
    "cut off": ("rows.jsonl", b'{"prompt": "a", ', "JSON parse error"),
    "a broken line": ("rows.jsonl", f"{GOOD}{{oh}}\n{GOOD}".encode(), "in row 1"),
    "no parquet": ("rows.parquet", b"garbage", "Parquet file size is 7 bytes"),
}


@pytest.mark.parametrize("streaming", [False, True], ids=["", "stream"])
@pytest.mark.parametrize("by", ["loader", "folder"])
@pytest.mark.parametrize("case", BAD_FILES)
def test_empty_and_broken_files_are_named(tmp_path, case, by, streaming):
    name, content, text = BAD_FILES[case]
    path = tmp_path / name
    path.write_bytes(content)
    loader = {"jsonl": "json"}.get(path.suffix[1:], path.suffix[1:])
    files = (loader, str(path)) if by == "loader" else (str(tmp_path), None)
    with pytest.raises(InputError) as error:
        load_splits(DataConfig(*files, streaming=streaming))
    assert str(path) in str(error.value) and text in str(error.value)


def test_an_empty_file_among_others_is_named(source, tmp_path):
    empty = write(tmp_path / "empty.jsonl", [])
    for files in ([source, empty], {"train": source, "test": empty}, str(tmp_path / "*.jsonl")):
        with pytest.raises(InputError, match=f"data_files: '{empty}': the file is empty"):
            load_splits(DataConfig("json", files))


def test_a_folder_without_data_is_named(tmp_path):
    with pytest.raises(InputError, match=rf"dataset='{tmp_path}': cannot be loaded \(.*any data"):
        load_splits(DataConfig(str(tmp_path)))


@pytest.mark.parametrize("count", [2, 5])
def test_rows_of_several_files_are_numbered_through(tmp_path, count):
    files = [write(tmp_path / f"{i}.jsonl", [{"prompt": i}] * 4) for i in range(count)]
    rows = [row for s in load_splits(DataConfig("json", files)).values() for row in s]
    rows.sort(key=lambda row: row[ROW])
    assert [row["prompt"] for row in rows] == sorted([*range(count)] * 4)
    named = " + ".join(files) if count == 2 else str(tmp_path / "*")
    assert {row[SOURCE] for row in rows} == {named}


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


# Streams.


@pytest.fixture
def stream(tmp_path):
    """DataConfig of 400 streamed rows in four files; options change it."""
    for k in range(4):
        rows = [{"prompt": f"q{i}", "completion": f"a{i}"} for i in range(100 * k, 100 * k + 100)]
        write(tmp_path / f"rows-{k}.jsonl", rows)
    files = str(tmp_path / "rows-*.jsonl")
    return lambda **options: DataConfig("json", files, streaming=True, **options)


def numbers(rows):
    return [row[ROW] for row in rows]


@pytest.mark.parametrize("test_split", ["test", None])
def test_the_parts_of_a_stream_are_disjoint_whole_and_the_same_each_time(stream, test_split):
    names = NAMES if test_split is None else NAMES[:2]
    config = stream(test_split=test_split)
    parts = {name: numbers(rows) for name, rows in load_splits(config, names).items()}
    assert tuple(parts) == names
    assert sorted(chain(*parts.values())) == list(range(400)), "each row in one part alone"
    assert all(part == sorted(part) for part in parts.values())
    again = load_splits(config, names)
    assert {name: numbers(rows) for name, rows in again.items()} == parts
    other = load_splits(stream(test_split=test_split, split_seed=1), names)
    assert all(numbers(rows) != parts[name] for name, rows in other.items())
    test = 0.1 if test_split is None else 0
    assert len(parts["validation"]) == pytest.approx(0.3 * (1 - test) * 400, abs=30)
    assert len(parts.get("test", [])) == pytest.approx(test * 400, abs=15)
    for name, rows in again.items():
        assert [row["prompt"] for row in rows] == [f"q{i}" for i in parts[name]]


@pytest.mark.parametrize("fraction", [0.05, 0.5, 0.9])
def test_the_share_of_a_streams_validation_rows(stream, fraction):
    parts = load_splits(stream(validation_fraction=fraction))
    assert len(list(parts["validation"])) == pytest.approx(400 * fraction, abs=35)


def test_only_the_wanted_parts_of_a_stream(stream):
    test = load_splits(stream(test_split=None), ["test"])
    everything = load_splits(stream(test_split=None), NAMES)
    assert list(test) == ["test"]
    assert numbers(test["test"]) == numbers(everything["test"])


@pytest.mark.parametrize("split_by", ["prompt", "row"])
@pytest.mark.parametrize("test_split", ["test", None])
def test_the_record_of_a_streams_split_gives_it_again(stream, test_split, split_by):
    options = {"max_train_samples": 150, "split_seed": 3, "split_by": split_by}
    config = stream(test_split=test_split, **options)
    names = NAMES if test_split is None else NAMES[:2]
    splits = load_splits(config, names)
    record = json.loads(json.dumps(split_record(splits, config)))
    assert "random.Random(f'{split_seed} {i}').random()" in record["rule"]
    found = {name: [] for name in names}
    test = 0 if record["test_split"] else record["test_fraction"]
    for i in range(record["max_train_samples"]):
        own = (
            i
            if record["split_by"] == "row"
            else row_prompt({"prompt": f"q{i}", "completion": ""}).hex()
        )
        u = random.Random(f"{record['split_seed']} {own}").random()
        validation = test + (1 - test) * record["validation_fraction"]
        found["test" if u < test else "validation" if u < validation else "train"].append(i)
    assert {name: numbers(rows) for name, rows in splits.items()} == found


def test_sample_limits_of_a_stream(stream, tmp_path):
    files = {"train": str(tmp_path / "rows-*.jsonl"), "test": str(tmp_path / "rows-0.jsonl")}
    limits = {"max_train_samples": 50, "max_test_samples": 7}
    config = DataConfig("json", files, streaming=True, **limits)
    parts = {name: numbers(rows) for name, rows in load_splits(config, NAMES).items()}
    assert sorted(parts["train"] + parts["validation"]) == list(range(50))
    assert parts["test"] == list(range(7))
    assert (
        len(numbers(load_splits(stream(test_split=None, max_test_samples=7), NAMES)["test"])) == 7
    )


@pytest.mark.parametrize("streaming", [False, True], ids=["", "stream"])
@pytest.mark.parametrize("test_split", ["test", None])
def test_training_rows_are_those_of_training_and_validation(stream, streaming, test_split):
    config = stream(test_split=test_split, max_train_samples=300)
    config.streaming = streaming
    rows = numbers(training_rows(config))
    parts = load_splits(config)
    assert sorted(rows) == sorted(chain(*map(numbers, parts.values())))
    assert len(set(rows)) == len(rows)


def loaded(dataset, seed=0, epochs=1, **options):
    """The row numbers that a loader gives, for each epoch."""
    loader = make_dataloader(dataset, numbers, 8, shuffle=True, seed=seed, **options)
    found = []
    for epoch in range(epochs):
        if hasattr(dataset, "set_epoch"):
            loader.dataset.set_epoch(epoch)
        found.append(list(chain(*loader)))
    return found


@pytest.mark.parametrize("workers", [0, 2])
def test_every_epoch_of_a_streams_loader_has_each_row_of_its_part_once(stream, workers):
    """Also with several files, which datasets shuffles and shares out among workers."""
    for limit in (None, 250):
        parts = load_splits(stream(test_split=None, max_train_samples=limit), NAMES)
        for part in parts.values():
            epochs = loaded(part, epochs=2, num_workers=workers)
            assert [sorted(epoch) for epoch in epochs] == [numbers(part)] * 2
            assert epochs[0] != epochs[1] != numbers(part)


def test_a_streams_loader_shuffles_by_its_seed_and_never_drops_all(stream, monkeypatch):
    part = load_splits(stream())["train"]
    assert loaded(part) == loaded(part) != loaded(part, seed=1)
    rows = len(numbers(part))
    assert rows % 8 and len(loaded(part, drop_last=True)[0]) == rows - rows % 8
    few = part.take(15)
    assert len(loaded(few, drop_last=True)[0]) == 8 and len(loaded(few.take(7), drop_last=True)[0])
    monkeypatch.setenv("WORLD_SIZE", "2")  # accelerate would drop less than a batch of each
    assert len(loaded(few, drop_last=True)[0]) == 15
    plain = make_dataloader(part, numbers, 8)
    assert list(chain(*plain)) == numbers(part)
    assert plain.num_workers == 0
    assert make_dataloader(part, numbers, 8, num_workers=2).num_workers == 1


def test_another_library_may_read_a_stream_with_more_workers(stream):
    """transformers' Trainer opens its own loader: no row may be lost, and none come twice."""
    rows = training_rows(stream())
    loader = torch.utils.data.DataLoader(rows, 8, collate_fn=numbers, num_workers=2)
    assert sorted(chain(*loader)) == list(range(400))


@pytest.mark.parametrize("streaming", [False, True], ids=["", "stream"])
def test_the_shares_of_processes_have_each_row_once(stream, streaming):
    config = stream(max_test_samples=7, test_split=None)
    config.streaming = streaming
    rows = load_splits(config, ["test"])["test"]
    for processes, sizes in ((1, [7]), (3, [3, 2, 2]), (8, [1] * 7 + [0])):
        shares = [numbers(process_share(rows, i, processes)) for i in range(processes)]
        assert [len(share) for share in shares] == sizes
        assert sorted(chain(*shares)) == numbers(rows)


@pytest.mark.parametrize("streaming", [False, True], ids=["", "stream"])
def test_a_run_has_one_epoch_behind_the_other(stream, streaming):
    config = stream(max_train_samples=30)
    config.streaming = streaming
    rows, training = training_rows(config), TrainingConfig(batch_size=4)

    def taken(seed=0, **options):
        loader = run_dataloader(rows, numbers, training, 23, seed, **options)
        return [*chain(*islice(loader, 23))]

    found = taken()
    assert found == taken() != taken(seed=1)
    if streaming:  # a buffer of rows: those of two epochs are mixed
        assert len(found) == 92 and set(found) == set(numbers(rows))
        return
    epochs = found[:30], found[30:60], found[60:90]
    assert all(sorted(epoch) == numbers(rows) for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2]
    begun = taken(first=[3, 1, 4])
    assert {*begun[:3]} == {numbers(rows)[i] for i in (1, 3, 4)}
    assert begun[3:63] == found[30:90]


def test_the_rows_that_are_left_come_first_and_then_all():
    order = list(RunOrder(6, 16, seed=0, first=[5, 2, 0]))
    assert sorted(order[:3]) == [0, 2, 5]
    assert sorted(order[3:9]) == list(range(6)) and len(order) == 16
    assert order == list(RunOrder(6, 16, seed=0, first=[5, 2, 0]))
    assert order[3:9] != list(RunOrder(6, 16, seed=1, first=[5, 2, 0]))[3:9]
    assert list(RunOrder(6, 9, seed=0, first=[]))[:6] == order[3:9], "none may be left"


def test_search_dataloaders_of_streams(stream):
    splits = load_splits(stream())
    loaders = search_dataloaders(splits, numbers, TrainingConfig(batch_size=16, num_workers=2), 0)
    train, validation = (list(loader) for loader in loaders)
    for name, batches, size in (("train", train, 16), ("validation", validation, 8)):
        rows = numbers(splits[name])
        assert {len(batch) for batch in batches} == {size}
        assert len(set(chain(*batches)) & set(rows)) == len(rows) - len(rows) % size


def test_a_stream_of_batches_goes_on_where_another_stopped(stream):
    splits = load_splits(stream(max_train_samples=50))

    def batches():
        loader, _ = search_dataloaders(splits, tensors, TrainingConfig(batch_size=8), 0)
        return BatchStream(Accelerator(cpu=True).prepare(loader))

    whole, moved = batches(), batches()
    epoch = len(numbers(splits["train"])) // 8
    taken = [next(whole)["row"].tolist() for _ in range(2 * epoch)]
    assert all(len(set(chain(*rows))) == 8 * epoch for rows in (taken[:epoch], taken[epoch:]))
    assert taken[:epoch] != taken[epoch:], "each epoch has an order of its own"
    moved.move_to((1, 2))
    assert [next(moved)["row"].tolist() for _ in range(2)] == taken[epoch + 2 : epoch + 4]


def tensors(rows):
    """A batch for a small regression."""
    x = torch.tensor([[hash((row[ROW], i)) % 97 / 97 for i in range(16)] for row in rows])
    return {"x": x, "row": torch.tensor(numbers(rows))}


def test_a_search_on_streams_keeps_validation_rows_out_of_the_weights(stream):
    parts = load_splits(stream(max_train_samples=40))
    training = TrainingConfig(max_steps=16, batch_size=8, logging_steps=8)
    whole = {"search_fraction": 1.0, "arch_every": 1}
    supernet = Supernet(residual(), SearchConfig(ranks=(0, 1, 2), budget_rank=1, **whole))
    seen = {True: set(), False: set()}

    def loss_fn(model, batch):
        seen[supernet._probe is not None] |= set(batch["row"].tolist())
        return (model(batch["x"]) - batch["x"].flip(1)).pow(2).mean()

    loaders = search_dataloaders(parts, tensors, training, 0)
    genotype = RankSearch(supernet, *loaders, training=training, loss_fn=loss_fn).run()
    assert set(genotype.ranks.values()) <= {0, 1, 2}
    assert seen[False] == set(numbers(parts["train"])), "several epochs"
    assert seen[True] == set(numbers(parts["validation"]))


def test_a_search_on_streams_goes_on_exactly(stream, tmp_path):
    """Over several epochs of validation rows, whose number is no multiple of a batch's."""
    parts = load_splits(stream(max_train_samples=40))
    training = TrainingConfig(max_steps=30, batch_size=8, logging_steps=8, save_steps=12)

    def search(folder):
        whole = {"search_fraction": 1.0, "arch_every": 1}
        supernet = Supernet(residual(), SearchConfig(ranks=(0, 1, 2), budget_rank=1, **whole))
        return RankSearch(
            supernet,
            *search_dataloaders(parts, tensors, training, 0),
            training=training,
            output_dir=str(folder),
            loss_fn=lambda model, batch: model(batch["x"]).pow(2).mean(),
        )

    assert len(numbers(parts["validation"])) % 8
    whole = search(tmp_path / "whole")
    whole.run()
    assert whole.val_stream.position[0] >= 2
    shutil.copytree(tmp_path / "whole", tmp_path / "cut")
    shutil.rmtree(tmp_path / "cut" / "checkpoints" / "step-0000030")
    resumed = search(tmp_path / "cut")
    resumed.run(resume=True)
    assert resumed.val_stream.position == whole.val_stream.position
    for key, value in whole.supernet.state_dict().items():
        assert torch.equal(value, resumed.supernet.state_dict()[key])


def test_a_saved_data_set_as_a_stream(tmp_path):
    folder = str(tmp_path / "saved")
    rows = [{"prompt": f"q{i}", "completion": f"a{i}"} for i in range(60)]
    Dataset.from_list(rows).save_to_disk(folder)
    config = DataConfig(folder, streaming=True)
    assert [row["prompt"] for row in load_splits(config)["train"]]
    assert sorted(numbers(training_rows(config))) == list(range(60))


def test_a_stream_with_too_few_rows(tmp_path):
    path = write(tmp_path / "rows.jsonl", [{"prompt": "a", "completion": "b"}] * 3)
    stream = partial(DataConfig, "json", path, streaming=True, split_by="row")
    for fraction, name in ((0.001, "validation"), (0.999, "train")):
        config = stream(validation_fraction=fraction)
        with pytest.raises(InputError, match=rf"={fraction}: leaves no sample in the {name} split"):
            load_splits(config)
    config = stream(test_split=None, test_fraction=0.001)
    with pytest.raises(InputError, match=r"test_fraction=0\.001: leaves no sample in the test"):
        load_splits(config, NAMES)


def test_a_stream_that_breaks_off_is_named(tmp_path):
    rows = [{"prompt": "q" * 1000, "completion": "a"}] * 20_000  # more than is read at once
    path = write(tmp_path / "rows.jsonl", rows)
    with open(path, "a") as file:
        file.write('{"prompt": "a", ')
    with pytest.raises(InputError, match=r"rows\.jsonl: cannot be read after \d{4,} rows \(JSON"):
        numbers(load_splits(DataConfig("json", path, streaming=True))["train"])


def test_a_stream_reads_only_what_is_taken(stream, tmp_path):
    (tmp_path / "rows-3.jsonl").write_text("{oh}\n")
    rows = load_splits(stream())["train"]
    assert len(list(islice(rows, 100))) == 100
    with pytest.raises(InputError, match="cannot be read after 300 rows"):
        numbers(rows)


def test_how_a_model_will_be_tested_is_told_before_the_search(tmp_path, data_folder):
    both, train = DataConfig(data_folder), DataConfig(data_folder, {"train": "train.parquet"})
    for config, wanted in (
        (both, "^test: evaluate.py takes the split 'test'$"),
        (replace(both, test_split=None), "^test: 10% of the rows are held back for evaluate.py$"),
        (train, "no split 'test' \\(only train\\); --test_split null holds 10% of the rows back"),
    ):
        assert re.search(wanted, how_tested(load_source(config), config))
