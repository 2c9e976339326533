"""Which rows train, validate and test: drawn at random, but what belongs together stays together.
Not here: where rows come from (sources.py), what they mean (rows.py), loaders (loaders.py)."""

from __future__ import annotations

import random
from collections.abc import Hashable, Iterable, Mapping, Sequence

import torch
from datasets import Dataset, IterableDataset
from tqdm.auto import tqdm

from darts_lora.base.errors import InputError
from darts_lora.config import DataConfig
from darts_lora.data.places import ROW
from darts_lora.data.rows import row_image_digests, row_prompt
from darts_lora.data.sources import is_empty


def drawn_parts(train: Dataset, config: DataConfig) -> dict[str, Dataset]:
    """Train, validation (and, where there is no test split, test) rows, drawn at random.

    Raises:
        InputError: a part without a row.
    """
    rows, parts = shuffled(len(train), config)[: config.max_train_samples], {}
    groups = _groups(train, rows, config)
    if config.test_split is None:
        rows, parts["test"] = _cut(rows, groups, config, "test_fraction")
    parts["train"], parts["validation"] = _cut(rows, groups, config, "validation_fraction")
    return {name: train.select(sorted(rows)) for name, rows in parts.items()}


def drawn_training_rows(train: Dataset, config: DataConfig) -> Dataset:
    """Training and validation rows of `drawn_parts` together. What belongs together is only looked
    for where test rows are held back."""
    rows = shuffled(len(train), config)[: config.max_train_samples]
    if config.test_split is None:
        rows, _ = _cut(rows, _groups(train, rows, config), config, "test_fraction")
    return train.select(sorted(rows))


def _groups(train: Dataset, rows: list[int], config: DataConfig) -> dict[int, Hashable]:
    """Row number -> what it has in common with all rows that stay on its side."""
    if config.split_by == "row":
        return dict(zip(rows, rows, strict=True))
    in_order = sorted(rows)  # files are read fastest in their order
    found = {"prompt": row_prompts, "image": image_groups}[config.split_by]
    return dict(zip(in_order, found(train.select(in_order)), strict=True))


def row_prompts(rows: Iterable[dict]) -> list[bytes]:
    """The digest of each row's prompt (rows.py); a bar where it takes more than seconds."""
    return [row_prompt(row) for row in _with_bar(rows, "prompts")]


def image_groups(rows: Iterable[dict]) -> list[bytes]:
    """For each row a digest that it shares with all rows of its images, and of theirs; of a row
    without images that of its prompt."""
    first: dict[bytes, bytes] = {}  # of two that belong together, the one that stands for both

    def leader(digest: bytes) -> bytes:
        while first[digest] != digest:
            first[digest] = digest = first[first[digest]]
        return digest

    leaders = []
    for row in _with_bar(rows, "images"):
        digests = row_image_digests(row) or [row_prompt(row)]
        for digest in digests:
            first.setdefault(digest, digest)
            first[leader(digest)] = leader(digests[0])
        leaders.append(digests[0])
    return [leader(digest) for digest in leaders]


def _with_bar(rows: Iterable[dict], what: str) -> Iterable[dict]:
    return tqdm(rows, desc=what, unit="row", delay=3, mininterval=1, leave=False)


def hold_back(
    rows: Sequence[int], groups: Mapping[int, Hashable], share: float
) -> tuple[list[int], list[int]]:
    """Rows kept, and rows held back: the first ones, as near to `share` of all as whole groups
    allow. Rows of which each is a group of its own, or all are the same, are cut where they are.
    """
    count = round(share * len(rows))
    if len({groups[row] for row in rows}) > 1:
        rows = _side_by_side(rows, groups)
        ends = (i for i in range(1, len(rows)) if groups[rows[i]] != groups[rows[i - 1]])
        count = min(ends, key=lambda end: abs(end - count))
    return list(rows[count:]), list(rows[:count])


def _side_by_side(rows: Sequence[int], groups: Mapping[int, Hashable]) -> list[int]:
    """Rows of one group one after the other; the groups in the order of each one's first row in
    the source, which is random where that of the rows is."""
    place = {row: i for i, row in enumerate(rows)}
    first: dict[Hashable, int] = {}
    for row in sorted(rows):
        first.setdefault(groups[row], place[row])
    return sorted(rows, key=lambda row: (first[groups[row]], place[row]))


def stream_parts(train: IterableDataset, config: DataConfig) -> dict[str, IterableDataset]:
    """The same of a stream."""
    train = train if config.max_train_samples is None else train.take(config.max_train_samples)
    names = ("train", "validation") if config.test_split else ("train", "validation", "test")
    parts = {name: train.filter(StreamPart(config, (name,))) for name in names}
    for name, rows in parts.items():
        if is_empty(rows):
            option = "test_fraction" if name == "test" else "validation_fraction"
            raise InputError(
                f"{option}={getattr(config, option)}: leaves no sample in the {name} split of the "
                "stream; it has too few rows, or too few images or prompts (split_by=row)"
            )
    return parts


class StreamPart:
    """Whether a row of a stream belongs to one of these parts, by its prompt or number alone."""

    def __init__(self, config: DataConfig, parts: tuple[str, ...]):
        self.parts, self.seed = parts, config.split_seed
        self.split_by = config.split_by
        self.test = 0.0 if config.test_split else config.test_fraction
        self.validation = self.test + (1 - self.test) * config.validation_fraction

    def __call__(self, row: dict) -> bool:
        u = random.Random(f"{self.seed} {self._own(row)}").random()
        part = "test" if u < self.test else "validation" if u < self.validation else "train"
        return part in self.parts

    def _own(self, row: dict) -> str | int:
        if self.split_by == "row":
            return row[ROW]
        images = row_image_digests(row) if self.split_by == "image" else []
        return b"".join(sorted(images)).hex() or row_prompt(row).hex()


def _cut(
    rows: list[int], groups: Mapping[int, Hashable], config: DataConfig, option: str
) -> tuple[list[int], list[int]]:
    """Rows kept and rows held back (the share that `option` names); neither may be empty."""
    share, name = getattr(config, option), option.removesuffix("_fraction")
    wanted = round(len(rows) * share)
    if wanted == 0 or wanted == len(rows):
        empty = f"the {name} split" if wanted == 0 else "the training split"
        raise InputError(f"{option}={share}: leaves no sample in {empty} ({len(rows)} rows in all)")
    kept, held = hold_back(rows, groups, share)
    if abs(len(held) - wanted) > min(wanted, len(rows) - wanted) / 2:
        count, what = len({groups[row] for row in rows}), config.split_by
        kinds, other = (
            ("images or prompts", "prompt or row") if what == "image" else (f"{what}s", "row")
        )
        raise InputError(
            f"split_by={what!r}: the {len(rows)} rows have {count} {kinds}, which cannot be split "
            f"by {option}={share}; use split_by={other}"
        )
    return kept, held


def shuffled(count: int, config: DataConfig) -> list[int]:
    """The numbers of all rows, in the order in which they are drawn."""
    return torch.randperm(count, generator=generator(config.split_seed)).tolist()


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)
