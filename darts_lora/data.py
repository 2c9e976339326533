"""Data sets: loading, the fixed split into training, validation and test rows, data loaders.
Not here: what a row means (rows.py) and how it becomes a batch (collator.py). The only room with
datasets."""

from __future__ import annotations

import os
import random
import tempfile
from collections.abc import Callable, Iterator, Sequence
from functools import cache
from glob import glob
from typing import Any, NamedTuple

import torch
from datasets import (
    Dataset,
    DatasetBuilder,
    Features,
    Image,
    IterableDataset,
    List,
    concatenate_datasets,
    load_dataset_builder,
    load_from_disk,
)
from torch.utils.data import DataLoader

from darts_lora.collator import Collator, LabelCollator
from darts_lora.config import DataConfig, ModelConfig, TrainingConfig
from darts_lora.errors import InputError
from darts_lora.models import (
    EMBEDDED,
    context_length,
    is_classifier,
    load_model_config,
    load_processor,
)
from darts_lora.rows import IMAGE_COLUMNS, ROW, SOURCE

Rows = Dataset | IterableDataset
SHUFFLE_BUFFER = 1000  # rows of a stream that are shuffled among each other


def make_collator(model: ModelConfig, data: DataConfig) -> Collator | LabelCollator:
    """What makes batches for this model, by its task; sequences up to data.max_length, or to what
    the model's positions allow if that is less.

    Raises:
        InputError: the model's configuration or processor cannot be loaded.
    """
    model_config, processor = load_model_config(model), load_processor(model)
    context = context_length(model_config)
    if is_classifier(model_config, model.task):
        # RoBERTa has two positions more than it takes tokens: its tokenizer knows.
        known = getattr(processor, "model_max_length", context)
        context = known if context is None else min(context, known)
        return LabelCollator(processor, data.max_length, model_config.label2id, context)
    return Collator(processor, data.max_length, data.pad_to_multiple_of, context)


def load_splits(
    config: DataConfig, names: Sequence[str] = ("train", "validation")
) -> dict[str, Rows]:
    """The data sets of these names, out of train, validation and test; disjoint, always the same.

    Validation rows are drawn from the training split, and so are test rows where test_split is
    None. Columns `row_index` and `row_source` hold each row's number in its source split, and what
    that is. Images stay encoded. In a stream each row's number and split_seed decide.

    Raises:
        InputError: data that cannot be loaded, a missing split, a split with no rows.
    """
    source = _load_source(config)
    own_test = config.test_split is not None
    splits = {}
    if "test" in names and own_test:
        splits["test"] = _source_split(source, config, "test_split")
    if set(names) - set(splits):
        train = _source_split(source, config, "train_split")
        parts = _stream_parts if config.streaming else _drawn_parts
        splits = {**parts(train, config), **splits}
    if "test" in splits:
        splits["test"] = _at_most(splits["test"], config.max_test_samples, config)
    return {name: splits[name] for name in names}


def training_rows(config: DataConfig, seed: int = 0) -> Rows:
    """Training and validation rows together, for a finetune; a stream comes shuffled by `seed`."""
    if not config.streaming:
        return concatenate_datasets(list(load_splits(config).values()))
    train = _source_split(_load_source(config), config, "train_split")
    train = train if config.max_train_samples is None else train.take(config.max_train_samples)
    rows = train.filter(_StreamPart(config, ("train", "validation")))
    return rows.shuffle(seed=seed, buffer_size=SHUFFLE_BUFFER)


def split_record(splits: dict[str, Rows], config: DataConfig) -> dict[str, Any]:
    """How a run's rows were split, for its folder: row numbers of each split in the source; for
    streams the rule."""
    if config.streaming:
        rule = "row i: u = random.Random(f'{split_seed} {i}').random(); test below test_fraction "
        rule += "(0 with a test_split), then validation below validation_fraction of the rest"
        options = ("split_seed", "test_split", "test_fraction", "validation_fraction")
        options += ("max_train_samples",)
        return {"rule": rule} | {name: getattr(config, name) for name in options}
    return {name: list(split[ROW]) for name, split in splits.items()}


class _Source(NamedTuple):
    """What a data set was loaded as: its splits, and the files of each, where they are local."""

    splits: dict[str, Rows]
    files: dict[str, list[str]]


def _load_source(config: DataConfig) -> _Source:
    name, files, options = config.dataset, config.data_files, {}
    if name == "embedded":
        files = {split: str(EMBEDDED / "data" / f"{split}.parquet") for split in ("train", "test")}
        name, options["cache_dir"] = "parquet", _temporary_cache()
    if "/" not in name and not os.path.isdir(name):  # a loader; else files are relative to name
        _check_files(files)
    found = {}
    try:
        if any(os.path.isfile(os.path.join(name, f)) for f in ("dataset_dict.json", "state.json")):
            source = load_from_disk(name)  # what save_to_disk wrote
            return _Source(source if isinstance(source, dict) else {"train": source}, found)
        builder = load_dataset_builder(name, config.dataset_config, data_files=files, **options)
        if config.data_files is not None or os.path.isdir(name):
            data_files = builder.config.data_files or {}
            found = {str(split): list(map(str, data_files[split])) for split in data_files}
        return _Source(_read(builder, config.streaming), found)
    except Exception as error:  # datasets raises any kind here: files, formats, network, scripts
        raise InputError(_what_failed(error, config, found)) from error


