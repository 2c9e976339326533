"""BatchStream: a data loader's batches without end, from any position; whether it has any, which
rows it gives. Not here: what is in a batch (collator.py) and how rows are split (loaders.py)."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import chain, islice
from typing import Any

from accelerate import Accelerator, PartialState, skip_first_batches
from torch.utils.data import DataLoader, IterableDataset

from darts_lora.base.errors import InputError
from darts_lora.run.launch import prepare_loaders


class BatchStream:
    """Endless batches of a data loader that accelerate prepared; each epoch in its own order.

    Attributes:
        position: (epoch, batches taken from it), for `move_to` in a resumed run.
    """

    def __init__(self, dataloader: DataLoader):
        self.dataloader: Any = dataloader  # accelerate's, with set_epoch
        self.position: tuple[int, int] = (0, 0)
        self._batches: Iterator | None = None

    def __iter__(self) -> BatchStream:
        return self

    def __next__(self) -> Any:
        if self._batches is None:
            self._batches = self._open(*self.position)
        epoch, taken = self.position
        try:
            batch = next(self._batches)
        except StopIteration:
            epoch, taken = epoch + 1, 0
            self._batches = self._open(epoch, taken)
            batch = next(self._batches, None)
            if batch is None:
                raise InputError(
                    "a data loader gives no batch: its split has too few rows"
                ) from None
        self.position = (epoch, taken + 1)
        return batch

    def move_to(self, position: tuple[int, int]) -> None:
        """Go on behind `position`. Opening a data loader draws a random number: it is drawn here,
        and not at the next batch, so that the caller can restore the generators afterwards. One
        that has given no batch was not open."""
        epoch, taken = position
        self.position = (epoch, taken)
        if self.position == (0, 0):
            self._batches = None
            return
        opened = self._open(*self.position)
        self._batches = chain(list(islice(opened, 1)), opened)

    def _open(self, epoch: int, taken: int) -> Iterator:
        self.dataloader.set_epoch(epoch)
        if not taken:
            return iter(self.dataloader)
        rest = skip_first_batches(self.dataloader, taken)
        rest.set_epoch(epoch)
        return iter(rest)


def row_loader(
    name: str, rows: Any, batch_size: int, num_workers: int, collate: Callable[[list], Any]
) -> DataLoader:
    """A data loader of the rows, shuffled unless they are a stream.

    Raises:
        InputError: there are none; `name` is what it calls them.
    """
    unsized = isinstance(rows, IterableDataset)
    if not unsized and len(rows) == 0:
        raise InputError(f"{name}: has no rows")
    return DataLoader(
        rows,
        batch_size,
        shuffle=not unsized,
        num_workers=num_workers,
        collate_fn=collate,
    )


def open_streams(
    accelerator: Accelerator, train: DataLoader, val: DataLoader, seed: int, resumable: bool
) -> tuple[BatchStream, BatchStream]:
    """Streams of both data loaders, prepared as by prepare_loaders.

    Raises:
        InputError: of check_batches.
    """
    given = train, val
    prepared = prepare_loaders(accelerator, given, seed, resumable)
    for split, *pair in zip(("train", "validation"), given, prepared, strict=True):
        check_batches(split, *pair)
    train_stream, val_stream = map(BatchStream, prepared)
    return train_stream, val_stream


def taken_rows(dataloader: Any, batches: int) -> list[int]:
    """Numbers of the rows that all processes have taken of an epoch.

    Args:
        dataloader: a DataLoader with a length that accelerate prepared.
        batches: that each process has taken in all, at least 1; the epoch is that of the last one.
    """
    epoch, taken = divmod(batches - 1, len(dataloader))
    dataloader.set_epoch(epoch)
    shared = dataloader.batch_sampler
    whole = getattr(shared, "batch_sampler", shared)  # shared out to processes
    return [*chain.from_iterable(islice(whole, (taken + 1) * PartialState().num_processes))]


def check_batches(split: str, given: DataLoader, prepared: DataLoader) -> None:
    """Whether a search can take batches from a data loader, as far as that is known beforehand.

    Args:
        split: its name, train or validation.
        given, prepared: the loader before and after accelerate prepared it.

    Raises:
        InputError: some process would get no batch.
    """
    unsized, processes = isinstance(given.dataset, IterableDataset), PartialState().num_processes
    if not unsized and len(prepared) == 0:
        if len(given) == 0:
            raise InputError(f"{split} data loader: gives no batch")
        raise InputError(
            f"num_processes={processes}, batch_size={given.batch_size}: the {split} split has a "
            f"whole batch for {len(given)} of the processes only; lower one of the two, or "
            f"{'raise' if split == 'validation' else 'lower'} validation_fraction"
        )
