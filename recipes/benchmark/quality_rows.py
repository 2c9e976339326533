"""A task's rows, encoded once; batches of one or several trainings, losses of supervised tokens or
of classes.
Not here: what is trained on them (quality_training.py)."""

from __future__ import annotations

import contextlib
import hashlib
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace

import torch
from datasets import Dataset, concatenate_datasets
from torch import Tensor, nn
from torch.utils.data import Sampler
from transformers import PreTrainedModel

from darts_lora import InputError
from darts_lora.config import DataConfig, ModelConfig
from darts_lora.data.collator import IGNORED, Collator
from darts_lora.data.label_collator import LabelCollator
from darts_lora.data.loaders import load_splits
from darts_lora.data.rows import row_prompt, row_text
from darts_lora.data.splits import row_prompts
from darts_lora.lora.models import load_model

POSITIONS, LABELS = "supervised_positions", "supervised_labels"
GROUP = 25  # batches whose rows are sorted by length


def task_digest(model: ModelConfig, data: DataConfig) -> str:
    """Of the rows, in their order and with their images, and of the model's weights: options name
    them alike where a file or a folder has others by now."""
    digest = hashlib.blake2b(digest_size=8)
    for rows in (task_rows(data), load_splits(data, ["test"])["test"]):
        for row in rows:
            digest.update(row_prompt(row) + row_text(row).encode())
    for name, weights in task_model(model).state_dict().items():
        digest.update(name.encode())
        digest.update(weights.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def task_model(config: ModelConfig) -> PreTrainedModel:
    """The model, the same at each load: a classifier's head may be drawn at random."""
    torch.manual_seed(0)
    return load_model(config)


def task_rows(data: DataConfig) -> Dataset:
    """Training and validation rows, in the order that cells have been computed with so far."""
    return concatenate_datasets(list(load_splits(replace(data, split_by="prompt")).values()))


class EncodedRows:
    """All rows of a split as tensors on the device: what a collator makes of them, made once.

    Args:
        rows: of a data set.
        collator: gives each row its tensors; its pad_to_multiple_of pads the batches.
        device: where they stay.
        grouped: whether batches have rows of similar length (Batches).
    """

    def __init__(
        self,
        rows: Iterable[dict],
        collator: Collator | LabelCollator,
        device: torch.device,
        grouped: bool = False,
    ):
        self.grouped = grouped
        self.multiple, collator.pad_to_multiple_of = collator.pad_to_multiple_of, 1
        rows = list(rows)
        self.prompts = dict(enumerate(row_prompts(rows)))
        single = [collator([row]) for row in rows]
        collator.pad_to_multiple_of = self.multiple
        self.lengths = [row["input_ids"].shape[1] for row in single]
        self.classes = single[0]["labels"].dim() == 1  # one of them for each row
        next_tokens = [row["labels"] if self.classes else row["labels"][0, 1:] for row in single]
        self.positions = [(tokens != IGNORED).nonzero()[:, 0] for tokens in next_tokens]
        self.targets = [
            tokens[where] for tokens, where in zip(next_tokens, self.positions, strict=True)
        ]
        fill = {"input_ids": collator.tokenizer.pad_token_id, "labels": IGNORED}
        fill |= {"attention_mask": 0}
        longest = self._padded(max(self.lengths))
        # Beside the tokens, what is aligned with them: masks; the leading dimension is the row.
        self.aligned = {
            key
            for key, value in single[0].items()
            if value.dim() > 1 and value.shape[1] == self.lengths[0]
        }
        self.tensors = {}
        for key in single[0]:
            values = [row[key] for row in single]
            if key in self.aligned:
                values = [_pad(value, longest, fill.get(key)) for value in values]
            self.tensors[key] = torch.cat(values).to(device)

    def __len__(self) -> int:
        return len(self.lengths)

    def batches(self, indices: Sequence[int], size: int, seed: int) -> Batches:
        """Full batches of some of the rows in an order that the seed decides."""
        return Batches(indices, size, seed, self.lengths if self.grouped else None)

    def shape(self, *parts: Sequence[int]) -> tuple[int, ...]:
        """Parts, tokens that each row of their batch is padded to, and positions of a part for
        supervised_loss: more than there are supervised tokens, for its labels begin with none."""
        tokens = max(self.lengths[i] for part in parts for i in part)
        supervised = max(sum(len(self.targets[i]) for i in part) for part in parts)
        power = 2 ** int(math.log2(supervised))  # few shapes: powers of 2, and 1.5 times these
        count = next(size for size in (power * 3 // 2, 2 * power) if size > supervised)
        return len(parts), self._padded(tokens), count

    def batch(self, *parts: Sequence[int]) -> dict[str, Tensor]:
        """The batch that the collator makes of these rows; several parts of equal size are those of
        as many trainings, one after the other.

        For supervised_loss it has, for each part, the positions (among all tokens of the batch)
        that predict a supervised token, and their labels, each behind the position that predicts
        it, as in any sequence. Rows that have a class have just that for a label, (parts, rows).
        """
        _, length, count = self.shape(*parts)
        chosen = self._sent(torch.tensor([i for part in parts for i in part]))
        batch = {
            key: value[chosen, :length] if key in self.aligned else value[chosen]
            for key, value in self.tensors.items()
        }
        if self.classes:
            labels = batch["labels"].view(len(parts), -1)
            return batch | {LABELS: labels}
        positions, labels, row = [], [], 0
        for part in parts:
            targets = torch.cat([self.targets[i] for i in part])
            missing = count - len(targets)
            places = [(row + n) * length + self.positions[i] for n, i in enumerate(part)]
            positions.append(nn.functional.pad(torch.cat(places), (0, missing)))
            labels.append(nn.functional.pad(targets, (1, missing - 1), value=IGNORED))
            row += len(part)
        extra = {POSITIONS: torch.stack(positions), LABELS: torch.stack(labels)}
        return batch | {key: self._sent(value) for key, value in extra.items()}

    def _sent(self, values: Tensor) -> Tensor:
        device = self.tensors["input_ids"].device
        if device.type == "cuda":  # a copy from pageable memory would wait for the step before
            return values.pin_memory().to(device, non_blocking=True)
        return values

    def _padded(self, length: int) -> int:
        return math.ceil(length / self.multiple) * self.multiple


def _pad(value: Tensor, length: int, fill: int | None) -> Tensor:
    """Up to `length` in the second dimension; None goes on as at the last token, as processors let
    masks of images do."""
    rest = value[:, -1:] if fill is None else torch.full_like(value[:, -1:], fill)
    return torch.cat([value, rest.expand(-1, length - value.shape[1], *value.shape[2:])], dim=1)


class Batches(Sampler[list[int]]):
    """Full batches of shuffled rows; an iteration is an epoch, and the next one goes on from it.

    Args:
        indices: rows.
        size: rows of a batch.
        seed: decides the order.
        lengths: of all rows, where those of a batch are to be of similar length, so that little is
            padded: among GROUP batches. Whether a batch is of long or short rows doesn't depend on
            the seed, so that batches of several trainings fit together.

    Raises:
        InputError: fewer rows than a batch takes.
    """

    def __init__(
        self, indices: Sequence[int], size: int, seed: int, lengths: Sequence[int] | None = None
    ):
        if len(indices) < size:
            raise InputError(f"batch_size={size}: there are {len(indices)} rows to train on")
        self.indices, self.size, self.lengths = indices, size, lengths
        self.generator = torch.Generator().manual_seed(seed)

    def __len__(self) -> int:
        return len(self.indices) // self.size

    def __iter__(self) -> Iterator[list[int]]:
        order = torch.randperm(len(self.indices), generator=self.generator).tolist()
        rows = [self.indices[i] for i in order[: len(self) * self.size]]
        if self.lengths is None:
            yield from self._cut(rows)
            return
        for start in range(0, len(rows), GROUP * self.size):
            group = rows[start : start + GROUP * self.size]
            parts = self._cut(sorted(group, key=lambda row: self.lengths[row]))
            same = torch.Generator().manual_seed(start)
            for place in torch.randperm(len(parts), generator=same):
                yield parts[place]

    def _cut(self, rows: list[int]) -> list[list[int]]:
        return [rows[start : start + self.size] for start in range(0, len(rows), self.size)]

    def endless(self) -> Iterator[list[int]]:
        """Epoch after epoch."""
        while True:
            yield from self


def model_inputs(batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """What the collator made: all but what supervised_loss needs."""
    return {key: value for key, value in batch.items() if key not in (POSITIONS, LABELS)}


def supervised_loss(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    """The model's own loss, but of logits of the supervised tokens alone: with a vocabulary of
    49,152, in float32, those of all tokens of an evaluation's batch take 3 GiB a copy."""
    if POSITIONS not in batch:
        return supervised_losses(model, batch).mean()
    with _supervised_logits(model, batch):
        return model(**model_inputs(batch) | {"labels": batch[LABELS]}, use_cache=False).loss


def supervised_losses(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    """The same for each part of the batch, (parts,)."""
    inputs, labels = model_inputs(batch), batch[LABELS]
    del inputs["labels"]
    if POSITIONS not in batch:
        logits = model(**inputs).logits
        losses = nn.functional.cross_entropy(logits.float(), labels.flatten(), reduction="none")
        return losses.view(labels.shape).mean(1)
    labels = labels[:, 1:]
    with _supervised_logits(model, batch):
        logits = model(**inputs, use_cache=False).logits[:, :-1]
    losses = nn.functional.cross_entropy(
        logits.float().flatten(0, 1), labels.flatten(), ignore_index=IGNORED, reduction="none"
    )
    return losses.view(labels.shape).sum(1) / (labels != IGNORED).sum(1)


@contextlib.contextmanager
def _supervised_logits(model: nn.Module, batch: dict[str, Tensor]) -> Iterator[None]:
    """The head sees the supervised positions alone, a sequence for each part."""

    def keep(head: nn.Module, args: tuple[Tensor]) -> tuple[Tensor]:
        return (args[0].flatten(0, 1)[batch[POSITIONS]],)

    hook = model.get_output_embeddings().register_forward_pre_hook(keep)
    try:
        yield
    finally:
        hook.remove()


@torch.no_grad()
def mean_loss(
    model: nn.Module, rows: EncodedRows, indices: Sequence[int], batch_size: int
) -> float | None:
    """Mean loss per supervised token, or class, natural log; None if it is not finite."""
    training = model.training
    model.eval()
    order = sorted(indices, key=lambda i: rows.lengths[i])  # little padding
    total, tokens = 0.0, 0
    for start in range(0, len(order), batch_size):
        batch = rows.batch(order[start : start + batch_size])
        count = int((batch[LABELS] != IGNORED).sum())
        total, tokens = total + float(supervised_loss(model, batch)) * count, tokens + count
    model.train(training)
    return total / tokens if math.isfinite(total) else None
