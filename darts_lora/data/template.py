"""The chat template: a conversation as text, its tokens, and which of them are the answers.
Not here: batches and images (collator.py), what a row means (rows.py)."""

from __future__ import annotations

import re
from typing import Any

from transformers.utils.chat_template_utils import render_jinja_template

from darts_lora.base.errors import InputError
from darts_lora.data.places import row_name
from darts_lora.data.rows import content_text, naming

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


class ChatTemplate:
    """How a model's conversations are written: by its processor's chat template, else by its
    tokenizer's, else plainly.

    Args:
        processor: a processor with a tokenizer in it, or a tokenizer for text-only models.

    Raises:
        InputError: several templates, and none of them called default.
    """

    def __init__(self, processor):
        self.tokenizer = getattr(processor, "tokenizer", processor)
        self.image_token = getattr(processor, "image_token", None)
        own = getattr(processor, "chat_template", None)
        template = own or getattr(self.tokenizer, "chat_template", None) or PLAIN_TEMPLATE
        self.source = _default(template)
        # A tokenizer's own may know text alone.
        borrowed = not own and self.tokenizer is not processor
        self._takes_parts = not borrowed or self._writes_images(self.source)

    def text(self, row: dict, conversation: list[dict], **options) -> str:
        """The conversation as text; `options` as of apply_chat_template (add_generation_prompt)."""
        given, shown = self._given(conversation), self._shown(conversation)
        with naming([row], "the chat template cannot take it"):
            return self.tokenizer.apply_chat_template(shown, **given, tokenize=False, **options)

    def learnt(self, row: dict, conversation: list[dict]) -> tuple[list[int], list[bool]]:
        """Tokens, before the processor expands images, and which of them are of an answer.

        An answer has every token that is at least partly behind its prompt: tokenizers merge a
        prompt's last character with the first of an answer.
        """
        text, answers = self._answers(row, conversation)
        return self._covered(text, answers)

    def last_answer(self, row: dict, conversation: list[dict]) -> tuple[list[int], list[bool]]:
        """The same, of the last answer alone as far as it continues its own prompt: templates may
        write more than the content (an empty <think>) there."""
        text, answers = self._answers(row, conversation)
        prompt = self.text(row, conversation[:-1], add_generation_prompt=True)
        shared, (start, end) = _shared(text, prompt), answers[-1]
        return self._covered(text, [(max(start, shared), end)])

    def _answers(self, row: dict, conversation: list[dict]) -> tuple[str, list[tuple[int, int]]]:
        """The conversation as text, and from which character to which it is the assistant's: by the
        template's own marks, else by prefix (an answer begins where the prompt before it ends)."""
        given = self._given(conversation)
        if re.search(r"\{%-?\s*generation\b", given["chat_template"]):
            with naming([row], "the chat template cannot take it"):
                rendered: Any = render_jinja_template(
                    conversations=[self._shown(conversation)],
                    **{**self.tokenizer.special_tokens_map, **given},
                    return_assistant_tokens_mask=True,
                )
            (text,), (marks,) = rendered
            return text, [(start, end) for start, end in marks]
        text, answers = self.text(row, conversation), []
        for i, message in enumerate(conversation):
            if message["role"] != "assistant":
                continue
            start = self._start(row, conversation, text, i)
            end = self._end(row, conversation, text, i)
            if start is None or end is None:
                raise InputError(
                    f"{row_name(row)}: the chat template does not continue its own prompt; "
                    "give it a {% generation %} block around the answer"
                )
            answers.append((start, end))
        return text, answers

    def _start(self, row: dict, conversation: list[dict], text: str, i: int) -> int | None:
        """The character at which the answer that is message i begins; None if unsure.

        A prompt may open a <think> that templates write into the last answer alone: an earlier one
        then begins with its content, where conversation and prompt part.
        """
        prompt = self.text(row, conversation[:i], add_generation_prompt=True)
        start = _shared(text, prompt)
        content = content_text(conversation[i]["content"]).strip()
        follows = bool(content) and text[start:].lstrip().startswith(content)
        return start if start == len(prompt) or follows else None

    def _end(self, row: dict, conversation: list[dict], text: str, i: int) -> int | None:
        """The character behind the answer that is message i; None if unsure.

        Templates write into the last answer alone an empty <think> (Qwen3's) or another end mark
        (gpt-oss's). An earlier one is as in the whole only with the next question behind it, whose
        own length shows where it is asked twice.
        """
        until = self.text(row, conversation[: i + 1])
        if text.startswith(until):
            return len(until)
        asked, question = conversation[: i + 2], conversation[i + 1 : i + 2]
        if [message["role"] for message in question] != ["user"]:
            return None
        try:
            once, twice = (self.text(row, c) for c in (asked, asked + question))
        except InputError:  # no two questions on end
            return None
        turn = twice[len(once) :]
        end = len(once) - len(turn)
        found = text.startswith(once) and once + turn == twice and once.endswith(turn)
        # Its end marks are as many as at the end: a template may join questions into one turn.
        content = content_text(conversation[i]["content"]).strip()
        marks = [self._marks_behind(content, whole) for whole in (once[:end], until)]
        return end if found and turn and content and marks[0] == marks[1] is not None else None

    def _marks_behind(self, content: str, text: str) -> int | None:
        """Tokens behind the last place of `content` in `text`; None where it is not there."""
        place = text.rfind(content)
        return None if place < 0 else len(self._ids(text[place + len(content) :]))

    def _covered(self, text: str, spans: list[tuple[int, int]]) -> tuple[list[int], list[bool]]:
        """The text's tokens, and which begin before a span's end and end behind its start."""
        if self.tokenizer.is_fast:
            tokens = self.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
            places = tokens["offset_mapping"]
            mask = [any(a < end and b > start for start, end in spans) for a, b in places]
            return tokens["input_ids"], mask
        ids = self._ids(text)  # of a tokenizer that does not say where its tokens are
        mask = [False] * len(ids)
        for start, end in spans:
            first, until = _shared(ids, self._ids(text[:start])), self._ids(text[:end])
            last = _shared(ids, until)
            last += last < len(until)  # a token that goes on behind the answer
            mask[first:last] = [True] * (last - first)
        return ids, mask

    def _ids(self, text: str) -> list[int]:
        return self.tokenizer(text, add_special_tokens=False)["input_ids"]

    def _given(self, conversation: list[dict]) -> dict[str, str | None]:
        """The template for this conversation, and what it needs to know."""
        if is_plain(conversation) or self.source == PLAIN_TEMPLATE:
            return {"chat_template": PLAIN_TEMPLATE, "image_token": self.image_token}
        return {"chat_template": self.source}

    def _writes_images(self, source: str) -> bool:
        """Whether a template takes the parts of a message, and writes an image's mark."""
        parts = [{"type": "image"}, {"type": "text", "text": "a"}]
        try:
            text = self.tokenizer.apply_chat_template(
                [{"role": "user", "content": parts}], chat_template=source, tokenize=False
            )
        except Exception:  # one for text may fail in any way
            return False
        return self.image_token is not None and self.image_token in text

    def _shown(self, conversation: list[dict]) -> list[dict]:
        """The messages as the template takes them: one for text gets the images' marks in it."""
        if self._takes_parts:
            return conversation
        mark = self.image_token or ""
        return [{**m, "content": content_text(m["content"], mark)} for m in conversation]


def is_plain(conversation: list[dict]) -> bool:
    """An answer without a question, as rows of plain text are, is no chat."""
    return len(conversation) == 1 and conversation[0]["role"] == "assistant"


def _default(template: str | dict[str, str]) -> str:
    """The template, or of several the one that is called default."""
    if isinstance(template, str):
        return template
    if "default" not in template:
        raise InputError(
            f"the model has several chat templates ({', '.join(sorted(template))}) and none called "
            "default; choose one: tokenizer.chat_template = tokenizer.chat_template[NAME], "
            "tokenizer.save_pretrained(FOLDER), in a folder beside the model's files"
        )
    return template["default"]


def _shared(one: str | list, other: str | list) -> int:
    """Length of what both begin with."""
    if one[: len(other)] == other:
        return len(other)
    pairs = enumerate(zip(one, other, strict=False))
    return next((i for i, (a, b) in pairs if a != b), min(len(one), len(other)))
