"""What a row of a data set means: its columns -> chat messages, images; where a bad one stands.
Not here: tokens and tensors (collator.py), nor where rows come from (loaders.py)."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from itertools import islice
from typing import Any

from jinja2 import TemplateError
from PIL import Image

from darts_lora.base.errors import InputError, one_line
from darts_lora.config import MAX_IMAGE_PIXELS
from darts_lora.data.pictures import Picture
from darts_lora.data.places import ADDED, ROW, row_name

IMAGE_COLUMNS = ("images", "image")
# messages; prompt and completion; the_cauldron's question-answer pairs; text without a prompt
LAYOUTS = (("messages",), ("prompt", "completion"), ("texts",), ("text",))
LABELLED = (("text", "label"),)  # the layout of a classification


def row_layout(row: dict) -> tuple[str, ...]:
    """The columns of the row's layout, the first of LAYOUTS that it has.

    Raises:
        InputError: it has none of them.
    """
    for layout in LAYOUTS:
        if all(row.get(column) is not None for column in layout):
            return layout
    for layout in LAYOUTS:
        empty = [column for column in layout if column in row and row[column] is None]
        if empty and all(column in row for column in layout):
            raise InputError(f"{row_name(row, empty[0])}: empty")
    needed = ", or ".join(" and ".join(layout) for layout in LAYOUTS)
    found = ", ".join(column for column in row if column not in ADDED)
    raise InputError(f"{row_name(row)}: needs the columns {needed}; found: {found}")


def row_messages(row: dict) -> list[dict[str, Any]]:
    """The row as chat messages, {"role", "content"}; the last is the assistant's answer.

    A row of plain `text` is one message of the assistant.

    Raises:
        InputError: the row has no layout, values of another type, what would be lost (tools, keys
            of a message beside role and content), or no answer at its end.
    """
    layout = row_layout(row)
    if layout != ("text",) and not _is_empty(row.get("tools")):
        raise InputError(
            f"{row_name(row, 'tools')}: would be lost, no chat template is given tools; write them "
            "into a message, or leave out the column"
        )
    if layout == ("texts",):
        messages = [message for pair in _pairs(row) for message in pair]
    elif layout == ("text",):
        messages = _turns(row, "text", "assistant")
    elif layout == ("messages",):
        messages = _turns(row, "messages", "user")
    else:
        messages = _turns(row, "prompt", "user") + _turns(row, "completion", "assistant")
    if not messages or messages[-1]["role"] != "assistant":
        raise InputError(
            f"{row_name(row, layout[-1])}: the last message is not the assistant's answer"
        )
    return messages


def row_prompt(row: dict) -> bytes:
    """A digest (16 bytes) of what the model is given before the answer: messages and images, these
    as they are stored; of a row of plain `text` the text, of a labelled one its `text_pair` too. A
    row that has none of them is alone."""
    try:
        messages = row_messages(row)
        given = messages if row_layout(row) == ("text",) else messages[:-1]
        if row_layout(row) == ("text",) and "label" in row and row.get("text_pair") is not None:
            given = [*given, row["text_pair"]]
    except InputError:  # whoever uses the row says so
        given = row.get(ROW)
    inside: list[bytes] = []
    return _digest(repr(_without_images(given, inside)), *_image_bytes(row), *inside)


def row_image_digests(row: dict) -> list[bytes]:
    """A digest (16 bytes) of each of the row's images, as it is stored."""
    inside: list[bytes] = []
    with suppress(InputError):  # whoever uses the row says so
        _without_images(row_messages(row), inside)
    return [_digest(image) for image in (*_image_bytes(row), *inside)]


def _digest(*pieces: str | bytes) -> bytes:
    digest = hashlib.blake2b(digest_size=16)
    for piece in pieces:
        digest.update(piece if isinstance(piece, bytes) else piece.encode("utf-8", "surrogatepass"))
    return digest.digest()


