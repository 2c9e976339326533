"""Where rows come from: the hub, files, folders, streams; each row with its number and its source.
Not here: which split a row goes to (loaders.py), what it means (rows.py)."""

from __future__ import annotations

import os
from collections.abc import Iterator
from glob import escape, glob
from typing import Any, NamedTuple, TypeAlias

import pyarrow.parquet as pq
from datasets import (
    ClassLabel,
    Dataset,
    DatasetBuilder,
    Features,
    Image,
    IterableDataset,
    List,
    load_dataset_builder,
    load_from_disk,
)
from datasets.data_files import get_data_patterns
from datasets.packaged_modules.csv.csv import CsvConfig

from darts_lora.base.errors import InputError
from darts_lora.config import DataConfig
from darts_lora.data.places import ADDED, LABEL, ROW, SOURCE
from darts_lora.data.rawdata import check_nesting, check_text
from darts_lora.lora.models import EMBEDDED

Rows: TypeAlias = Dataset | IterableDataset
# Endings of a file that is named as the data set -> its loader
LOADERS = {".jsonl": "json", ".json": "json", ".csv": "csv", ".parquet": "parquet"}
# Columns of a table that stay as written: pandas takes answers like 42 or None for something else.
_TEXTS = ("prompt", "completion", "text", "text_pair", "label")


class Source(NamedTuple):
    """What a data set was loaded as: its splits, and the files of each, where they are local."""

    splits: dict[str, Rows]
    files: dict[str, list[str]]


def load_source(config: DataConfig) -> Source:
    """All splits of the data set that the options name.

    Raises:
        InputError: it cannot be loaded, a file is missing or empty, or the embedded data are given
            files.
    """
    name, files = config.dataset, config.data_files
    if name == "embedded":
        for option in ("data_files", "dataset_config"):
            if getattr(config, option) is not None:
                raise InputError(
                    f"{option}={getattr(config, option)!r}: dataset='embedded' has its own; name "
                    "what it is of by dataset (json, csv, parquet, a hub name or a folder)"
                )
        return _embedded(config.streaming)
    if os.path.isfile(name):
        name, files = _loader(config), name
    if "/" not in name and not os.path.isdir(name):  # a loader; else files are relative to name
        _check_files(files)
    found: dict[str, list[str]] = {}
    try:
        if any(os.path.isfile(os.path.join(name, f)) for f in ("dataset_dict.json", "state.json")):
            source = load_from_disk(name)  # what save_to_disk wrote
            return Source(source if isinstance(source, dict) else {"train": source}, found)
        builder = _builder(name, config.dataset_config, _patterns(name, files))
        if files is not None or os.path.isdir(name):
            data_files = builder.config.data_files or {}
            found = {str(split): list(map(str, data_files[split])) for split in data_files}
            check_nesting(file for files in found.values() for file in files)
        return Source(_read(builder, config.streaming), found)
    except InputError:
        raise
    except Exception as error:  # datasets raises any kind here: files, formats, network, scripts
        raise InputError(_what_failed(error, config, found)) from error


def _builder(name: str, config_name: str | None, files: Any) -> DatasetBuilder:
    builder = load_dataset_builder(name, config_name, data_files=files)
    if isinstance(builder.config, CsvConfig):
        options = {"converters": dict.fromkeys(_TEXTS, _text), "keep_default_na": False}
        builder = load_dataset_builder(name, config_name, data_files=files, **options)
    return builder


def _loader(config: DataConfig) -> str:
    """The loader of a single file that is named in place of a data set, by its ending."""
    ending = os.path.splitext(config.dataset)[1].lower()
    if config.data_files is not None:
        raise InputError(
            f"dataset={config.dataset!r}, data_files={config.data_files!r}: give a file once, by "
            "data_files with dataset=json, csv or parquet, or by dataset alone"
        )
    if ending not in LOADERS:
        raise InputError(
            f"dataset={config.dataset!r}: a file must end in {', '.join(LOADERS)}; or give the "
            "loader as dataset and the file as data_files"
        )
    return LOADERS[ending]


def _patterns(name: str, files: Any) -> Any:
    """The files as patterns, as which datasets takes them: those that exist stand for themselves,
    whatever brackets are in their names."""
    if isinstance(files, dict):
        return {split: _patterns(name, several) for split, several in files.items()}
    if isinstance(files, list | tuple):
        return [_patterns(name, file) for file in files]
    folder = os.path.abspath(name) if os.path.isdir(name) else ""
    if isinstance(files, str):
        if os.path.exists(os.path.join(folder, files)):
            return escape(os.path.join(folder, files))
        return os.path.join(escape(folder), files) if folder and "://" not in files else files
    if folder == escape(folder):
        return files
    splits = get_data_patterns(escape(folder))
    return {str(split): _patterns(name, several) for split, several in splits.items()}


