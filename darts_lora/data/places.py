"""Where a row stands, for messages: its source, number, and line as an editor counts lines.
Not here: what the row says (rows.py), nor how files are loaded (sources.py)."""

from __future__ import annotations

import csv
import json
import os
from collections.abc import Iterator
from functools import lru_cache

ROW = "row_index"  # columns we add: a row's number in the split of the source,
SOURCE = "row_source"  # what that source is: its file, or data set and split,
LABEL = "row_label"  # and the name of its label, where the data have names for them
ADDED = (ROW, SOURCE, LABEL)
LARGEST = 2**30  # bytes of a file that is read once more to say where a bad row stands


def row_name(row: dict, column: str | None = None) -> str:
    """Where a row stands, for messages: "rows.jsonl:18, row 17, column 'completion'"."""
    parts = [_place(str(row[SOURCE]), row.get(ROW, -1))] if row.get(SOURCE) else []
    parts.append(f"row {row[ROW]}" if ROW in row else "a row")
    return ", ".join(parts + ([f"column {column!r}"] if column else []))


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


def _place(source: str, number: int) -> str:
    """ "file:line" of a row, as editors and compilers write it; `source` where that is not known.

    Args:
        source: the row's file, or several joined by " + ".
        number: the row's, from 0 on, through all of these files.
    """
    for file in source.split(" + ") if number >= 0 else ():
        lines = _first_lines(file)
        if lines is None:
            return source
        if number < len(lines):
            return f"{file}:{lines[number]}"
        number -= len(lines)
    return source


def _first_lines(file: str) -> tuple[int, ...] | None:
    """The line at which each of the file's rows begins; None where rows are no lines."""
    try:
        about = os.stat(file)
    except OSError:
        return None
    if not os.path.isfile(file) or about.st_size > LARGEST:
        return None
    return _read_lines(file, about.st_mtime_ns, about.st_size)


@lru_cache(maxsize=8)
def _read_lines(file: str, changed: int, size: int) -> tuple[int, ...] | None:
    readers = {".csv": _csv_lines, ".jsonl": _json_lines, ".json": _json_lines}
    reader = readers.get(os.path.splitext(file)[1].lower())
    try:
        return None if reader is None else tuple(reader(file))
    except (OSError, ValueError, csv.Error):  # another form than its name says
        return None


def _json_lines(file: str) -> Iterator[int]:
    with open(file, encoding="utf-8-sig") as lines:
        for number, line in enumerate(lines, start=1):
            if number == 1 and not isinstance(json.loads(line), dict):
                raise ValueError("a list over several lines")
            if line.strip():
                yield number


def _csv_lines(file: str) -> Iterator[int]:
    with open(file, encoding="utf-8-sig", newline="") as text:
        reader, behind, header = csv.reader(text), 0, True
        for values in reader:
            if values and not header:
                yield behind + 1
            header = header and not values
            behind = reader.line_num
