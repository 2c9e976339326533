"""Rows of a data set -> batches: chat messages, images, labels on the assistant's answers only.
Not here: where rows come from (data.py), nor which processor is used (models.py)."""

from __future__ import annotations

import re
from collections.abc import Iterable
from difflib import SequenceMatcher
from itertools import islice
from typing import Any

import torch
from PIL import Image

from darts_lora.errors import InputError

IGNORED = -100  # the label that no loss counts
ROW = "row_index"  # column we add: a row's number in the split of the source
IMAGE_COLUMNS = ("images", "image")
LAYOUTS = (("messages",), ("prompt", "completion"))
# For models without a chat template: the texts as they are, an end token after each answer.
PLAIN_TEMPLATE = (
    "{{ bos_token or '' }}{% for message in messages %}{% if message.role == 'assistant' %}"
    "{% generation %}{{ message.content }}{{ eos_token or '' }}{% endgeneration %}"
    "{% else %}{{ message.content }}{% endif %}{% endfor %}"
)


def row_images(row: dict) -> list[Image.Image]:
    """The row's images, from column `images` or `image`.

    Raises:
        InputError: an image file that does not open.
    """
    found = row.get("images") or row.get("image") or []
    found = found if isinstance(found, list) else [found]
    try:
        return [Image.open(image) if isinstance(image, str) else image for image in found]
    except OSError as error:
        raise InputError(f"{_name(row)}: image {error.filename!r} does not open") from error


def row_messages(row: dict) -> list[dict[str, Any]]:
    """The row as chat messages, {"role", "content"}, from `messages` or `prompt`/`completion`.

    Raises:
        InputError: the row has neither, or no assistant's answer at its end.
    """
    if row.get("messages"):
        messages = row["messages"]
    elif "prompt" in row and "completion" in row:
        messages = _turns(row["prompt"], "user") + _turns(row["completion"], "assistant")
    else:
        raise InputError(f"{_name(row)}: no messages; columns: {', '.join(row)}")
    if messages[-1]["role"] != "assistant":
        raise InputError(f"{_name(row)}: the last message is not the assistant's answer")
    return messages


def _turns(value: str | list[dict], role: str) -> list[dict]:
    return [{"role": role, "content": value}] if isinstance(value, str) else value


def _name(row: dict) -> str:
    return f"row {row[ROW]}" if ROW in row else "a row"


