"""Data sets: loading, the fixed split into training, validation and test rows, data loaders.
Not here: what a row means and how it becomes a batch (collator.py). The only room with datasets."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Sequence
from functools import cache
from glob import glob
from typing import Any

import torch
from datasets import Dataset, DatasetDict, load_dataset
from torch.utils.data import DataLoader

from darts_lora.collator import LAYOUTS, ROW
from darts_lora.config import DataConfig, TrainingConfig
from darts_lora.errors import InputError
from darts_lora.models import EMBEDDED


def load_splits(
    config: DataConfig, names: Sequence[str] = ("train", "validation")
) -> dict[str, Dataset]:
    """The data sets of these names, out of train, validation and test; disjoint, always the same.

    Validation rows are drawn from the training split, and so are test rows where test_split is
    None. A column `row_index` holds each row's number in its source split.

    Raises:
        InputError: data that cannot be loaded, a missing split or column, a split with no rows.
    """
    source = _load_source(config)
    splits = {}
    if "test" in names and config.test_split is not None:
        test = _source_split(source, config, "test_split")
        splits["test"] = _select(test, _shuffled(len(test), config)[: config.max_test_samples])
    if set(names) - set(splits):
        train = _source_split(source, config, "train_split")
        rows = _shuffled(len(train), config)[: config.max_train_samples]
        if config.test_split is None:
            rows, test_rows = _cut(rows, config, "test_fraction")
            splits["test"] = _select(train, test_rows[: config.max_test_samples])
        train_rows, validation_rows = _cut(rows, config, "validation_fraction")
        splits["train"] = _select(train, train_rows)
        splits["validation"] = _select(train, validation_rows)
    return {name: splits[name] for name in names}


def split_indices(splits: dict[str, Dataset]) -> dict[str, list[int]]:
    """Row numbers of each split in the source, for the record of a run."""
    return {name: list(split[ROW]) for name, split in splits.items()}


def _load_source(config: DataConfig) -> DatasetDict:
    name, files, options = config.dataset, config.data_files, {}
    if name == "embedded":
        files = {split: str(EMBEDDED / "data" / f"{split}.parquet") for split in ("train", "test")}
        name, options["cache_dir"] = "parquet", _temporary_cache()
    if "/" not in name and not os.path.isdir(name):  # a loader; else files are relative to name
        _check_files(files)
    try:
        return load_dataset(name, data_files=files, **options)
    except Exception as error:  # datasets raises any kind here: files, formats, network, scripts
        cause = error.__cause__ or error
        reason = " ".join(str(cause).split())[:300]
        where = f"dataset={config.dataset!r}"
        if config.data_files is not None:
            where += f", data_files={config.data_files!r}"
        raise InputError(f"{where}: cannot be loaded ({reason})") from error


@cache
def _temporary_cache() -> str:
    """The embedded data's cache: gone with the process, nothing in the home folder."""
    folder = tempfile.TemporaryDirectory(prefix="darts_lora-")
    _temporary_cache.folder = folder  # its finalizer removes it
    return folder.name


def _check_files(files: Any) -> None:
    """InputError for a local path or pattern that matches no file."""
    if isinstance(files, dict):
        files = list(files.values())
    if isinstance(files, list):
        for file in files:
            _check_files(file)
    elif files is not None and "://" not in files and not glob(files, recursive=True):
        raise InputError(f"data_files: no such file: {files!r}")


def _source_split(source: DatasetDict, config: DataConfig, option: str) -> Dataset:
    """The split that `option` names, with the row numbers; its columns and size are checked."""
    name = getattr(config, option)
    where = f"data set {config.dataset!r}"
    if name not in source:
        hint = "; null holds rows of the training split back" if option == "test_split" else ""
        raise InputError(f"{option}={name!r}: {where} has only {', '.join(source)}{hint}")
    split = source[name]
    if len(split) == 0:
        raise InputError(f"{where}, split {name!r}: has no sample in it")
    if not any(set(layout) <= set(split.column_names) for layout in LAYOUTS):
        needed = ", or ".join(" and ".join(layout) for layout in LAYOUTS)
        found = ", ".join(split.column_names)
        raise InputError(f"{where}, split {name!r}: needs the columns {needed}; found: {found}")
    if ROW in split.column_names:
        split = split.remove_columns(ROW)
    return split.add_column(ROW, list(range(len(split))))


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


def _select(split: Dataset, rows: list[int]) -> Dataset:
    return split.select(sorted(rows))


def make_dataloader(
    dataset: Dataset,
    collate: Callable[[list[dict]], Any],
    batch_size: int,
    *,
    shuffle: bool = False,
    seed: int = 0,
    num_workers: int = 0,
    drop_last: bool = False,
) -> DataLoader:
    """Batches of `batch_size` rows through `collate`; `seed` fixes the order of all epochs.

    `drop_last` leaves an incomplete batch out, but never the only one.
    """
    return DataLoader(
        dataset,
        batch_size=batch_size,
        shuffle=shuffle,
        generator=_generator(seed),
        collate_fn=collate,
        num_workers=num_workers,
        persistent_workers=num_workers > 0,
        drop_last=drop_last and len(dataset) >= batch_size,
        pin_memory=torch.cuda.is_available(),
    )


def search_dataloaders(
    splits: dict[str, Dataset],
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