def _read(builder: DatasetBuilder, streaming: bool) -> dict[str, Rows]:
    if streaming:
        return builder.as_streaming_dataset()
    builder.download_and_prepare()
    for split, info in (builder.info.splits or {}).items():
        if info.num_examples == 0:
            raise ValueError(f"the split {split!r} has no sample in it")
    return builder.as_dataset()


def _what_failed(error: Exception, config: DataConfig, found: dict[str, list[str]]) -> str:
    cause, where = error.__cause__ or error, f"dataset={config.dataset!r}"
    reason = " ".join(str(cause).split())[:300] or type(cause).__name__
    if config.data_files is not None:
        where += f", data_files={config.data_files!r}"
    elif found:
        where += f", files {' + '.join(map(_named, found.values()))}"
    empty = [file for files in found.values() for file in files if _has_nothing(file)]
    if empty:
        reason = f"{empty[0]!r}: the file is empty"
    return f"{where}: cannot be loaded ({reason})"


@cache
def _temporary_cache() -> str:
    """The embedded data's cache: gone with the process, nothing in the home folder."""
    folder = tempfile.TemporaryDirectory(prefix="darts_lora-")
    _temporary_cache.folder = folder  # its finalizer removes it
    return folder.name


def _check_files(files: Any) -> None:
    """InputError for a local path or pattern that matches no file, or an empty file."""
    if isinstance(files, dict):
        files = list(files.values())
    if isinstance(files, list):
        for file in files:
            _check_files(file)
    elif files is not None and "://" not in files:
        found = glob(files, recursive=True)
        if not found:
            raise InputError(f"data_files: no such file: {files!r}")
        empty = [file for file in found if _has_nothing(file)]
        if empty:
            raise InputError(f"data_files: {empty[0]!r}: the file is empty")


def _has_nothing(file: str) -> bool:
    return os.path.isfile(file) and not os.path.getsize(file)


def _source_split(source: _Source, config: DataConfig, option: str) -> Rows:
    """The split that `option` names, its rows numbered, its images encoded; it is not empty."""
    name = getattr(config, option)
    if name not in source.splits:
        hint = "; null holds rows of the training split back" if option == "test_split" else ""
        has = f"data set {config.dataset!r} has only {', '.join(source.splits)}"
        raise InputError(f"{option}={name!r}: {has}{hint}")
    split = _keep_encoded(source.splits[name])
    where = _source_name(config, name, source.files.get(name, []))
    if config.streaming:
        split = IterableDataset.from_generator(_NumberedStream(split, where))
    if _is_empty(split):
        raise InputError(f"{where}: has no sample in it")
    if config.streaming:
        return split
    split = split.remove_columns([c for c in (ROW, SOURCE) if c in split.column_names])
    split = split.add_column(ROW, list(range(len(split))))
    return split.add_column(SOURCE, [where] * len(split))


class _NumberedStream:
    """A stream's rows with their numbers: always all rows in the order of the source.

    datasets would change the order of a stream's files with each epoch and share them out among
    workers, and count anew; a row's number decides its split, so the splits would overlap.
    """

    def __init__(self, rows: Rows, where: str):
        self.rows, self.where = rows, where

    def __call__(self) -> Iterator[dict]:
        read = 0
        try:
            for batch in self.rows.iter(batch_size=1):  # iter(self.rows) would heed the worker
                row = {column: values[0] for column, values in batch.items()}
                yield {**row, ROW: read, SOURCE: self.where}
                read += 1
        except Exception as error:  # any kind, as when a data set is loaded
            reason = " ".join(str(error).split())[:300]
            raise InputError(
                f"{self.where}: cannot be read after {read} rows ({reason})"
            ) from error


def _is_empty(rows: Rows) -> bool:
    return next(iter(rows), None) is None if isinstance(rows, IterableDataset) else len(rows) == 0


def _source_name(config: DataConfig, split: str, files: list[str]) -> str:
    """The split's files, or data set and split; its dirname is what paths are relative to."""
    tables = [file for file in files if os.path.basename(file).startswith("metadata.")]
    if files:
        return _named(tables or files)
    folder = os.path.isdir(config.dataset)
    return f"{os.path.join(config.dataset, '') if folder else config.dataset}, split {split!r}"


def _named(files: list[str]) -> str:
    """A few files by their paths, many by their folders."""
    folders = sorted({os.path.dirname(file) for file in files})
    if len(files) <= 3:
        return " + ".join(files)
    if len(folders) <= 3:
        return " + ".join(os.path.join(folder, "*") for folder in folders)
    return f"{len(files)} files in {len(folders)} folders"