class Collator:
    """Rows of a data set -> a batch of tensors, by the model's processor (or tokenizer) alone.

    Rows are processed when their batch is made (in the loader's workers, if it has any): nothing
    is kept, so large image sets need no room on disk.

    Args:
        processor: a processor with a tokenizer in it, or a tokenizer for text-only models.
        max_length: longest sequence in tokens, images included.
    """

    def __init__(self, processor, max_length: int = 2048):
        self.processor, self.max_length = processor, max_length
        self.tokenizer = getattr(processor, "tokenizer", processor)
        self.multimodal = self.tokenizer is not processor
        template = processor.chat_template or PLAIN_TEMPLATE
        self.template = template["default"] if isinstance(template, dict) else template
        self.marks_answers = re.search(r"\{%-?\s*generation\b", self.template) is not None

    def __call__(self, rows: list[dict]) -> dict[str, torch.Tensor]:
        """A training batch, padded on the right; every tensor's leading dimension is the row.

        Returns:
            input_ids, attention_mask, labels: int64 (rows, tokens); labels are -100 except on the
            assistant's answers. What else the model takes (pixel_values ...) as the processor
            makes it.

        Raises:
            InputError: a row that is longer than max_length, or has no token to learn from.
        """
        conversations = [self._conversation(row) for row in rows]
        batch = self._encode(rows, conversations, padding_side="right")
        labels = torch.full_like(batch["input_ids"], IGNORED)
        image_token = getattr(self.processor, "image_token_id", None)
        for i, (row, conversation) in enumerate(zip(rows, conversations, strict=True)):
            present = batch["attention_mask"][i].nonzero().flatten()
            tokens = batch["input_ids"][i, present]
            learnt = torch.tensor(self._answer_mask(row, conversation, tokens.tolist()))
            learnt &= tokens != (-1 if image_token is None else image_token)
            _check_learnt(row, bool(learnt.any()))
            labels[i, present[learnt]] = tokens[learnt]
        return {**batch, "labels": labels}

    def check(self, rows: Iterable[dict], limit: int = 10_000) -> float:
        """Read the first `limit` rows' texts (no images) and raise what a batch of them would.

        Returns:
            The share of the text's tokens that the loss counts, in (0, 1].

        Raises:
            InputError: as for a batch.
        """
        if hasattr(rows, "column_names"):  # a data set: do not decode images for nothing
            rows = rows.remove_columns([c for c in IMAGE_COLUMNS if c in rows.column_names])
        learnt = tokens = 0
        for row in islice(rows, limit):
            plain, mask = self._plain_mask(row, self._conversation(row))
            self._check_length(row, len(plain))
            _check_learnt(row, any(mask))
            learnt, tokens = learnt + sum(mask), tokens + len(plain)
        return learnt / tokens

    def prompts(self, rows: list[dict]) -> tuple[dict[str, torch.Tensor], list[str]]:
        """A batch for `generate`, padded on the left, up to each row's last answer; the answers."""
        conversations = [self._conversation(row) for row in rows]
        questions = [conversation[:-1] for conversation in conversations]
        batch = self._encode(rows, questions, padding_side="left", add_generation_prompt=True)
        return batch, [_text(conversation[-1]["content"]) for conversation in conversations]

    def _conversation(self, row: dict) -> list[dict]:
        """The row's messages as the chat template wants them: processors take lists of parts."""
        messages = [{"role": m["role"], "content": m["content"]} for m in row_messages(row)]
        if not self.multimodal:
            return [{**m, "content": _text(m["content"])} for m in messages]
        for message in messages:
            message["content"] = _parts(message["content"])
        placed = sum(part["type"] == "image" for m in messages for part in m["content"])
        missing = len(row_images(row)) - placed
        first = next((m for m in messages if m["role"] == "user"), messages[0])
        first["content"] = [{"type": "image"}] * missing + first["content"]
        return messages

    def _encode(self, rows, conversations, *, padding_side, add_generation_prompt=False) -> dict:
        texts = self.processor.apply_chat_template(
            conversations,
            chat_template=self.template,
            tokenize=False,
            add_generation_prompt=add_generation_prompt,
        )
        images = [row_images(row) for row in rows] if self.multimodal else []
        bos = self.tokenizer.bos_token
        try:
            batch = self.processor(
                text=texts,
                **({"images": images} if any(images) else {}),
                # As apply_chat_template does it: most templates write the start token themselves.
                add_special_tokens=self.multimodal and bos is not None and bos not in texts[0],
                padding=True,
                padding_side=padding_side,
                return_tensors="pt",
            )
        except ValueError as error:
            names = ", ".join(map(_name, rows))
            raise InputError(f"{names}: the processor cannot take them ({error})") from error
        for row, length in zip(rows, batch["attention_mask"].sum(1).tolist(), strict=True):
            self._check_length(row, length)
        batch.pop("token_type_ids", None)
        return dict(batch)

    def _check_length(self, row: dict, length: int) -> None:
        if length > self.max_length:
            raise InputError(
                f"{_name(row)}: {length} tokens, max_length={self.max_length}; "
                "shorten or leave out the row, or raise max_length"
            )

    def _answer_mask(self, row: dict, conversation: list[dict], tokens: list[int]) -> list[bool]:
        """Which of the row's tokens belong to the assistant's answers."""
        plain, mask = self._plain_mask(row, conversation)
        if plain == tokens:
            return mask
        # The processor writes one image mark as many tokens: find the rest of the text around it.
        placed = [False] * len(tokens)
        blocks = SequenceMatcher(None, plain, tokens, autojunk=False).get_matching_blocks()
        for start, target, size in blocks:
            placed[target : target + size] = mask[start : start + size]
        if sum(placed) != sum(mask):
            raise InputError(f"{_name(row)}: cannot find the answer among the processor's tokens")
        return placed

    def _plain_mask(self, row: dict, conversation: list[dict]) -> tuple[list[int], list[bool]]:
        """Tokens and answer mask before the processor expands images: by the template's own marks,
        else by prefix (an answer begins where the prompt before it ends)."""
        if self.marks_answers:
            plain = self._tokens(conversation, return_assistant_tokens_mask=True)
            return plain["input_ids"], [bool(m) for m in plain["assistant_masks"]]
        ids = self._tokens(conversation)["input_ids"]
        mask = [False] * len(ids)
        for i, message in enumerate(conversation):
            if message["role"] != "assistant":
                continue
            before = self._tokens(conversation[:i], add_generation_prompt=True)["input_ids"]
            until = self._tokens(conversation[: i + 1])["input_ids"]
            if ids[: len(before)] != before or ids[: len(until)] != until:
                raise InputError(
                    f"{_name(row)}: the chat template does not continue its own prompt; "
                    "give it a {% generation %} block around the answer"
                )
            mask[len(before) : len(until)] = [True] * (len(until) - len(before))
        return ids, mask

    def _tokens(self, conversation: list[dict], **options) -> dict:
        return self.tokenizer.apply_chat_template(
            conversation, chat_template=self.template, tokenize=True, return_dict=True, **options
        )


def _check_learnt(row: dict, learnt: bool) -> None:
    if not learnt:
        raise InputError(f"{_name(row)}: no token to learn from, all labels are masked")


def _parts(content: str | list[dict]) -> list[dict]:
    if isinstance(content, str):
        return [{"type": "text", "text": content}]
    return [{key: value for key, value in part.items() if value is not None} for part in content]


def _text(content: str | list[dict]) -> str:
    if isinstance(content, str):
        return content
    return "".join(part.get("text") or "" for part in content)
