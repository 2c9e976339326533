"""Rows -> batches of tensors: chat template, images, labels on the assistant's answers only.
Not here: what a row means (rows.py), where rows come from (sources.py), how a model is loaded."""

from __future__ import annotations

from collections.abc import Iterable
from difflib import SequenceMatcher
from typing import Any, NamedTuple

import torch
from torch import Tensor

from darts_lora.base.errors import InputError
from darts_lora.config import MAX_IMAGE_PIXELS
from darts_lora.data.checks import Limits, check_rows
from darts_lora.data.pictures import Picture
from darts_lora.data.places import row_name
from darts_lora.data.rows import (
    IMAGE_COLUMNS,
    content_text,
    first_rows,
    naming,
    placed_images,
    row_layout,
    row_messages,
)
from darts_lora.data.template import ChatTemplate, is_plain

IGNORED = -100  # the label that no loss counts


class _Chat(NamedTuple):
    """A row as the chat template and the processor want it."""

    row: dict
    messages: list[dict]
    pictures: list[Picture]


class Collator:
    """Rows of a data set -> a batch of tensors, by the model's processor (or tokenizer) alone.

    Rows are processed when their batch is made (in the loader's workers, if it has any): nothing
    is kept, so large image sets need no room on disk.

    Args:
        processor: a processor with a tokenizer in it, or a tokenizer for text-only models.
        max_length: longest sequence in tokens, images included.
        pad_to_multiple_of: training batches are padded to a multiple of this many tokens.
        context: longest sequence that the model takes, if it says.
        truncate: cut longer sequences of a training batch at their end, instead of an error.
        max_image_pixels: largest image, width times height.
        refuse_labels: whether a text with a label is an error: nobody said which is to be learnt.

    Attributes:
        limits: what a row may be at most; `limits.of_model(model)` adds the model's vocabulary.

    Raises:
        InputError: a processor that writes labels itself, as PaliGemma's does; several chat
            templates without a default.
    """

    def __init__(
        self,
        processor,
        max_length: int = 2048,
        pad_to_multiple_of: int = 1,
        context: int | None = None,
        truncate: bool = False,
        max_image_pixels: int = MAX_IMAGE_PIXELS,
        refuse_labels: bool = False,
    ):
        if "labels" in getattr(processor, "model_input_names", ()):
            raise InputError(
                f"{type(processor).__name__}: writes labels of its own, as PaliGemma's does, whose "
                "prompts attend both ways; such models are not supported"
            )
        self.processor, self.pad_to_multiple_of = processor, pad_to_multiple_of
        self.tokenizer = getattr(processor, "tokenizer", processor)
        self.multimodal = self.tokenizer is not processor
        self.template = ChatTemplate(processor)
        self.limits = Limits(self.tokenizer, max_length, context)
        self.truncate, self.max_image_pixels = truncate, max_image_pixels
        self.refuse_labels = refuse_labels
        if truncate:
            self.tokenizer.truncation_side = "right"

    def __call__(self, rows: list[dict]) -> dict[str, Tensor]:
        """A training batch, padded on the right; every tensor's leading dimension is the row.

        Returns:
            input_ids, attention_mask, labels: int64 (rows, tokens); labels are -100 except on the
            assistant's answers. What else the model takes (pixel_values ...) as the processor
            makes it.

        Raises:
            InputError: a row that is too long, or has no token to learn from.
        """
        return self._whole(list(map(self._read, rows)))

    def check(self, rows: Iterable[dict], limit: int = 10_000) -> float:
        """Read the first `limit` rows' texts and the heads of their images, make batches of those
        with most of them, and raise what a batch would; of a stream, whose rows cost more, a
        fortieth of that.

        Returns:
            The share of the text's tokens that the loss counts, in (0, 1].

        Raises:
            InputError: as for a batch.
        """
        heaviest: dict[str, tuple[int, dict]] = {}

        def check(row: dict) -> tuple[int, int]:
            chat = self._read(row)
            tokens, mask = self.template.learnt(row, chat.messages)
            length = min(len(tokens), self.limits.longest) if self.truncate else len(tokens)
            self.limits.check(row, row_layout(row)[-1], self._own(tokens), length)
            _check_learnt(row, any(mask[:length]))
            pixels = sum(picture.pixels() for picture in chat.pictures)
            sizes = {"tokens": length, "images": len(chat.pictures), "pixels": pixels}
            for kind, size in sizes.items() if chat.pictures else ():
                if size > heaviest.get(kind, (0,))[0]:
                    heaviest[kind] = (size, row)
            return length, sum(mask[:length])

        counts = check_rows(first_rows(rows, limit, images=True), check)
        if not counts:
            raise InputError("no row to learn from")
        for row in {id(row): row for _, row in heaviest.values()}.values():
            self([row])  # images may make them too long
        return sum(learnt for _, learnt in counts) / sum(tokens for tokens, _ in counts)

    def evaluation(self, rows: list[dict]) -> dict[str, Any]:
        """A batch for evaluation: "whole" as for training; but for rows of plain text also "prompt"
        for `generate`, padded on the left, up to each row's last answer, and the "answers": the
        tokens of each that are learnt, without the special ones and blanks at the end."""
        chats = list(map(self._read, rows))
        images = self._images(chats)
        whole = self._whole(chats, images)
        if any(is_plain(chat.messages) for chat in chats):
            return {"whole": whole}
        questions = [chat._replace(messages=chat.messages[:-1]) for chat in chats]
        prompt = self._encode(questions, images, padding_side="left", add_generation_prompt=True)
        return {"whole": whole, "prompt": prompt, "answers": list(map(self._last_answer, chats))}

    def _last_answer(self, chat: _Chat) -> list[int]:
        tokens, mask = self.template.last_answer(chat.row, chat.messages)
        answer = self._own([token for token, own in zip(tokens, mask, strict=True) if own])
        while answer and not self.tokenizer.decode(answer[-1:], skip_special_tokens=True).strip():
            answer.pop()
        return answer

    def _own(self, tokens: list[int]) -> list[int]:
        """The tokens without the places of images, which models look up elsewhere."""
        image_token = getattr(self.processor, "image_token_id", None)
        return [token for token in tokens if token != image_token]

    def _read(self, row: dict) -> _Chat:
        """The row's messages as the chat template wants them: processors take lists of parts."""
        messages = [{"role": m["role"], "content": m["content"]} for m in row_messages(row)]
        if self.refuse_labels and row_layout(row) == ("text",) and row.get("label") is not None:
            raise InputError(
                f"{row_name(row, 'label')}: the checkpoint has no head for labels; give "
                "task=classification to learn them, or task=generation to learn the text"
            )
        if self.multimodal:
            mark = self.template.image_token
            return _Chat(row, *placed_images(row, messages, mark, self.max_image_pixels))
        _check_text_only(row, messages)
        return _Chat(row, [{**m, "content": content_text(m["content"])} for m in messages], [])

    @staticmethod
    def _images(chats: list[_Chat]) -> list[list]:
        """Each row's images, decoded: once for all that is made of them."""
        return [[picture.open() for picture in chat.pictures] for chat in chats]

    def _whole(self, chats: list[_Chat], images: list[list] | None = None) -> dict[str, Tensor]:
        images = self._images(chats) if images is None else images
        batch = self._encode(chats, images, padding_side="right", truncate=self.truncate)
        labels = torch.full_like(batch["input_ids"], IGNORED)
        image_token = getattr(self.processor, "image_token_id", None)
        for i, chat in enumerate(chats):
            present = batch["attention_mask"][i].nonzero().flatten()
            tokens = batch["input_ids"][i, present]
            learnt = torch.tensor(self._answer_mask(chat, tokens.tolist()))
            learnt &= tokens != (-1 if image_token is None else image_token)
            _check_learnt(chat.row, bool(learnt.any()))
            labels[i, present[learnt]] = tokens[learnt]
        return {**batch, "labels": labels}

    def _encode(
        self,
        chats: list[_Chat],
        images: list[list],
        *,
        padding_side: str,
        add_generation_prompt: bool = False,
        truncate: bool = False,
    ) -> dict[str, Tensor]:
        rows = [chat.row for chat in chats]
        options = {"add_generation_prompt": add_generation_prompt}
        texts = [self.template.text(chat.row, chat.messages, **options) for chat in chats]
        mixed = "; some have no image" if any(images) and not all(images) else ""
        bos = self.tokenizer.bos_token
        cut = {"truncation": True, "max_length": self.limits.longest} if truncate else {}
        with naming(rows, "the processor cannot take them", mixed):
            batch = self.processor(
                text=texts,
                **({"images": images} if any(images) else {}),
                # As apply_chat_template does it: most templates write the start token themselves.
                add_special_tokens=self.multimodal and bos is not None and bos not in texts[0],
                padding=True,
                padding_side=padding_side,
                # prompts for `generate` need no fixed shapes
                pad_to_multiple_of=None if add_generation_prompt else self.pad_to_multiple_of,
                return_tensors="pt",
                **cut,
            )
        masks = batch["attention_mask"].bool()
        for row, ids, mask in zip(rows, batch["input_ids"], masks, strict=True):
            tokens = ids[mask].tolist()
            self.limits.check(row, row_layout(row)[-1], self._own(tokens), len(tokens))
        kinds = batch.pop("token_type_ids", None)
        if self.multimodal and kinds is not None and kinds.any():  # a tokenizer's own are all 0
            batch["token_type_ids"] = kinds  # where Gemma 3 attends both ways: within an image
        return dict(batch)

    def _answer_mask(self, chat: _Chat, tokens: list[int]) -> list[bool]:
        """Which of the row's tokens belong to the assistant's answers."""
        plain, mask = self.template.learnt(chat.row, chat.messages)
        cut = self.truncate and len(tokens) == self.limits.longest
        if plain == tokens or (cut and plain[: len(tokens)] == tokens):
            return mask[: len(tokens)]
        # The processor writes one image mark as many tokens: find the rest of the text around it.
        placed = [False] * len(tokens)
        blocks = SequenceMatcher(None, plain, tokens, autojunk=False).get_matching_blocks()
        for start, target, size in blocks:
            placed[target : target + size] = mask[start : start + size]
        if sum(placed) != sum(mask) and not cut:
            raise InputError(
                f"{row_name(chat.row)}: cannot find the answer among the processor's tokens"
            )
        return placed


def _check_learnt(row: dict, learnt: bool) -> None:
    if not learnt:
        where = row_name(row, row_layout(row)[-1])
        raise InputError(f"{where}: no token to learn from, all labels are masked")


def _check_text_only(row: dict, messages: list[dict]) -> None:
    """InputError where the row has images or the like, which a tokenizer would lose."""
    for column in IMAGE_COLUMNS:
        if row.get(column):
            raise InputError(
                f"{row_name(row, column)}: the model takes text only; leave out the column, or "
                "choose a model for images (model_name_or_path)"
            )
    for part in (p for m in messages if not isinstance(m["content"], str) for p in m["content"]):
        if part["type"] == "image" or (part["type"] != "text" and not part.get("text")):
            raise InputError(
                f"{row_name(row)}: the model takes text only, a message has a part of type "
                f"{part['type']!r}; leave it out, or choose a model for it (model_name_or_path)"
            )
