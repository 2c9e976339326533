"""What a row of a data set means: its columns -> chat messages, images; where a bad one stands.
Not here: tokens and tensors (collator.py), nor where rows come from (data.py)."""

from __future__ import annotations

import hashlib
import io
import json
import os
import re
from collections.abc import Iterable
from contextlib import contextmanager
from itertools import islice
from typing import Any

from jinja2 import TemplateError
from PIL import Image

from darts_lora.errors import InputError, one_line

ROW = "row_index"  # columns we add: a row's number in the split of the source,
SOURCE = "row_source"  # and what that source is: its file, or data set and split
IMAGE_COLUMNS = ("images", "image")
# messages; prompt and completion; the_cauldron's question-answer pairs; text without a prompt
LAYOUTS = (("messages",), ("prompt", "completion"), ("texts",), ("text",))
_EMPTY = (None, "", [], {})  # values that stand for nothing: Arrow gives all rows the same keys
LABELLED = (("text", "label"),)  # the layout of a classification


def row_name(row: dict, column: str | None = None) -> str:
    """Where a row stands, for messages: "rows.jsonl, row 17, column 'completion'"."""
    parts = [str(row[SOURCE])] if row.get(SOURCE) else []
    parts.append(f"row {row[ROW]}" if ROW in row else "a row")
    return ", ".join(parts + ([f"column {column!r}"] if column else []))


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
    found = ", ".join(column for column in row if column not in (ROW, SOURCE))
    raise InputError(f"{row_name(row)}: needs the columns {needed}; found: {found}")


def row_messages(row: dict) -> list[dict[str, Any]]:
    """The row as chat messages, {"role", "content"}; the last is the assistant's answer.

    A row of plain `text` is one message of the assistant.

    Raises:
        InputError: the row has no layout, values of another type, what would be lost (tools, keys
            of a message beside role and content), or no answer at its end.
    """
    layout = row_layout(row)
    if layout != ("text",) and row.get("tools") not in _EMPTY:
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
    digest = hashlib.blake2b(repr(given).encode("utf-8", "surrogatepass"), digest_size=16)
    for column in IMAGE_COLUMNS:
        images = row.get(column) or ()
        for image in images if isinstance(images, list) else [images]:
            stored = image.get("bytes") or image.get("path") if isinstance(image, dict) else image
            if isinstance(stored, Image.Image):
                stored = stored.tobytes()
            digest.update(stored if isinstance(stored, bytes) else repr(stored).encode())
    return digest.digest()


def row_text(row: dict) -> str:
    """All that the row says, answer or label included, as JSON; without images and its source."""
    columns = {column for layout in (*LAYOUTS, *LABELLED) for column in layout} | {"text_pair"}
    said = {column: row[column] for column in sorted(columns) if column in row}
    # a value that is not JSON's by its type: an object's repr may differ in each process
    return json.dumps(said, default=lambda value: type(value).__name__)


def row_images(row: dict) -> list[Image.Image]:
    """The row's images, decoded, from column `images` or `image`.

    Values are images, paths (also relative to the data file), or {"bytes", "path"} as in Parquet. A
    path may lead anywhere on this machine: a data file can name each image that you can read, as
    many do whose images lie elsewhere. It is read as an image alone and never fetched.

    Raises:
        InputError: an image that does not open, or something else than an image.
    """
    for column in IMAGE_COLUMNS:
        found = row.get(column)
        if found:
            found = found if isinstance(found, list) else [found]
            return [_open(row, column, image) for image in found]
    return []


def _open(row: dict, column: str, image: Any) -> Image.Image:
    if isinstance(image, Image.Image):
        return image
    path = image.get("path") if isinstance(image, dict) else image
    content = image.get("bytes") if isinstance(image, dict) else None
    if content is None and not isinstance(path, str):
        kind = type(image).__name__
        raise InputError(f"{row_name(row, column)}: must be an image or its path, not a {kind}")
    try:
        opened = Image.open(_find(row, column, path) if content is None else io.BytesIO(content))
        if opened.format == "EPS":
            raise ValueError("EPS is a program, which Ghostscript would run")
        opened.load()  # a file that is cut off shows only now
    except InputError:
        raise
    except Exception as error:  # decoders raise any kind
        where = "" if path is None else f" {path!r}"
        reason = re.sub(r" <_io\.BytesIO.*?>", "", str(error)) or type(error).__name__
        raise InputError(
            f"{row_name(row, column)}: image{where} does not open ({reason})"
        ) from error
    return opened


def _find(row: dict, column: str, path: str) -> str:
    """The path in a folder of the row's source; else the path as it is."""
    folders = source_folders(str(row.get(SOURCE, "")))
    found = {os.path.join(folder, path) for folder in folders if folder}
    found = sorted(filter(os.path.exists, found)) or [path]
    if len(found) > 1:
        raise InputError(
            f"{row_name(row, column)}: image {path!r} is in several folders ({', '.join(found)}); "
            "give its whole path"
        )
    if os.path.exists(found[0]) and not (os.path.isfile(found[0]) or os.path.isdir(found[0])):
        raise ValueError("no regular file")  # a pipe or a device: reading it may never end
    return found[0]


def source_folders(source: str) -> set[str]:
    """The folders of the files that a source's name joins by " + ", which may be in their own names
    too: what is longest and there counts."""
    parts, folders = source.split(" + "), set()
    while parts:
        for end in range(len(parts), 0, -1):
            folder = os.path.dirname(" + ".join(parts[:end]))
            if os.path.isdir(folder):
                break
        folders.add(folder)
        parts = parts[end:]
    return folders


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
            if key not in ("role", "content") and more not in _EMPTY:
                raise InputError(
                    f"{row_name(row, column)}: {key!r} of a message would be lost, its role and "
                    "content alone are taken; write it into the content, or leave it out; found "
                    f"{more!r:.60}"
                )
    return value


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
def naming(rows: list[dict], what: str, note: str = ""):
    """What a chat template or a processor raises as an InputError that names the rows."""
    try:
        yield
    except (TemplateError, ValueError, IndexError, TypeError) as error:
        names = ", ".join(map(row_name, rows))
        raise InputError(f"{names}: {what} ({one_line(error)}{note})") from error


def first_rows(rows: Iterable[dict], limit: int, images: bool = False) -> Iterable[dict]:
    """The first rows, without their images unless asked for."""
    if getattr(rows, "column_names", None) and not images:  # of a data set, not read for nothing
        rows = rows.remove_columns([c for c in IMAGE_COLUMNS if c in rows.column_names])
    return islice(rows, limit if hasattr(rows, "__len__") else max(limit // 40, 1))


def check_length(row: dict, column: str, length: int, max_length: int, context: int | None) -> None:
    """InputError where a row has more tokens (`length`) than max_length or than the model takes
    (context, if it says)."""
    limit, advice = f"max_length={max_length}", ", or raise max_length"
    if context is not None and context <= max_length:
        limit, advice = f"the model takes {context}", ""
    if length > min(max_length, context or length):
        raise InputError(
            f"{row_name(row, column)}: {length} tokens, {limit}; shorten or leave out the row"
            + advice
        )