def _keep_encoded(split: Rows) -> Rows:
    """Images as {"bytes", "path"}: whoever needs one opens it, and says which does not open."""
    features = dict(split.features or {})
    encoded = {}
    for column in IMAGE_COLUMNS:
        feature = features.get(column)
        if isinstance(feature, Image):
            encoded[column] = Image(decode=False)
        elif isinstance(feature, List) and isinstance(feature.feature, Image):
            encoded[column] = List(Image(decode=False))
    if isinstance(split, IterableDataset):
        for column, feature in encoded.items():
            split = split.cast_column(column, feature)
    elif encoded:  # the same bytes: cast_column would write lists of images to the disk again
        info = split.info.copy()
        info.features = Features({**features, **encoded})
        split = Dataset(split.data, info, split.split)
    return split


def _drawn_parts(train: Dataset, config: DataConfig) -> dict[str, Dataset]:
    """Train, validation (and, where there is no test split, test) rows, drawn at random."""
    rows, parts = _shuffled(len(train), config)[: config.max_train_samples], {}
    if config.test_split is None:
        rows, parts["test"] = _cut(rows, config, "test_fraction")
    parts["train"], parts["validation"] = _cut(rows, config, "validation_fraction")
    return {name: train.select(sorted(rows)) for name, rows in parts.items()}


def _stream_parts(train: IterableDataset, config: DataConfig) -> dict[str, IterableDataset]:
    """The same of a stream."""
    train = train if config.max_train_samples is None else train.take(config.max_train_samples)
    names = ("train", "validation") if config.test_split else ("train", "validation", "test")
    parts = {name: train.filter(_StreamPart(config, (name,))) for name in names}
    for name, rows in parts.items():
        if _is_empty(rows):
            option = "test_fraction" if name == "test" else "validation_fraction"
            raise InputError(
                f"{option}={getattr(config, option)}: leaves no sample in the {name} split of the "
                "stream; it has too few rows"
            )
    return parts


class _StreamPart:
    """Whether a row of a stream belongs to one of these parts, by its number alone."""

    def __init__(self, config: DataConfig, parts: tuple[str, ...]):
        self.parts, self.seed = parts, config.split_seed
        self.test = 0.0 if config.test_split else config.test_fraction
        self.validation = self.test + (1 - self.test) * config.validation_fraction

    def __call__(self, row: dict) -> bool:
        u = random.Random(f"{self.seed} {row[ROW]}").random()
        part = "test" if u < self.test else "validation" if u < self.validation else "train"
        return part in self.parts


def _at_most(rows: Rows, limit: int | None, config: DataConfig) -> Rows:
    """A random choice of `limit` rows; the first ones of a stream."""
    if config.streaming:
        return rows if limit is None else rows.take(limit)
    return rows.select(sorted(_shuffled(len(rows), config)[:limit]))


def _shuffled(count: int, config: DataConfig) -> list[int]:
    return torch.randperm(count, generator=_generator(config.split_seed)).tolist()


def _generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def _cut(rows: list[int], config: DataConfig, option: str) -> tuple[list[int], list[int]]:
    """Rows kept and rows held back (the share that `option` names); neither may be empty."""
    share, name = getattr(config, option), option.removesuffix("_fraction")
    held = round(len(rows) * share)
    if held == 0 or held == len(rows):
        empty = f"the {name} split" if held == 0 else "the training split"
        raise InputError(f"{option}={share}: leaves no sample in {empty} ({len(rows)} rows in all)")
    return rows[held:], rows[:held]


def make_dataloader(
    dataset: Rows,
    collate: Callable[[list[dict]], Any],
    batch_size: int,
    *,
    shuffle: bool = False,
    seed: int = 0,
    num_workers: int = 0,
    drop_last: bool = False,
) -> DataLoader:
    """Batches of `batch_size` rows through `collate`; `seed` fixes the order of all epochs.

    `drop_last` leaves an incomplete batch out, but never the only one. A stream is shuffled within
    a buffer of rows (anew after its `set_epoch`), never drops the last batch, and has one worker at
    most.
    """
    stream = isinstance(dataset, IterableDataset)
    if stream and shuffle:
        dataset = dataset.shuffle(seed=seed, buffer_size=SHUFFLE_BUFFER)
    if stream:
        num_workers = min(num_workers, dataset.num_shards)
    return DataLoader(
        dataset,
        batch_size=batch_size,
        shuffle=shuffle and not stream,
        generator=_generator(seed),
        collate_fn=collate,
        num_workers=num_workers,
        persistent_workers=num_workers > 0,
        drop_last=drop_last and not stream and len(dataset) >= batch_size,
        pin_memory=torch.cuda.is_available(),
    )


def search_dataloaders(
    splits: dict[str, Rows],
    collate: Callable[[list[dict]], Any],
    training: TrainingConfig,
    seed: int,
) -> list[DataLoader]:
    """Shuffled batches of the training and of the validation split, for a RankSearch."""
    return [
        make_dataloader(
            splits[name],
            collate,
            training.batch_size,
            shuffle=True,
            seed=seed,
            num_workers=training.num_workers,
            drop_last=True,
        )
        for name in ("train", "validation")
    ]
