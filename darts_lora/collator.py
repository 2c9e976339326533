"""Rows -> batches of tensors: chat template, images, labels on the assistant's answers only.
Not here: what a row means (rows.py), where rows come from (sources.py), how a model is loaded."""

from __future__ import annotations

import re
from collections.abc import Iterable
from difflib import SequenceMatcher
from typing import Any

import torch
from torch import Tensor

from darts_lora.errors import InputError
from darts_lora.rows import (
    IMAGE_COLUMNS,
    check_length,
    first_rows,
    naming,
    row_images,
    row_layout,
    row_messages,
    row_name,
)

IGNORED = -100  # the label that no loss counts
_CONTENT = (
    "{% if message.content is string %}{{ message.content }}{% else %}"
    "{% for part in message.content %}{% if part.type == 'image' %}{{ image_token or '' }}"
    "{% else %}{{ part.text or '' }}{% endif %}{% endfor %}{% endif %}"
)
# For models without a chat template, and for rows of plain text: the texts as they are, an end
# token after each answer.
PLAIN_TEMPLATE = (
    "{{ bos_token or '' }}{% for message in messages %}{% if message.role == 'assistant' %}"
    "{% generation %}" + _CONTENT + "{{ eos_token or '' }}{% endgeneration %}"
    "{% else %}" + _CONTENT + "{% endif %}{% endfor %}"
)