def _image_bytes(row: dict) -> list[bytes]:
    """What is stored of each image in the row's columns: its file's bytes, or its path."""
    found: list[bytes] = []
    for column in IMAGE_COLUMNS:
        images = row.get(column) or []
        found += map(_stored_bytes, images if isinstance(images, list) else [images])
    return found


def _stored_bytes(image: Any) -> bytes:
    stored = image.get("bytes") or image.get("path") if isinstance(image, dict) else image
    if isinstance(stored, Image.Image):
        stored = stored.tobytes()
    return stored if isinstance(stored, bytes) else repr(stored).encode("utf-8", "surrogatepass")


def _without_images(value: Any, found: list[bytes]) -> Any:
    """Messages whose image parts are places alone; what stood there goes to `found`."""
    if isinstance(value, list):
        return [_without_images(entry, found) for entry in value]
    if not isinstance(value, dict):
        return value
    if isinstance(value.get("type"), str) and (image := part_image(value)) is not None:
        found.append(_stored_bytes(image))
        return {"type": "image"}
    return {key: _without_images(entry, found) for key, entry in value.items()}


def row_text(row: dict) -> str:
    """All that the row says, answer or label included, as JSON; without images and its source."""
    columns = {column for layout in (*LAYOUTS, *LABELLED) for column in layout} | {"text_pair"}
    said = {column: row[column] for column in sorted(columns) if column in row}
    # a value that is not JSON's by its type: an object's repr may differ in each process
    return json.dumps(said, default=lambda value: type(value).__name__)


def stored_images(row: dict) -> list[tuple[str, Any]]:
    """The images of column `images` or `image` as they are stored: (column, image) each."""
    for column in IMAGE_COLUMNS:
        found = row.get(column)
        if found:
            return [(column, image) for image in (found if isinstance(found, list) else [found])]
    return []


def row_images(row: dict, max_pixels: int = MAX_IMAGE_PIXELS) -> list[Image.Image]:
    """The images of the row's column `images` or `image`, decoded; see `Picture`."""
    return [Picture(row, *found, max_pixels).open() for found in stored_images(row)]


def part_image(part: dict) -> Any:
    """The image that stands in a part of a message itself; None where it is a place alone."""
    return part.get("image") or part.get("path") if part["type"] == "image" else None


def content_text(content: str | list[dict], image_mark: str = "") -> str:
    """The text of a message's content, a mark where an image stands."""
    if isinstance(content, str):
        return content
    marks = {"image": image_mark}
    return "".join(marks.get(part["type"], part.get("text") or "") for part in content)


def placed_images(
    row: dict, messages: list[dict], mark: str | None, max_pixels: int = MAX_IMAGE_PIXELS
) -> tuple[list[dict], list[Picture]]:
    """A row's messages as parts, and its images in the order of their places.

    A place is a part of type image, or `mark` in a text. Images that stand in their part are its
    own; the others come from the row's column. Those that have no place open the first question.

    Args:
        messages: of the row, {"role", "content"}.
        mark: the text by which an image is written, if the model has one.

    Raises:
        InputError: more places than images, where the row has a column of them.
    """
    messages = [{**message, "content": _parts(message["content"])} for message in messages]
    spare = [Picture(row, *found, max_pixels) for found in stored_images(row)]
    parts = [part for message in messages for part in message["content"]]
    places = sum(_places(part, mark) for part in parts if part_image(part) is None)
    if places > len(spare) and any(column in row for column in IMAGE_COLUMNS):
        raise InputError(f"{row_name(row)}: {places} places for images, {len(spare)} images")
    first = next((m for m in messages if m["role"] == "user"), messages[0])
    unplaced = [{"type": "image"}] * (len(spare) - places)
    first["content"] = unplaced + first["content"]
    column, pictures = row_layout(row)[0], []
    for message in messages:
        for part in message["content"]:
            if (own := part_image(part)) is not None:
                pictures.append(Picture(row, column, own, max_pixels))
                continue
            count = _places(part, mark)
            pictures, spare = pictures + spare[:count], spare[count:]
        message["content"] = [
            {"type": "image"} if part["type"] == "image" else part for part in message["content"]
        ]
    return messages, pictures