def _text(cell: str) -> str | None:
    return cell or None


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


def _embedded(streaming: bool) -> Source:
    """The embedded data, read into memory: a cache on the disk would stay where a run is killed."""
    splits = {}
    for split in ("train", "test"):
        rows = Dataset(pq.read_table(EMBEDDED / "data" / f"{split}.parquet"))
        splits[split] = rows.to_iterable_dataset() if streaming else rows
    return Source(splits, {})


def _check_files(files: Any) -> None:
    """InputError for a local path or pattern that matches no file, or an empty file."""
    if isinstance(files, dict):
        files = list(files.values())
    if isinstance(files, list):
        for file in files:
            _check_files(file)
    elif files is not None and "://" not in files:
        found = [files] if os.path.exists(files) else glob(files, recursive=True)
        if not found:
            raise InputError(f"data_files: no such file: {files!r}")
        empty = [file for file in found if _has_nothing(file)]
        if empty:
            raise InputError(f"data_files: {empty[0]!r}: the file is empty")


def _has_nothing(file: str) -> bool:
    return os.path.isfile(file) and not os.path.getsize(file)


def source_split(source: Source, config: DataConfig, option: str) -> Rows:
    """The split that `option` names, its rows numbered, its images encoded.

    Raises:
        InputError: there is no such split, or no row in it.
    """
    name = getattr(config, option)
    if name not in source.splits:
        hint = (
            "; null holds rows of the training split back, from the search on"
            if option == "test_split"
            else ""
        )
        has = f"data set {config.dataset!r} has only {', '.join(source.splits)}"
        raise InputError(f"{option}={name!r}: {has}{hint}")
    split = _keep_encoded(source.splits[name])
    where = _source_name(config, name, source.files.get(name, []))
    label = (split.features or {}).get("label")
    label = label if isinstance(label, ClassLabel) else None
    if config.streaming:
        split = IterableDataset.from_generator(_NumberedStream(split, where, label))
    if is_empty(split):
        raise InputError(f"{where}: has no sample in it")
    if config.streaming:
        return split
    check_text(split.data.table, where)
    split = split.remove_columns([c for c in ADDED if c in split.column_names])
    split = split.add_column(ROW, list(range(len(split))))
    split = split.add_column(SOURCE, [where] * len(split))
    if label is not None:
        split = split.add_column(LABEL, [_label_name(label, n) for n in split["label"]])
    return split


def _label_name(label: ClassLabel, number: int | None) -> str | None:
    """What the data call a class; -1 stands for none."""
    return label.int2str(number) if number is not None and number >= 0 else None


class _NumberedStream:
    """A stream's rows with their numbers: always all rows in the order of the source.

    datasets would change the order of a stream's files with each epoch and share them out among
    workers, and count anew; a row's number decides its split, so the splits would overlap.
    """

    def __init__(self, rows: Rows, where: str, label: ClassLabel | None):
        self.rows, self.where, self.label = rows, where, label

    def __call__(self) -> Iterator[dict]:
        read = 0
        try:
            for batch in self.rows.iter(batch_size=1):  # iter(self.rows) would heed the worker
                row = {column: values[0] for column, values in batch.items()}
                if self.label is not None:
                    row[LABEL] = _label_name(self.label, row["label"])
                yield {**row, ROW: read, SOURCE: self.where}
                read += 1
        except Exception as error:  # any kind, as when a data set is loaded
            reason = " ".join(str(error).split())[:300]
            raise InputError(
                f"{self.where}: cannot be read after {read} rows ({reason})"
            ) from error


def is_empty(rows: Rows) -> bool:
    """Whether there is no row; of a stream, the first one is read."""
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
    """Images as {"bytes", "path"}, inside messages too: whoever needs one opens it, and says which
    does not open."""
    features = dict(split.features or {})
    encoded = {column: _encoded(feature) for column, feature in features.items()}
    encoded = {column: f for column, f in encoded.items() if f != features[column]}
    if isinstance(split, IterableDataset):
        for column, feature in encoded.items():
            split = split.cast_column(column, feature)
    elif encoded:  # the same bytes: cast_column would write lists of images to the disk again
        info = split.info.copy()
        info.features = Features({**features, **encoded})
        split = Dataset(split.data, info, split.split)
    return split


def _encoded(feature: Any) -> Any:
    if isinstance(feature, Image):
        return Image(decode=False)
    if isinstance(feature, List):
        return List(_encoded(feature.feature))
    if isinstance(feature, dict):
        return {name: _encoded(inner) for name, inner in feature.items()}
    return feature
