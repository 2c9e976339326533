"""What a run reads: its rows by split, checked, its collator and its data loaders.
Not here: where rows come from (sources.py), which split takes them (splits.py)."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import chain, count, islice
from typing import Any

import torch
from accelerate import PartialState
from datasets import Dataset, IterableDataset
from torch.utils.data import DataLoader, Sampler, Subset

from darts_lora.base.interruption import worker_context
from darts_lora.config import DataConfig, ModelConfig, TrainingConfig
from darts_lora.data.checks import usable_rows
from darts_lora.data.collator import Collator
from darts_lora.data.label_collator import LabelCollator
from darts_lora.data.places import ROW
from darts_lora.data.rows import first_rows, row_text
from darts_lora.data.sources import Rows, Source, load_source, source_split
from darts_lora.data.splits import (
    StreamPart,
    drawn_parts,
    drawn_training_rows,
    generator,
    shuffled,
    stream_parts,
)
from darts_lora.lora.models import (
    context_length,
    is_classifier,
    load_model_config,
    load_processor,
)

SHUFFLE_BUFFER = 1000  # rows of a stream that are shuffled among each other


def make_collator(model: ModelConfig, data: DataConfig) -> Collator | LabelCollator:
    """What makes batches for this model, by its task; sequences up to data.max_length, or to what
    the model's positions allow if that is less.

    Raises:
        InputError: the model's configuration or processor cannot be loaded.
    """
    model_config, processor = load_model_config(model), load_processor(model)
    context, truncate = context_length(model_config), data.on_long_row == "truncate"
    if is_classifier(model_config, model.task):
        # RoBERTa has two positions more than it takes tokens: its tokenizer knows.
        known = getattr(processor, "model_max_length", context)
        context = known if context is None else min(context, known)
        labels: Any = model_config.label2id
        multiple = data.pad_to_multiple_of
        return LabelCollator(processor, data.max_length, labels, context, multiple, truncate)
    return Collator(
        processor,
        data.max_length,
        data.pad_to_multiple_of,
        context,
        truncate,
        data.max_image_pixels,
        refuse_labels=model.task == "auto",
    )


def checked_rows(
    rows: Rows, collator: Collator | LabelCollator, config: DataConfig, reads: int = 0
) -> tuple[Rows, float | None]:
    """Rows that batches can be made of (skip leaves the others out), and the share of their tokens
    that is learnt, None of labels.

    Args:
        reads: rows that the run reads; that many are checked, 10,000 at least.

    Raises:
        InputError: a bad row; no row is left.
    """
    bad = config.on_bad_row == "skip"
    long = bad if config.on_long_row is None else config.on_long_row == "skip"
    if bad or long:
        rows = usable_rows(rows, collator, bad=bad, long=long)
    return rows, collator.check(rows, max(10_000, reads))


def rows_read(training: TrainingConfig) -> int:
    """Rows that a run reads, on all processes together."""
    batch = training.batch_size * int(os.environ.get("WORLD_SIZE", "1"))
    return training.max_steps * training.gradient_accumulation_steps * batch


def load_splits(
    config: DataConfig,
    names: Sequence[str] = ("train", "validation"),
    source: Source | None = None,
) -> dict[str, Rows]:
    """The data sets of these names, out of train, validation and test; disjoint, always the same.

    Validation rows are drawn from the training split, and so are test rows where test_split is
    None; rows of one image or prompt go together, unless split_by says otherwise. Columns
    `row_index` and `row_source` hold each row's number in its source split, and what that is.
    Images stay encoded. In a stream each row's images, prompt or number, and split_seed decide.

    Args:
        source: of load_source(config), where it is loaded already.

    Raises:
        InputError: data that cannot be loaded, a missing split, a split with no rows.
    """
    source = source or load_source(config)
    own_test = config.test_split is not None
    splits = {}
    if "test" in names and own_test:
        splits["test"] = source_split(source, config, "test_split")
    if set(names) - set(splits):
        train = source_split(source, config, "train_split")
        parts = stream_parts if config.streaming else drawn_parts
        splits = {**parts(train, config), **splits}
    if "test" in splits:
        splits["test"] = _at_most(splits["test"], config.max_test_samples, config)
    return {name: splits[name] for name in names}


def how_tested(source: Source, config: DataConfig) -> str:
    """One line for the screen: which rows will test what comes out, if there are any."""
    if config.test_split is None:
        return f"test: {config.test_fraction:.0%} of the rows are held back for evaluate.py"
    if config.test_split in source.splits:
        return f"test: evaluate.py takes the split {config.test_split!r}"
    return (
        f"test: nothing for evaluate.py to test on, the data set has no split "
        f"{config.test_split!r} (only {', '.join(source.splits)}); --test_split null holds "
        f"{config.test_fraction:.0%} of the rows back from the search on"
    )


def training_rows(config: DataConfig) -> Rows:
    """Training and validation rows together, for a finetune."""
    train = source_split(load_source(config), config, "train_split")
    if not config.streaming:
        return drawn_training_rows(train, config)
    train = train if config.max_train_samples is None else train.take(config.max_train_samples)
    return train.filter(StreamPart(config, ("train", "validation")))


def split_record(splits: dict[str, Rows], config: DataConfig) -> dict[str, Any]:
    """How a run's rows were split, for its folder: row numbers of each split in the source, and a
    digest of what the rows say, by which others of the same numbers show; for streams the rule."""
    if config.streaming:
        rule = "u = random.Random(f'{split_seed} {i}').random(), i the row's number or (split_by "
        rule += "image, prompt) the digests of its images or of its prompt; test below "
        rule += "test_fraction (0 with a test_split), then validation below "
        rule += "validation_fraction of the rest"
        options = ["split_by", "split_seed", "test_split", "test_fraction", "validation_fraction"]
        options += ["max_train_samples"]
        return {"rule": rule} | {name: getattr(config, name) for name in options}
    numbers = {name: list(split[ROW]) for name, split in splits.items()}
    return {**numbers, "digest": rows_digest(splits.values())}


def rows_digest(splits: Iterable[Dataset], limit: int = 10_000) -> str:
    """Of the texts of the first rows of each split: those that a run checks at its start as well,
    so that it costs no more than a second; images are not read."""
    digest = hashlib.blake2b(digest_size=8)
    for split in splits:
        for row in first_rows(split, limit):
            digest.update(row_text(row).encode())
    return digest.hexdigest()


def _at_most(rows: Rows, limit: int | None, config: DataConfig) -> Rows:
    """A random choice of `limit` rows; the first ones of a stream."""
    if config.streaming:
        return rows if limit is None else rows.take(limit)
    return rows.select(sorted(shuffled(len(rows), config)[:limit]))


def process_share(rows: Rows, process: int, processes: int) -> Rows | Subset:
    """Every `processes`-th row, from row `process` on: the shares of all have each row once."""
    if isinstance(rows, IterableDataset):
        return rows.filter(lambda _, i: i % processes == process, with_indices=True)
    return Subset(rows, range(process, len(rows), processes))  # of lists too


def make_dataloader(
    dataset: Rows,
    collate: Callable[[list[dict]], Any],
    batch_size: int,
    *,
    shuffle: bool = False,
    seed: int = 0,
    num_workers: int = 0,
    drop_last: bool = False,
    order: Sampler | None = None,
) -> DataLoader:
    """Batches of `batch_size` rows through `collate`; `seed`, or an `order`, fixes that of rows.

    `drop_last` leaves an incomplete batch out, but never the only one (of a stream: of all
    processes together). A stream is shuffled within a buffer of rows (anew after its `set_epoch`),
    and has one worker at most.
    """
    stream = isinstance(dataset, IterableDataset)
    if drop_last and stream:
        whole = batch_size * int(os.environ.get("WORLD_SIZE", "1"))
        drop_last = len(list(islice(dataset, whole))) == whole
    elif drop_last:
        drop_last = len(dataset) >= batch_size
    if stream and shuffle:
        dataset = dataset.shuffle(seed=seed, buffer_size=SHUFFLE_BUFFER)
    if stream:
        num_workers = min(num_workers, dataset.num_shards)
    return DataLoader(
        dataset,
        batch_size=batch_size,
        shuffle=shuffle and not stream,
        sampler=order,
        generator=generator(seed),
        collate_fn=collate,
        num_workers=num_workers,
        persistent_workers=num_workers > 0,
        multiprocessing_context=worker_context(num_workers),
        drop_last=drop_last,
        pin_memory=torch.cuda.is_available(),
    )


class RunOrder(Sampler):
    """Numbers of the rows that a run takes, one epoch behind the other, each in its own order.

    Args:
        rows: of the data set (count, at least 1).
        length: rows that the run takes (count).
        seed: decides the orders.
        first: numbers of the rows of the first epoch; None: all.
    """

    def __init__(self, rows: int, length: int, seed: int, first: Sequence[int] | None = None):
        self.rows, self.length, self.seed = range(rows), length, seed
        self.first = self.rows if first is None else first

    def __len__(self) -> int:
        return self.length

    def __iter__(self) -> Iterator[int]:
        return islice(chain.from_iterable(map(self._epoch, count())), self.length)

    def _epoch(self, epoch: int) -> Iterator[int]:
        rows = self.rows if epoch else self.first
        generator = torch.Generator().manual_seed(self.seed + epoch)
        return (rows[i] for i in torch.randperm(len(rows), generator=generator).tolist())


def run_dataloader(
    rows: Rows,
    collate: Callable[[list[dict]], Any],
    training: TrainingConfig,
    steps: int,
    seed: int,
    first: Sequence[int] | None = None,
) -> DataLoader:
    """Shuffled batches of so many weight steps, of all processes together, epoch after epoch.

    Args:
        first: numbers of the rows that come before all others; not of a stream.
    """
    batch, workers = training.batch_size, training.num_workers
    if isinstance(rows, IterableDataset):
        return make_dataloader(
            rows.repeat(None), collate, batch, shuffle=True, seed=seed, num_workers=workers
        )
    length = steps * training.gradient_accumulation_steps * batch * PartialState().num_processes
    order = RunOrder(len(rows), length, seed, first)
    return make_dataloader(rows, collate, batch, order=order, num_workers=workers)


def search_dataloaders(
    splits: dict[str, Rows],
    collate: Callable[[list[dict]], Any],
    training: TrainingConfig,
    seed: int,
) -> list[DataLoader]:
    """Shuffled batches of the training and of the validation split, for a RankSearch."""
    sizes = {"train": training.batch_size, "validation": training.validation_batch_size}
    return [
        make_dataloader(
            splits[name],
            collate,
            size,
            shuffle=True,
            seed=seed,
            num_workers=training.num_workers,
            drop_last=True,
        )
        for name, size in sizes.items()
    ]
