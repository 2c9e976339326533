"""Rows of a text and its class -> batches of tensors, for sequence classification.
Not here: chats, images and answers (collator.py), what a row means (rows.py)."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from darts_lora.base.errors import InputError
from darts_lora.data.checks import Limits, check_rows
from darts_lora.data.places import ADDED, LABEL, row_name
from darts_lora.data.rows import first_rows, naming


class LabelCollator:
    """Rows with `text` (and `text_pair`) and `label` -> batches for a classification model.

    Args:
        tokenizer: the model's.
        max_length: longest sequence in tokens.
        label_ids: name -> number of the model's classes; a label is one or the other. Where the
            data name their classes as well, as a ClassLabel of datasets does, names decide.
        context: longest sequence that the model takes, if it says.
        pad_to_multiple_of: batches are padded to a multiple of this many tokens.
        truncate: cut longer sequences at their end, instead of an error.

    Attributes:
        limits: what a row may be at most; `limits.of_model(model)` adds the model's vocabulary.
    """

    def __init__(
        self,
        tokenizer,
        max_length: int,
        label_ids: dict[str, int],
        context: int | None = None,
        pad_to_multiple_of: int = 1,
        truncate: bool = False,
    ):
        self.tokenizer, self.pad_to_multiple_of = tokenizer, pad_to_multiple_of
        self.label_ids, self.limits = label_ids, Limits(tokenizer, max_length, context)
        self._folded = {name.casefold(): number for name, number in label_ids.items()}
        self._named = any(name != f"LABEL_{number}" for name, number in label_ids.items())
        self._cut = {"truncation": True, "max_length": self.limits.longest} if truncate else {}

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
                **self._cut,
            )
        masks = batch["attention_mask"].bool()
        for row, ids, mask in zip(rows, batch["input_ids"], masks, strict=True):
            tokens = ids[mask].tolist()
            self.limits.check(row, "text", tokens, len(tokens))
        return {**batch, "labels": labels}

    def check(self, rows: Iterable[dict], limit: int = 10_000) -> None:
        """Read the first `limit` rows and raise what a batch of them would."""

        def check(row: dict) -> None:
            self._label(row)
            tokens = self.tokenizer(*self._texts([row]), **self._cut)["input_ids"][0]
            self.limits.check(row, "text", tokens, len(tokens))

        check_rows(first_rows(rows, limit), check)

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
            own = ", ".join(column for column in row if column not in ADDED)
            raise InputError(f"{row_name(row)}: needs the columns text and label; found: {own}")
        label, name = row["label"], row.get(LABEL)
        if name is not None and self._named:
            label = name
        found = self._number(label)
        if found is None:
            classes = ", ".join(f"{number}: {name}" for name, number in self.label_ids.items())
            raise InputError(
                f"{row_name(row, 'label')}: {label!r:.100} is none of the model's "
                f"{len(self.label_ids)} classes ({classes:.400}); {self._advice(label)}"
            )
        return found

    def _advice(self, label: Any) -> str:
        if not isinstance(label, str):
            return "num_labels sets their number"
        if self._named:
            return "a name counts, whatever its number in the data: rename the data's classes"
        return (
            "they have no names: write labels as numbers from 0 on, or name the classes in the "
            "model's config.json (id2label and label2id)"
        )

    def _number(self, label: Any) -> int | None:
        """The number of the class that a label names or is; None where there is none."""
        if isinstance(label, str):
            known = self.label_ids.get(label, self._folded.get(label.casefold()))
            if known is not None:
                return known
            label = _as_number(label)
        if isinstance(label, float) and label.is_integer():  # a csv column with gaps
            label = int(label)
        return label if type(label) is int and label in self.label_ids.values() else None


def _as_number(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None