def _parts(content: str | list[dict]) -> list[dict]:
    if isinstance(content, str):
        return [{"type": "text", "text": content}]
    return [{key: value for key, value in part.items() if value is not None} for part in content]


def _places(part: dict, mark: str | None) -> int:
    """Images that a part of a message places: it is one, or its text has their marks."""
    if part["type"] == "image":
        return 1
    return (part.get("text") or "").count(mark) if mark else 0


def _turns(row: dict, column: str, role: str) -> list[dict]:
    """A column of text, or of messages, as messages."""
    value = row[column]
    if isinstance(value, str) and column != "messages":
        return [{"role": role, "content": value}]
    if column == "text" or not isinstance(value, list):
        wanted = {"text": "text", "messages": "a list of messages"}.get(column, "text or messages")
        kind = type(value).__name__
        raise InputError(f"{row_name(row, column)}: must be {wanted}, not {kind} ({value!r:.60})")
    for message in value:
        content = message.get("content") if isinstance(message, dict) else None
        parts = isinstance(content, list) and all(
            isinstance(part, dict)
            and isinstance(part.get("type"), str)
            and isinstance(part.get("text", ""), str | None)
            for part in content
        )
        if not (isinstance(content, str) or parts) or not isinstance(message.get("role"), str):
            raise InputError(
                f"{row_name(row, column)}: each message must have a role and a content, which is "
                f"text or a list of typed parts; found {message!r:.100}"
            )
        for key, more in message.items():
            if key not in ("role", "content") and not _is_empty(more):
                raise InputError(
                    f"{row_name(row, column)}: {key!r} of a message would be lost, its role and "
                    "content alone are taken; write it into the content, or leave it out; found "
                    f"{more!r:.60}"
                )
        for part in content if isinstance(content, list) else ():
            _check_part(row, column, part)
    return value


def _check_part(row: dict, column: str, part: dict) -> None:
    """InputError where a part of a message holds what would be lost."""
    taken = {"image": ("image", "path"), "text": ("text",)}.get(part["type"], ("text",))
    for key, more in part.items():
        if key not in ("type", *taken) and not _is_empty(more):
            raise InputError(
                f"{row_name(row, column)}: {key!r} of a part of type {part['type']!r} would be "
                "lost; give an image as 'image' (a path) of a part of type 'image', or in a column "
                f"images; found {more!r:.60}"
            )


def _is_empty(value: Any) -> bool:
    """Whether it stands for nothing: Arrow gives all rows the same keys."""
    return value is None or (isinstance(value, str | list | dict) and not value)


def _pairs(row: dict) -> list[list[dict]]:
    """the_cauldron's `texts`: a list of {"user", "assistant"}."""
    found, roles = row["texts"], ("user", "assistant")
    for pair in found if isinstance(found, list) else [None]:
        good = isinstance(pair, dict) and all(isinstance(pair.get(role), str) for role in roles)
        if not good:
            raise InputError(
                f"{row_name(row, 'texts')}: must be a list of texts by user and assistant; "
                f"found {pair or found!r:.100}"
            )
    return [[{"role": role, "content": pair[role]} for role in roles] for pair in found]


@contextmanager
def naming(rows: list[dict], what: str, note: str = "") -> Iterator[None]:
    """What a chat template or a processor raises as an InputError that names the rows."""
    try:
        yield
    except (TemplateError, ValueError, IndexError, TypeError) as error:
        names = ", ".join(map(row_name, rows))
        raise InputError(f"{names}: {what} ({one_line(error)}{note})") from error


def first_rows(rows: Any, limit: int, images: bool = False) -> Iterable[dict]:
    """The first `limit` rows, of a stream (whose rows cost more) a fortieth of that; without their
    images unless asked for."""
    if getattr(rows, "column_names", None) and not images:  # of a data set, not read for nothing
        rows = rows.remove_columns([c for c in IMAGE_COLUMNS if c in rows.column_names])
    return islice(rows, limit if hasattr(rows, "__len__") else max(limit // 40, 1))
