"""What a row may be at most, and what becomes of rows that batches cannot be made of.
Not here: what a row means (rows.py), nor the batches themselves (collator.py)."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

from torch import nn
from tqdm.auto import tqdm

from darts_lora.base.errors import InputError, RowsError
from darts_lora.base.files import is_main_process
from darts_lora.data.places import row_name

if TYPE_CHECKING:
    from darts_lora.data.sources import Rows

TOLD = 10  # bad rows that are listed at once
T = TypeVar("T")


class LongRowError(InputError):
    """A row that is longer than max_length, or than the model takes."""


class Limits:
    """How long a row may be, and which tokens it may have.

    Args:
        tokenizer: writes a token's number as text.
        max_length: longest sequence in tokens, images included.
        context: longest sequence that the model takes, if it says.
    """

    def __init__(self, tokenizer, max_length: int, context: int | None = None):
        self.tokenizer, self.max_length, self.context = tokenizer, max_length, context
        self.vocabulary: int | None = None
        self._highest = (-1, "")  # token that was met, and where

    @property
    def longest(self) -> int:
        """Tokens of the longest sequence."""
        return self.max_length if self.context is None else min(self.max_length, self.context)

    def check(self, row: dict, column: str, tokens: Sequence[int], length: int) -> None:
        """Raises LongRowError for a length (in tokens) above the limit, InputError for tokens that
        the model does not embed (known from `of_model` on)."""
        limit, advice = f"max_length={self.max_length}", ", or raise max_length"
        if self.context is not None and self.context <= self.max_length:
            limit, advice = f"the model takes {self.context}", ""
        if length > self.longest:
            raise LongRowError(
                f"{row_name(row, column)}: {length} tokens, {limit}; shorten or leave out the row "
                f"(on_long_row: truncate or skip){advice}"
            )
        highest = max(tokens, default=-1)
        if self.vocabulary is not None:
            self._check_embedded(highest, row_name(row, column))
        elif highest > self._highest[0]:
            self._highest = (highest, row_name(row, column))

    def of_model(self, model: nn.Module) -> None:
        """Take over which tokens the model embeds, for the rows checked so far and those to come.

        Raises:
            InputError: a row that was checked has another token.
        """
        embedding: Any = model.get_input_embeddings
        self.vocabulary = embedding().weight.shape[0]
        self._check_embedded(*self._highest)

    def _check_embedded(self, token: int, where: str) -> None:
        if token >= self.vocabulary:
            text = self.tokenizer.convert_ids_to_tokens(token)
            raise InputError(
                f"{where}: the token {text!r} has number {token}, the model embeds "
                f"{self.vocabulary}; use the tokenizer that belongs to the model, or save the "
                "model once after model.resize_token_embeddings(len(tokenizer))"
            )


def check_rows(rows: Iterable[dict], check: Callable[[dict], T]) -> list[T]:
    """What `check` gives for each row.

    Raises:
        InputError: the check's own where one row is bad; of several their number and the first.
    """
    good: list[T] = []
    bad: list[InputError] = []
    for row in rows:
        try:
            good.append(check(row))
        except InputError as error:
            bad.append(error)
    if len(bad) == 1:
        raise bad[0]
    if bad:
        raise _listed(bad, len(good) + len(bad)) from bad[0]
    return good


def usable_rows(
    rows: Rows, make_batch: Callable[[list[dict]], Any], *, bad: bool, long: bool
) -> Rows:
    """The rows without those of which a batch cannot be made; these are told on the screen.

    Each row is read once for it, a stream's when they are needed.

    Args:
        make_batch: a collator.
        bad, long: which are left out: those above the limit (long), those with another fault (bad).

    Raises:
        InputError: a row that is not to be left out; no row is left.
    """
    if not hasattr(rows, "__len__"):
        return rows.filter(_Usable(make_batch, bad, long))
    usable, kept = _Usable(make_batch, bad, long, told=0), []
    bar = tqdm(rows, desc="rows", unit="row", delay=3, mininterval=1, leave=False)
    for number, row in enumerate(bar):
        if usable(row):
            kept.append(number)
    if usable.bad:
        listed = _listed(usable.bad, len(rows), "left out")
        if not kept:
            raise listed
        if is_main_process():
            print(f"warning: {listed}", file=sys.stderr, flush=True)
    return rows.select(kept)


class _Usable:
    """Whether a batch can be made of a row alone; the first bad ones of a stream are told."""

    def __init__(self, make_batch: Callable, bad: bool, long: bool, told: int = TOLD):
        self.make_batch, self.skips_bad, self.skips_long = make_batch, bad, long
        self.told = told
        self.bad: list[InputError] = []

    def __call__(self, row: dict) -> bool:
        try:
            self.make_batch([row])
        except InputError as error:
            if not (self.skips_long if isinstance(error, LongRowError) else self.skips_bad):
                raise
            if len(self.bad) < self.told:
                print(f"warning: left out: {error}", file=sys.stderr, flush=True)
            self.bad.append(error)
            return False
        return True


def _listed(errors: Sequence[InputError], count: int, what: str = "cannot be used") -> InputError:
    """How many rows of `count` are bad, and the first ones, each in a line; where all rows have the
    same fault, the first alone."""
    faults = {str(error).partition(": ")[2] for error in errors}
    if len(errors) == count and len(faults) == 1:
        return InputError(f"{errors[0]}; so it is in all {count:,} rows")
    more = [f"and {len(errors) - TOLD:,} more"] if len(errors) > TOLD else []
    return RowsError(
        f"{len(errors):,} of {count:,} rows {what}:", [*map(str, errors[:TOLD]), *more]
    )