class Collator:
    """Rows of a data set -> a batch of tensors, by the model's processor (or tokenizer) alone.

    Rows are processed when their batch is made (in the loader's workers, if it has any): nothing
    is kept, so large image sets need no room on disk.

    Args:
        processor: a processor with a tokenizer in it, or a tokenizer for text-only models.
        max_length: longest sequence in tokens, images included.
        pad_to_multiple_of: training batches are padded to a multiple of this many tokens.
        context: longest sequence that the model takes, if it says.

    Raises:
        InputError: a processor that writes labels itself, as PaliGemma's does.
    """

    def __init__(
        self,
        processor,
        max_length: int = 2048,
        pad_to_multiple_of: int = 1,
        context: int | None = None,
    ):
        if "labels" in getattr(processor, "model_input_names", ()):
            raise InputError(
                f"{type(processor).__name__}: writes labels of its own, as PaliGemma's does, whose "
                "prompts attend both ways; such models are not supported"
            )
        self.processor, self.max_length, self.context = processor, max_length, context
        self.pad_to_multiple_of = pad_to_multiple_of
        self.tokenizer = getattr(processor, "tokenizer", processor)
        self.multimodal = self.tokenizer is not processor
        self.image_token = getattr(processor, "image_token", None)
        template = processor.chat_template or PLAIN_TEMPLATE
        self.chat_template = template["default"] if isinstance(template, dict) else template

    def __call__(self, rows: list[dict]) -> dict[str, Tensor]:
        """A training batch, padded on the right; every tensor's leading dimension is the row.

        Returns:
            input_ids, attention_mask, labels: int64 (rows, tokens); labels are -100 except on the
            assistant's answers. What else the model takes (pixel_values ...) as the processor
            makes it.

        Raises:
            InputError: a row that is too long, or has no token to learn from.
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
        """Read the first `limit` rows' texts (no images that the model takes) and raise what a
        batch of them would; of a stream, whose rows cost more, a fortieth of that.

        Returns:
            The share of the text's tokens that the loss counts, in (0, 1].

        Raises:
            InputError: as for a batch.
        """
        learnt = tokens = 0
        # A model for text refuses the first image, so none is read for nothing.
        for row in first_rows(rows, limit, images=not self.multimodal):
            plain, mask = self._plain_mask(row, self._conversation(row))
            check_length(row, row_layout(row)[-1], len(plain), self.max_length, self.context)
            _check_learnt(row, any(mask))
            learnt, tokens = learnt + sum(mask), tokens + len(plain)
        if not tokens:
            raise InputError("no row to learn from")
        return learnt / tokens

    def evaluation(self, rows: list[dict]) -> dict[str, Any]:
        """A batch for evaluation: "whole" as for training; but for rows of plain text also "prompt"
        for `generate`, padded on the left, up to each row's last answer, and the "answers": the
        tokens of each that are learnt, without the special ones and blanks at the end."""
        conversations = [self._conversation(row) for row in rows]
        if any(map(_is_plain, conversations)):
            return {"whole": self(rows)}
        questions = [conversation[:-1] for conversation in conversations]
        batch = self._encode(rows, questions, padding_side="left", add_generation_prompt=True)
        answers = list(map(self._last_answer, rows, conversations))
        return {"whole": self(rows), "prompt": batch, "answers": answers}

    def _last_answer(self, row: dict, conversation: list[dict]) -> list[int]:
        """What continues the prompt: templates may write more than the content (an empty <think>)
        there."""
        ids, mask = self._plain_mask(row, conversation)
        prompt = self._tokens(row, conversation[:-1], add_generation_prompt=True)["input_ids"]
        pairs = enumerate(zip(ids, prompt, strict=False))
        start = next((i for i, (token, other) in pairs if token != other), len(prompt))
        image_token = getattr(self.processor, "image_token_id", None)
        learnt = zip(ids[start:], mask[start:], strict=True)
        answer = [token for token, own in learnt if own and token != image_token]
        while answer and not self.tokenizer.decode(answer[-1:], skip_special_tokens=True).strip():
            answer.pop()
        return answer

    def _conversation(self, row: dict) -> list[dict]:
        """The row's messages as the chat template wants them: processors take lists of parts."""
        messages = [{"role": m["role"], "content": m["content"]} for m in row_messages(row)]
        if not self.multimodal:
            _check_text_only(row, messages)
            return [{**m, "content": _text(m["content"])} for m in messages]
        for message in messages:
            message["content"] = _parts(message["content"])
        placed = sum(self._images_in(part) for m in messages for part in m["content"])
        missing = len(row_images(row)) - placed
        if missing < 0 and any(column in row for column in IMAGE_COLUMNS):
            raise InputError(
                f"{row_name(row)}: {placed} places for images, {missing + placed} images"
            )
        first = next((m for m in messages if m["role"] == "user"), messages[0])
        first["content"] = [{"type": "image"}] * missing + first["content"]
        return messages

    def _images_in(self, part: dict) -> int:
        """Images that a part of a message places: it is one, or its text has their marks."""
        if part["type"] == "image":
            return 1
        return (part.get("text") or "").count(self.image_token) if self.image_token else 0

    def _encode(self, rows, conversations, *, padding_side, add_generation_prompt=False) -> dict:
        texts = []
        for row, conversation in zip(rows, conversations, strict=True):
            with naming([row], "the chat template cannot take it"):
                text = self.processor.apply_chat_template(
                    conversation,
                    **self._template(conversation),
                    tokenize=False,
                    add_generation_prompt=add_generation_prompt,
                )
            texts.append(text)
        images = [row_images(row) for row in rows] if self.multimodal else []
        mixed = "; some have no image" if any(images) and not all(images) else ""
        bos = self.tokenizer.bos_token
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
            )
        for row, length in zip(rows, batch["attention_mask"].sum(1).tolist(), strict=True):
            check_length(row, row_layout(row)[-1], length, self.max_length, self.context)
        kinds = batch.pop("token_type_ids", None)
        if self.multimodal and kinds is not None and kinds.any():  # a tokenizer's own are all 0
            batch["token_type_ids"] = kinds  # where Gemma 3 attends both ways: within an image
        return dict(batch)

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
            raise InputError(
                f"{row_name(row)}: cannot find the answer among the processor's tokens"
            )
        return placed

    def _plain_mask(self, row: dict, conversation: list[dict]) -> tuple[list[int], list[bool]]:
        """Tokens and answer mask before the processor expands images: by the template's own marks,
        else by prefix (an answer begins where the prompt before it ends)."""
        if re.search(r"\{%-?\s*generation\b", self._template(conversation)["chat_template"]):
            plain = self._tokens(row, conversation, return_assistant_tokens_mask=True)
            return plain["input_ids"], [bool(m) for m in plain["assistant_masks"]]
        ids = self._tokens(row, conversation)["input_ids"]
        mask = [False] * len(ids)
        for i, message in enumerate(conversation):
            if message["role"] != "assistant":
                continue
            before = self._tokens(row, conversation[:i], add_generation_prompt=True)["input_ids"]
            end = self._answer_end(row, conversation, ids, i)
            if ids[: len(before)] != before or end is None:
                raise InputError(
                    f"{row_name(row)}: the chat template does not continue its own prompt; "
                    "give it a {% generation %} block around the answer"
                )
            mask[len(before) : end] = [True] * (end - len(before))
        return ids, mask

    def _answer_end(
        self, row: dict, conversation: list[dict], ids: list[int], i: int
    ) -> int | None:
        """Where the answer that is message i ends among the conversation's tokens; None if unsure.

        Templates like Qwen3's write an empty <think> into an answer behind the last question alone.
        An earlier one is as in the whole only with the next question behind it, whose own length
        shows where it is asked twice.
        """
        until = self._tokens(row, conversation[: i + 1])["input_ids"]
        if ids[: len(until)] == until:
            return len(until)
        asked, question = conversation[: i + 2], conversation[i + 1 : i + 2]
        if [message["role"] for message in question] != ["user"]:
            return None
        try:
            once, twice = (self._tokens(row, c)["input_ids"] for c in (asked, asked + question))
        except InputError:  # no two questions on end
            return None
        turn = twice[len(once) :]
        end = len(once) - len(turn)
        found = ids[: len(once)] == once and once + turn == twice and once[end:] == turn
        # It ends as it does at the end: a template may join questions into one turn.
        return end if found and turn and once[end - 1] == until[-1] else None

    def _tokens(self, row: dict, conversation: list[dict], **options) -> dict:
        with naming([row], "the chat template cannot take it"):
            return self.tokenizer.apply_chat_template(
                conversation,
                **self._template(conversation),
                tokenize=True,
                return_dict=True,
                **options,
            )

    def _template(self, conversation: list[dict]) -> dict[str, str | None]:
        """The chat template, and what it needs to know."""
        if _is_plain(conversation) or self.chat_template == PLAIN_TEMPLATE:
            return {"chat_template": PLAIN_TEMPLATE, "image_token": self.image_token}
        return {"chat_template": self.chat_template}


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


def _is_plain(conversation: list[dict]) -> bool:
    """An answer without a question, as rows of plain text are, is no chat."""
    return len(conversation) == 1 and conversation[0]["role"] == "assistant"


def _parts(content: str | list[dict]) -> list[dict]:
    if isinstance(content, str):
        return [{"type": "text", "text": content}]
    return [{key: value for key, value in part.items() if value is not None} for part in content]


def _text(content: str | list[dict]) -> str:
    if isinstance(content, str):
        return content
    return "".join(part.get("text") or "" for part in content)
