"""Rows of a text and its class -> batches of tensors, for sequence classification.
Not here: chats, images and answers (collator.py), what a row means (rows.py)."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from darts_lora.errors import InputError
from darts_lora.rows import ROW, SOURCE, check_length, first_rows, naming, row_name


class LabelCollator:
    """Rows with `text` (and `text_pair`) and `label` -> batches for a classification model.

    Args:
        tokenizer: the model's.
        max_length: longest sequence in tokens.
        label_ids: name -> number of the model's classes; a label is one or the other.
        context: longest sequence that the model takes, if it says.
        pad_to_multiple_of: batches are padded to a multiple of this many tokens.
    """

    def __init__(
        self,
        tokenizer,
        max_length: int,
        label_ids: dict[str, int],
        context: int | None = None,
        pad_to_multiple_of: int = 1,
    ):
        self.tokenizer, self.max_length, self.context = tokenizer, max_length, context
        self.label_ids, self.pad_to_multiple_of = label_ids, pad_to_multiple_of

    def __call__(self, rows: list[dict]) -> dict[str, Tensor]:
        """A training batch, padded on the right.

        Returns:
            input_ids, attention_mask (and token_type_ids, for a tokenizer that has them): int64
            (rows, tokens); labels: int64 (rows,).

        Raises:
            InputError: a row that is too long, or has no text or no such label.
        """
        labels = torch.tensor([self._label(row) for row in rows])
        texts = self._texts(rows)
        with naming(rows, "the tokenizer cannot take them"):
            batch = self.tokenizer(
                *texts,
                padding=True,
                padding_side="right",
                pad_to_multiple_of=self.pad_to_multiple_of,
                return_tensors="pt",
            )
        for row, length in zip(rows, batch["attention_mask"].sum(1).tolist(), strict=True):
            check_length(row, "text", length, self.max_length, self.context)
        return {**batch, "labels": labels}

    def check(self, rows: Iterable[dict], limit: int = 10_000) -> None:
        """Read the first `limit` rows and raise what a batch of them would."""
        for row in first_rows(rows, limit):
            self._label(row)
            length = len(self.tokenizer(*self._texts([row]))["input_ids"][0])
            check_length(row, "text", length, self.max_length, self.context)

    def evaluation(self, rows: list[dict]) -> dict[str, Any]:
        """A batch for evaluation: {"whole": as for training}."""
        return {"whole": self(rows)}

    def _texts(self, rows: list[dict]) -> list[list[str]]:
        columns = ["text"] + ["text_pair"] * ("text_pair" in rows[0])
        for row in rows:
            for column in columns:
                if not isinstance(row.get(column), str):
                    kind = type(row.get(column)).__name__
                    raise InputError(f"{row_name(row, column)}: must be text, not {kind}")
        return [[row[column] for row in rows] for column in columns]

    def _label(self, row: dict) -> int:
        if not {"text", "label"} <= set(row):
            found = ", ".join(column for column in row if column not in (ROW, SOURCE))
            raise InputError(f"{row_name(row)}: needs the columns text and label; found: {found}")
        label = row["label"]
        if isinstance(label, str):
            label = self.label_ids.get(label)
        elif isinstance(label, float) and label.is_integer():  # a csv column with gaps
            label = int(label)
        if type(label) is not int or label not in self.label_ids.values():
            names = ", ".join(list(self.label_ids)[:20])
            raise InputError(
                f"{row_name(row, 'label')}: {row['label']!r} is none of the model's "
                f"{len(self.label_ids)} classes ({names}); num_labels sets their number"
            )
        return label
